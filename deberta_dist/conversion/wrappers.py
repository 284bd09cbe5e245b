"""Removes what training code puts around a model: prefixes of parameter names, and dictionaries around the state dictionary.

Everything here acts on the keys of a file, before its format is recognised. Nothing is guessed: a name that is no known
wrapper, and a file with several models, are errors that say what was seen.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from deberta_dist.checkpoint.errors import CheckpointError
from deberta_dist.conversion.rules import allowed_by
from deberta_dist.conversion.weights import Weights, shorten
from deberta_dist.errors import ConfigError, printable

CONTAINERS = ("state_dict", "model_state_dict", "model", "module")
"""Entries of a training checkpoint that are the model: of Lightning, of much hand-written code, of DeepSpeed."""
# Around any module, hence anywhere in a name; no published name has them.
_ANYWHERE = ("module", "_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module")
# Attributes that hold the model or its backbone, hence in front.
_IN_FRONT = ("model", "base_model", "encoder", "backbone", "deberta", "bert")
_WHY = "wrapper of training code"
# Where a backbone lies, whatever stands before it; a backbone inside a model is called deberta, or bert.
_BACKBONE = re.compile(r"(|.*?\.)(?:(?:deberta|bert)\.)?(?:embeddings\.word_embeddings|encoder\.layer\.\d+\.attention)\..*")
_ADAPTER = re.compile(
    r"(.*\.)?(lora_\w+|ia3_l|hada_\w+|lokr_\w+|vera_\w+|boft_\w+|oft_\w+|base_layer|modules_to_save|original_module|"
    r"prompt_encoder)(\..*)?"
)


def tensors_in(state: Mapping[Any, Any], *, where: object) -> tuple[tuple[str, ...], Mapping[Any, Any]]:
    """The state dictionary inside a training checkpoint, and the entries on the way to it.

    Raises:
        CheckpointError: two entries could be the model.
    """
    way: tuple[str, ...] = ()
    while found := [name for name in CONTAINERS if _holds_tensors(state.get(name))]:
        if len(found) > 1:
            raise CheckpointError(
                f"{where} has several entries that could be the model: {shorten(found)}: save the one that is meant alone"
            )
        way, state = (*way, found[0]), state[found[0]]
    return way, state


def _holds_tensors(value: object) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, Tensor) or _holds_tensors(v) for v in value.values())


def unwrap(weights: Weights, *, prefix: str | None, where: object, allow_unmapped: Sequence[str] = ()) -> Weights:
    """The weights without the names of wrappers before, and in, their names.

    Args:
        weights: By the file's own keys.
        prefix: Given by the user, with or without the dot at its end; None: known wrappers alone.
        where: Prefix of messages: the source.
        allow_unmapped: Patterns of the file's keys. Where two keys become one, the one that they name keeps its own.

    Raises:
        ConfigError: no key begins with ``prefix``, or the model has more before its names.
        CheckpointError: the names before the model are not known or there are several, two keys become one, or adapters
            were not merged.
    """
    if adapters := [k for k in weights if _ADAPTER.fullmatch(k) and allowed_by(k, allow_unmapped) is None]:
        raise CheckpointError(
            f"{where} has {len(adapters)} keys of adapters that are not merged into the weights ({shorten(adapters, most=2)}): "
            "call merge_and_unload() of PEFT and save the result"
        )
    names = {key: _without(key) for key in weights}
    front = _front(names, where=where) if prefix is None else _given(prefix, names, where=where)
    found: Weights = {}
    for key, name in names.items():
        name = name.removeprefix(front)
        if name in found and allowed_by(key, allow_unmapped) is not None:
            name = key
        elif name in found:
            other = found[name].origin[0]
            if other in found or allowed_by(other, allow_unmapped) is None:
                raise CheckpointError(
                    f"{where}: keys {printable(other)} and {printable(key)} are both {printable(name)}; to leave one out, give "
                    "--allow-unmapped KEY"
                )
            found[other] = weights[other]
        found[name] = weights[key] if name == key else replace(weights[key], why=_WHY)
    return found


def require_whole(weights: Weights, *, where: object) -> None:
    """Refuses the files of one rank of ZeRO-3, which hold names and shapes of nothing.

    Raises:
        CheckpointError: most tensors are empty.
    """
    empty = [key for key, weight in weights.items() if 0 in weight.shape]
    if len(empty) > len(weights) // 2:
        raise CheckpointError(
            f"{where}: {len(empty)} of {len(weights)} tensors are empty ({shorten(empty, most=2)}), as in the files of DeepSpeed's "
            "ZeRO-3: gather them first with the zero_to_fp32.py that lies with the checkpoint"
        )


def _without(key: str) -> str:
    """A name without the wrappers that may stand anywhere in it."""
    return ".".join(part for part in key.split(".") if part not in _ANYWHERE)


def _front(names: Mapping[str, str], *, where: object) -> str:
    fronts = Counter(match[1] for name in names.values() if (match := _BACKBONE.fullmatch(name)))
    if not fronts or "" in fronts:
        return ""
    counts = {front: sum(name.startswith(front) for name in names.values()) for front in fronts}
    if len(fronts) > 1:
        listed = ", ".join(f"{printable(front)!r} ({count} keys)" for front, count in list(counts.items())[:4])
        raise CheckpointError(f"{where} has {len(fronts)} models, at {listed}: say with --prefix which is meant")
    (front,) = fronts
    if all(part in _IN_FRONT for part in front.rstrip(".").split(".")):
        return front
    raise CheckpointError(
        f"{where}: {counts[front]} of {len(names)} keys begin with {printable(front)!r}, which is not a known wrapper: if the "
        f"model is there, give --prefix {printable(front)}"
    )


def _given(prefix: str, names: Mapping[str, str], *, where: object) -> str:
    front = _without(prefix.rstrip(".") + ".") if prefix.rstrip(".") else ""
    behind = [name.removeprefix(front) for name in names.values() if name.startswith(front)]
    if not behind:
        raise ConfigError(f"--prefix {prefix}: no key of {where} begins with it; its keys are {shorten(names, most=3)}")
    further = {match[1] for name in behind if (match := _BACKBONE.fullmatch(name))}
    if further and "" not in further:
        listed = " or ".join(f"--prefix {printable(front + rest)}" for rest in sorted(further)[:4])
        raise ConfigError(f"--prefix {prefix}: the model of {where} lies deeper: give {listed}")
    return front
