"""Conversions there and back, bit for bit, and what Hugging Face's classes make of an export."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from deberta_dist.checkpoint.errors import CheckpointError
from deberta_dist.conversion.convert import convert
from deberta_dist.conversion.output import REPORT_NAME, hash_of
from deberta_dist.errors import ConfigError
from deberta_dist.models.masked_lm import DebertaForMaskedLM
from deberta_dist.models.presets import preset
from tests.conversion.small_models import MODELS, export, fuse, make_model, published_tensors, same

AUTO = {
    "mlm": transformers.AutoModelForMaskedLM,
    "rtd": transformers.AutoModel,
    "classification": transformers.AutoModelForSequenceClassification,
}


@pytest.fixture(autouse=True, scope="module")
def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_huggingface_computes_the_same_and_everything_comes_back(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    source, exported = export(model, tmp_path / "source"), tmp_path / "hf"
    report = convert(source, exported, to="huggingface")
    card = (exported / "README.md").read_text()
    kind = MODELS[name].kind
    classes = {AUTO[kind], transformers.AutoModel, transformers.AutoModelForMaskedLM}
    if kind == "rtd":
        classes = {transformers.AutoModel}
    for auto in classes:
        theirs, info = auto.from_pretrained(exported, output_loading_info=True, local_files_only=True)
        assert not info["mismatched_keys"] and not info["error_msgs"]
        assert not info["missing_keys"] or (auto is not AUTO[kind] and auto is not transformers.AutoModel)
        for key in info["unexpected_keys"]:
            assert f"`{key.split('.')[0]}." in card, key
        if not info["missing_keys"]:
            _compare_hidden_states(model, theirs.eval())
    back = tmp_path / "back"
    convert(exported, back, to="deberta_dist")
    assert same(load_file(back / "model.safetensors"), published_tensors(model))
    assert json.loads((back / "config.json").read_text())["pos_att_type"] == "|".join(model.config.pos_att_type)
    assert not report["new"] and not report["absent"]
    for file, entry in report["files"].items():
        assert entry["sha256"] == hash_of(exported / file)


def _compare_hidden_states(ours: nn.Module, theirs: nn.Module) -> None:
    input_ids = torch.randint(4, ours.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(input_ids)
    mask[1, 30:] = 0
    expected = ours.deberta(input_ids, mask, output_hidden_states=True).hidden_states
    actual = theirs(input_ids, attention_mask=mask, output_hidden_states=True)
    for mine, other in zip(expected, actual.hidden_states, strict=True):
        assert (mine - other)[mask.bool()].abs().max() < 1e-5 * mine.abs().max()
    if hasattr(theirs, "classifier"):
        logits = ours(input_ids, mask).logits
        assert (logits - actual.logits).abs().max() < 1e-5 * logits.abs().max()
    if hasattr(theirs, "lm_predictions"):
        # Hugging Face has no enhanced mask decoder: its head is compared on equal hidden states.
        table = ours.deberta.embeddings.word_embeddings
        logits = ours.lm_predictions.lm_head(expected[-1], word_embeddings_VW=table.weight)
        assert (logits - theirs.lm_predictions(expected[-1], table)).abs().max() < 1e-5 * logits.abs().max()


def test_v1_goes_to_the_class_that_can_hold_it(tmp_path: Path) -> None:
    for name, kind in (("v1", "deberta"), ("v1_with_key_biases", "deberta-v2")):
        source = export(make_model(name), tmp_path / name)
        report = convert(source, tmp_path / f"{name}_hf", to="huggingface")
        assert json.loads((tmp_path / f"{name}_hf" / "config.json").read_text())["model_type"] == kind
        assert any("v1" in warning for warning in report["warnings"])
    for to in ("huggingface", "official"):
        with pytest.raises(ConfigError, match=r"layer\.0\.attention\.self\.key_proj\.bias is not zero"):
            convert(tmp_path / "v1_with_key_biases", tmp_path / "no", to=to, is_fused=True)
    with pytest.raises(ConfigError, match="share_att_key"):
        convert(export(make_model("v2"), tmp_path / "v2"), tmp_path / "no", to="official", is_fused=True)
    with pytest.raises(ConfigError, match="separate projections"):
        convert(tmp_path / "v1", tmp_path / "no", to="deberta_dist", is_fused=True)
    narrow = DebertaForMaskedLM(preset("tiny-v2", attention_head_size=8))
    export(narrow, tmp_path / "narrow")
    for to in ("huggingface", "official"):
        with pytest.raises(ConfigError, match="attention_head_size = 32 differs from hidden_size = 64"):
            convert(tmp_path / "narrow", tmp_path / "no", to=to)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("name", MODELS)
def test_official_and_back(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    source = export(model, tmp_path / "source")
    for number, is_fused in enumerate([False, True] if name in ("v1", "v1_classification") else [False]):
        there, back = tmp_path / f"official{number}", tmp_path / f"back{number}"
        convert(source, there, to="official", is_fused=is_fused)
        for mmap in (False, True):
            state = torch.load(there / "pytorch_model.bin", weights_only=True, mmap=mmap)
            expected = published_tensors(model)
            expected = fuse(expected, head_size=model.config.head_size) if is_fused else expected
            assert same(state, expected)
            assert all(value.data_ptr() % 64 == 0 for value in state.values() if mmap)
        make_model(name, seed=5).load_state_dict(state, strict=True)
        report = convert(there, back, to="deberta_dist")
        assert same(load_file(back / "model.safetensors"), published_tensors(model))
        assert bool(report["new"]) == is_fused and all("key_proj.bias" in item["key"] for item in report["new"])
        # Equal weights make equal files.
        convert(back, tmp_path / f"again{number}", to="official", is_fused=is_fused)
        assert hash_of(tmp_path / f"again{number}/pytorch_model.bin") == hash_of(there / "pytorch_model.bin")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_number_formats(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model("v2")
    source, name = export(model, tmp_path / "source"), str(dtype).removeprefix("torch.")
    report = convert(source, tmp_path / "hf", to="huggingface", dtype=name)
    rounded = {key: value.to(dtype) for key, value in published_tensors(model).items()}
    assert same(load_file(tmp_path / "hf/model.safetensors"), rounded)
    assert "numbers were rounded to a narrower format" in report["warnings"]
    assert report["source"]["dtype"] == ["float32"] and report["target"]["dtype"] == [name]
    assert transformers.AutoModel.from_pretrained(tmp_path / "hf").dtype == dtype
    convert(tmp_path / "hf", tmp_path / "official", to="official")
    convert(tmp_path / "official", tmp_path / "back", to="huggingface")
    assert same(load_file(tmp_path / "back/model.safetensors"), rounded)
    convert(tmp_path / "back", tmp_path / "wide", to="deberta_dist", dtype="float32")
    wide = load_file(tmp_path / "wide/model.safetensors")
    assert same(wide, {key: value.float() for key, value in rounded.items()})


def test_what_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = make_model("v2")
    nn.init.constant_(model.deberta.encoder.rel_embeddings.weight[3], 1e5)
    source = export(model, tmp_path / "source")
    with pytest.raises(CheckpointError, match=r"rel_embeddings.weight holds 1e\+05, outside the range of float16"):
        convert(source, tmp_path / "target", to="deberta_dist", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    convert(source, tmp_path / "target", to="deberta_dist", dtype="bfloat16")


def test_shards_with_an_index(tmp_path: Path) -> None:
    model = make_model("v2")
    report = convert(export(model, tmp_path / "source"), tmp_path / "hf", to="huggingface", max_shard_bytes=100_000)
    shards = sorted((tmp_path / "hf").glob("model-*.safetensors"))
    assert len(shards) >= 3 and not (tmp_path / "hf/model.safetensors").exists()
    largest = max(t.nbytes for t in published_tensors(model).values())
    assert all(path.stat().st_size < max(largest, 100_000) + 20_000 for path in shards)
    _, info = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert set(report["files"]) == {path.name for path in (tmp_path / "hf").iterdir()} - {REPORT_NAME}
    convert(tmp_path / "hf", tmp_path / "back", to="deberta_dist")
    assert same(load_file(tmp_path / "back/model.safetensors"), published_tensors(model))


def test_what_huggingface_saves_is_read(tmp_path: Path) -> None:
    """Their own files, of both heads and both generations; their class drops the position table."""
    for name in ("v1", "v2"):
        model = make_model(name)
        convert(export(model, tmp_path / name), tmp_path / f"{name}_hf", to="huggingface")
        for legacy in (False, True):
            theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / f"{name}_hf", legacy=legacy)
            if legacy:
                _copy_head(theirs, published_tensors(model))
            for number, options in enumerate(({}, {"max_shard_size": "100KB"})):
                saved, back = tmp_path / f"{name}{legacy}{number}", tmp_path / f"{name}{legacy}{number}_back"
                theirs.save_pretrained(saved, **options)
                report = convert(saved, back, to="deberta_dist")
                expected = published_tensors(model)
                del expected["deberta.embeddings.position_embeddings.weight"]
                assert same(load_file(back / "model.safetensors"), expected)
                assert [item["key"] for item in report["absent"]] == ["deberta.embeddings.position_embeddings.weight"]
        backbone = transformers.AutoModel.from_pretrained(tmp_path / f"{name}_hf")
        backbone.save_pretrained(tmp_path / f"{name}_backbone")
        convert(tmp_path / f"{name}_backbone", tmp_path / f"{name}_b", to="deberta_dist")
        found = load_file(tmp_path / f"{name}_b/model.safetensors")
        assert same(found, {key: value for key, value in expected.items() if key.startswith("deberta.")})


def _copy_head(theirs: nn.Module, tensors: dict[str, Tensor]) -> None:
    head, prefix = theirs.cls.predictions, "lm_predictions.lm_head."
    state = {
        "transform.dense.weight": tensors[prefix + "dense.weight"],
        "transform.dense.bias": tensors[prefix + "dense.bias"],
        "transform.LayerNorm.weight": tensors[prefix + "LayerNorm.weight"],
        "transform.LayerNorm.bias": tensors[prefix + "LayerNorm.bias"],
        "bias": tensors[prefix + "bias"],
    }
    head.load_state_dict(state, strict=False)
    theirs.tie_weights()
