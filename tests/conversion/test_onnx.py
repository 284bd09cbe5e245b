"""Programs in ONNX: the model's numbers in onnxruntime, at sizes they were not exported with, and what is refused."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnxruntime.quantization import quantize_dynamic

from deberta_dist.conversion import onnx_files
from deberta_dist.conversion.convert import convert
from deberta_dist.conversion.output import hash_of
from deberta_dist.data.tokenizer import train_tokenizer
from deberta_dist.errors import DebertaDistError
from tests.conversion import small_models
from tests.conversion.small_models import Model, export, make_model, published_tensors, write
from tests.preparation.test_tools import assert_one_line_error
from tests.tool_calls import call

TOOL = "convert_checkpoint.py"
# Types, buckets, convolution, shared projections and decoder in one.
SMALL = Model("tiny-v2", "mlm", {"num_hidden_layers": 2, "type_vocab_size": 2})


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    """A masked language model, and the directory of its program; the weights lie in a file beside it."""
    folder = tmp_path_factory.mktemp("onnx")
    train_tokenizer(["the quick brown fox jumps over the lazy dog"] * 9, folder / "spm.model", vocab_size=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(small_models.MODELS, "small", SMALL)
        model = make_model("small")
    source = export(model, folder / "source")
    convert(source, folder / "made", to="onnx", tokenizer_path=folder / "spm.model", max_inline_bytes=1000)
    return model, folder / "made"


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def inputs(names: list[str], *shape: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(shape[-1])
    mask = torch.ones(shape, dtype=torch.int64)
    mask[0, ..., shape[-1] // 2 :] = 0
    known = {
        "input_ids": torch.randint(1, 500, shape, generator=generator),
        "attention_mask": mask,
        "token_type_ids": torch.randint(2, shape, generator=generator),
    }
    return {name: known[name] for name in names}


def difference(model, path: Path, *shape: int) -> float:
    """From `token_logits` or logits of the model."""
    runtime = session(path)
    given = inputs([x.name for x in runtime.get_inputs()], *shape)
    (found,) = runtime.run(["logits"], {name: x.numpy() for name, x in given.items()})
    with torch.no_grad():
        expected = model.token_logits(**given) if hasattr(model, "token_logits") else model(**given).logits
    assert found.shape == tuple(expected.shape)
    return float(np.abs(found - expected.numpy()).max())


def test_a_masked_language_model(small) -> None:
    model, made = small
    report = json.loads((made / "conversion_report.json").read_text())
    assert {"config.json", "model.onnx", "model.onnx.data", "spm.model", "tokenizer.json"} <= set(report["files"])
    for name, entry in report["files"].items():
        assert entry["sha256"] == hash_of(made / name) and entry["bytes"] == (made / name).stat().st_size
    assert any("compared with the model in onnxruntime" in warning for warning in report["warnings"])
    assert json.loads((made / "config.json").read_text())["architectures"] == ["DebertaV2ForMaskedLM"]
    program = onnx.load(made / "model.onnx", load_external_data=False)
    assert [opset.version for opset in program.opset_import] == [onnx_files.OPSET]
    axes = {
        x.name: [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim]
        for x in (*program.graph.input, *program.graph.output)
    }
    shape = ["batch", "length"]
    assert axes == {
        "input_ids": shape, "attention_mask": shape, "token_type_ids": shape, "logits": [*shape, 512]
    }  # fmt: skip
    # Neither a path of the machine that made it nor a weight twice.
    content = (made / "model.onnx").read_bytes()
    assert b".py" not in content and b"site-packages" not in content
    weights = sum(tensor.nbytes for tensor in published_tensors(model).values())
    assert 0.95 * weights < (made / "model.onnx.data").stat().st_size < 1.05 * weights
    names = {tensor.name for tensor in program.graph.initializer}
    assert {"deberta.embeddings.word_embeddings.weight", "lm_predictions.lm_head.dense.weight"} <= names
    for size in ((3, 33), (1, 64), (5, 7), (1, 1)):
        assert difference(model, made / "model.onnx", *size) < 1e-4
    with pytest.raises(Exception, match="out of data bounds"):
        difference(model, made / "model.onnx", 1, 65)


def test_eight_bits(small, tmp_path: Path) -> None:
    model, made = small
    quantize_dynamic(made / "model.onnx", tmp_path / "int8.onnx", per_channel=True)
    assert (tmp_path / "int8.onnx").stat().st_size < 0.5 * (made / "model.onnx.data").stat().st_size
    kinds = [node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node]
    # Every product with a weight; those of two activations stay.
    assert kinds.count("MatMulInteger") >= 2 * 6 and "Gemm" not in kinds
    given = inputs(["input_ids", "attention_mask", "token_type_ids"], 3, 33)
    (found,) = session(tmp_path / "int8.onnx").run(None, {name: x.numpy() for name, x in given.items()})
    with torch.no_grad():
        expected = model.token_logits(**given)
    # 0.12: weights that are random to such a degree round worse than trained ones.
    assert (torch.from_numpy(found) - expected).norm() < 0.2 * expected.norm()


def test_another_program_is_not_written(small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, made = small
    model = type("Model", (), {"parameters": lambda self: iter([torch.ones(1)])})()
    model.examples = lambda rows, length: inputs(["input_ids", "attention_mask", "token_type_ids"], *rows, length)
    called = type("Called", (torch.nn.Module,), {"examples": staticmethod(model.examples)})()
    called.register_parameter("weight", torch.nn.Parameter(torch.ones(1)))
    called.forward = lambda input_ids, **rest: (torch.zeros(*input_ids.shape, 512),)
    program = onnx_files.Program(model=called, exported=None, inputs=(), outputs=("logits",), lengths=(5, 9), num_bytes=0)
    with pytest.raises(DebertaDistError, match=r"other logits than the model for inputs of 3 x 5.*nothing is written"):
        onnx_files._compare(made / "model.onnx", program)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else found(name))
    assert onnx_files._compare(made / "model.onnx", program) == (
        "the program was not compared with the model: onnxruntime is not installed"
    )


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("v2")
    source = export(model, tmp_path / "source")
    tensors = published_tensors(model)
    lacking = {name: x for name, x in tensors.items() if "position_embeddings" not in name}
    write(lacking, tmp_path / "lacking", config=model.config.to_dict())
    for arguments, code, words in (
        ((source, "--fused"), 2, "a program has no names to choose"),
        ((source, "--dtype", "bfloat16"), 2, "bfloat16, which onnxruntime does not compute with"),
        (("lacking",), 65, "no whole DebertaForMaskedLM: it lacks deberta.embeddings.position_embeddings.weight"),
    ):
        result = call(TOOL, arguments[0], "target", "--to", "onnx", *arguments[1:], cwd=tmp_path)
        assert_one_line_error(result, code=code, words=words)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "onnx" in name else found(name))
    result = call(TOOL, "nowhere", "target", "--to", "onnx", cwd=tmp_path)
    assert_one_line_error(result, code=2, words="needs onnx and onnxscript: pip install 'deberta_dist[onnx]'")
    assert not (tmp_path / "target").exists()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", small_models.MODELS)
def test_every_model(name: str, dtype: str, tmp_path: Path) -> None:
    model = make_model(name)
    report = convert(export(model, tmp_path / "source"), tmp_path / "made", to="onnx", dtype=dtype)
    assert "compared with the model" in report["warnings"][-1]
    assert not (tmp_path / "made/model.onnx.data").exists()
    limit = 1e-4 if dtype == "float32" else 0.1
    for size in ((3, 33), (2, 64)):
        assert difference(model, tmp_path / "made/model.onnx", *size) < limit


@pytest.mark.slow
def test_a_backbone_and_several_choices(tmp_path: Path) -> None:
    tensors = published_tensors(make_model("v3"))
    model = make_model("v3").deberta
    backbone = {name: x for name, x in tensors.items() if name.startswith("deberta.") and "position_emb" not in name}
    write(backbone, tmp_path / "source", config=model.config.to_dict())
    report = convert(tmp_path / "source", tmp_path / "backbone", to="onnx")
    runtime = session(tmp_path / "backbone/model.onnx")
    given = inputs(["input_ids", "attention_mask"], 2, 50)
    (found,) = runtime.run(["last_hidden_state"], {name: x.numpy() for name, x in given.items()})
    with torch.no_grad():
        expected = model(**given).last_hidden_state
    assert np.abs(found - expected.numpy()).max() < 1e-4 and not report["new"]

    choice = make_model("v2_classification")
    config = {**choice.config.to_dict(), "architectures": ["DebertaV2ForMultipleChoice"], "model_type": "deberta-v2"}
    one = {name: x[:1] if name.startswith("classifier.") else x for name, x in published_tensors(choice).items()}
    config["pad_token_id"] = config.pop("padding_idx")
    write(one, tmp_path / "choice", config=config)
    convert(tmp_path / "choice", tmp_path / "choices", to="onnx")
    runtime = session(tmp_path / "choices/model.onnx")
    assert [x.shape for x in runtime.get_inputs()] == [["batch", "choices", "length"]] * 3
    given = inputs(["input_ids", "attention_mask", "token_type_ids"], 3, 4, 21)
    (found,) = runtime.run(None, {name: x.numpy() for name, x in given.items()})
    with torch.no_grad():
        rows = choice(**{name: x.flatten(0, 1) for name, x in given.items()}).logits[:, :1]
    assert np.abs(found - rows.view(3, 4).numpy()).max() < 1e-4
