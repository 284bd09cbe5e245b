"""Drives a conversion: source -> published names -> target, one tensor in memory at a time."""

import dataclasses
import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from deberta_dist.checkpoint.errors import CheckpointError
from deberta_dist.conversion import custom_code, hub, huggingface, official, onnx_files, published, v1_in_proj
from deberta_dist.conversion.canonical import CanonicalCheckpoint, as_asked, require_decoder, to_canonical
from deberta_dist.conversion.find_tokenizer import find_tokenizer, tokenizer_names
from deberta_dist.conversion.heads import SUFFIXES
from deberta_dist.conversion.model_card import model_card
from deberta_dist.conversion.options import CheckpointReadOptions
from deberta_dist.conversion.output import (
    REPORT_NAME,
    OutputDirectory,
    new_directory,
    require_apart,
    require_free,
)
from deberta_dist.conversion.report import dtype_names, make_report
from deberta_dist.conversion.safetensors_files import write_safetensors
from deberta_dist.conversion.source import CheckpointSource, open_source
from deberta_dist.conversion.target import Target
from deberta_dist.conversion.tokenizer_export import TokenizerResult, write_tokenizer
from deberta_dist.conversion.torch_files import write_torch_file
from deberta_dist.conversion.weights import DTYPES, DroppedKey, Weights, in_one_dtype, shorten
from deberta_dist.errors import ConfigError
from deberta_dist.models.defaults import V1, V2
from deberta_dist.models.encoder import DebertaModel
from deberta_dist.models.heads import LABELLED, MASKED_LM, model_with_head
from deberta_dist.models.initialisation import without_memory
from deberta_dist.values import CONVERSION_FORMATS

MAX_SHARD_BYTES = 5 * 10**9


def convert(
    source_path: Path,
    target_path: Path,
    *,
    to: str,
    dtype: str | None = None,
    is_fused: bool = False,
    allow_unmapped: Sequence[str] = (),
    prefix: str | None = None,
    decoder: str | None = None,
    tokenizer_path: Path | None = None,
    force: bool = False,
    with_code: bool = False,
    license_name: str | None = None,
    languages: Sequence[str] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
    max_inline_bytes: int = onnx_files.MAX_INLINE_BYTES,
) -> dict[str, Any]:
    """Converts a checkpoint.

    Args:
        source_path: Run directory, checkpoint directory or weights file, as `source.open_source` takes it.
        target_path: Directory to make; it appears when everything in it is complete.
        to: One of ``CONVERSION_FORMATS``.
        dtype: A key of ``weights.DTYPES``; None keeps what the source has, of several formats the one that holds all.
        is_fused: Write the fused projections of v1.
        allow_unmapped, prefix, decoder: What the user says about the source, see `options.CheckpointReadOptions`.
        tokenizer_path: SentencePiece model; by default the one that lies with the source.
        force: Replace a converted checkpoint.
        with_code: Hugging Face only: with a masked language model, also write the code of its enhanced mask decoder.
        license_name: Hugging Face only: see `hub.license_fields`.
        languages: Hugging Face only: see `hub.language_codes`.
        max_shard_bytes: Hugging Face only: start another file before one grows beyond this.
        max_inline_bytes: ONNX only: weights of more lie in a file beside the program.

    Returns:
        The report, which also lies in the directory.

    Raises:
        ConfigError: the configuration or the request is refused, or the target exists.
        DataError: the source or the tokenizer is refused.
        CheckpointWriteError: the target cannot be written.
    """
    assert to in CONVERSION_FORMATS and (dtype is None or dtype in DTYPES)
    # Said before the work, not after it.
    require_free(target_path, force=force)
    _require_options_of_target(to, is_fused=is_fused, for_hub=with_code or license_name is not None or bool(languages))
    for_hub: dict[str, Any] = {} if license_name is None else hub.license_fields(license_name)
    for_hub |= {"language": hub.language_codes(languages)} if languages else {}
    # Rounding comes last, so that the report can say which number formats the source has.
    options = CheckpointReadOptions(allow_unmapped=tuple(allow_unmapped), prefix=prefix, decoder=decoder)
    source = open_source(source_path, options=options)
    require_apart(source.path if source.is_file else source.directory, target_path)
    model = to_canonical(source)
    if to != "huggingface":
        require_decoder(model, where=source_path)
    source_dtype = dtype_names(model.weights)
    is_rounded = dtype not in (None, "float32") and any(w.dtype != DTYPES[dtype] for w in model.weights.values())
    model, warnings = _in_target_dtype(model, options, dtype=dtype)
    tokenizer, message = find_tokenizer(source, given=tokenizer_path, config=model.config)
    limits = {"huggingface": max_shard_bytes, "onnx": max_inline_bytes}
    target = _TARGET_OF[to](model, is_fused, limits.get(to))
    if with_code:
        target = custom_code.with_code(target, model, where=source_path)

    found = _Converted(source=source, model=model, source_dtype=source_dtype, is_rounded=is_rounded, warnings=warnings)
    with new_directory(target_path, force=force, num_bytes=target.num_bytes) as output:
        output.write_text(target.config_name, json.dumps(target.config, indent=2) + "\n")
        notes = target.write(output)
        result = write_tokenizer(
            output,
            source,
            tokenizer=tokenizer,
            message=message,
            model_type=str(target.config["model_type"]) if to in ("huggingface", "onnx") else "",
            is_given=tokenizer_path is not None,
            config=model.config,
        )
        if to == "huggingface":
            output.write_text("README.md", model_card(source, model, target=target, tokenizer=result, for_hub=for_hub))
        return _write_report(output, found, target, result, to=to, notes=notes)


