"""Microsoft's form: ``pytorch_model.bin`` and ``model_config.json``, loaded by the published code.

Differences from the published names: the prefix ``bert.`` of the first releases, the fused projections of v1, and in
v3 discriminators the embeddings that were trained as a difference to the generator's.

Source: microsoft/DeBERTa DeBERTa/deberta/cache_utils.py and DeBERTa/apps/tasks/rtd_task.py@4d7fe0bd.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch

from deberta_dist.checkpoint.errors import CheckpointError
from deberta_dist.conversion import v1_in_proj
from deberta_dist.conversion.rules import COMMON_DROPS, COMMON_RENAMES, Format, Reading
from deberta_dist.conversion.weights import POSITION_TABLE, WORD_TABLE, Weight, Weights, require_square_output
from deberta_dist.models.config import DebertaConfig

WEIGHTS_NAME = "pytorch_model.bin"
GENERATOR_NAME = "pytorch_model.generator.bin"
CONFIG_NAME = "model_config.json"
_FOREIGN_POOLER_FIELDS = ("pooler_hidden_act", "pooler_dropout")
GENERATORS_HEAD = (
    "a discriminator with a masked language modelling head: the head was trained by the generator, not on this encoder; to "
    f"predict words, convert the generator ({GENERATOR_NAME})"
)
"""The warning of a v3 discriminator; not repeated where the head stays unused."""


def is_discriminator(names: Iterable[str]) -> bool:
    """Whether published names are those of a discriminator of replaced tokens."""
    return any(name.startswith("mask_predictions.") for name in names)


def merge_shared_embeddings(reading: Reading) -> None:
    """Makes plain tables of a v3 discriminator's embeddings.

    It was trained as E_D = stop_gradient(E_G) + E_delta. Its file has E_delta as ``_weight``, and E_D as ``weight``,
    a buffer filled by the forward pass and therefore without the very last update of E_delta. E_D is what everyone
    loads from the releases, so it is taken; E_delta means nothing without the generator. A file with E_delta alone
    needs the generator beside it.

    Raises:
        CheckpointError: a table cannot be had, or ``weight`` is a copy of ``_weight``.
    """
    for table in (WORD_TABLE, POSITION_TABLE):
        difference = table.removesuffix("weight") + "_weight"
        if difference not in reading.weights:
            continue
        if table in reading.weights:
            if table == WORD_TABLE and torch.equal(reading.weights[table].read(), reading.weights[difference].read()):
                raise CheckpointError(
                    f"{table} equals {difference}, the difference to the generator's table: somebody copied it, and "
                    "the embeddings are lost; use the original checkpoint"
                )
            reading.drop(
                difference,
                why="difference between the discriminator's and the generator's table; `weight` holds their sum, as of "
                "the last forward pass. To go on with shared embeddings, it is `weight` minus the generator's table",
            )
        elif table in (generator := reading.open_generator()):
            reading.weights[table] = _sum(generator[table], reading.weights.pop(difference))
        else:
            raise CheckpointError(
                f"{difference} is there and {table} is not: the discriminator's table is the generator's plus this "
                f"difference, so put the generator beside it as {GENERATOR_NAME}"
            )
    if is_discriminator(reading.weights) and any(name.startswith("lm_predictions.") for name in reading.weights):
        reading.warnings.append(GENERATORS_HEAD)


def separate_fused(reading: Reading) -> None:
    """Cuts the fused projections of v1."""
    reading.weights = v1_in_proj.separate(reading.weights, head_size=reading.config.head_size)


FORMAT = Format(
    name="official",
    renames=COMMON_RENAMES,
    drops=COMMON_DROPS,
    rules=(merge_shared_embeddings, separate_fused),
    consumed=(r".*_embeddings\._weight", *(rf".*\.attention\.self\.{re.escape(leaf)}" for leaf in v1_in_proj.LEAVES)),
)


def model_config(raw: dict[str, Any], *, is_generator: bool) -> dict[str, Any]:
    """One model's configuration out of a file's; that of replaced-token detection has two."""
    if isinstance(raw.get("discriminator"), dict) and isinstance(raw.get("generator"), dict):
        return raw["generator" if is_generator else "discriminator"]
    return raw


def with_pooling(raw: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A configuration with the pooler's fields where the published code finds them, and what to know about that.

    It reads them from the table ``pooling``, and in a file without one the same names from the model's own fields: there
    the pooler has the activation of all layers, and a dropout only if a field has just that name. Hugging Face's names for
    the pooler's fields mean nothing to it.

    Source: microsoft/DeBERTa DeBERTa/deberta/pooling.py@4d7fe0bd.
    """
    ignored = {key: raw[key] for key in _FOREIGN_POOLER_FIELDS if key in raw}
    found = {key: value for key, value in raw.items() if key not in ignored}
    if "pooling" not in raw:
        found["pooling"] = {"hidden_act": raw.get("hidden_act", "gelu"), "dropout": found.pop("dropout", 0.0)}
    elif raw["pooling"] is None:
        found["pooling"] = {}
    read = found["pooling"] if isinstance(found["pooling"], dict) else {}
    taken = {f"pooler_{name}": read.get(name, default) for name, default in (("hidden_act", "gelu"), ("dropout", 0.0))}
    differing = [f"{key} = {value!r} ({taken[key]!r} is taken)" for key, value in ignored.items() if value != taken[key]]
    if not differing:
        return found, []
    return found, [
        f"the published code does not read {', '.join(differing)}: it takes the pooler's fields from a table 'pooling'"
    ]


def to_official(weights: Weights, *, config: DebertaConfig, is_fused: bool) -> Weights:
    """Published weights as this format names them.

    Raises:
        ConfigError: the published code cannot build the model, or ``is_fused`` would lose something.
    """
    require_square_output(config, target="official")
    return v1_in_proj.fuse(weights, config=config) if is_fused else weights


def to_config(config: DebertaConfig) -> dict[str, Any]:
    """``model_config.json``: the published code reads the pooler's fields from a table of their own."""
    values = config.to_dict()
    values["pooling"] = {"dropout": values.pop("pooler_dropout"), "hidden_act": values.pop("pooler_hidden_act")}
    values.pop("pooler_hidden_size", None)
    return values


def _sum(table: Weight, difference: Weight) -> Weight:
    if table.shape != difference.shape:
        raise CheckpointError(f"the generator's table is {list(table.shape)}, the difference to it {list(difference.shape)}")
    return Weight(
        shape=table.shape,
        dtype=difference.dtype,
        # In float32, rounded once: the two files may have different number formats.
        read=lambda: (table.read().float() + difference.read().float()).to(difference.dtype),
        origin=difference.origin,
        why="the generator's table plus the discriminator's difference to it",
    )
