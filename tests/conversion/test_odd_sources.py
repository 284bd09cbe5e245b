"""What lies about in real downloads and on real disks: converted rightly, or refused in one line."""

import io
import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load, load_file, save_file

from deberta_dist.checkpoint.errors import CheckpointError
from deberta_dist.conversion import output
from deberta_dist.conversion.convert import convert
from deberta_dist.conversion.inspect import difference, differs
from deberta_dist.conversion.safetensors_files import read_safetensors, write_safetensors
from deberta_dist.conversion.source import open_source
from deberta_dist.errors import ConfigError
from tests.conversion.small_models import export, make_model, published_tensors, same
from tests.preparation.test_tools import assert_one_line_error
from tests.tool_calls import call

INSPECT = "inspect_checkpoint.py"
POSITIONS = "deberta.embeddings.position_embeddings.weight"


def edit(path: Path, **changes: object) -> None:
    """Changes fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    """torch reads one, but not from a map: there its bytes would be taken for numbers."""
    source = export(make_model("v2"), tmp_path / "source")
    torch.save(load_file(source / "model.safetensors"), tmp_path / "plain.bin")
    (source / "model.safetensors").unlink()
    with zipfile.ZipFile(tmp_path / "plain.bin") as plain:
        entries = {name: plain.read(name) for name in plain.namelist()}
    with zipfile.ZipFile(source / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    assert same(torch.load(source / "pytorch_model.bin", weights_only=True), published_tensors(make_model("v2")))
    with pytest.raises(CheckpointError, match="compressed, which torch.save never does"):
        convert(source, tmp_path / "target", to="deberta_dist")
    # Two records that have changed places.
    names = [name for name in entries if "/data/" in name]
    a, b = next((a, b) for a in names for b in names if len(entries[a]) > len(entries[b]))
    with zipfile.ZipFile(source / "pytorch_model.bin", "w") as archive:
        for name in entries:
            archive.writestr(name, entries[{a: b, b: a}.get(name, name)])
    with pytest.raises(CheckpointError, match="larger or smaller than what is stored"):
        convert(source, tmp_path / "target", to="deberta_dist")


def test_a_pointer_is_not_the_weights(tmp_path: Path) -> None:
    source = export(make_model("v2"), tmp_path / "source")
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        open_source(source)


def test_keys_that_the_index_does_not_name_have_to_be_explained(tmp_path: Path) -> None:
    tensors = published_tensors(make_model("v2"))
    source = tmp_path / "source"
    convert(export(make_model("v2"), tmp_path / "plain"), source, to="huggingface", max_shard_bytes=100_000)
    first = source / "model-00001-of-{:05d}.safetensors".format(len(list(source.glob("model-*.safetensors"))))
    save_file({**load_file(first), "secret.extra": torch.zeros(3)}, first)
    with pytest.raises(CheckpointError, match="not explained: secret.extra"):
        convert(source, tmp_path / "no", to="deberta_dist")
    report = convert(source, tmp_path / "yes", to="deberta_dist", allow_unmapped=["secret.*"])
    assert [item["key"] for item in report["dropped"]] == ["secret.extra"]
    assert same(load_file(tmp_path / "yes/model.safetensors"), tensors)
    # A single file goes before an index, as it does with Hugging Face's classes.
    shutil.copy(tmp_path / "plain/model.safetensors", source / "model.safetensors")
    assert convert(source, tmp_path / "single", to="deberta_dist")["dropped"] == []


def test_allowed_patterns_do_not_drop_what_a_model_needs(tmp_path: Path) -> None:
    model = make_model("v2")
    source = export(model, tmp_path / "source")
    save_file({**published_tensors(model), "extra.position": torch.zeros(1)}, source / "model.safetensors")
    report = convert(source, tmp_path / "target", to="deberta_dist", allow_unmapped=["*position*", "*"])
    assert [item["key"] for item in report["dropped"]] == ["extra.position"] and report["absent"] == []
    assert same(load_file(tmp_path / "target/model.safetensors"), published_tensors(model))
    edit(source / "config.json", my_note=1)
    with pytest.raises(ConfigError, match=r"source: .*unknown key 'my_note'.*--allow-unmapped"):
        convert(source, tmp_path / "no", to="deberta_dist")
    report = convert(source, tmp_path / "noted", to="deberta_dist", allow_unmapped=["my_*", "extra.*"])
    assert "config: my_note" in [item["key"] for item in report["dropped"]]


def test_prefix_of_data_parallel_training(tmp_path: Path) -> None:
    tensors = published_tensors(make_model("v2"))
    source = export(make_model("v2"), tmp_path / "source")
    (source / "model.safetensors").unlink()
    torch.save({f"module.{name}": value for name, value in tensors.items()}, source / "pytorch_model.bin")
    convert(source, tmp_path / "target", to="deberta_dist")
    assert same(load_file(tmp_path / "target/model.safetensors"), tensors)


def test_a_generator_has_a_configuration_of_its_own(tmp_path: Path) -> None:
    """As the releases of v3 lie on the hub. A damaged generator is no obstacle to the discriminator."""
    source = export(make_model("v3_discriminator"), tmp_path / "source")
    edit(source / "config.json", num_hidden_layers=2)
    state = published_tensors(make_model("v3_discriminator"))
    state["deberta.embeddings.word_embeddings._weight"] = torch.zeros_like(state["deberta.embeddings.word_embeddings.weight"])
    (source / "model.safetensors").unlink()
    torch.save(state, source / "pytorch_model.bin")
    generator = published_tensors(make_model("v2"))
    torch.save(generator, source / "pytorch_model.generator.bin")
    (source / "generator_config.json").write_text(json.dumps(make_model("v2").config.to_dict()))
    convert(source / "pytorch_model.generator.bin", tmp_path / "generator", to="deberta_dist")
    assert same(load_file(tmp_path / "generator/model.safetensors"), generator)
    (source / "pytorch_model.generator.bin").write_bytes(b"torn")
    convert(source, tmp_path / "discriminator", to="deberta_dist")


def test_classes_keep_their_numbers_and_choices_their_class(tmp_path: Path) -> None:
    source = export(make_model("v2_classification"), tmp_path / "source")
    edit(source / "config.json", id2label={"2": "c", "0": "a", "1": "b"})
    convert(source, tmp_path / "hf", to="huggingface")
    assert json.loads((tmp_path / "hf/config.json").read_text())["label2id"] == {"a": 0, "b": 1, "c": 2}
    edit(source / "config.json", id2label=["a", "b", "c"])
    with pytest.raises(ConfigError, match="not a table from 0, 1, 2"):
        convert(source, tmp_path / "no", to="huggingface")
    convert(export(make_model("v2"), tmp_path / "plain"), tmp_path / "base", to="huggingface")
    choice = transformers.DebertaV2ForMultipleChoice.from_pretrained(tmp_path / "base")
    choice.save_pretrained(tmp_path / "choice")
    convert(tmp_path / "choice", tmp_path / "again", to="huggingface")
    assert json.loads((tmp_path / "again/config.json").read_text())["architectures"] == ["DebertaV2ForMultipleChoice"]
    _, info = transformers.DebertaV2ForMultipleChoice.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def test_double_precision_needs_a_word(tmp_path: Path) -> None:
    tensors = published_tensors(make_model("v2"))
    source = export(make_model("v2"), tmp_path / "source")
    save_file({name: value.double() for name, value in tensors.items()}, source / "model.safetensors")
    with pytest.raises(ConfigError, match="say with --dtype"):
        convert(source, tmp_path / "no", to="huggingface")
    convert(source, tmp_path / "single", to="huggingface", dtype="float32")
    assert same(load_file(tmp_path / "single/model.safetensors"), tensors)


def test_zero_with_a_minus_sign_is_not_lost(tmp_path: Path) -> None:
    model = make_model("v1")
    with torch.no_grad():
        model.deberta.encoder.layer[0].attention.self.key_proj.bias[3] = -0.0
    source = export(model, tmp_path / "source")
    with pytest.raises(ConfigError, match="without loss"):
        convert(source, tmp_path / "no", to="official", is_fused=True)


def test_tensors_of_several_formats_lie_on_their_boundaries(tmp_path: Path) -> None:
    tensors = published_tensors(make_model("v2"))
    mixed = {n: v.bfloat16() if i % 3 else v for i, (n, v) in enumerate(tensors.items())}
    source = export(make_model("v2"), tmp_path / "source")
    save_file(mixed, source / "model.safetensors")
    written = io.BytesIO()
    write_safetensors(written, read_safetensors(source / "model.safetensors"))
    content = written.getvalue()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__")
    sizes = {"F32": 4, "BF16": 2}
    assert all((8 + length + e["data_offsets"][0]) % sizes[e["dtype"]] == 0 for e in header.values())
    assert same(load(content), mixed)


def test_a_signal_between_the_renames_leaves_the_old_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = export(make_model("v2"), tmp_path / "source"), tmp_path / "target"
    convert(source, target, to="deberta_dist")
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    rename, calls = os.rename, []

    def interrupted(a: Path, b: Path) -> None:
        calls.append(a)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(a, b)

    monkeypatch.setattr(output.os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(source, target, to="huggingface", force=True)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_inspection_says_what_differs_and_what_is_damaged(tmp_path: Path) -> None:
    source = export(make_model("v2"), tmp_path / "source")
    tensors = published_tensors(make_model("v2"))
    odd = {**tensors, POSITIONS: tensors[POSITIONS].clone()}
    odd[POSITIONS][0, :2] = torch.tensor([float("inf"), float("nan")])
    same_odd = tmp_path / "odd"
    shutil.copytree(source, same_odd)
    save_file(odd, same_odd / "model.safetensors")
    shown = json.loads(call(INSPECT, "source", "--diff", "odd", "--json", cwd=tmp_path).stdout, parse_constant=pytest.fail)
    assert shown["values"] == {POSITIONS: "nan"}
    # Infinities and not-a-numbers in the same places are equal; the rest is measured.
    changed = {**odd, POSITIONS: odd[POSITIONS].clone()}
    changed[POSITIONS][1, 1] += 0.5
    shutil.copytree(source, tmp_path / "changed")
    save_file(changed, tmp_path / "changed/model.safetensors")
    found = difference(same_odd, tmp_path / "changed")
    assert found["values"] == {POSITIONS: pytest.approx(0.5, abs=1e-6)}
    # Equal numbers in another format, and other names of classes, are differences.
    convert(source, tmp_path / "narrow", to="deberta_dist", dtype="bfloat16")
    convert(tmp_path / "narrow", tmp_path / "wide", to="deberta_dist", dtype="float32")
    found = difference(tmp_path / "narrow", tmp_path / "wide")
    assert found["equal"] == 0 and not found["values"] and len(found["dtypes"]) == len(tensors) and differs(found)
    for name, labels in (("a", ["x", "y", "z"]), ("b", ["y", "x", "z"])):
        classifier = export(make_model("v2_classification"), tmp_path / name)
        edit(classifier / "config.json", id2label={str(i): label for i, label in enumerate(labels)})
    assert "id2label" in difference(tmp_path / "a", tmp_path / "b")["config"]
    content = bytearray((tmp_path / "wide/model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "wide/model.safetensors").write_bytes(content)
    damaged = call(INSPECT, "wide", cwd=tmp_path)
    assert damaged.returncode == 65 and "DAMAGED: model.safetensors is not what was written" in damaged.stdout


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    source = export(make_model("v2"), tmp_path / "source")
    edit(source / "config.json", pooling="gelu")
    assert_one_line_error(call(INSPECT, "x" * 300, cwd=tmp_path), code=74, words="File name too long")
    for changes, words in (
        ({"pooling": "gelu"}, "pooling = 'gelu' is no table"),
        ({"pos_att_type": 5}, "pos_att_type = 5"),
        ({"pos_att_type": [1]}, "pos_att_type = [1]"),
        ({"vocab_size": 2**70}, "vocab_size = 1180591620717411303424 must be at most 16777216"),
    ):
        edit(source / "config.json", **({"pooling": {}, "pos_att_type": "c2p|p2c"} | changes))
        result = call("convert_checkpoint.py", "source", "target", "--to", "deberta_dist", cwd=tmp_path)
        assert_one_line_error(result, code=2, words=words)


def test_entries_that_are_no_tensors(tmp_path: Path) -> None:
    model = make_model("v2_classification")
    source = export(model, tmp_path / "source")
    (source / "model.safetensors").unlink()
    state = published_tensors(model)
    torch.save({**state, "epoch": 3, "x._extra_state": {"a": 1}, 7: torch.ones(1)}, source / "pytorch_model.bin")
    tool, to = "convert_checkpoint.py", ("--to", "deberta_dist")
    result = call(tool, "source", "target", *to, "--allow-unmapped", "x.*", cwd=tmp_path)
    assert_one_line_error(result, code=65, words="epoch is int, not a named tensor; to leave it out, give --allow-unmapped")
    patterns = [word for key in ("epoch", "x.*", "7") for word in ("--allow-unmapped", key)]
    result = call(tool, "source", "target", *to, *patterns, cwd=tmp_path)
    assert result.returncode == 0 and "also holds epoch, x._extra_state, 7: not part of the model" in result.stdout
    torch.save({**state, "net._packed_params.dtype": torch.qint8}, source / "pytorch_model.bin")
    result = call(tool, "source", "other", *to, cwd=tmp_path)
    assert_one_line_error(result, code=65, words="1 entries are of modules that torch has quantised")


@pytest.mark.parametrize(
    ("fields", "words"), [({"id2label": {"1": "a"}}, "id2label"), ({"model_type": "bert"}, "only deberta and deberta-v2")]
)
def test_what_is_wrong_with_a_configuration_names_its_place(fields: dict[str, object], words: str, tmp_path: Path) -> None:
    model = make_model("v2_classification")
    source = export(model, tmp_path / "source")
    edit(source / "config.json", **fields)
    result = call("convert_checkpoint.py", source, "target", "--to", "deberta_dist", cwd=tmp_path)
    assert_one_line_error(result, code=2, words=f"{source}: ")
    assert words in result.stderr
