"""Hostile files: nothing in them runs, nothing outside their directory is read, every refusal is one clear error."""

import contextlib
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deberta_dist.checkpoint.errors import CheckpointError
from deberta_dist.conversion.convert import convert
from deberta_dist.conversion.source import open_source
from tests.conversion.small_models import export, make_model, published_tensors, same


class Attack:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path, *, how: str) -> None:
        self.mark, self.how = mark, how

    def __reduce__(self) -> tuple[Any, ...]:
        if self.how == "system":
            return os.system, (f"touch {self.mark}",)
        if self.how == "eval":
            return eval, (f"open({str(self.mark)!r}, 'w')",)
        return Path.touch, (self.mark,)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A sound checkpoint to make bad."""
    return export(make_model("v2"), tmp_path / "source")


def refused(source: Path, tmp_path: Path, *, match: str) -> None:
    target = tmp_path / "target"
    for to in ("deberta_dist", "huggingface"):
        with pytest.raises(CheckpointError, match=match) as caught:
            convert(source, target, to=to)
        assert caught.value.exit_code == 65 and "\n" not in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if "target" in path.name]


@pytest.mark.parametrize("how", ["system", "eval", "touch"])
@pytest.mark.parametrize("form", ["tensor", "whole", "plain", "legacy", "config"])
def test_pickles_do_not_run(how: str, form: str, source: Path, tmp_path: Path) -> None:
    mark, attack = tmp_path / "mark", Attack(tmp_path / "mark", how=how)
    tensors = published_tensors(make_model("v2"))
    content: Any = {
        "tensor": {**tensors, "deberta.encoder.LayerNorm.bias": attack},
        "config": {**tensors, "config": attack},
    }.get(form, attack)
    file = source / "pytorch_model.bin"
    (source / "model.safetensors").unlink()
    if form == "plain":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form != "legacy")
    refused(source, tmp_path, match="asks for code to be run|damaged or not a file of torch.save")
    refused(file, tmp_path, match="asks for code to be run|damaged or not a file of torch.save")
    assert not mark.exists()
    # The attack is real: it works on a reader that trusts the file.
    with contextlib.suppress(Exception):
        pickle.loads(file.read_bytes()) if form == "plain" else torch.load(file, weights_only=False)
    assert mark.exists()


def test_pickles_of_other_things(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").unlink()
    file = source / "pytorch_model.bin"
    tensors = published_tensors(make_model("v2"))
    for content, match in (
        ([1, 2], "holds list, not a state dictionary"),
        ({**tensors, "step": 3}, "step is int, not a named tensor"),
        ({1: torch.zeros(1)}, "1 is Tensor, not a named tensor"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "not a dense tensor"),
        ({"a": torch.zeros(1).expand(10**6, 10**6)}, "more than the file stores"),
        ({**tensors, "deberta.encoder.LayerNorm.bias": torch.zeros(64, dtype=torch.int64)}, "not floating point"),
    ):
        torch.save(content, file)
        refused(source, tmp_path, match=match)


def test_damaged_archives(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").unlink()
    file = source / "pytorch_model.bin"
    torch.save(published_tensors(make_model("v2")), file)
    whole = file.read_bytes()
    for damaged in (b"", b"\x80", whole[:100], whole[:-100], whole[: len(whole) // 2], b"PK\x03\x04" + whole[:50]):
        file.write_bytes(damaged)
        refused(source, tmp_path, match="pytorch_model.bin is refused|pytorch_model.bin: ")
    # A tensor that claims to be larger than its record.
    file.write_bytes(whole)
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    victim = max(entries, key=lambda name: len(entries[name]))
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content[:16] if name == victim else content)
    refused(source, tmp_path, match="larger or smaller than what is stored")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "..", "", "sub/x.safetensors", "a\0b", 7, None])
def test_an_index_does_not_lead_elsewhere(name: object, source: Path, tmp_path: Path) -> None:
    os.rename(source / "model.safetensors", tmp_path / "secret.safetensors")
    (source / "sub").mkdir()
    (source / "sub/x.safetensors").write_bytes((tmp_path / "secret.safetensors").read_bytes())
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        (source / index).write_text(json.dumps({"weight_map": {"deberta.encoder.LayerNorm.bias": name}}))
        refused(source, tmp_path, match="not the plain name of a file in this directory")
        (source / index).unlink()


def test_links_do_not_lead_elsewhere(source: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    for name in ("model.safetensors", "config.json", "spm.model"):
        if name != "spm.model":
            os.rename(source / name, secret)
        (source / name).symlink_to(secret)
        refused(source, tmp_path, match="is a link that leads out of its directory") if name != "spm.model" else None
        (source / name).unlink()
        if name != "spm.model":
            os.rename(secret, source / name)
    (source / "model.safetensors").rename(secret)
    (source / "shard.safetensors").symlink_to(secret)
    index = {"weight_map": dict.fromkeys(published_tensors(make_model("v2")), "shard.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(source, tmp_path, match="is a link that leads out of its directory")
    (source / "shard.safetensors").unlink()
    (source / "shard.safetensors").symlink_to("nowhere")
    refused(source, tmp_path, match="is missing")


def test_the_links_of_a_hub_cache_are_followed(source: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--x/blobs", tmp_path / "models--x/snapshots/0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, name in enumerate(("config.json", "model.safetensors")):
        os.rename(source / name, blobs / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    convert(snapshot, tmp_path / "target", to="deberta_dist")
    assert same(load_file(tmp_path / "target/model.safetensors"), published_tensors(make_model("v2")))


@pytest.mark.parametrize(
    ("length", "header"),
    [
        (2**63, None),
        (2**64 - 1, None),
        (99 * 2**20, None),
        (None, b"[]"),
        (None, b"not json"),
        (None, b"[" * 100_000),
        (None, {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}),
        (None, {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 10**12]}}),
        (None, {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}),
        (None, {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}),
        (None, {"a": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}}),
        (None, {"a": {"dtype": "OBJECT", "shape": [2], "data_offsets": [0, 8]}}),
        (None, {"a": {"dtype": "F32", "shape": [2]}}),
        (None, {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}),
        (None, b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": 1}'),
        (None, {"a": 3}),
    ],
)  # fmt: skip
def test_safetensors_headers(length: int | None, header: Any, source: Path, tmp_path: Path) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    (source / "model.safetensors").write_bytes(length.to_bytes(8, "little") + text + bytes(16))
    refused(source, tmp_path, match="model.safetensors")


def test_json_bombs(source: Path, tmp_path: Path) -> None:
    config = source / "config.json"
    for text in (
        "[" * 10**6,
        '{"vocab_size": 1, "vocab_size": 2}',
        '{"x": NaN}',
        "[]",
        "\xff",
        '{"x": ' + "9" * 5000 + "}",
    ):
        config.write_text(text, encoding="latin-1")
        refused(source, tmp_path, match="config.json")
    with open(config, "wb") as file:
        file.truncate(100 * 2**20)
    refused(source, tmp_path, match="larger than 64 MiB")


def test_things_that_are_no_checkpoint(source: Path, tmp_path: Path) -> None:
    for path, match in (
        (tmp_path / "nothing", "does not exist"),
        (source / "config.json", "neither .safetensors nor .bin"),
        (tmp_path, "not a known kind of checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=match):
            open_source(path)
    os.mkfifo(source / "pipe.bin")
    os.remove(source / "model.safetensors")
    with pytest.raises(CheckpointError, match="is missing, or is no file"):
        open_source(source)
