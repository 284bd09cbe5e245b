"""The canonical form in which all formats meet: a format's rules give published names, and the result has to be a model."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deberta_dist.conversion import heads as head_rules
from deberta_dist.conversion import huggingface, official
from deberta_dist.conversion.options import CheckpointReadOptions
from deberta_dist.conversion.rules import Reading, allowed_by, apply, leave_out_twins, renamed, require_known
from deberta_dist.conversion.source import CheckpointSource
from deberta_dist.conversion.weights import (
    DTYPES,
    POSITION_TABLE,
    DroppedKey,
    Weights,
    backbone_shapes,
    fit,
    require_layers,
    shorten,
)
from deberta_dist.errors import ConfigError
from deberta_dist.models.config import BOOKKEEPING_KEYS, SYNONYMS, DebertaConfig
from deberta_dist.models.heads import MASKED_LM, REPLACED_TOKENS


@dataclass(frozen=True, kw_only=True)
class CanonicalCheckpoint:
    """A checkpoint in the form in which all formats meet.

    Attributes:
        config: Sizes and switches, checked against the weights' shapes.
        head: Head of fine-tuning, a key of `models.heads.HEADS`; empty without one.
        num_labels: Rows of that head, None without one.
        labels: What the source's configuration says about classes.
        knows_decoder: Whether the source, or the user, says how its masked language model decodes.
        is_legacy: Its masked language modelling head had the names of Hugging Face's older class.
        weights: Published names, in model order.
        reading: How it got there: what was dropped, what to know.
        lacking: Published names that the model has and the source did not.
    """

    config: DebertaConfig
    head: str
    num_labels: int | None
    labels: dict[str, Any]
    knows_decoder: bool
    is_legacy: bool
    weights: Weights
    reading: Reading = field(repr=False)
    lacking: list[str]

    @property
    def decoder(self) -> str | None:
        """How masked language modelling decodes, as far as is known; None without its head."""
        if not any(name.startswith("lm_predictions.") for name in self.weights):
            return None
        return "emd" if self.config.uses_enhanced_mask_decoder else "plain"

    @property
    def model_head(self) -> str:
        """The head of a model that is made of it, a name of `models.heads`; empty for the backbone alone.

        That of fine-tuning; else the detector's, beside which a head of masked language modelling was trained on the
        generator's encoder and not on this one; else that of masked language modelling.
        """
        if self.head:
            return self.head
        modules = {name.split(".")[0] for name in self.weights}
        pretrained = {"mask_predictions": REPLACED_TOKENS, "lm_predictions": MASKED_LM}
        return next((head for module, head in pretrained.items() if module in modules), "")

    @property
    def head_config(self) -> dict[str, Any]:
        """For configurations of other forms than Hugging Face's: names of classes, and what names of weights do not
        tell: which head of fine-tuning, and that the one of masked language modelling had other names."""
        listed = {"architectures": ["DebertaV2" + head_rules.SUFFIXES[self.head]]} if self.head == "choice" else {}
        return {**self.labels, **listed, **({"legacy": True} if self.is_legacy else {})}


def to_canonical(source: CheckpointSource, *, decoder: str | None = None) -> CanonicalCheckpoint:
    """Applies a format's rules and checks that the result is a model; the options are the source's.

    Args:
        source: The checkpoint as `source.open_source` found it; no weight is read yet.
        decoder: How its masked language model decodes, "emd" or "plain"; None: as the source's options say.

    Raises:
        ConfigError: the configuration is refused, or ``decoder`` contradicts it.
        CheckpointError: keys are unexplained or missing, or shapes differ.
    """
    allow_unmapped, decoder = source.options.allow_unmapped, decoder or source.options.decoder
    is_huggingface = source.format is huggingface.FORMAT
    raw, notes, unread = _completed_config(source)
    known = {*DebertaConfig.__dataclass_fields__, *BOOKKEEPING_KEYS, *SYNONYMS, "pooling"}
    dropped = [key for key in raw if key not in known and allowed_by(key, allow_unmapped) is not None]
    with _named(source.path):
        labels = huggingface.labels({key: value for key, value in raw.items() if key not in dropped})
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
        dropped=[*unread, *(DroppedKey(f"config: {key}", "--allow-unmapped") for key in dropped)],
        warnings=notes,
        open_generator=lambda: renamed(source.open_generator(), renames),
    )
    leave_out_twins(reading, renames=renames, allow_unmapped=allow_unmapped)
    # Before the rules: they read tensors, and cut them by head sizes of the configuration.
    names = renamed(reading.weights, renames)
    require_layers(config, names, where=source.path)
    heads = head_rules.find_heads(names, listed_class=listed_class)
    shapes = _shapes(config, heads, rows=head_rules.num_rows(names, heads))
    apply(source.format, reading, known=shapes, allow_unmapped=allow_unmapped)
    heads, rows = _settle(source, reading, names, listed_class=listed_class, allow_unmapped=allow_unmapped)
    head = heads[-1] if rows is not None else ""
    if rows is not None:
        head_rules.require_rows(source.path, head=head, rows=rows, stated=_stated(labels))
        if beside := [item.key for item in reading.dropped if item.why.startswith("--allow-unmapped") and item.key in names]:
            reading.warnings.append(
                f"{shorten(beside)} left out beside the {head} head: if they took part in its outputs, these are others now"
            )
    knows_decoder = _settle_decoder(source, reading, heads=heads, decoder=decoder, is_huggingface=is_huggingface)
    config = reading.config
    shapes = _shapes(config, heads, rows=rows)
    require_known(reading, shapes=shapes, fmt=source.format, where=source.path)
    # The table that only the decoder of masked language modelling uses: Hugging Face's classes do not save it.
    may_lack = [POSITION_TABLE] if config.uses_enhanced_mask_decoder else []
    weights = fit(reading.weights, shapes=shapes, may_lack=may_lack, where=source.path)
    return CanonicalCheckpoint(
        config=config if rows is not None else dataclasses.replace(config, problem_type=None),
        head=head,
        num_labels=rows,
        labels=labels if head else {},
        knows_decoder=knows_decoder,
        is_legacy=MASKED_LM in heads
        and (raw.get("legacy") is True if not is_huggingface else any("cls.predictions." in k for k in source.weights)),
        weights=weights,
        reading=reading,
        lacking=[name for name in may_lack if name not in weights],
    )


def _completed_config(source: CheckpointSource) -> tuple[dict[str, Any], list[str], list[DroppedKey]]:
    """The source's configuration with what its format leaves unsaid; warnings, and keys that are not read."""
    raw, notes = dict(source.config), list(source.warnings)
    if source.format is huggingface.FORMAT:
        with _named(source.path):
            raw, unread = huggingface.with_defaults(raw, keys=source.weights)
        return raw, notes, unread
    if source.format is official.FORMAT:
        raw, more = official.with_pooling(raw)
        notes += more
    return raw, notes, []


