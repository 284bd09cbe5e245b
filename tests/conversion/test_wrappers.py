"""Names and dictionaries that training code puts around a model: read where they are known, refused by name where not."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deberta_dist import load_masked_lm
from deberta_dist.checkpoint.errors import CheckpointError
from deberta_dist.conversion.convert import convert
from deberta_dist.conversion.source import open_source
from deberta_dist.errors import ConfigError
from deberta_dist.finetuning.starting_point import open_starting_point
from tests.conversion.small_models import export, make_model, published_tensors, same
from tests.preparation.test_tools import assert_one_line_error
from tests.tool_calls import call

MODEL = make_model("v2")
TENSORS = published_tensors(MODEL)
BACKBONE = {name: value for name, value in TENSORS.items() if name.startswith("deberta.")}
State = dict[str, Any]


def behind(prefix: str, tensors: dict[str, Tensor] = TENSORS) -> State:
    return {prefix + name: value for name, value in tensors.items()}


def bare(prefix: str) -> State:
    return {prefix + name.removeprefix("deberta."): value for name, value in BACKBONE.items()}


def within_layers(wrapper: str) -> State:
    return {name.replace(".attention.", f".{wrapper}.attention."): value for name, value in TENSORS.items()}


LIGHTNING = {"epoch": 3, "global_step": torch.tensor(4), "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}]}
KNOWN: dict[str, tuple[State, dict[str, Tensor]]] = {
    "ddp": (behind("module."), TENSORS),
    "compiled": (behind("_orig_mod."), TENSORS),
    "compiled_ddp": (behind("_orig_mod.module."), TENSORS),
    "attribute": (behind("model."), TENSORS),
    "attribute_of_ddp": (behind("module.model."), TENSORS),
    "backbone": (bare("encoder.backbone."), BACKBONE),
    "encoder": (bare("encoder."), BACKBONE),
    "peft_merged": (behind("base_model.model."), TENSORS),
    "twice": (behind("deberta."), TENSORS),
    "first_releases": ({f"bert.{name.replace('deberta.', 'bert.')}": value for name, value in TENSORS.items()}, TENSORS),
    "ddp_of_a_part": ({name.replace("deberta.", "deberta.module."): value for name, value in TENSORS.items()}, TENSORS),
    "fsdp": (within_layers("_fsdp_wrapped_module._checkpoint_wrapped_module"), TENSORS),
    "lightning": ({"state_dict": behind("model."), **LIGHTNING}, TENSORS),
    "deepspeed": ({"module": behind("module."), "optimizer": None, "ds_version": "0.19"}, TENSORS),
    "by_hand": ({"model_state_dict": behind("_orig_mod."), "loss": 0.5}, TENSORS),
    "nested": ({"model": {"state_dict": TENSORS}}, TENSORS),
}


def write(state: State, directory: Path, *, name: str = "pytorch_model.bin", **config: Any) -> Path:
    directory.mkdir()
    torch.save(state, directory / name)
    (directory / "config.json").write_text(json.dumps({**MODEL.config.to_dict(), "model_type": "deberta-v2", **config}))
    return directory


@pytest.mark.parametrize("case", KNOWN)
def test_known_wrappers(case: str, tmp_path: Path) -> None:
    state, expected = KNOWN[case]
    source = write(state, tmp_path / "source", name="last.ckpt" if case == "lightning" else "pytorch_model.bin")
    report = convert(source, tmp_path / "target", to="deberta_dist")
    assert same(load_file(tmp_path / "target/model.safetensors"), expected)
    if case not in ("nested", "ddp_of_a_part"):
        assert any("wrapper of training code" in item["why"] for item in report["changed"])
    assert ("optimizer_states: not part of the model" in " ".join(report["warnings"])) == (case == "lightning")


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (behind("student."), "80 of 80 keys begin with 'student.', which is not a known wrapper: .* give --prefix student."),
        (behind("net.inner."), "begin with 'net.inner.'.*--prefix net.inner."),
        ({"state_dict": behind("model.student.")}, "begin with 'model.student.'"),
        ({**behind("student."), **behind("teacher.")}, r"2 models, at 'student.' \(80 keys\), 'teacher.' \(80 keys\): .*--prefix"),
        ({**behind("model."), **behind("ema.")}, "2 models, at 'model.'"),
        ({**TENSORS, **behind("ema.")}, "80 keys of this huggingface checkpoint are not explained: ema.deberta"),
        ({**TENSORS, **behind("module.", {"lm_predictions.lm_head.bias": torch.ones(512)})}, "are both lm_predictions.lm_head.bias"),
        ({"model": TENSORS, "module": TENSORS}, "several entries that could be the model: model, module"),
        ({"module": {name: torch.zeros(0) for name in TENSORS}}, "80 of 80 tensors are empty .*zero_to_fp32"),
        (behind("base_model.model.") | {"base_model.model.deberta.x.lora_A.default.weight": torch.ones(2)}, "1 keys of adapters .*merge_and_unload"),
        ({name.replace("_proj.", "_proj.base_layer."): value for name, value in TENSORS.items()}, "keys of adapters"),
    ],
)  # fmt: skip
def test_what_is_not_guessed(state: State, words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words) as refusal:
        convert(write(state, tmp_path / "source"), tmp_path / "target", to="huggingface")
    assert "\n" not in str(refusal.value) and not (tmp_path / "target").exists()


def dropped_weights(report: dict[str, Any]) -> list[str]:
    return [item["key"] for item in report["dropped"] if not item["key"].startswith("config: ")]


@pytest.mark.parametrize("prefix", ["student", "student.", "module.student."])
def test_a_prefix_by_the_user(prefix: str, tmp_path: Path) -> None:
    others = {name: value + 1 for name, value in behind("teacher.").items()}
    source = write(behind("module.student.") | others, tmp_path / "source")
    with pytest.raises(CheckpointError, match="80 keys .* not explained: teacher.deberta"):
        convert(source, tmp_path / "no", to="deberta_dist", prefix=prefix)
    report = convert(source, tmp_path / "target", to="deberta_dist", prefix=prefix, allow_unmapped=["teacher.*"])
    assert same(load_file(tmp_path / "target/model.safetensors"), TENSORS) and len(dropped_weights(report)) == 80
    with pytest.raises(ConfigError, match="--prefix nobody: no key of .*; its keys are module.student|--prefix nobody: no key"):
        convert(source, tmp_path / "no", to="deberta_dist", prefix="nobody")
    deeper = write(behind("student.net."), tmp_path / "deeper")
    with pytest.raises(ConfigError, match=r"lies deeper: give --prefix student.net.$"):
        convert(deeper, tmp_path / "no", to="deberta_dist", prefix=prefix.removeprefix("module."))


def test_patterns_are_of_the_keys_in_the_file(tmp_path: Path) -> None:
    source = write(behind("model.") | {"model.loss.weight": torch.ones(3)}, tmp_path / "source")
    with pytest.raises(CheckpointError, match="1 keys .*not explained: model.loss.weight"):
        convert(source, tmp_path / "no", to="deberta_dist")
    for number, pattern in enumerate(("model.loss.*", "loss.*")):
        report = convert(source, tmp_path / f"target{number}", to="deberta_dist", allow_unmapped=[pattern])
        assert dropped_weights(report) == ["model.loss.weight"]


def test_adapters_and_quantised_weights_are_refused(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2)}, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="adapter of PEFT .*merge_and_unload"):
        open_source(adapter)
    quantised = write(TENSORS, tmp_path / "quantised", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(CheckpointError, match="has quantization_config: the weights are quantised"):
        open_source(quantised)
    convert(quantised, tmp_path / "target", to="deberta_dist", allow_unmapped=["quantization_config"])


def test_files_and_keys_of_other_libraries_are_told(tmp_path: Path) -> None:
    extras = {"sentence_transformers": {"version": "3"}, "torch_dtype": "float32", "auto_map": {"AutoModel": "mine.Model"}}
    source = write(TENSORS, tmp_path / "source", **extras)
    (source / "1_Pooling").mkdir()
    (source / "modules.json").write_text("[]")
    told = " ".join(convert(source, tmp_path / "target", to="huggingface")["warnings"])
    assert "not carried, since no part of the model or its tokenizer: 1_Pooling/, modules.json" in told
    assert "auto_map), which is never run" in told
    assert "1_Pooling" not in " ".join(convert(source / "pytorch_model.bin", tmp_path / "file", to="huggingface")["warnings"])


def test_the_same_options_in_every_entry(tmp_path: Path) -> None:
    """Fine-tuning and ``training.init`` have their tests where they live."""
    state = behind("student.") | {"loss.weight": torch.ones(1)}
    source = write(state, tmp_path / "source", name="model.bin", my_note=1)
    options = {"prefix": "student.", "allow_unmapped": ["loss.*", "my_note"]}
    words = ["--prefix", "student.", "--allow-unmapped", "loss.*", "--allow-unmapped", "my_note"]
    model, _ = load_masked_lm(source, dtype="bfloat16", **options)
    assert same(dict(model.named_parameters()), {name: value.bfloat16() for name, value in TENSORS.items()})
    with pytest.raises(ConfigError, match="dtype = 'int8' is none of float32"):
        load_masked_lm(source, dtype="int8", **options)
    with pytest.raises(CheckpointError, match="--prefix student"):
        load_masked_lm(source)
    export(MODEL, tmp_path / "plain")
    for arguments in ([source], [source, "--diff", tmp_path / "plain", "--dtype", "float16"]):
        shown = call("inspect_checkpoint.py", *arguments, *words, cwd=tmp_path)
        assert shown.returncode == 0 and "problem" not in shown.stdout, shown
    result = call("inspect_checkpoint.py", "plain", "--diff", "plain", "--prefix", "no", cwd=tmp_path)
    assert_one_line_error(result, code=2, words="--prefix no: no key")
    for tool, arguments in (("convert_checkpoint.py", ["target", "--to", "official"]), ("fill_mask.py", ["a [MASK]"])):
        result = call(tool, source, *arguments, "--prefix", "student", cwd=tmp_path)
        assert_one_line_error(result, code=2, words="unknown key 'my_note'")
    result = call("fill_mask.py", source, "a [MASK]", *words, "--dtype", "float32", cwd=tmp_path)
    assert_one_line_error(result, code=2, words="no spm.model lies with")


class Code:
    """Something that a pickle would make by running code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("run",)


