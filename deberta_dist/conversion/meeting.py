"""Where all formats meet: a format's rules lead to published names, and the result has to be a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from deberta_dist.conversion import huggingface, official
from deberta_dist.conversion.rules import Reading, allowed_by, apply, renamed, require_known
from deberta_dist.conversion.source import Source
from deberta_dist.conversion.weights import (
    POSITION_TABLE,
    Dropped,
    Weights,
    fit,
    published_shapes,
    require_layers,
)
from deberta_dist.errors import ConfigError
from deberta_dist.models.config import BOOKKEEPING_KEYS, DebertaConfig


@dataclass(frozen=True, kw_only=True)
class Published:
    """A checkpoint in the form in which all formats meet.

    Attributes:
        config: Of the model.
        num_labels: Rows of the classifier, None without one.
        labels: What the source's configuration says about classes.
        listed_class: Hugging Face class that it names; may be empty.
        weights: Published names, in model order.
        reading: How it got there: what was dropped, what to know.
        lacking: Published names that the model has and the source did not.
    """

    config: DebertaConfig
    num_labels: int | None
    labels: dict[str, Any]
    listed_class: str
    weights: Weights
    reading: Reading = field(repr=False)
    lacking: list[str]


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
    raw, notes = dict(source.config), list(source.warnings)
    if is_huggingface:
        raw = huggingface.with_defaults(raw)
    elif source.format is official.FORMAT:
        raw, more = official.with_pooling(raw)
        notes += more
    known = {*DebertaConfig.__dataclass_fields__, *BOOKKEEPING_KEYS, "pooling"}
    dropped = [key for key in raw if key not in known and allowed_by(key, allow_unmapped) is not None]
    labels = {key: value for key, value in huggingface.labels(raw).items() if key not in dropped}
    listed = raw.get("architectures")
    listed_class = str(listed[0]) if isinstance(listed, list) and listed else ""
    try:
        config = DebertaConfig.from_dict({key: value for key, value in raw.items() if key not in dropped})
    except ConfigError as error:
        hint = " (--allow-unmapped KEY leaves a key out)" if "unknown key" in str(error) else ""
        raise ConfigError(f"{source.path}: {error}{hint}") from None
    renames = source.format.renames
    reading = Reading(
        weights=dict(source.weights),
        config=config,
        dropped=[Dropped(f"config: {key}", "--allow-unmapped") for key in dropped],
        warnings=notes,
        open_generator=lambda: renamed(source.open_generator(), renames),
    )
    # Before the rules: they read tensors, and cut them by head sizes of the configuration.
    names = renamed(source.weights, renames)
    require_layers(config, names, where=source.path)
    # A multiple choice scores each choice with one number, whatever the number of classes says.
    stated = {} if listed_class.endswith(huggingface.MULTIPLE_CHOICE) else labels
    num_labels = _num_labels(names, stated)
    shapes = published_shapes(config, keys=names, num_labels=num_labels)
    apply(source.format, reading, known=shapes, allow_unmapped=allow_unmapped)
    shapes = published_shapes(config, keys=reading.weights, num_labels=num_labels)
    require_known(reading, shapes=shapes, fmt=source.format, where=source.path)
    # The table that only the decoder of masked language modelling uses: Hugging Face's classes do not save it.
    may_lack = [] if config.position_biased_input else [POSITION_TABLE]
    weights = fit(reading.weights, shapes=shapes, may_lack=may_lack, where=source.path)
    return Published(
        config=config if num_labels is not None else replace(config, problem_type=None),
        num_labels=num_labels,
        labels=labels if num_labels is not None else {},
        listed_class=listed_class,
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
        raise ConfigError(f"the configuration has {stated!r} classes, classifier.weight has {rows} rows")
    return rows
