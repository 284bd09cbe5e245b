"""Recognises a checkpoint and opens it: which format, which files, which configuration."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deberta_dist.checkpoint.errors import CheckpointError
from deberta_dist.checkpoint.find import CHECKPOINTS_NAME
from deberta_dist.checkpoint.manifest import MANIFEST_NAME, Manifest
from deberta_dist.conversion import files, huggingface, native, official, published
from deberta_dist.conversion.options import AS_IT_IS, CheckpointReadOptions
from deberta_dist.conversion.rules import Format, allowed_by
from deberta_dist.conversion.safetensors_files import read_safetensors
from deberta_dist.conversion.torch_files import TorchFile
from deberta_dist.conversion.weights import Weights, shorten
from deberta_dist.conversion.wrappers import require_whole, unwrap
from deberta_dist.errors import ConfigError, printable

SPM_NAME = "spm.model"
# In the order in which Hugging Face's classes look for them.
_WEIGHTS_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
CONFIG_NAMES = ("config.json", "model_config.json")
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_QUANTISED = ("quantization_config", "compression_config")
_OWN_CODE = (
    "the configuration names code of its own (auto_map), which is never run: the model is taken for the DeBERTa that the other "
    "keys describe"
)
_ADAPTER_NAME = "adapter_config.json"
_GENERATOR_CONFIG_NAME = "generator_config.json"


@dataclass(frozen=True, kw_only=True)
class CheckpointSource:
    """A recognised checkpoint; no tensor of it has been read.

    Attributes:
        path: As the user gave it.
        is_file: The user named a file, so that the rest of its directory is not the checkpoint's.
        directory: Where its files are.
        description: What was recognised, for the user.
        format: How its keys lead to published names.
        config: Its model configuration as it stands in the file.
        weights: By the file's own keys, without names of wrappers before them; each knows its key.
        options: What the user says about it.
        open_generator: Weights of a generator file beside a discriminator by its own keys, empty where none is.
        step: Optimizer steps done, of a run's checkpoint; None for other sources.
        tokenizer_sha256: Of the SentencePiece model that a run used.
        tokenizer_hints: Where that model may be.
        warnings: What a user should know.
        layout: Parallel sizes that wrote a run's checkpoint.
        manifest: Manifest of a run's checkpoint; None for other sources.
        verify: Compares every byte of a run's checkpoint with its checksums; raises CheckpointError.
    """

    path: Path
    is_file: bool
    directory: Path
    description: str
    format: Format
    config: Mapping[str, Any]
    weights: Weights
    options: CheckpointReadOptions = AS_IT_IS
    open_generator: Callable[[], Weights] = dict
    step: int | None = None
    tokenizer_sha256: str | None = None
    tokenizer_hints: tuple[Path, ...] = ()
    warnings: tuple[str, ...] = ()
    layout: Mapping[str, Any] | None = None
    manifest: Manifest | None = None
    verify: Callable[[], None] | None = None


def open_source(path: Path, *, verify: bool = True, options: CheckpointReadOptions = AS_IT_IS) -> CheckpointSource:
    """Recognises ``path``.

    Args:
        path: A directory or a file.
        verify: For a run's own checkpoint, compare every byte with its checksums first.
        options: What the user says about it.

    Raises:
        CheckpointError: nothing that is known, or damaged.
        ConfigError: no key begins with the prefix that the user gave.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if path.is_dir():
        names = [name for name in _WEIGHTS_NAMES if files.has(path, name)]
        if not names and is_run(path):
            if options.prefix:
                raise ConfigError(f"--prefix {options.prefix}: {path} is a run, whose names have none")
            return dataclasses.replace(_native(path, verify=verify), options=options)
        if files.has(path, _ADAPTER_NAME) and not names:
            raise CheckpointError(
                f"{path} is an adapter of PEFT ({_ADAPTER_NAME}) and not a model: load it on its base model, call "
                "merge_and_unload() and save the result"
            )
        if not names:
            there = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
            names = [p.name for p in there if p.suffix in SUFFIXES[:2]] or [p.name for p in there]
            if len(names) != 1:
                raise CheckpointError(
                    f"{path} is not a known kind of checkpoint: neither {MANIFEST_NAME} nor {CHECKPOINTS_NAME}/ (a run), "
                    f"nor {' nor '.join(_WEIGHTS_NAMES)}" + (f"; of {shorten(names)} name one" if names else "")
                )
        return _from_files(path, path, files.inside(path, names[0]), options=options)
    return _from_files(path, path.parent, path, options=options)