@dataclass(frozen=True)
class _Converted:
    """What a report says of the source.

    Attributes:
        source: What was read.
        model: In published names, in the target's number format.
        source_dtype: Number formats of the source.
        is_rounded: Whether the target's is narrower than one of them.
        warnings: What reading it gave rise to.
    """

    source: CheckpointSource
    model: CanonicalCheckpoint
    source_dtype: Sequence[str]
    is_rounded: bool
    warnings: Sequence[str]


def _write_report(
    output: OutputDirectory,
    found: _Converted,
    target: Target,
    tokenizer: TokenizerResult,
    *,
    to: str,
    notes: Sequence[str],
) -> dict[str, Any]:
    """Writes the report, after everything else, and returns it."""
    warnings = [
        *found.warnings,
        *_warnings(found.model, target, tokenizer, is_rounded=found.is_rounded),
        *_left_behind(found.source, tokenizer),
        *notes,
    ]
    report = make_report(
        found.source,
        found.model,
        source_dtype=found.source_dtype,
        written=target.weights,
        lost=target.lost,
        target_format=f"{to} ({target.architecture})" if target.architecture else to,
        details={"tokenizer": dataclasses.asdict(tokenizer), "warnings": warnings, "files": dict(output.files)},
    )
    output.write_text(REPORT_NAME, json.dumps(report, indent=1) + "\n")
    return report


def _require_options_of_target(to: str, *, is_fused: bool, for_hub: bool) -> None:
    """Refuses options that mean nothing for the target, and a target whose libraries are missing."""
    if is_fused and to == "deberta_dist":
        raise ConfigError("--fused is for the targets official and huggingface; deberta_dist has separate projections")
    if to != "huggingface" and for_hub:
        raise ConfigError(f"--with-code, --license and --language are for the target huggingface, not for {to}")
    if to == "onnx" and is_fused:
        raise ConfigError("--fused is for the targets official and huggingface; a program has no names to choose")
    if to == "onnx":
        onnx_files.require_exporter()


def _in_target_dtype(
    model: CanonicalCheckpoint, options: CheckpointReadOptions, *, dtype: str | None
) -> tuple[CanonicalCheckpoint, list[str]]:
    """The model in the number format asked for, by default in one that holds all that it has; and what to say of that."""
    if dtype is not None:
        return as_asked(model, dataclasses.replace(options, dtype=dtype)), []
    if odd := [name for name, weight in model.weights.items() if weight.dtype not in DTYPES.values()]:
        raise ConfigError(f"{shorten(odd)} are neither float32, bfloat16 nor float16: say with --dtype what to write")
    weights, mixed = in_one_dtype(model.weights)
    return dataclasses.replace(model, weights=weights), [f"{mixed}; --dtype chooses another"] if mixed else []


