"""What a checkpoint says about itself: ``manifest.json`` as frozen values.

The manifest names every published tensor once, with its full shape and the files in which its slices lie;
the layout that wrote it is mentioned for people and never needed for reading. The last key is a checksum of
all others, so that a flipped digit is a damaged checkpoint and not another run.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deberta_dist.checkpoint.errors import CheckpointError, CheckpointVersionError, strict_json
from deberta_dist.files.foreign import read_limited
from deberta_dist.files.strict_json import as_read

FORMAT = "deberta_dist-checkpoint"
VERSION = 1
MANIFEST_NAME = "manifest.json"
MAX_BYTES = 256 * 2**20
_FILE_NAME = re.compile(r"rank-\d{5,9}\.safetensors", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_ABSENT = object()


@dataclass(frozen=True)
class FlatRange:
    """A run of elements of a slice.

    Attributes:
        file: Name of the shard file.
        flat: Number of the flat parameter in that file, from 0.
        offset: Its first element in that file's shard of the flat parameter.
        begin: The same element's place in the flattened slice.
        count: Number of elements, at least 1.
    """

    file: str
    flat: int
    offset: int
    begin: int
    count: int


@dataclass(frozen=True)
class TensorSlice:
    """A slice of a tensor that one tensor-parallel rank owned.

    Attributes:
        start: First index along the cut dimension (dimension 0 of an uncut tensor).
        stop: First index behind it; may lie behind the real size where a vocabulary is padded.
        ranges: Where its elements lie, row by row, without gaps.
    """

    start: int
    stop: int
    ranges: tuple[FlatRange, ...]


@dataclass(frozen=True)
class TensorEntry:
    """One published tensor.

    Attributes:
        shape: Full shape, without vocabulary padding.
        cut_dim: Dimension along which ``slices`` lie, None where there is one slice.
        slices: Side by side along ``cut_dim``, together the whole tensor.
    """

    shape: tuple[int, ...]
    cut_dim: int | None
    slices: tuple[TensorSlice, ...]


@dataclass(frozen=True)
class FileEntry:
    """Size and SHA-256 (hex) of one shard file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class WrittenLayout:
    """Parallel sizes and schedule of the run that wrote a checkpoint. For people; reading does not use it."""

    tensor: int
    pipeline: int
    data: int
    schedule: str


