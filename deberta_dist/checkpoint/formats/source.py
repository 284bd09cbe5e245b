"""Recognises a checkpoint and opens it: which format, which files, which configuration."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deberta_dist.checkpoint.errors import CheckpointError
from deberta_dist.checkpoint.formats import files, huggingface, native, official, published
from deberta_dist.checkpoint.formats.rules import Format, Reading, allowed_by, apply, renamed, require_known
from deberta_dist.checkpoint.formats.safetensors_files import read_safetensors
from deberta_dist.checkpoint.formats.torch_files import TorchFile
from deberta_dist.checkpoint.formats.weights import (
    POSITION_TABLE,
    Weights,
    fit,
    published_shapes,
    require_layers,
    shorten,
)
from deberta_dist.errors import ConfigError
from deberta_dist.models.config import BOOKKEEPING_KEYS, DebertaConfig

MANIFEST_NAME = "manifest.json"
CHECKPOINTS_NAME = "checkpoints"
SPM_NAME = "spm.model"
_WEIGHTS_NAMES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
_CONFIG_NAMES = ("config.json", "model_config.json")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A recognised checkpoint; no tensor of it has been read.

    Attributes:
        path: As the user gave it.
        directory: Where its files are.
        description: What was recognised, for the user.
        format: How its keys lead to published names.
        config: Its model configuration as it stands in the file.
        weights: By the file's own keys.
        generator: Weights of a generator file beside a discriminator, by its own keys.
        step: Step of a run's checkpoint.
        tokenizer_sha256: Of the SentencePiece model that a run used.
        tokenizer_hints: Where that model may be.
        warnings: What a user should know.
        layout: Parallel sizes that wrote a run's checkpoint.
        verify: Compares every byte of a run's checkpoint with its checksums; raises CheckpointError.
    """

    path: Path
    directory: Path
    description: str
    format: Format
    config: Mapping[str, Any]
    weights: Weights
    generator: Weights | None = None
    step: int | None = None
    tokenizer_sha256: str | None = None
    tokenizer_hints: tuple[Path, ...] = ()
    warnings: tuple[str, ...] = ()
    layout: Mapping[str, Any] | None = None
    verify: Callable[[], None] | None = None


@dataclass(frozen=True, kw_only=True)
class Published:
    """A checkpoint in the form in which all formats meet.

    Attributes:
        config: Of the model.
        num_labels: Rows of the classifier, None without one.
        labels: What the source's configuration says about classes.
        weights: Published names, in model order.
        reading: How it got there: what was dropped, what to know.
        lacking: Published names that the model has and the source did not.
    """

    config: DebertaConfig
    num_labels: int | None
    labels: dict[str, Any]
    weights: Weights
    reading: Reading = field(repr=False)
    lacking: list[str]