def broken_files() -> dict[str, Callable[[Path], None]]:
    """Everything that torch.load refuses in words of its own."""
    legacy = {"_use_new_zipfile_serialization": False}

    def scripted(path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), path)

    return {
        "call": lambda path: torch.save({**TENSORS, "x": Code()}, path),
        "call_legacy": lambda path: torch.save({**TENSORS, "x": Code()}, path, **legacy),
        "class": lambda path: torch.save({"state_dict": TENSORS, "where": Path("x")}, path),
        "module": lambda path: torch.save(torch.nn.Linear(2, 2), path),
        "protocol": lambda path: torch.save({**TENSORS, "x": slice(3)}, path, pickle_protocol=4),
        "script": scripted,
        "text": lambda path: path.write_text("hello"),
        "empty": lambda path: path.write_bytes(b""),
        "torn": lambda path: (torch.save(TENSORS, path), path.write_bytes(path.read_bytes()[:5000])),
        "torn_legacy": lambda path: (torch.save(TENSORS, path, **legacy), path.write_bytes(path.read_bytes()[:5000])),
    }


@pytest.mark.parametrize("case", broken_files())
def test_advice_to_read_unsafely_is_never_repeated(case: str, tmp_path: Path) -> None:
    source = write({}, tmp_path / "source")
    broken_files()[case](source / "pytorch_model.bin")
    (source / "spm.model").write_bytes(b"")
    entries: list[Callable[[], object]] = [
        lambda: convert(source, tmp_path / "target", to="huggingface"),
        lambda: load_masked_lm(source),
        lambda: open_starting_point(source, tokenizer=None, verify=True),
        lambda: open_source(source / "pytorch_model.bin"),
    ]
    for entry in entries:
        with pytest.raises(CheckpointError) as refusal:
            entry()
        said = str(refusal.value)
        assert str(source) in said and "\n" not in said and len(said) < 600, said
        assert not any(word in said.lower() for word in ("weights_only", "safe_globals", "torch.load", "allowlist")), said
        if case in ("call", "call_legacy", "class", "module"):
            assert "asks for code to be run (" in said and "save the state_dict() alone" in said, said
    if case == "script":
        assert "TorchScript" in said
