"""What a source means beyond its tensors: fields that it leaves out, its labels, and number formats that it mixes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from deberta_dist import load_masked_lm
from deberta_dist.checkpoint.compatible import computation
from deberta_dist.conversion.canonical import CanonicalCheckpoint, to_canonical
from deberta_dist.conversion.convert import convert
from deberta_dist.conversion.source import open_source
from deberta_dist.errors import ConfigError
from tests.conversion.small_models import export, make_model, published_tensors, same
from tests.tool_calls import call


def official(model: nn.Module, directory: Path, **fields: Any) -> Path:
    """As Microsoft's code saves it; fields that are ... are left out."""
    directory.mkdir()
    torch.save(published_tensors(model), directory / "pytorch_model.bin")
    config = {key: value for key, value in model.config.to_dict().items() if not key.startswith("pooler_")} | fields
    (directory / "model_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return directory


def published(directory: Path) -> CanonicalCheckpoint:
    return to_canonical(open_source(directory))


POOLERS = {
    "no table": ({"hidden_act": "relu"}, "relu", 0.0),
    "no table, gelu": ({"hidden_act": "gelu"}, "gelu", 0.0),
    "nothing": ({"hidden_act": ...}, "gelu", 0.0),
    "no table, a dropout": ({"hidden_act": "tanh", "dropout": 0.25}, "tanh", 0.25),
    "an empty table": ({"hidden_act": "relu", "pooling": {}}, "gelu", 0.0),
    "null": ({"hidden_act": "relu", "pooling": None}, "gelu", 0.0),
    "a table": ({"hidden_act": "relu", "pooling": {"hidden_act": "tanh", "dropout": 0.5}}, "tanh", 0.5),
    "a table of a dropout": ({"hidden_act": "relu", "pooling": {"dropout": 0.5}}, "gelu", 0.5),
    "the other library's field": ({"hidden_act": "relu", "pooler_hidden_act": "gelu"}, "relu", 0.0),
}


@pytest.mark.parametrize("case", POOLERS)
def test_a_pooler_of_the_official_form(case: str, tmp_path: Path) -> None:
    fields, activation, dropout = POOLERS[case]
    source = official(make_model("v2_classification"), tmp_path / "source", **fields)
    found = published(source)
    assert (found.config.pooler_hidden_act, found.config.pooler_dropout) == (activation, dropout)
    told = [text for text in found.reading.warnings if "pooler_hidden_act = 'gelu' ('relu' is taken)" in text]
    assert len(told) == (case == "the other library's field")
    for to in ("deberta_dist", "huggingface", "official") if case in ("no table", "a table") else ():
        convert(source, tmp_path / to, to=to)
        assert computation(published(tmp_path / to).config) == computation(found.config)
        assert published(tmp_path / to).config.pooler_dropout == dropout


def test_a_pooler_of_the_other_forms_is_gelu(tmp_path: Path) -> None:
    model = make_model("v2_classification")
    config = {key: value for key, value in model.config.to_dict().items() if not key.startswith("pooler_")} | {
        "hidden_act": "relu"
    }
    for name, more in (
        ("own", {}),
        ("hf", {"model_type": "deberta-v2", "architectures": ["DebertaV2ForSequenceClassification"]}),
    ):
        (tmp_path / name).mkdir()
        save_file(published_tensors(model), tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(config | more))
        assert published(tmp_path / name).config.pooler_hidden_act == "gelu"


LABELS = {
    "id2label": {"0": "red", "1": "green", "2": "blue"},
    "label2id": {"red": 0, "green": 1, "blue": 2},
    "problem_type": "multi_label_classification",
}


def test_labels_and_their_kind_are_carried(tmp_path: Path) -> None:
    """All the way round, and what Hugging Face reads computes its loss for them."""
    model = make_model("v2_classification")
    source = export(model, tmp_path / "source")
    (source / "config.json").write_text(json.dumps(model.config.to_dict() | LABELS))
    before = source
    for number, to in enumerate(("official", "deberta_dist", "huggingface")):
        convert(before, tmp_path / f"{number}", to=to)
        before = tmp_path / f"{number}"
        name = "model_config.json" if to == "official" else "config.json"
        written = json.loads((before / name).read_text())
        assert {key: written[key] for key in LABELS} == LABELS
        assert published(before).config.problem_type == "multi_label_classification"
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(before)
    ids, labels = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[1.0, 0.0, 1.0]])
    model = type(model)(published(before).config, num_labels=3)
    model.load_state_dict(published_tensors(make_model("v2_classification")), strict=True)
    ours, expected = model.eval()(ids, labels=labels).loss, theirs(ids, labels=labels).loss
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_a_kind_of_labels_means_nothing_without_a_classifier(tmp_path: Path) -> None:
    model = make_model("v2")
    source = export(model, tmp_path / "source")
    (source / "config.json").write_text(json.dumps(model.config.to_dict() | {"problem_type": "regression"}))
    assert published(source).config == model.config
    (source / "config.json").write_text(json.dumps(model.config.to_dict() | {"problem_type": "sorting"}))
    with pytest.raises(ConfigError, match="problem_type = 'sorting' is not one of regression"):
        published(source)


@pytest.mark.parametrize(("narrow", "wide"), [("bfloat16", "float32"), ("float16", "bfloat16")])
def test_several_number_formats_become_one(narrow: str, wide: str, tmp_path: Path) -> None:
    model = make_model("v2")
    source = export(model, tmp_path / "source")
    mixed = {
        name: value.to(getattr(torch, wide if name.startswith("lm_predictions") else narrow))
        for name, value in published_tensors(model).items()
    }
    save_file(mixed, source / "model.safetensors")
    expected = {name: value.float() for name, value in mixed.items()}
    told = rf"the source has tensors of bfloat16 and float(16|32) \({wide}: lm_predictions.*\): all become float32"
    for to in ("huggingface", "official", "deberta_dist"):
        report = convert(source, tmp_path / to, to=to)
        assert report["target"]["dtype"] == ["float32"]
        assert [text for text in report["warnings"] if text.startswith("the source has tensors of") and "--dtype" in text]
    assert same(load_file(tmp_path / "deberta_dist/model.safetensors"), expected)
    assert json.loads((tmp_path / "huggingface/config.json").read_text())["dtype"] == "float32"
    with pytest.warns(UserWarning, match=told):
        loaded, _ = load_masked_lm(source)
    assert same(published_tensors(loaded), expected)
    assert convert(source, tmp_path / "asked", to="deberta_dist", dtype="float16")["target"]["dtype"] == ["float16"]
    done = call("convert_checkpoint.py", source, tmp_path / "tool", "--to", "huggingface", cwd=tmp_path)
    assert done.returncode == 0 and "all become float32" in done.stdout + done.stderr