def open_source(path: Path, *, verify: bool = True) -> Source:
    """Recognises ``path``.

    Args:
        path: A directory or a file.
        verify: For a run's own checkpoint, compare every byte with its checksums first.

    Raises:
        CheckpointError: nothing that is known, or damaged.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if path.is_dir():
        if files.has(path, MANIFEST_NAME) or (path / CHECKPOINTS_NAME).is_dir():
            return _native(path, verify=verify)
        names = [name for name in _WEIGHTS_NAMES if files.has(path, name)]
        if not names:
            names = sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", ".bin"))
            if len(names) != 1:
                raise CheckpointError(
                    f"{path} is no checkpoint that is known: neither {MANIFEST_NAME} nor {CHECKPOINTS_NAME}/ (a run), "
                    f"nor {' nor '.join(_WEIGHTS_NAMES)}" + (f"; of {shorten(names)} name one" if names else "")
                )
        return _from_files(path, path, files.inside(path, names[0]))
    return _from_files(path, path.parent, path)


def _from_files(path: Path, directory: Path, weights_file: Path) -> Source:
    weights, embedded = _read_weights(weights_file)
    config_names = [name for name in _CONFIG_NAMES if files.has(directory, name)]
    if config_names:
        raw = files.read_json(files.inside(directory, config_names[0]))
    elif embedded is not None:
        raw = embedded
    else:
        raise CheckpointError(f"{directory} has no {' or '.join(_CONFIG_NAMES)}: the sizes of the model are unknown")
    is_generator = "generator" in weights_file.name
    raw = official.model_config(raw, is_generator=is_generator)
    generator = None
    if any(key.endswith("embeddings._weight") for key in weights) and files.has(directory, official.GENERATOR_NAME):
        generator = TorchFile(files.inside(directory, official.GENERATOR_NAME)).weights
    fmt, description = _recognise(raw, weights, weights_file)
    traits = [
        *(["fused projections of v1"] if any(key.endswith(".in_proj.weight") for key in weights) else []),
        *(["discriminator of v3"] if any(key.startswith("mask_predictions.") for key in weights) else []),
        *(["generator of v3"] if is_generator else []),
        *(["classifier"] if any(key.startswith("classifier.") for key in weights) else []),
        *(["prefix bert."] if any(key.startswith("bert.") for key in weights) else []),
    ]
    return Source(
        path=path,
        directory=directory,
        description=", ".join([description, *traits]),
        format=fmt,
        config=raw,
        weights=weights,
        generator=generator,
    )


def _recognise(raw: Mapping[str, Any], weights: Weights, weights_file: Path) -> tuple[Format, str]:
    if "model_type" in raw or "architectures" in raw or any(key.startswith("cls.predictions.") for key in weights):
        # Microsoft's releases on the hub have Hugging Face's configuration and Microsoft's keys; this reads both.
        listed = raw.get("architectures")
        name = str(listed[0])[:60] if isinstance(listed, list) and listed else "without a class"
        return huggingface.FORMAT, f"Hugging Face checkpoint ({str(raw.get('model_type'))[:60]}, {name})"
    if weights_file.suffix == ".bin":
        return official.FORMAT, "Microsoft's published form"
    return published.FORMAT, "deberta_dist weights with published names"


def _read_weights(path: Path) -> tuple[Weights, dict[str, Any] | None]:
    if path.name.endswith(".index.json"):
        weights: Weights = {}
        for name, keys in files.indexed_files(path).items():
            part, _ = _read_weights_file(path.parent / name)
            absent = [key for key in keys if key not in part]
            if absent:
                raise CheckpointError(f"{path.parent / name} lacks {shorten(absent)}, which {path.name} says it holds")
            weights.update({key: part[key] for key in keys})
        return weights, None
    return _read_weights_file(path)


def _read_weights_file(path: Path) -> tuple[Weights, dict[str, Any] | None]:
    if path.suffix == ".safetensors":
        return read_safetensors(path), None
    if path.suffix in (".bin", ".pt"):
        file = TorchFile(path)
        return file.weights, file.config
    raise CheckpointError(f"{path} is neither .safetensors nor .bin: its kind is not known")


def _native(path: Path, *, verify: bool) -> Source:
    try:
        checkpoint = native.NativeCheckpoint(path, verify=verify)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path / CHECKPOINTS_NAME} holds no checkpoint yet") from error
    manifest = checkpoint.manifest
    data = manifest.run_config.get("data")
    named = data.get("tokenizer") if isinstance(data, dict) else None
    # A run keeps a copy beside its checkpoints; the path it was given may be gone, or of another machine.
    hints = (checkpoint.directory.parent.parent / SPM_NAME, *([Path(named)] if isinstance(named, str) else []))
    return Source(
        path=path,
        directory=checkpoint.directory,
        description=f"checkpoint of a run at step {manifest.step}",
        format=native.FORMAT,
        config=manifest.model_config,
        weights=checkpoint.weights,
        step=manifest.step,
        tokenizer_sha256=manifest.tokenizer_sha256,
        tokenizer_hints=hints,
        warnings=tuple(checkpoint.warnings),
        layout=vars(manifest.layout),
        verify=checkpoint.verify,
    )


def to_published(source: Source, *, allow_unmapped: Sequence[str] = ()) -> Published:
    """Applies a format's rules and checks that the result is a model.

    Args:
        source: A recognised checkpoint.
        allow_unmapped: fnmatch patterns of keys, of weights or of the configuration, that may be left out.

    Raises:
        ConfigError: the configuration is refused.
        CheckpointError: keys are unexplained or missing, or shapes differ.
    """
    is_huggingface = source.format is huggingface.FORMAT
    raw = huggingface.with_defaults(dict(source.config)) if is_huggingface else dict(source.config)
    known = {*DebertaConfig.__dataclass_fields__, *BOOKKEEPING_KEYS}
    raw = {key: value for key, value in raw.items() if key in known or allowed_by(key, allow_unmapped) is None}
    labels = {key: raw[key] for key in huggingface.LABEL_KEYS if raw.get(key) is not None}
    config = DebertaConfig.from_dict(raw)
    reading = Reading(weights=dict(source.weights), config=config, warnings=list(source.warnings))
    if source.generator is not None:
        reading.generator = renamed(source.generator, source.format.renames)
    # Before the rules: they read tensors, and cut them by head sizes of the configuration.
    require_layers(config, renamed(source.weights, source.format.renames), where=source.path)
    apply(source.format, reading, allow_unmapped=allow_unmapped)
    num_labels = _num_labels(reading.weights, labels)
    shapes = published_shapes(config, keys=reading.weights, num_labels=num_labels)
    require_known(reading, shapes=shapes, fmt=source.format, where=source.path)
    # The table that only the decoder of masked language modelling uses: Hugging Face's classes do not save it.
    may_lack = [] if config.position_biased_input else [POSITION_TABLE]
    weights = fit(reading.weights, shapes=shapes, may_lack=may_lack, where=source.path)
    return Published(
        config=config,
        num_labels=num_labels,
        labels=labels if num_labels is not None else {},
        weights=weights,
        reading=reading,
        lacking=[name for name in may_lack if name not in weights],
    )


def _num_labels(weights: Weights, labels: Mapping[str, Any]) -> int | None:
    if "classifier.weight" not in weights:
        return None
    rows = weights["classifier.weight"].shape[0] if weights["classifier.weight"].shape else 0
    stated = len(labels["id2label"]) if isinstance(labels.get("id2label"), dict) else labels.get("num_labels", rows)
    if rows != stated:
        raise ConfigError(f"the configuration has {stated} classes, classifier.weight has {rows} rows")
    return rows