@dataclass(frozen=True, kw_only=True)
class NetworkState:
    """What the manifest says of a network beside the one whose tensors have their published names.

    Attributes:
        optimizer_steps: Steps that moved the network's weights: skipped steps do not count, and Adam's bias
            correction needs it.
        loss_scale: State of its fp16 loss scaler, None for other precisions.
        model_config: The network's configuration, as a published ``config.json`` has it.
    """

    optimizer_steps: int
    loss_scale: Mapping[str, Any] | None
    model_config: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything a checkpoint holds besides the numbers.

    Attributes:
        step: Steps the run has done, skipped ones included.
        consumed_samples: Sequences read so far.
        optimizer_steps: Steps that moved the weights (Adam's bias correction).
        seed: Of initial weights, data order, masks and dropout.
        loss_scale: State of the fp16 loss scaler, None for other precisions.
        run_config: Resolved run configuration, as JSON.
        model_config: The network's configuration, as a published ``config.json`` has it.
        tokenizer_sha256: SHA-256 of the SentencePiece model file, in hex: ids mean nothing with another one.
        data_sha256: Of the token files, by what they are for; only to report that they have changed.
        precision: Of the run: fp32, bf16 or fp16; only to report that it has changed.
        layout: Parallel sizes of the run that wrote it, for people; a reader needs none of them.
        tensors: Every published tensor by name, in model order; those of further networks behind their network's name.
        files: Every shard file by name. ``CheckpointWriter.commit`` fills it in.
        networks: Further networks by name. Absent from the file where there are none.
    """

    step: int
    consumed_samples: int
    optimizer_steps: int
    seed: int
    loss_scale: Mapping[str, Any] | None
    run_config: Mapping[str, Any]
    model_config: Mapping[str, Any]
    tokenizer_sha256: str
    data_sha256: Mapping[str, str]
    precision: str
    layout: WrittenLayout
    tensors: Mapping[str, TensorEntry]
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    networks: Mapping[str, NetworkState] = field(default_factory=dict)


def to_json(manifest: Manifest) -> bytes:
    """The text of ``manifest.json``.

    Raises:
        ValueError: NaN or infinity in a configuration.
        TypeError: something in a configuration that JSON cannot say.
    """
    document = {
        "format": FORMAT,
        "version": VERSION,
        "step": manifest.step,
        "consumed_samples": manifest.consumed_samples,
        "optimizer_steps": manifest.optimizer_steps,
        "seed": manifest.seed,
        "loss_scale": None if manifest.loss_scale is None else dict(manifest.loss_scale),
        "run_config": dict(manifest.run_config),
        "model_config": dict(manifest.model_config),
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "data_sha256": dict(manifest.data_sha256),
        "precision": manifest.precision,
        "layout": vars(manifest.layout),
        "files": {name: vars(entry) for name, entry in manifest.files.items()},
        "tensors": {name: _tensor_to_json(entry) for name, entry in manifest.tensors.items()},
    }
    if manifest.networks:
        document["networks"] = {name: vars(network) for name, network in manifest.networks.items()}
    document = as_read(document)
    document["sha256"] = _checksum(document)
    return (json.dumps(document, indent=1, allow_nan=False) + "\n").encode("utf-8")


def read_manifest(directory: str | Path) -> Manifest:
    """Reads ``directory/manifest.json``.

    Raises:
        CheckpointVersionError: it was written by a newer format.
        CheckpointError: it is missing, unreadable, absurdly large, damaged, or not a manifest.
    """
    path = Path(directory) / MANIFEST_NAME
    too_large = f"has more than {MAX_BYTES} bytes: not a manifest"
    text = read_limited(path, max_bytes=MAX_BYTES, too_large=too_large, error=CheckpointError)
    return from_json(text, file=path)


def from_json(text: bytes, *, file: object = MANIFEST_NAME) -> Manifest:
    """Reads a manifest strictly; ``file`` is named in messages. Raises like ``read_manifest``."""
    document = strict_json.parse(text, file=file)
    if document.get("format") != FORMAT:
        raise CheckpointError(f"{file} is not the manifest of a checkpoint of ours: its format is not {FORMAT!r}")
    version = strict_json.integer(document.get("version"), where=f"{file}: version", minimum=1)
    # Before the version: the checksum is the same in all of them, and a flipped bit must not look like a newer one.
    if document.pop("sha256", None) != _checksum(document, file=file):
        raise CheckpointError(f"{file}: its checksum does not fit its contents; it is damaged or was edited")
    if version > VERSION:
        raise CheckpointVersionError(
            f"{file} has format version {version}, and this program reads versions up to {VERSION}: "
            "use the program that wrote it, or a newer one"
        )
    document.setdefault("networks", {})
    document = strict_json.fields(document, keys=("format", "version", *Manifest.__dataclass_fields__), where=str(file))

    def number(key: str) -> int:
        return strict_json.integer(document[key], where=f"{file}: {key}")

    def table(key: str) -> dict[str, Any]:
        return strict_json.mapping(document[key], where=f"{file}: {key}")

    return Manifest(
        step=number("step"),
        consumed_samples=number("consumed_samples"),
        optimizer_steps=number("optimizer_steps"),
        seed=number("seed"),
        loss_scale=None if document["loss_scale"] is None else table("loss_scale"),
        run_config=table("run_config"),
        model_config=table("model_config"),
        tokenizer_sha256=_sha256(document["tokenizer_sha256"], where=f"{file}: tokenizer_sha256"),
        data_sha256={
            name: _sha256(value, where=f"{file}: data_sha256.{name[:100]}") for name, value in table("data_sha256").items()
        },
        precision=strict_json.string(document["precision"], where=f"{file}: precision"),
        layout=_layout(document["layout"], where=f"{file}: layout"),
        files={name: file_entry(name, raw, where=f"{file}: files") for name, raw in table("files").items()},
        tensors={name: _tensor(raw, where=f"{file}: {name[:200]}") for name, raw in table("tensors").items()},
        networks={name: _network(raw, where=f"{file}: networks.{name[:100]}") for name, raw in table("networks").items()},
    )


def file_entry(name: str, raw: Any, *, where: str) -> FileEntry:
    """The checked entry of one shard file; a name that is not a shard file's own is refused."""
    if not _FILE_NAME.fullmatch(name):
        raise CheckpointError(f"{where}: {name[:100]!r} is not the name of a shard file")
    raw = strict_json.fields(raw, keys=("bytes", "sha256"), where=f"{where}.{name}")
    size = strict_json.integer(raw["bytes"], where=f"{where}.{name}.bytes")
    return FileEntry(bytes=size, sha256=_sha256(raw["sha256"], where=f"{where}.{name}.sha256"))


def differing_keys(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys whose values differ between two configurations, sorted; a key that one lacks differs."""
    a, b = as_read(a), as_read(b)
    return tuple(key for key in sorted({*a, *b}) if a.get(key, _ABSENT) != b.get(key, _ABSENT))


def _tensor_to_json(entry: TensorEntry) -> dict[str, Any]:
    slices = [
        {
            "start": tensor_slice.start,
            "stop": tensor_slice.stop,
            "pieces": [vars(flat_range) for flat_range in tensor_slice.ranges],
        }
        for tensor_slice in entry.slices
    ]
    return {"shape": list(entry.shape), "cut_dim": entry.cut_dim, "regions": slices}


def _checksum(document: Mapping[str, Any], *, file: object = MANIFEST_NAME) -> str:
    try:
        text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except RecursionError as error:
        raise CheckpointError(f"{file} is nested too deep for a manifest") from error
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _sha256(value: Any, *, where: str) -> str:
    if not _SHA256.fullmatch(strict_json.string(value, where=where)):
        raise CheckpointError(f"{where}: 64 hexadecimal digits are expected")
    return value


def _network(raw: Any, *, where: str) -> NetworkState:
    raw = strict_json.fields(raw, keys=tuple(NetworkState.__dataclass_fields__), where=where)
    scale = raw["loss_scale"]
    return NetworkState(
        optimizer_steps=strict_json.integer(raw["optimizer_steps"], where=f"{where}.optimizer_steps"),
        loss_scale=None if scale is None else strict_json.mapping(scale, where=f"{where}.loss_scale"),
        model_config=strict_json.mapping(raw["model_config"], where=f"{where}.model_config"),
    )


def _layout(raw: Any, *, where: str) -> WrittenLayout:
    raw = strict_json.fields(raw, keys=("tensor", "pipeline", "data", "schedule"), where=where)
    sizes = {key: strict_json.integer(raw[key], where=f"{where}.{key}", minimum=1) for key in ("tensor", "pipeline", "data")}
    return WrittenLayout(**sizes, schedule=strict_json.string(raw["schedule"], where=f"{where}.schedule"))


def _tensor(raw: Any, *, where: str) -> TensorEntry:
    raw = strict_json.fields(raw, keys=("shape", "cut_dim", "regions"), where=where)
    shape = strict_json.sequence(raw["shape"], where=f"{where}.shape")
    cut_dim = raw["cut_dim"]
    return TensorEntry(
        shape=tuple(strict_json.integer(size, where=f"{where}.shape", minimum=1) for size in shape),
        cut_dim=None if cut_dim is None else strict_json.integer(cut_dim, where=f"{where}.cut_dim"),
        slices=tuple(_tensor_slice(r, where=where) for r in strict_json.sequence(raw["regions"], where=where)),
    )


def _tensor_slice(raw: Any, *, where: str) -> TensorSlice:
    raw = strict_json.fields(raw, keys=("start", "stop", "pieces"), where=where)
    return TensorSlice(
        start=strict_json.integer(raw["start"], where=f"{where}.start"),
        stop=strict_json.integer(raw["stop"], where=f"{where}.stop", minimum=1),
        ranges=tuple(_flat_range(flat_range, where=where) for flat_range in strict_json.sequence(raw["pieces"], where=where)),
    )


def _flat_range(raw: Any, *, where: str) -> FlatRange:
    raw = strict_json.fields(raw, keys=("file", "flat", "offset", "begin", "count"), where=where)
    numbers = {key: strict_json.integer(raw[key], where=f"{where}.{key}") for key in ("flat", "offset", "begin", "count")}
    return FlatRange(file=strict_json.string(raw["file"], where=f"{where}.file"), **numbers)
