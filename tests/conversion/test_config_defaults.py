"""A field that a configuration file lacks means what the library that wrote the file takes it to mean."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.models.deberta import modeling_deberta
from transformers.models.deberta_v2 import modeling_deberta_v2

from deberta_dist.conversion import huggingface, official
from deberta_dist.conversion.convert import convert
from deberta_dist.errors import ConfigError
from deberta_dist.models.config import BOOKKEEPING_KEYS, SYNONYMS, DebertaConfig
from deberta_dist.models.defaults import IGNORED, REQUIRED, TABLE, UNREAD, V1, V2, column
from deberta_dist.models.presets import preset
from tests.conversion.small_models import export, make_model, published_tensors, write

CLASSES = {V1: transformers.DebertaConfig, V2: transformers.DebertaV2Config}
MODULES = {V1: modeling_deberta, V2: modeling_deberta_v2}
# Without these nothing is built: both libraries' defaults are a model without relative positions.
LEAST = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}


def reads(kind: str) -> dict[str, Any]:
    """Field -> default in ``getattr``, or ..., of every field that the code of a model reads of its configuration."""
    text = Path(MODULES[kind].__file__).read_text()
    found: dict[str, Any] = dict.fromkeys(re.findall(r"\bconfig\.([a-z]\w*)", text), ...)
    for name, default in re.findall(r'getattr\((?:self\.)?config, "(\w+)", ([^)]+)\)', text):
        found[name] = default
    # Names of modules beside the configuration's.
    return {name: default for name, default in found.items() if name not in ("_attn_implementation", "to_dict")}


@pytest.mark.parametrize("kind", CLASSES)
def test_every_field_of_their_classes_is_in_a_list(kind: str) -> None:
    """A release of transformers with another field fails here, and somebody has to say what its absence means."""
    declared = {field.name: field.default for field in dataclasses.fields(CLASSES[kind])}
    names = {*declared, *CLASSES[kind]().to_dict(), *reads(kind)}
    assert not names - TABLE.keys() - IGNORED.keys()
    assert not TABLE.keys() & IGNORED.keys() and IGNORED.keys() <= BOOKKEEPING_KEYS
    for name, default in column(kind).items():
        if default == UNREAD:
            assert name not in names, name
        elif name in declared:
            assert default == declared[name], name
        elif name in reads(kind) and reads(kind)[name] not in (..., "None") and default is not None:
            # Inside a convolution that is there: whether one is, another line says.
            expected = {"conv_kernel_size": "0"}.get(name, reads(kind)[name])
            assert json.dumps(default) == expected.replace("False", "false"), name


def test_the_published_column_is_the_model_configurations() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(DebertaConfig)}
    for name, (default, _, _) in TABLE.items():
        if default == REQUIRED:
            assert fields[name] is dataclasses.MISSING
        elif default == UNREAD:
            assert name in SYNONYMS or name == "talking_head"
        else:
            expected = "|".join(fields[name]) if name == "pos_att_type" else fields[name]
            assert default == expected, name
    assert fields.keys() <= TABLE.keys()


@pytest.mark.parametrize("kind", CLASSES)
def test_an_absent_field_is_their_default(kind: str) -> None:
    """What we make of a file with nothing in it is what they do; likewise of a file without any one field."""
    theirs = CLASSES[kind](**LEAST).to_dict()

    def understood(raw: dict[str, Any]) -> DebertaConfig:
        config = DebertaConfig.from_dict(huggingface.with_defaults(raw, keys=())[0])
        return dataclasses.replace(config, pooler_hidden_size=None)  # nothing but the hidden size fits

    least = understood({"model_type": kind, **LEAST})
    assert least == understood({"model_type": kind, **theirs})
    for name in TABLE.keys() & theirs.keys() - LEAST.keys() - {"pooler_hidden_size"}:
        field = SYNONYMS.get(name, name)
        assert getattr(least, field) == theirs[name], name
        without = {key: value for key, value in theirs.items() if key != name}
        assert understood({"model_type": kind, **without}) == least, name
    for gone in (*LEAST, "both"):
        with pytest.raises(ConfigError, match="relative_attention must be true|classes it means neither"):
            understood({"model_type": kind, **{key: value for key, value in LEAST.items() if gone not in (key, "both")}})
    with pytest.raises(ConfigError, match="classes it means neither"):
        understood({"model_type": kind, "relative_attention": True, "pos_att_type": None})


def test_the_same_file_means_two_things_to_two_libraries(tmp_path: Path) -> None:
    """Without pos_att_type, the published code has c2p and Hugging Face's classes nothing. Fields that theirs of v1 do
    not look at are left out and told."""
    model = make_model("v1")
    config = {key: value for key, value in model.config.to_dict().items() if key != "pos_att_type"}
    tensors = {key: value for key, value in published_tensors(model).items() if ".pos_query_proj." not in key}
    convert(write(tensors, tmp_path / "ours", config=config), tmp_path / "c2p", to="deberta_dist")
    assert json.loads((tmp_path / "c2p/config.json").read_text())["pos_att_type"] == "c2p"
    write(tensors, tmp_path / "theirs", config={**config, "model_type": V1, "pad_token_id": 0})
    with pytest.raises(ConfigError, match="it means neither"):
        convert(tmp_path / "theirs", tmp_path / "no", to="deberta_dist")

    ignored = {"position_buckets": 16, "share_att_key": True, "norm_rel_ebd": "layer_norm", "attention_head_size": 8}
    raw = {**model.config.to_dict(), "model_type": V1, "talking_head": False, **ignored}
    source = write(published_tensors(model), tmp_path / "v1", config=raw)
    report = convert(source, tmp_path / "v1-ours", to="deberta_dist", decoder="emd")
    told = {item["key"].removeprefix("config: ") for item in report["dropped"]}
    assert {*ignored, "talking_head", "padding_idx"} <= told
    assert DebertaConfig.from_dict(json.loads((tmp_path / "v1-ours/config.json").read_text())) == model.config
    (source / "config.json").write_text(json.dumps({**raw, "talking_head": True}))
    with pytest.raises(ConfigError, match="talking_head"):
        convert(source, tmp_path / "no", to="deberta_dist")


@pytest.mark.parametrize("name", ["v1", "v2_classification"])
def test_what_is_written_has_every_field(tmp_path: Path, name: str) -> None:
    convert(export(make_model(name), tmp_path / "source"), tmp_path / "hf", to="huggingface")
    written = json.loads((tmp_path / "hf/config.json").read_text())
    wanted = {key for key, default in column(written["model_type"]).items() if default != UNREAD}
    wanted -= {"talking_head", "problem_type"}  # the latter where a classifier has one
    if name == "v2_classification":  # it has no masked language modelling head
        wanted.remove("masked_lm_decoder")
    assert not wanted - written.keys()
    assert written["legacy"] is False and written["tie_word_embeddings"] is True
    config = getattr(transformers, written["architectures"][0]).config_class.from_pretrained(tmp_path / "hf")
    assert {key: getattr(config, key) for key in wanted if key != "pos_att_type"} == {
        key: written[key] for key in wanted if key != "pos_att_type"
    }
    assert "padding_idx" in official.to_config(preset("v3-base"))