def _from_files(path: Path, directory: Path, weights_file: Path, *, options: CheckpointReadOptions) -> CheckpointSource:
    weights, embedded, others = _read_weights(weights_file, options=options)
    if odd := [key for key in weights if not key.isprintable()]:
        raise CheckpointError(f"{weights_file} has keys that cannot be printed: {shorten(odd)}")
    weights = unwrap(weights, prefix=options.prefix, where=weights_file, allow_unmapped=options.allow_unmapped)
    require_whole(weights, where=weights_file)
    is_generator = "generator" in weights_file.name
    config_names = [name for name in CONFIG_NAMES if files.has(directory, name)]
    if is_generator and files.has(directory, _GENERATOR_CONFIG_NAME):
        config_names = [_GENERATOR_CONFIG_NAME]
    if config_names:
        raw = files.read_json(files.inside(directory, config_names[0]))
    elif embedded is not None:
        raw = embedded
    else:
        raise CheckpointError(
            f"{directory} has no {' or '.join(CONFIG_NAMES)}: the sizes of the model are unknown; put the file of the model "
            f"that was trained beside {weights_file.name}"
        )
    raw = official.model_config(raw, is_generator=is_generator)
    for key in _QUANTISED:
        if raw.get(key) is not None and allowed_by(key, options.allow_unmapped) is None:
            raise CheckpointError(
                f"{directory / config_names[0] if config_names else weights_file} has {key}: the weights are quantised, which is "
                "not undone here; load the model with the library that made it, call dequantize() and save the result"
            )
    fmt, description = _recognise(raw, weights, weights_file)
    traits = [
        *(["fused projections of v1"] if any(key.endswith(".in_proj.weight") for key in weights) else []),
        *(["discriminator of v3"] if any(key.startswith("mask_predictions.") for key in weights) else []),
        *(["generator of v3"] if is_generator else []),
        *(["classifier"] if any(key.startswith("classifier.") for key in weights) else []),
        *(["question answering"] if any(key.startswith("qa_outputs.") for key in weights) else []),
        *(["prefix bert."] if any(key.startswith("bert.") for key in weights) else []),
    ]
    return CheckpointSource(
        path=path,
        is_file=path != directory,
        directory=directory,
        description=", ".join([description, *traits]),
        format=fmt,
        config=raw,
        weights=weights,
        open_generator=lambda: _generator(directory),
        options=options,
        warnings=(
            *([f"{weights_file.name} also holds {shorten(others)}: not part of the model, not read"] if others else []),
            *([_OWN_CODE] if raw.get("auto_map") else []),
        ),
    )


def is_run(path: Path) -> bool:
    """Whether a directory is a run's, or one of its checkpoints."""
    return files.has(path, MANIFEST_NAME) or (path / CHECKPOINTS_NAME).is_dir()


def _generator(directory: Path) -> Weights:
    if not files.has(directory, official.GENERATOR_NAME):
        return {}
    path = files.inside(directory, official.GENERATOR_NAME)
    return unwrap(TorchFile(path).weights, prefix=None, where=path)


def _recognise(raw: Mapping[str, Any], weights: Weights, weights_file: Path) -> tuple[Format, str]:
    # Ours and the published code's name a class at most, and the row of padding by another word.
    is_foreign = "padding_idx" not in raw or not raw.keys().isdisjoint({"pad_token_id", "transformers_version"})
    if (
        "model_type" in raw
        or ("architectures" in raw and is_foreign)
        or any(key.startswith("cls.predictions.") for key in weights)
    ):
        # Microsoft's releases on the hub have Hugging Face's configuration and Microsoft's keys; this reads both.
        listed = raw.get("architectures")
        name = printable(str(listed[0])) if isinstance(listed, list) and listed else "without a class"
        return huggingface.FORMAT, f"Hugging Face checkpoint ({printable(str(raw.get('model_type')))}, {name})"
    if weights_file.suffix == ".bin":
        return official.FORMAT, "Microsoft's published form"
    return published.FORMAT, "deberta_dist weights with published names"


def _read_weights(path: Path, *, options: CheckpointReadOptions) -> tuple[Weights, dict[str, Any] | None, list[str]]:
    """Weights, the configuration among them, and what else a file holds."""
    if path.name.endswith(".index.json"):
        weights: Weights = {}
        others: list[str] = []
        for name, keys in files.indexed_files(path).items():
            part, _, more = _read_weights_file(path.parent / name, options=options)
            others += [key for key in more if key not in others]
            keys = [key for key in keys if key not in more]
            absent = [key for key in keys if key not in part]
            if absent:
                raise CheckpointError(f"{path.parent / name} lacks {shorten(absent)}, which {path.name} says it holds")
            if twice := [key for key in part if key in weights]:
                raise CheckpointError(f"{path.parent / name} has {shorten(twice)} once more, which another file has")
            # What the index does not name is in the checkpoint all the same, and has to be explained.
            weights.update(part)
        return weights, None, others
    return _read_weights_file(path, options=options)


def _read_weights_file(path: Path, *, options: CheckpointReadOptions) -> tuple[Weights, dict[str, Any] | None, list[str]]:
    if path.suffix == ".safetensors":
        return read_safetensors(path), None, []
    if path.suffix in SUFFIXES:
        file = TorchFile(path, allow_unmapped=options.allow_unmapped)
        return file.weights, file.config, [str(key) for key in file.others]
    raise CheckpointError(f"{path} is neither .safetensors nor .bin (or {', '.join(SUFFIXES[2:])}): its kind is not known")


def _native(path: Path, *, verify: bool) -> CheckpointSource:
    try:
        checkpoint = native.NativeCheckpoint(path, verify=verify)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path / CHECKPOINTS_NAME} holds no checkpoint yet") from error
    manifest = checkpoint.manifest
    data = manifest.run_config.get("data")
    named = data.get("tokenizer") if isinstance(data, dict) else None
    # A run keeps a copy beside its checkpoints; the path it was given may be gone, or of another machine.
    hints = (checkpoint.directory.parent.parent / SPM_NAME, *([Path(named)] if isinstance(named, str) else []))
    return CheckpointSource(
        path=path,
        is_file=False,
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
        manifest=manifest,
        verify=checkpoint.verify,
    )
