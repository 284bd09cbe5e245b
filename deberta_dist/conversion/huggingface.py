"""Hugging Face's form: ``config.json``, safetensors or ``.bin`` files with an index, two pairs of classes.

Their v2 classes use the published names; their v1 classes keep the fused projections. Masked language models written
by the older ("legacy") head have other names for it. Microsoft's own files, as they lie on the hub, are read as well.
"""

from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch

from deberta_dist.checkpoint.errors import CheckpointError
from deberta_dist.conversion import fused, official
from deberta_dist.conversion.rules import Drop, Format, Reading, Rename
from deberta_dist.conversion.weights import WORD_TABLE, Weights, require_square_output
from deberta_dist.errors import ConfigError
from deberta_dist.models.config import DebertaConfig

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
V1, V2 = "deberta", "deberta-v2"

# Numbers that no shape betrays, or that the message about shapes should get right: what their classes assume where a
# file leaves a field out. Everywhere else their defaults and the published code's are the same.
DEFAULTS = MappingProxyType(
    {
        V1: {"vocab_size": 50265},
        V2: {
            "vocab_size": 128100,
            "hidden_size": 1536,
            "num_hidden_layers": 24,
            "num_attention_heads": 24,
            "intermediate_size": 6144,
        },
    }
)
LABEL_KEYS = ("id2label", "label2id", "num_labels", "problem_type", "finetuning_task")
MULTIPLE_CHOICE = "ForMultipleChoice"
_HEAD = "lm_predictions.lm_head."
_TIED = "legacy_decoder."


def drop_tied_decoder(reading: Reading) -> None:
    """Leaves out copies of the word embeddings and of the bias, after a look whether they are copies.

    Raises:
        CheckpointError: the decoder is a matrix of its own.
    """
    for name, original in ((_TIED + "weight", WORD_TABLE), (_TIED + "bias", _HEAD + "bias")):
        if name not in reading.weights:
            continue
        if original not in reading.weights:
            # Which of two tied tensors survives saving is left to chance.
            reading.weights[original] = replace(reading.weights.pop(name), why="tied to it in the legacy head")
        elif torch.equal(reading.weights[name].read(), reading.weights[original].read()):
            reading.drop(name, why=f"tied: equal to {original}")
        else:
            raise CheckpointError(
                f"{reading.weights[name].origin[0]} differs from {original}, to which DeBERTa ties it; to leave it "
                f"out, give --allow-unmapped '{reading.weights[name].origin[0]}'"
            )


FORMAT = Format(
    name="huggingface",
    renames=(
        *official.FORMAT.renames,
        Rename(r"^cls\.predictions\.transform\.", _HEAD, "name in the legacy head"),
        Rename(r"^cls\.predictions\.bias$", _HEAD + "bias", "name in the legacy head"),
        Rename(r"^cls\.predictions\.decoder\.", _TIED, "name in the legacy head"),
    ),
    drops=(
        *official.FORMAT.drops,
        Drop(r"cls\.predictions\.position_ids", "a buffer"),
    ),
    rules=(drop_tied_decoder, *official.FORMAT.rules),
    consumed=official.FORMAT.consumed,
)


def with_defaults(raw: dict[str, Any]) -> dict[str, Any]:
    """A configuration with the fields that Hugging Face's classes would fill in.

    Raises:
        ConfigError: it is of another kind of model.
    """
    kind = raw.get("model_type") or V2
    if kind not in tuple(DEFAULTS):
        raise ConfigError(f"config.json has model_type {str(kind)[:50]!r}: only deberta and deberta-v2 are DeBERTa")
    # In JSON null and absent mean the same to them, and to the published code only the latter is understood.
    return {**DEFAULTS[kind], **{key: value for key, value in raw.items() if value is not None}}


def labels(raw: dict[str, Any]) -> dict[str, Any]:
    """What a configuration says about classes.

    Raises:
        ConfigError: its classes are not numbered from 0.
    """
    found = {key: raw[key] for key in LABEL_KEYS if raw.get(key) is not None}
    names = found.get("id2label", {})
    if not isinstance(names, dict) or {str(key) for key in names} != {str(i) for i in range(len(names))}:
        raise ConfigError(f"id2label = {str(names)[:80]} is no table from 0, 1, 2, ... to the names of classes")
    return found


def model_type(weights: Weights, *, config: DebertaConfig, is_fused: bool) -> tuple[str, str]:
    """Which pair of classes a model fits, and why.

    The v1 classes hold the fused form alone. The v2 classes compute v1 as well, so a v1 model with key biases
    (which training gives it) goes there instead of losing them.

    Raises:
        ConfigError: neither can hold the model. Whether the v1 classes can, where ``is_fused`` asks for them, is left
            to `to_huggingface`.
    """
    if config.embedding_width != config.hidden_size and any(name.startswith(_HEAD) for name in weights):
        raise ConfigError(
            f"embedding_size = {config.embedding_size} differs from hidden_size = {config.hidden_size}: Hugging Face's "
            "masked language modelling head cannot be that narrow"
        )
    require_square_output(config, target="huggingface")
    if not is_fused and needs_v2(config):
        return V2, ""
    reasons = fused.obstacles(weights, config=config)
    if is_fused or not reasons:
        return V1, "v1 without key biases: the classes with fused projections"
    return V2, f"v1 computed by the v2 classes, because the v1 classes would lose something: {reasons[0]}"


def needs_v2(config: DebertaConfig) -> bool:
    """Whether the model is none of the first generation."""
    return config.share_att_key or config.position_buckets >= 1


def to_huggingface(weights: Weights, *, config: DebertaConfig, kind: str) -> Weights:
    """Published weights as these classes name them."""
    return fused.fuse(weights, config=config) if kind == V1 else weights


def class_name(weights: Weights, *, kind: str, listed: str) -> str:
    """The class that uses most of the weights; ``listed`` is what the source's configuration names."""
    heads = {name.split(".")[0] for name in weights}
    stem = "DebertaV2" if kind == V2 else "Deberta"
    if "classifier" in heads:
        # The same tensors, one row of classifier; v1 has no such class.
        return stem + (MULTIPLE_CHOICE if kind == V2 and listed.endswith(MULTIPLE_CHOICE) else "ForSequenceClassification")
    return stem + ("ForMaskedLM" if "lm_predictions" in heads else "Model")


def to_config(
    config: DebertaConfig, *, kind: str, architecture: str, dtype: str, labels: dict[str, Any], num_labels: int | None
) -> dict[str, Any]:
    """``config.json`` with every field that their classes read, declared there or not."""
    values = config.to_dict()
    values["pad_token_id"] = values.pop("padding_idx")
    values["pos_att_type"] = list(config.pos_att_type)
    values["pooler_hidden_size"] = config.hidden_size
    if config.cls_drop_out is not None:
        values["cls_dropout"] = values.pop("cls_drop_out")
    if num_labels is not None and not architecture.endswith(MULTIPLE_CHOICE):
        labels = {key: value for key, value in labels.items() if key != "num_labels"}
        labels.setdefault("id2label", {str(i): f"LABEL_{i}" for i in range(num_labels)})
        labels.setdefault("label2id", {str(name): int(i) for i, name in labels["id2label"].items()})
    return {
        "architectures": [architecture],
        "model_type": kind,
        # Without it they build a head of other names and leave it random.
        "legacy": False,
        "tie_word_embeddings": True,
        "dtype": dtype,
        # The same for releases before "dtype".
        "torch_dtype": dtype,
        **values,
        **labels,
    }
