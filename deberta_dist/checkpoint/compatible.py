"""Checks that a run may resume from a checkpoint, or start from weights, before anything is loaded."""

import json
from collections.abc import Mapping
from typing import Any

from deberta_dist.checkpoint.errors import CheckpointError
from deberta_dist.checkpoint.manifest import Manifest, differing_keys
from deberta_dist.errors import ConfigError
from deberta_dist.files.strict_json import as_read
from deberta_dist.models.config import DebertaConfig

# Dropout and initial values: nothing that given weights compute depends on them.
_TRAINING_FIELDS = frozenset(
    """
    hidden_dropout_prob attention_probs_dropout_prob pooler_dropout cls_drop_out initializer_range problem_type
    """.split()
)


def compatible(
    manifest: Manifest,
    *,
    model_config: Mapping[str, Any],
    tokenizer_sha256: str,
    networks: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Refuses to go on with another model or vocabulary, or other networks, than the checkpoint's.

    Args:
        manifest: What the checkpoint says of its model, tokenizer and tensors.
        model_config: Published configuration of the model that is to be loaded.
        tokenizer_sha256: Of the SentencePiece model in use.
        networks: Configurations of the run's further networks by name; None where they do not matter.

    Raises:
        ConfigError: they differ; the message has every difference.
    """
    found = _differences(model_config, manifest.model_config, what="model")
    if networks is not None:
        there = manifest.networks
        found += [f"network {name} is in one of the two alone" for name in sorted(networks.keys() ^ there.keys())]
        for name in sorted(networks.keys() & there.keys()):
            found += _differences(networks[name], there[name].model_config, what=f"{name}: model")
    if tokenizer_sha256 != manifest.tokenizer_sha256:
        found.append(
            f"data.tokenizer has sha256 {tokenizer_sha256[:12]}..., in the checkpoint "
            f"{manifest.tokenizer_sha256[:12]}...: another vocabulary"
        )
    if found:
        raise ConfigError(f"the checkpoint of step {manifest.step} is of another model: {'; '.join(found)}")


def _differences(here: Mapping[str, Any], there: Mapping[str, Any], *, what: str) -> list[str]:
    mine = as_read(here)
    return [
        f"{what}.{key} is {json.dumps(mine[key]) if key in mine else 'absent'}, in the checkpoint "
        f"{json.dumps(there[key]) if key in there else 'absent'}"
        for key in differing_keys(mine, there)
    ]


def same_tensors(manifest: Manifest, shapes: Mapping[str, tuple[int, ...]], *, where: object) -> None:
    """Refuses a checkpoint whose tensors are not those of its own configuration.

    Raises:
        CheckpointError: names or shapes differ.
    """
    there = {name: entry.shape for name, entry in manifest.tensors.items()}
    odd = [name for name in {**there, **shapes} if there.get(name) != shapes.get(name)]
    if odd:
        raise CheckpointError(
            f"{where}: {len(odd)} tensors are not as its configuration has them, the first is {odd[0]}: "
            f"{there.get(odd[0])} there, {shapes.get(odd[0])} expected"
        )


def same_computation(there: DebertaConfig, here: DebertaConfig, *, where: str) -> None:
    """Refuses weights of a model that has other tensors or computes something else with them. Dropout may differ.

    Args:
        there: Configuration that the weights were trained with.
        here: Configuration of the run that is to use them.
        where: Subject of the message: what is another model.

    Raises:
        ConfigError: they differ; the message has every difference.
    """
    a, b = computation(there), computation(here)
    found = [f"{key} = {a.get(key)} there, {b.get(key)} here" for key in differing_keys(a, b)]
    if found:
        raise ConfigError(f"{where} is another model: {', '.join(found)}")


def computation(config: DebertaConfig) -> dict[str, Any]:
    """What decides which tensors there are and what is computed of them, absent fields resolved."""
    values = {name: value for name, value in config.to_dict().items() if name not in _TRAINING_FIELDS}
    return values | {
        "attention_head_size": config.head_size,
        "embedding_size": config.embedding_width,
        "pooler_hidden_size": config.hidden_size,
        "max_relative_positions": config.max_relative_distance,
        "position_buckets": config.position_buckets if config.position_buckets >= 1 else -1,
        "conv_kernel_size": max(config.conv_kernel_size, 0),
        "conv_groups": config.conv_groups if config.conv_kernel_size > 0 else None,
        "conv_act": config.conv_act if config.conv_kernel_size > 0 else None,
        "pos_att_type": "|".join(sorted(config.pos_att_type)),
        "decoder": "emd" if config.uses_enhanced_mask_decoder else "plain",
    }
