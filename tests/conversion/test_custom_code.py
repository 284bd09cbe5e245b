"""Hugging Face directories with the enhanced mask decoder beside the weights: our logits where this package is not."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deberta_dist.conversion.canonical import to_canonical
from deberta_dist.conversion.convert import build_model, convert
from deberta_dist.conversion.custom_code import CODE_NAME
from deberta_dist.conversion.load import load_masked_lm
from deberta_dist.conversion.output import REPORT_NAME
from deberta_dist.conversion.source import open_source
from deberta_dist.data.tokenizer import train_tokenizer
from deberta_dist.models.classification import DebertaForReplacedTokenDetection
from tests.conversion import small_models
from tests.conversion.small_models import Model, export, make_model, published_tensors, same
from tests.preparation.test_tools import assert_one_line_error
from tests.tool_calls import call

SMALL = {"num_hidden_layers": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# More positions than the relative table reaches, and both pairs of Hugging Face's classes.
CASES = {
    "v1": Model("tiny-v1", "mlm", {**SMALL, "max_relative_positions": 20}, has_key_biases=False),
    "v1_with_key_biases": Model("tiny-v1", "mlm", {**SMALL, "type_vocab_size": 2}),
    "v2": Model("tiny-v2", "mlm", {**SMALL, "vocab_size": 33}),
    "v3": Model("tiny-v2", "mlm", {**SMALL, "conv_kernel_size": 0, "max_relative_positions": 30, "position_buckets": 10}),
}


def make(name: str, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """A model of ``CASES``."""
    monkeypatch.setitem(small_models.MODELS, name, CASES[name])
    return make_model(name)


def test_logits_without_this_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tmp_path / "spm.model"
    # As many pieces as the model has rows, with [MASK].
    train_tokenizer(["the quick brown fox jumps over the lazy dog"] * 9, tokenizer, vocab_size=32)
    known, models = {}, {}
    for name in CASES:
        model = models[name] = make(name, monkeypatch)
        source, target = export(model, tmp_path / "sources" / name), tmp_path / name
        convert(source, target, to="huggingface", with_code=True, tokenizer_path=tokenizer if name == "v2" else None)
        assert (target / CODE_NAME).exists() and CODE_NAME in json.loads((target / REPORT_NAME).read_text())["files"]
        ids = torch.randint(1, model.config.vocab_size, (3, 50), generator=torch.Generator().manual_seed(1))
        mask = torch.ones_like(ids)
        mask[0, 31:] = 0
        mask[2, 5:] = 0
        logits = model.token_logits(ids, mask)
        known[str(target)] = str(tmp_path / f"{name}.safetensors")
        save_file({"input_ids": ids, "attention_mask": mask, "logits": logits.contiguous()}, known[str(target)])
    found = _elsewhere(tmp_path, known)
    assert found["stranger"] < 1e-6
    for name, model in models.items():
        case: dict[str, Any] = found[str(tmp_path / name)]
        assert case["code"] < 1e-5 and case["without mask"] < 1e-5 and case["again"] == 0, case
        # What the code is there for, and half precision is near.
        assert case["plain"] > 0.1 and case["bfloat16"] < 0.05, case
        assert case["module"] == "modeling_deberta_emd" and case["as a tuple"] == 2
        # Keys without content-to-position terms aside: a bias of keys moves all scores of a query alike.
        assert case["loss"] < 1e-5 and case["halved"] < 1e-5 and case["no targets"] == 0, case
        assert all("token_type" in key or "key_proj.bias" in key for key in case["without gradient"]), case
        assert case["resized"] == 50
        # Saved by transformers it has lost nothing, and this package reads it again.
        convert(tmp_path / "saved" / name, tmp_path / "back" / name, to="deberta_dist")
        assert same(load_file(tmp_path / "back" / name / "model.safetensors"), published_tensors(model))
        assert (tmp_path / "saved" / name / CODE_NAME).read_bytes() == (tmp_path / name / CODE_NAME).read_bytes()
    made = call("fill_mask.py", tmp_path / "v2", "the quick [MASK] fox", "--top", 3, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert len(found["pipeline"]) == 3
    warned = call("fill_mask.py", "v2", "the quick [MASK] fox", "--library", "transformers", cwd=tmp_path)
    assert warned.returncode == 0 and "code of its own, which does not run" in warned.stderr
    for _, score in found["pipeline"]:
        assert f"{score:.1%}" in made.stdout


def _elsewhere(tmp_path: Path, known: dict[str, str]) -> dict[str, Any]:
    (tmp_path / "known.json").write_text(json.dumps(known))
    (tmp_path / "elsewhere").mkdir()
    program = Path(__file__).with_name("decode_elsewhere.py")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    result = subprocess.run(
        [sys.executable, "-I", program, tmp_path / "known.json", tmp_path / "saved"],
        cwd=tmp_path / "elsewhere",
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_where_no_code_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = dataclasses.replace(CASES["v2"], fields={**SMALL, "position_biased_input": True})
    monkeypatch.setitem(small_models.MODELS, "plain", plain)
    for name, words in (("plain", "transformers' own class computes it"), ("v3_discriminator", "no masked language model")):
        source = export(make_model(name), tmp_path / "sources" / name)
        made = call("convert_checkpoint.py", source, name, "--to", "huggingface", "--with-code", cwd=tmp_path)
        assert made.returncode == 0 and words in made.stdout and "no code was written" in made.stdout
        assert not (tmp_path / name / CODE_NAME).exists()
        assert "auto_map" not in json.loads((tmp_path / name / "config.json").read_text())


def test_a_discriminator_has_the_head_of_its_generator(tmp_path: Path) -> None:
    model = make_model("v3_discriminator")
    head = {k: v for k, v in published_tensors(make_model("v3", seed=1)).items() if k.startswith("lm_predictions.")}
    source = small_models.write({**published_tensors(model), **head}, tmp_path / "source", config=model.config.to_dict())
    made = call("convert_checkpoint.py", source, "hf", "--to", "huggingface", "--with-code", cwd=tmp_path)
    assert made.returncode == 0 and "so no code was written" in made.stdout
    assert not (tmp_path / "hf" / CODE_NAME).exists()
    card = (tmp_path / "hf/README.md").read_text()
    assert "on this encoder it predicts no words" in card and "fill-mask" not in card and "enhanced mask decoder in" not in card
    built, names = build_model(to_canonical(open_source(source)), where=source)
    assert isinstance(built, DebertaForReplacedTokenDetection) and not head.keys() & set(names)
    with pytest.warns(UserWarning, match="convert the generator"):
        load_masked_lm(source)


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("v2", monkeypatch)
    tensors = published_tensors(model)
    del tensors["deberta.embeddings.position_embeddings.weight"]
    small_models.write(tensors, tmp_path / "lacking", config=model.config.to_dict())
    tool, target = "convert_checkpoint.py", tmp_path / "target"
    result = call(tool, "lacking", "target", "--to", "huggingface", "--with-code", cwd=tmp_path)
    assert_one_line_error(result, code=65, words="lacks deberta.embeddings.position_embeddings.weight")
    small_models.write(tensors, tmp_path / "theirs", config={**model.config.to_dict(), "model_type": "deberta-v2"})
    result = call(tool, "theirs", "target", "--to", "huggingface", "--with-code", cwd=tmp_path)
    assert_one_line_error(result, code=2, words="give --decoder plain")
    for flag in (("--with-code",), ("--license", "mit"), ("--language", "en")):
        for to in ("official", "deberta_dist", "onnx"):
            result = call(tool, "lacking", "target", "--to", to, *flag, cwd=tmp_path)
            assert_one_line_error(result, code=2, words="are for the target huggingface")
    result = call("fill_mask.py", "lacking", "a [MASK]", "--trust-remote-code", cwd=tmp_path)
    assert_one_line_error(result, code=2, words="this package runs no code of a checkpoint")
    assert not target.exists()