def _huggingface(model: CanonicalCheckpoint, is_fused: bool, max_bytes: int | None) -> Target:
    kind, why = huggingface.model_type(model.weights, config=model.config, head=model.head, is_fused=is_fused)
    architecture = huggingface.class_name(model.weights, kind=kind, head=model.head)
    is_masked_lm = model.decoder is not None
    # The head that the newer class has is as wide as the hidden states. The older one is trained without the enhanced
    # mask decoder.
    is_legacy = is_masked_lm and (
        model.config.embedding_width != model.config.hidden_size or (model.is_legacy and model.decoder != "emd")
    )
    weights = huggingface.to_huggingface(
        model.weights, config=model.config, kind=kind, architecture=architecture, is_legacy=is_legacy
    )
    config = huggingface.to_config(
        model.config,
        kind=kind,
        architecture=architecture,
        dtype=_main_dtype(weights),
        labels=model.labels,
        num_labels=model.num_labels if model.head in LABELLED else None,
        decoder=model.decoder if model.knows_decoder else None,
        is_legacy=is_legacy,
    )
    return Target(
        weights=weights,
        write=lambda output: _write_shards(output, weights, max_bytes=max_bytes),
        num_bytes=_num_bytes(weights),
        config_name=huggingface.CONFIG_NAME,
        config=config,
        lost=_lost(model.weights) if kind == V1 else (),
        architecture=architecture,
        why_class=why,
    )


def _official(model: CanonicalCheckpoint, is_fused: bool, max_bytes: int | None) -> Target:
    if model.head in ("token", "span"):
        raise ConfigError(
            f"the published code has no model with this head ({SUFFIXES[model.head]}): convert to huggingface or deberta_dist"
        )
    if model.decoder == "plain" and not model.config.position_biased_input:
        raise ConfigError(
            "the published code decodes with the enhanced mask decoder where position_biased_input is false, and this "
            "masked language model was trained without it: convert to huggingface or deberta_dist"
        )
    weights = official.to_official(model.weights, config=model.config, is_fused=is_fused)

    def write(output: OutputDirectory) -> list[str]:
        output.write(official.WEIGHTS_NAME, lambda file: write_torch_file(file, weights))
        return []

    return Target(
        weights=weights,
        write=write,
        num_bytes=_num_bytes(weights),
        config_name=official.CONFIG_NAME,
        config={**official.to_config(model.config), **model.head_config},
        lost=_lost(model.weights) if is_fused else (),
    )


def _published(model: CanonicalCheckpoint, is_fused: bool, max_bytes: int | None) -> Target:
    return Target(
        weights=model.weights,
        write=lambda output: _write_shards(output, model.weights, max_bytes=max_bytes),
        num_bytes=_num_bytes(model.weights),
        config_name=published.CONFIG_NAME,
        config=published.to_config(model.config, head=model.head_config),
    )


def _onnx(model: CanonicalCheckpoint, is_fused: bool, max_bytes: int | None) -> Target:
    onnx_files.require_dtype(next(iter(model.weights.values())).dtype)
    assert max_bytes is not None, "ONNX has a limit"
    built, names = build_model(model, where="the source")
    program = onnx_files.export(built, config=model.config)
    kind = V2 if huggingface.needs_v2(model.config) else V1
    weights = {name: model.weights[name] for name in names}
    architecture = huggingface.class_name(weights, kind=kind, head=model.head)
    return Target(
        weights=weights,
        write=lambda output: [onnx_files.write(output, program, max_inline_bytes=max_bytes)],
        num_bytes=program.num_bytes,
        config_name=huggingface.CONFIG_NAME,
        # For runtimes that choose a tokenizer and a task by it.
        config=huggingface.to_config(
            model.config,
            kind=kind,
            architecture=architecture,
            dtype=_main_dtype(model.weights),
            labels=model.labels,
            num_labels=model.num_labels if model.head in LABELLED else None,
            decoder=model.decoder if model.knows_decoder else None,
            is_legacy=False,
        ),
        lost=[DroppedKey(name, "the program does not compute with it") for name in model.weights if name not in names],
        architecture=f"{', '.join(program.inputs)} -> {', '.join(program.outputs)}; opset {onnx_files.OPSET}",
    )


