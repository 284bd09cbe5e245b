"""Finds the heads of a checkpoint by the names of its weights and the class in its configuration."""

import dataclasses
from collections.abc import Container, Iterable, Mapping, Sequence
from types import MappingProxyType

from torch import nn

from deberta_dist.checkpoint.errors import CheckpointError
from deberta_dist.conversion.rules import Reading, allowed_by
from deberta_dist.conversion.weights import Weights, shorten
from deberta_dist.errors import ConfigError
from deberta_dist.models.classification import ReplacedTokenHead
from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.heads import LABELLED, MASKED_LM, REPLACED_TOKENS, model_with_head
from deberta_dist.models.initialisation import without_memory
from deberta_dist.models.masked_lm import MaskedLMPredictions

SUFFIXES: Mapping[str, str] = MappingProxyType(
    {
        "sequence": "ForSequenceClassification",
        "choice": "ForMultipleChoice",
        "token": "ForTokenClassification",
        "span": "ForQuestionAnswering",
    }
)
"""Head of fine-tuning -> how Hugging Face's classes with it end."""
_ROWS = {"sequence": "classifier.weight", "choice": "classifier.weight", "token": "classifier.weight"} | {
    "span": "qa_outputs.weight"
}
Shapes = dict[str, tuple[int, ...]]


def find_heads(names: Container[str], *, listed_class: str, beside: Container[str] = ()) -> tuple[str, ...]:
    """The heads that a checkpoint has something of, at most one of fine-tuning, which comes last.

    Args:
        names: Published names of the weights that the checkpoint has.
        listed_class: Hugging Face class that its configuration names; may be empty.
        beside: Further names that the file has and that are left out.
    """
    found = []
    if any(f"lm_predictions.lm_head.{leaf}" in names for leaf in ("dense.weight", "LayerNorm.weight", "bias")):
        found.append(MASKED_LM)
    if any(f"mask_predictions.{leaf}.weight" in names for leaf in ("dense", "LayerNorm", "classifier")):
        found.append(REPLACED_TOKENS)
    listed = listed_head(listed_class)
    # A projection between encoder and classifier is of the published code's own heads (apps/models/ner.py and
    # record_qa.py@4d7fe0bd), which are not built here: without it their classifier would read something else.
    has_classifier = "classifier.weight" in names and "proj.weight" not in names and "proj.weight" not in beside
    possible = []
    if has_classifier and ("pooler.dense.weight" in names or listed in ("sequence", "choice")):
        possible.append("choice" if listed == "choice" else "sequence")
    if has_classifier and ("pooler.dense.weight" not in names or listed == "token"):
        possible.append("token")
    if "qa_outputs.weight" in names and ("qa_outputs.bias" in names or listed == "span"):
        possible.append("span")
    if possible:
        found.append(listed if listed in possible else possible[0])
    return tuple(found)


def listed_head(listed_class: str) -> str | None:
    """The head of fine-tuning that a class of Hugging Face has."""
    return next((head for head, suffix in SUFFIXES.items() if listed_class.endswith(suffix)), None)


def num_rows(names: Weights, heads: Sequence[str]) -> int | None:
    """Rows of the head of fine-tuning, None without one."""
    if not heads or heads[-1] not in _ROWS:
        return None
    shape = names[_ROWS[heads[-1]]].shape
    return shape[0] if shape else 0


def require_rows(where: object, *, head: str, rows: int, stated: object) -> None:
    """Refuses a head with another number of rows than its configuration says, or than it needs.

    Raises:
        ConfigError: it has.
    """
    if head not in LABELLED:
        needed = 2 if head == "span" else 1
        if rows != needed:
            raise ConfigError(f"{where}: {_ROWS[head]} has {rows} rows, and {SUFFIXES[head]} needs {needed}")
    elif stated is not None and rows != stated:
        raise ConfigError(f"{where}: the configuration has {stated!r} classes, {_ROWS[head]} has {rows} rows")


def head_shapes(config: DebertaConfig, heads: Iterable[str], *, rows: int | None) -> dict[str, Shapes]:
    """Head -> published name of every parameter -> its full shape."""
    found = {}
    # Layers cost time and are no head.
    config = dataclasses.replace(config, num_hidden_layers=1)
    for head in heads:
        with without_memory():
            if head == MASKED_LM:
                model: nn.Module = nn.ModuleDict({"lm_predictions": MaskedLMPredictions(config)})
            elif head == REPLACED_TOKENS:
                model = nn.ModuleDict({"mask_predictions": ReplacedTokenHead(config)})
            else:
                model = model_with_head(config, head, num_labels=rows if head in LABELLED and rows else None)
        found[head] = {n: tuple(p.shape) for n, p in model.named_parameters() if not n.startswith("deberta.")}
    return found


def settle_heads(
    reading: Reading, shapes: Mapping[str, Shapes], *, is_backbone_whole: bool, allow_unmapped: Sequence[str], where: object
) -> None:
    """Leaves heads out that are not whole, where patterns allow that; refuses them where not.

    Args:
        reading: By published names; changed in place.
        shapes: Expected shapes by head and published name, from `head_shapes`.
        is_backbone_whole: The weights beside the heads fit the configuration.
        allow_unmapped: fnmatch patterns of the file's keys.
        where: Prefix of messages: the source.

    Raises:
        CheckpointError: a head lacks a weight, or one has another shape, and no pattern names its keys.
    """
    for head, expected in shapes.items():
        odd = [
            f"{name} is {list(reading.weights[name].shape)}, expected {list(shape)}"
            if name in reading.weights
            else f"{name} is missing"
            for name, shape in expected.items()
            if name not in reading.weights or reading.weights[name].shape != shape
        ]
        if not odd:
            continue
        here = [name for name in expected if name in reading.weights]
        allowed = {name: _pattern(reading.weights[name].origin, allow_unmapped) for name in here}
        if all(allowed.values()):
            for name, pattern in allowed.items():
                reading.drop(name, why=f"--allow-unmapped {pattern}: its {head} head is not whole")
        elif is_backbone_whole:
            keys = {key: name for name in here for key in reading.weights[name].origin}
            # As the file spells them, whatever stands before the name.
            patterns = sorted({f"'{key.removesuffix(name)}{name.split('.')[0]}.*'" for key, name in keys.items()})
            raise CheckpointError(
                f"{where}: its {head} head is not whole: {shorten(odd)}; it has {len(keys)} keys ({shorten(keys)}): to "
                f"convert the rest without them, give --allow-unmapped {' --allow-unmapped '.join(patterns)}"
            )


def _pattern(origin: Sequence[str], patterns: Sequence[str]) -> str | None:
    found = [allowed_by(key, patterns) for key in origin]
    return found[0] if found and all(found) else None
