"""Drives a conversion: source -> published names -> target, one tensor in memory at a time."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deberta_dist.conversion import fused, huggingface, official, published
from deberta_dist.conversion.carry import TokenizerResult, find_tokenizer, write_tokenizer
from deberta_dist.conversion.meeting import Published, to_published
from deberta_dist.conversion.model_card import model_card
from deberta_dist.conversion.output import (
    REPORT_NAME,
    OutputDirectory,
    new_directory,
    require_apart,
    require_free,
)
from deberta_dist.conversion.report import dtype_names, make_report
from deberta_dist.conversion.safetensors_files import write_safetensors
from deberta_dist.conversion.source import Source, open_source
from deberta_dist.conversion.torch_files import write_torch_file
from deberta_dist.conversion.weights import DTYPES, Dropped, Weights, in_one_dtype, shorten
from deberta_dist.errors import ConfigError

TARGETS = ("huggingface", "official", "deberta_dist")
MAX_SHARD_BYTES = 5 * 10**9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """What is to be written.

    Attributes:
        weights: By the target's own keys.
        config_name: Name of the configuration file.
        config: Its contents.
        lost: Keys that the target has no place for.
        architecture: Hugging Face class, empty for other targets.
        why_class: Reason for it.
    """

    weights: Weights
    config_name: str
    config: Mapping[str, Any]
    lost: Sequence[Dropped] = ()
    architecture: str = ""
    why_class: str = ""


def convert(
    source_path: Path,
    target_path: Path,
    *,
    to: str,
    dtype: str | None = None,
    is_fused: bool = False,
    allow_unmapped: Sequence[str] = (),
    tokenizer_path: Path | None = None,
    force: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, Any]:
    """Converts a checkpoint.

    Args:
        source_path: See `source.open_source`.
        target_path: Directory to make.
        to: One of ``TARGETS``.
        dtype: A key of ``weights.DTYPES``; None keeps what the source has, of several formats the one that holds all.
        is_fused: Write the fused projections of v1.
        allow_unmapped: fnmatch patterns of keys that may be left out without another reason.
        tokenizer_path: SentencePiece model; by default the one that lies with the source.
        force: Replace a converted checkpoint.
        max_shard_bytes: Hugging Face only: start another file before one grows beyond this.

    Returns:
        The report, which also lies in the directory.

    Raises:
        ConfigError: the configuration or the request is refused, or the target exists.
        DataError: the source or the tokenizer is refused.
        CheckpointWriteError: the target cannot be written.
    """
    assert to in TARGETS and (dtype is None or dtype in DTYPES)
    # Said before the work, not after it.
    require_free(target_path, force=force)
    if is_fused and to == "deberta_dist":
        raise ConfigError("--fused is for the targets official and huggingface; deberta_dist has separate projections")
    source = open_source(source_path)
    require_apart(source.path if source.is_file else source.directory, target_path)
    model = to_published(source, allow_unmapped=allow_unmapped)
    if dtype is None and (odd := [n for n, w in model.weights.items() if w.dtype not in DTYPES.values()]):
        raise ConfigError(f"{shorten(odd)} are neither float32, bfloat16 nor float16: say with --dtype what to write")
    is_rounded = dtype not in (None, "float32") and any(w.dtype != DTYPES[dtype] for w in model.weights.values())
    source_dtype = dtype_names(model.weights)
    mixed = ""
    if dtype is None:
        one, mixed = in_one_dtype(model.weights)
        model = dataclasses.replace(model, weights=one)
    else:
        weights = {name: weight.as_dtype(DTYPES[dtype], name=name) for name, weight in model.weights.items()}
        model = dataclasses.replace(model, weights=weights)
    tokenizer, message = find_tokenizer(source, given=tokenizer_path, config=model.config)
    target = _TARGET_OF[to](model, is_fused)

    num_bytes = sum(weight.num_bytes for weight in target.weights.values())
    with new_directory(target_path, force=force, num_bytes=num_bytes) as output:
        output.write_text(target.config_name, json.dumps(target.config, indent=2) + "\n")
        if to == "official":
            output.write(official.WEIGHTS_NAME, lambda file: write_torch_file(file, target.weights))
        else:
            _write_shards(output, target.weights, max_bytes=max_shard_bytes if to == "huggingface" else None)
        result = write_tokenizer(
            output,
            source,
            tokenizer=tokenizer,
            message=message,
            for_huggingface=to == "huggingface",
            is_given=tokenizer_path is not None,
            max_length=model.config.max_position_embeddings,
        )
        if to == "huggingface":
            output.write_text("README.md", _card(source, model, target, result))
        report = make_report(
            source,
            model,
            source_dtype=source_dtype,
            written=target.weights,
            lost=target.lost,
            target_format=f"{to} ({target.architecture})" if target.architecture else to,
            details={
                "tokenizer": dataclasses.asdict(result),
                "warnings": [
                    *([f"{mixed}; --dtype chooses another"] if mixed else []),
                    *_warnings(model, target, result, is_rounded=is_rounded),
                ],
                "files": dict(output.files),
            },
        )
        output.write_text(REPORT_NAME, json.dumps(report, indent=1) + "\n")
    return report


def _huggingface(model: Published, is_fused: bool) -> Target:
    kind, why = huggingface.model_type(model.weights, config=model.config, is_fused=is_fused)
    architecture = huggingface.class_name(model.weights, kind=kind, listed=model.listed_class)
    weights = huggingface.to_huggingface(model.weights, config=model.config, kind=kind)
    config = huggingface.to_config(
        model.config,
        kind=kind,
        architecture=architecture,
        dtype=_main_dtype(weights),
        labels=model.labels,
        num_labels=model.num_labels,
    )
    return Target(
        weights=weights,
        config_name=huggingface.CONFIG_NAME,
        config=config,
        lost=_lost(model.weights) if kind == huggingface.V1 else (),
        architecture=architecture,
        why_class=why,
    )


def _official(model: Published, is_fused: bool) -> Target:
    return Target(
        weights=official.to_official(model.weights, config=model.config, is_fused=is_fused),
        config_name=official.CONFIG_NAME,
        config={**official.to_config(model.config), **model.labels},
        lost=_lost(model.weights) if is_fused else (),
    )


def _published(model: Published, is_fused: bool) -> Target:
    return Target(
        weights=model.weights,
        config_name=published.CONFIG_NAME,
        config=published.to_config(model.config, labels=model.labels),
    )


_TARGET_OF = {"huggingface": _huggingface, "official": _official, "deberta_dist": _published}


def _lost(weights: Weights) -> list[Dropped]:
    return [Dropped(key, "zero, and the fused form has no place for it") for key in fused.lost_biases(weights)]


def _main_dtype(weights: Weights) -> str:
    """The number format of most bytes."""
    sizes = dict.fromkeys(dtype_names(weights), 0)
    for name, dtype in DTYPES.items():
        sizes[name] = sum(weight.num_bytes for weight in weights.values() if weight.dtype == dtype)
    return max(sizes, key=lambda name: sizes[name])


def _write_shards(output: OutputDirectory, weights: Weights, *, max_bytes: int | None) -> None:
    """``model.safetensors``, or several files with an index beyond ``max_bytes``."""
    shards: list[Weights] = [{}]
    size = 0
    for name, weight in weights.items():
        if max_bytes is not None and shards[-1] and size + weight.num_bytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = weight
        size += weight.num_bytes
    if len(shards) == 1:
        output.write(huggingface.WEIGHTS_NAME, lambda file: write_safetensors(file, weights))
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        output.write(file_name, lambda file, shard=shard: write_safetensors(file, shard))
        weight_map.update(dict.fromkeys(shard, file_name))
    total = sum(weight.num_bytes for weight in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    output.write_text(huggingface.WEIGHTS_NAME + ".index.json", json.dumps(index, indent=1) + "\n")


def _card(source: Source, model: Published, target: Target, tokenizer: TokenizerResult) -> str:
    return model_card(
        source,
        model,
        architecture=target.architecture,
        dtype="/".join(dtype_names(target.weights)),
        why_class=target.why_class,
        tokenizer=tokenizer.message,
        has_tokenizer="tokenizer.json" in tokenizer.files,
    )


def _warnings(model: Published, target: Target, tokenizer: TokenizerResult, *, is_rounded: bool) -> list[str]:
    return [
        *model.reading.warnings,
        *([target.why_class] if target.why_class else []),
        *(["numbers were rounded to a narrower format"] if is_rounded else []),
        f"tokenizer: {tokenizer.message}",
    ]