@contextlib.contextmanager
def _named(path: object) -> Iterator[None]:
    """Adds the source to every error about a configuration."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def as_asked(model: CanonicalCheckpoint, options: CheckpointReadOptions) -> CanonicalCheckpoint:
    """A model in the number format that its reader asks for, rounded as it is read."""
    if options.dtype is None:
        return model
    dtype = DTYPES[options.dtype]
    return dataclasses.replace(
        model, weights={name: weight.as_dtype(dtype, name=name) for name, weight in model.weights.items()}
    )


def require_decoder(model: CanonicalCheckpoint, *, where: object) -> None:
    """Refuses a masked language model of which nobody has said how it decodes.

    Raises:
        ConfigError: it does not say so itself, and was not told.
    """
    if not model.knows_decoder:
        raise ConfigError(
            f"{where} does not say how its masked language model was trained: give --decoder plain if with Hugging Face's "
            "classes, which have no enhanced mask decoder, or --decoder emd if with DeBERTa's or deberta_dist (a save "
            "by Hugging Face's classes has lost its position table)"
        )


def _shapes(config: DebertaConfig, heads: Sequence[str], *, rows: int | None) -> head_rules.Shapes:
    found = backbone_shapes(config)
    for shapes in head_rules.head_shapes(config, heads, rows=rows).values():
        found |= shapes
    return found


def _settle(
    source: CheckpointSource, reading: Reading, before: Weights, *, listed_class: str, allow_unmapped: Sequence[str]
) -> tuple[tuple[str, ...], int | None]:
    """The heads that are whole, and rows of that of fine-tuning; the others are left out or refused.

    ``before``: the weights by renamed keys, those that were left out included.
    """

    def find() -> tuple[str, ...]:
        return head_rules.find_heads(reading.weights, listed_class=listed_class, beside=before)

    heads = find()
    rows = head_rules.num_rows(reading.weights, heads)
    backbone = backbone_shapes(reading.config)
    head_rules.settle_heads(
        reading,
        head_rules.head_shapes(reading.config, heads, rows=rows),
        is_backbone_whole=all(
            name in reading.weights and reading.weights[name].shape == shape
            for name, shape in backbone.items()
            if name != POSITION_TABLE
        ),
        allow_unmapped=allow_unmapped,
        where=source.path,
    )
    heads = find()
    return heads, head_rules.num_rows(reading.weights, heads)


def _settle_decoder(
    source: CheckpointSource, reading: Reading, *, heads: Sequence[str], decoder: str | None, is_huggingface: bool
) -> bool:
    """Decides how the masked language model decodes; whether that is known.

    The published code and this package write what decodes. Hugging Face's classes compute plain logits whatever the
    head was trained with, so that their files say nothing; a position table is only in those that they did not write.
    """
    config, where = reading.config, source.path
    is_masked_lm = MASKED_LM in heads and REPLACED_TOKENS not in heads
    if decoder is not None and not is_masked_lm:
        raise ConfigError(f"{where}: --decoder {decoder} is for masked language models, and this is none")
    if not is_masked_lm or config.position_biased_input:
        if decoder == "emd":
            raise ConfigError(
                f"{where}: --decoder emd contradicts position_biased_input = true: it was trained without that decoder"
            )
        return True
    stated = source.config.get("masked_lm_decoder", source.config.get("decoder"))
    by_itself = "emd" if config.uses_enhanced_mask_decoder else "plain"
    if decoder is None:
        return not is_huggingface or stated is not None or POSITION_TABLE in reading.weights
    if decoder != by_itself and not is_huggingface:
        raise ConfigError(f"{where}: --decoder {decoder} contradicts the checkpoint, which was trained with {by_itself!r}")
    if decoder != by_itself and stated is not None:
        reading.warnings.append(f"--decoder {decoder}, although config.json says {stated}")
    reading.config = dataclasses.replace(config, decoder=decoder)
    if decoder == "plain" and POSITION_TABLE in reading.weights:
        reading.drop(POSITION_TABLE, why="--decoder plain: absolute positions are of the enhanced mask decoder alone")
    return True


def _stated(labels: Mapping[str, Any]) -> object:
    """Number of classes that a configuration states, None where it states none."""
    return len(labels["id2label"]) if isinstance(labels.get("id2label"), dict) else labels.get("num_labels")
