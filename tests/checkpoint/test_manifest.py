"""What a manifest may say, and what is refused in a damaged or hostile one."""

import dataclasses
import json

import pytest

from deberta_dist.checkpoint import manifest as manifest_module
from deberta_dist.checkpoint.compatible import compatible, same_tensors
from deberta_dist.checkpoint.errors import CheckpointError, CheckpointVersionError
from deberta_dist.checkpoint.manifest import FileEntry, Manifest, differing_keys, from_json, read_manifest, to_json
from deberta_dist.errors import ConfigError, DataError
from tests.checkpoint.test_slices import TOKENIZER, Case

WORDS = "deberta.embeddings.word_embeddings.weight"
FILE = "rank-00000.safetensors"


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return dataclasses.replace(Case(tensor=2, data=2).manifest(), files={FILE: FileEntry(bytes=100, sha256="0" * 64)})


def _edited(manifest: Manifest, change) -> bytes:
    """The manifest's text after a change by somebody who knows how to make the checksum right."""
    document = json.loads(to_json(manifest))
    change(document)
    if "sha256" in document:
        del document["sha256"]
        document["sha256"] = manifest_module._checksum(document)
    return json.dumps(document).encode()


def test_round_trip(manifest: Manifest) -> None:
    found = from_json(to_json(manifest))
    assert found == dataclasses.replace(manifest, model_config=found.model_config)
    assert not differing_keys(found.model_config, manifest.model_config)
    assert from_json(to_json(found)) == found
    without = dataclasses.replace(manifest, loss_scale=None)
    assert from_json(to_json(without)).loss_scale is None


def test_order_of_tensors_is_kept(manifest: Manifest) -> None:
    assert list(from_json(to_json(manifest)).tensors) == list(manifest.tensors)


@pytest.mark.parametrize("config", [{"x": float("nan")}, {"x": float("inf")}])
def test_nan_is_not_written(manifest: Manifest, config: dict) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        to_json(dataclasses.replace(manifest, run_config=config))


