"""Hugging Face's form: ``config.json``, safetensors or ``.bin`` files with an index, two pairs of classes.

Their v2 classes use the published names; their v1 classes keep the fused projections. Masked language models written
by the older ("legacy") head have other names for it. Microsoft's own files, as they lie on the hub, are read as well.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch

from deberta_dist.checkpoint.errors import CheckpointError
from deberta_dist.conversion import official, v1_in_proj
from deberta_dist.conversion.heads import SUFFIXES
from deberta_dist.conversion.rules import Drop, Format, Reading, Rename
from deberta_dist.conversion.weights import WORD_TABLE, DroppedKey, Weight, Weights, require_square_output
from deberta_dist.errors import ConfigError
from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.defaults import V1, V2, filled_in

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
# The key in their file; "decoder" means something else to their configuration class.
DECODER_KEY = "masked_lm_decoder"
LABEL_KEYS = ("id2label", "label2id", "num_labels", "problem_type", "finetuning_task")
_HEAD = "lm_predictions.lm_head."
_TIED = "legacy_decoder."
_LEGACY, _ALONE = "name in the legacy head", "a backbone on its own has no prefix"
_LEGACY_NAMES = {
    **{
        f"{_HEAD}{part}.{leaf}": f"cls.predictions.transform.{part}.{leaf}"
        for part in ("dense", "LayerNorm")
        for leaf in ("weight", "bias")
    },
    _HEAD + "bias": "cls.predictions.bias",
}


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
        Rename(r"^cls\.predictions\.transform\.", _HEAD, _LEGACY),
        Rename(r"^cls\.predictions\.bias$", _HEAD + "bias", _LEGACY),
        Rename(r"^cls\.predictions\.decoder\.", _TIED, _LEGACY),
    ),
    drops=(
        *official.FORMAT.drops,
        Drop(r"cls\.predictions\.position_ids", "a buffer"),
    ),
    rules=(drop_tied_decoder, *official.FORMAT.rules),
    consumed=official.FORMAT.consumed,
)


def with_defaults(raw: dict[str, Any], *, keys: Collection[str]) -> tuple[dict[str, Any], list[DroppedKey]]:
    """A configuration as Hugging Face's classes understand it, and the fields that mean nothing to them.

    Args:
        raw: As it stands in the file.
        keys: Of the weights; they decide the pair of classes where the file does not.

    Raises:
        ConfigError: it is of another kind of model, or of one that is not built here.
    """
    kind = raw.get("model_type") or _kind_of(raw, keys)
    found, unread = filled_in(raw, kind=kind)
    return found, [DroppedKey(f"config: {key}", f"the {kind} classes do not read it") for key in unread]


def _kind_of(raw: dict[str, Any], keys: Collection[str]) -> str:
    listed = raw.get("architectures")
    name = str(listed[0]) if isinstance(listed, list) and listed else ""
    if name.startswith("Deberta"):
        return V2 if name.startswith("DebertaV2") else V1
    return V1 if any(key.endswith(".in_proj.weight") for key in keys) else V2


def labels(raw: dict[str, Any]) -> dict[str, Any]:
    """What a configuration says about classes.

    Raises:
        ConfigError: its classes are not numbered from 0.
    """
    found = {key: raw[key] for key in LABEL_KEYS if raw.get(key) is not None}
    names = found.get("id2label", {})
    if not isinstance(names, dict) or {str(key) for key in names} != {str(i) for i in range(len(names))}:
        raise ConfigError(f"id2label = {str(names)[:80]} is not a table from 0, 1, 2, ... to the names of classes")
    return found


def model_type(weights: Weights, *, config: DebertaConfig, head: str, is_fused: bool) -> tuple[str, str]:
    """Which pair of classes a model fits, and why.

    The v1 classes hold the fused form alone. The v2 classes compute v1 as well, so a v1 model with key biases
    (which training gives it) goes there instead of losing them.

    Args:
        weights: By published names.
        head: Its head of fine-tuning; empty without one.
        is_fused: Whether v1's one `in_proj` is asked for instead of three projections.

    Raises:
        ConfigError: neither can hold the model. Whether the v1 classes can, where ``is_fused`` asks for them, is left
            to `to_huggingface`.
    """
    require_square_output(config, target="huggingface")
    if not is_fused and needs_v2(config):
        return V2, ""
    if head == "choice":
        if is_fused:
            raise ConfigError(f"--fused: Hugging Face's v1 classes have no {SUFFIXES[head]}; leave --fused out")
        return V2, "v1 computed by the v2 classes, because the v1 classes have no multiple choice"
    reasons = v1_in_proj.obstacles(weights, config=config)
    if is_fused or not reasons:
        return V1, "v1 without key biases: the classes with fused projections"
    return V2, f"v1 computed by the v2 classes, because the v1 classes would lose something: {reasons[0]}"


def needs_v2(config: DebertaConfig) -> bool:
    """Whether the model is none of the first generation."""
    return config.share_att_key or config.position_buckets >= 1


def to_huggingface(weights: Weights, *, config: DebertaConfig, kind: str, architecture: str, is_legacy: bool) -> Weights:
    """Published weights as these classes name them."""
    weights = v1_in_proj.fuse(weights, config=config) if kind == V1 else weights
    if architecture.endswith("Model") and all(name.startswith("deberta.") for name in weights):
        return {name.removeprefix("deberta."): _renamed(weight, _ALONE) for name, weight in weights.items()}
    if not is_legacy:
        return weights
    return {
        _LEGACY_NAMES.get(name, name): _renamed(weight, _LEGACY) if name in _LEGACY_NAMES else weight
        for name, weight in weights.items()
    }


def _renamed(weight: Weight, why: str) -> Weight:
    return weight if weight.origin and weight.why else replace(weight, why=why)


def class_name(weights: Weights, *, kind: str, head: str) -> str:
    """The class that uses most of the weights."""
    stem = "DebertaV2" if kind == V2 else "Deberta"
    if head:
        return stem + SUFFIXES[head]
    return stem + ("ForMaskedLM" if any(name.startswith(_HEAD) for name in weights) else "Model")


def to_config(
    config: DebertaConfig,
    *,
    kind: str,
    architecture: str,
    dtype: str,
    labels: dict[str, Any],
    num_labels: int | None,
    decoder: str | None,
    is_legacy: bool,
) -> dict[str, Any]:
    """``config.json`` with every field that their classes read, declared there or not.

    Args:
        config: Sizes and switches; becomes the file's fields.
        kind: `model_type` of transformers: `deberta` or `deberta-v2`.
        architecture: Class that `architectures` lists.
        dtype: Number format of most weights.
        labels: What is known of classes.
        num_labels: Rows of a head with a row for every class.
        decoder: How the masked language model decodes; None without one, and where that is not known.
        is_legacy: Whether the head has the names of the older class.
    """
    values = config.to_dict()
    values["pad_token_id"] = values.pop("padding_idx")
    values["pos_att_type"] = list(config.pos_att_type)
    values |= {
        "attention_head_size": config.head_size,
        "embedding_size": config.embedding_width,
        "pooler_hidden_size": config.hidden_size,
        "cls_dropout": values.pop("cls_drop_out", None),
    }
    if (decoder := values.pop("decoder", decoder)) is not None:
        values[DECODER_KEY] = decoder
    if num_labels is not None:
        labels = {key: value for key, value in labels.items() if key != "num_labels"}
        labels.setdefault("id2label", {str(i): f"LABEL_{i}" for i in range(num_labels)})
        labels.setdefault("label2id", {str(name): int(i) for i, name in labels["id2label"].items()})
    return {
        "architectures": [architecture],
        "model_type": kind,
        # Absent it would be true: a head of other names, left random.
        "legacy": is_legacy,
        "tie_word_embeddings": True,
        "dtype": dtype,
        # The same for releases before "dtype".
        "torch_dtype": dtype,
        **values,
        **labels,
    }