_TARGET_OF = {"huggingface": _huggingface, "official": _official, "deberta_dist": _published, "onnx": _onnx}


def _lost(weights: Weights) -> list[DroppedKey]:
    return [DroppedKey(key, "zero, and the fused form has no place for it") for key in v1_in_proj.lost_biases(weights)]


def _num_bytes(weights: Weights) -> int:
    return sum(weight.num_bytes for weight in weights.values())


def _main_dtype(weights: Weights) -> str:
    """The number format of most bytes."""
    sizes = dict.fromkeys(dtype_names(weights), 0)
    for name, dtype in DTYPES.items():
        sizes[name] = sum(weight.num_bytes for weight in weights.values() if weight.dtype == dtype)
    return max(sizes, key=lambda name: sizes[name])


def _write_shards(output: OutputDirectory, weights: Weights, *, max_bytes: int | None) -> list[str]:
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
        return []
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        output.write(file_name, functools.partial(write_safetensors, weights=shard))
        weight_map.update(dict.fromkeys(shard, file_name))
    index = {"metadata": {"total_size": _num_bytes(weights)}, "weight_map": weight_map}
    output.write_text(huggingface.WEIGHTS_NAME + ".index.json", json.dumps(index, indent=1) + "\n")
    return []


# What a model is made of, what is written anew, and hidden files.
_READ = re.compile(
    r"\..*|README\.md|conversion_report\.json|(model_|generator_)?config\.json|.*\.(safetensors|bin|pt|pth|ckpt|index\.json)"
).fullmatch


def _left_behind(source: CheckpointSource, tokenizer: TokenizerResult) -> list[str]:
    """What else lies in a source's directory: it may be part of a pipeline of another library."""
    if source.is_file or source.layout is not None:
        return []
    own = {*tokenizer.files, *tokenizer_names(source)}
    entries = sorted(path for path in source.directory.iterdir() if path.name not in own)
    names = [f"{path.name}/" if path.is_dir() else path.name for path in entries if path.is_dir() or not _READ(path.name)]
    return [f"not carried, since no part of the model or its tokenizer: {shorten(names, most=10)}"] if names else []


def _warnings(model: CanonicalCheckpoint, target: Target, tokenizer: TokenizerResult, *, is_rounded: bool) -> list[str]:
    return [
        *model.reading.warnings,
        *([target.why_class] if target.why_class else []),
        *(["numbers were rounded to a narrower format"] if is_rounded else []),
        f"tokenizer: {tokenizer.message}",
    ]


def build_model(found: CanonicalCheckpoint, *, where: object) -> tuple[nn.Module, list[str]]:
    """The model of a checkpoint, with the head that `CanonicalCheckpoint.model_head` says.

    Args:
        found: The checkpoint; all its weights have one number format.
        where: Prefix of messages: the source.

    Returns:
        The model in evaluation mode, and the published names of the weights that it holds.

    Raises:
        CheckpointError: the checkpoint lacks some of them.
    """
    head = found.model_head
    with without_memory():
        model: nn.Module
        if head:
            model, prefix = model_with_head(found.config, head, num_labels=found.num_labels), ""
        else:
            model, prefix = DebertaModel(found.config, seed=None), "deberta."
    names = {name: prefix + name for name, _ in model.named_parameters()}
    if head != MASKED_LM:
        # Absolute positions of a decoder that this model does not have.
        names = {name: key for name, key in names.items() if key in found.weights or key not in found.lacking}
    if missing := [key for key in names.values() if key not in found.weights]:
        raise CheckpointError(f"{where} is no whole {type(model).__name__}: it lacks {shorten(missing)}")
    state = {name: found.weights[key].read() for name, key in names.items()}
    model.load_state_dict(state, strict=len(names) == len(list(model.parameters())), assign=True)
    model.eval().requires_grad_(False)
    return model, list(names.values())