def _piece(document: dict) -> dict:
    return document["tensors"][WORDS]["regions"][0]["pieces"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format="other"), "its format is not"),
        (lambda d: d.pop("format"), "its format is not"),
        (lambda d: d.update(version=True), "version: a whole number"),
        (lambda d: d.update(version=0), "version: a whole number"),
        (lambda d: d.pop("step"), r"missing keys \['step'\]"),
        (lambda d: d.pop("sha256"), "checksum does not fit"),
        (lambda d: d.update(pickle="x"), r"unknown keys \['pickle'\]"),
        (lambda d: d.update(step=-1), "step: a whole number"),
        (lambda d: d.update(step=1.0), "step: a whole number"),
        (lambda d: d.update(step=2**63), "step: a whole number"),
        (lambda d: d.update(step="1"), "step: a whole number"),
        (lambda d: d.update(tokenizer_sha256="ab"), "64 hexadecimal"),
        (lambda d: d.update(loss_scale=3), "loss_scale: an object"),
        (lambda d: d.update(tensors=[]), "tensors: an object"),
        (lambda d: d["layout"].update(tensor=0), "layout.tensor"),
        (lambda d: d["layout"].update(schedule=3), "layout.schedule"),
        (lambda d: d["files"][FILE].update(sha256="G" * 64), "64 hexadecimal"),
        (lambda d: d["files"][FILE].update(bytes=-1), "bytes: a whole number"),
        (lambda d: d["files"].update({"../rank-00001.safetensors": d["files"][FILE]}), "not the name of a shard file"),
        (lambda d: d["files"].update({"/etc/passwd": d["files"][FILE]}), "not the name of a shard file"),
        (lambda d: d["files"].update({"a\\rank-00001.safetensors": d["files"][FILE]}), "not the name of a shard"),
        (lambda d: d["files"].update({"rank-00001.safetensors\n": d["files"][FILE]}), "not the name of a shard"),
        (lambda d: d["files"].update({"rank-٠٠٠٠١.safetensors": d["files"][FILE]}), "not the name of a shard"),
        (lambda d: d["tensors"][WORDS].update(shape=[0, 16]), "shape: a whole number from 1"),
        (lambda d: d["tensors"][WORDS].update(shape=203), "shape: an array"),
        (lambda d: d["tensors"][WORDS].update(cut_dim=-1), "cut_dim"),
        (lambda d: d["tensors"][WORDS].update(regions={}), "an array"),
        (lambda d: _piece(d).update(offset=-1), "offset"),
        (lambda d: _piece(d).update(file=3), "file: text"),
        (lambda d: _piece(d).update(count=10**100), "count"),
        (lambda d: _piece(d).update(more=1), "unknown keys"),
    ],
)
def test_what_does_not_belong_is_refused(manifest: Manifest, change, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        from_json(_edited(manifest, change))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"\xff",
        b"nul",
        b"[" * 100000,
        b'{"a":' * 100000,
        b'{"format": "a", "format": "b"}',
        b'{"version": NaN}',
        b'{"version": -Infinity}',
        b'{"version": 1e999}',
        b'{"version": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_not_strict_json_is_refused(text: bytes) -> None:
    with pytest.raises(CheckpointError, match="the-file"):
        from_json(text, file="the-file")


def test_deep_nesting_is_refused(manifest: Manifest) -> None:
    for depth in range(900, 1000, 5):
        text = to_json(manifest).replace(b'"max_steps": 1000', b'"max_steps": ' + b"[" * depth + b"]" * depth)
        with pytest.raises(CheckpointError):
            from_json(text)


def test_an_edited_manifest_is_damaged(manifest: Manifest) -> None:
    with pytest.raises(CheckpointError, match="its checksum does not fit"):
        from_json(to_json(manifest).replace(b'"consumed_samples": 800', b'"consumed_samples": 801'))


def newer(version: int) -> bytes:
    """A sound manifest of a format that nobody here knows."""
    document = {"format": manifest_module.FORMAT, "version": version, "unheard": "of"}
    return json.dumps({**document, "sha256": manifest_module._checksum(document)}).encode()


def test_newer_version_first(manifest: Manifest) -> None:
    with pytest.raises(CheckpointVersionError, match="use the program that wrote it, or a newer one"):
        from_json(newer(2))
    # A flipped bit is damage, not progress.
    with pytest.raises(CheckpointError, match="its checksum does not fit") as caught:
        from_json(to_json(manifest).replace(b'"version": 1', b'"version": 3'))
    assert not isinstance(caught.value, CheckpointVersionError)


def test_size_is_capped(tmp_path, monkeypatch: pytest.MonkeyPatch, manifest: Manifest) -> None:
    (tmp_path / "manifest.json").write_bytes(to_json(manifest))
    assert read_manifest(tmp_path).step == 100
    monkeypatch.setattr(manifest_module, "MAX_BYTES", 1000)
    with pytest.raises(CheckpointError, match="more than 1000 bytes"):
        read_manifest(tmp_path)


def test_differing_keys() -> None:
    assert differing_keys({"a": 1, "b": (1, 2), "c": None}, {"a": 1, "b": [1, 2]}) == ("c",)
    assert differing_keys({"b": 1, "a": 2}, {"a": 3, "d": 1}) == ("a", "b", "d")
    assert differing_keys({}, {}) == ()


def test_compatible_names_every_difference(manifest: Manifest) -> None:
    config = manifest.model_config
    compatible(manifest, model_config=config, tokenizer_sha256=TOKENIZER)
    with pytest.raises(ConfigError) as caught:
        compatible(
            manifest,
            model_config={**config, "vocab_size": 300, "hidden_size": 64, "new": 1},
            tokenizer_sha256="cd" * 32,
        )
    for words in (
        "step 100",
        "model.vocab_size is 300, in the checkpoint 203",
        "model.hidden_size is 64, in the checkpoint 16",
        "model.new is 1, in the checkpoint absent",
        "data.tokenizer has sha256 cdcd",
    ):
        assert words in str(caught.value)
    assert not isinstance(caught.value, DataError)


def test_tensors_have_to_be_those_of_the_configuration(manifest: Manifest) -> None:
    shapes = {name: entry.shape for name, entry in manifest.tensors.items()}
    same_tensors(manifest, shapes, where="here")
    for changed in ({WORDS: shapes[WORDS][::-1]}, {"another.weight": (3,)}):
        with pytest.raises(CheckpointError, match="here: 1 tensors are not as its configuration has them"):
            same_tensors(manifest, {**shapes, **changed}, where="here")
