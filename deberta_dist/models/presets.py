"""The published sizes by name, and two of each kind small enough for tests and demonstrations."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from deberta_dist.errors import ConfigError
from deberta_dist.models.config import DebertaConfig

_V1 = DebertaConfig(vocab_size=50265, position_biased_input=False, relative_attention=True, pos_att_type=("c2p", "p2c"))
_V3 = DebertaConfig(
    vocab_size=128100,
    attention_head_size=64,
    position_biased_input=False,
    relative_attention=True,
    pos_att_type=("p2c", "c2p"),
    position_buckets=256,
    share_att_key=True,
    norm_rel_ebd="layer_norm",
)
_V2 = dataclasses.replace(_V3, conv_kernel_size=3, conv_act="gelu")


def _sized(base: DebertaConfig, hidden_size: int, num_layers: int, num_heads: int) -> DebertaConfig:
    """``base`` with a feed-forward of four times the hidden size, as every release has."""
    return dataclasses.replace(
        base,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        intermediate_size=4 * hidden_size,
    )


def _tiny(base: DebertaConfig) -> DebertaConfig:
    return dataclasses.replace(
        _sized(base, 64, 4, 4),
        vocab_size=512,
        intermediate_size=128,
        max_position_embeddings=64,
        attention_head_size=None,
        position_buckets=16 if base.position_buckets > 0 else -1,
    )


PRESETS: Mapping[str, DebertaConfig] = MappingProxyType(
    {
        "v1-base": _sized(_V1, 768, 12, 12),
        "v1-large": _sized(_V1, 1024, 24, 16),
        "v1-xlarge": _sized(_V1, 1024, 48, 16),
        "v2-xlarge": _sized(_V2, 1536, 24, 24),
        "v2-xxlarge": _sized(_V2, 1536, 48, 24),
        "v3-xsmall": _sized(_V3, 384, 12, 6),
        "v3-small": _sized(_V3, 768, 6, 12),
        "v3-base": _sized(_V3, 768, 12, 12),
        "v3-large": _sized(_V3, 1024, 24, 16),
        "tiny-v1": _tiny(_V1),
        "tiny-v2": _tiny(_V2),
    }
)


def preset_name(name: str) -> str:
    """The key of `PRESETS` for a published name: ``xxlarge-v2``, ``microsoft/deberta-v3-base``, ``large`` (v1).

    Raises:
        ConfigError: there is none.
    """
    words = name.lower().removeprefix("microsoft/").removeprefix("deberta-").split("-")
    for spelling in ("-".join(words), "-".join(reversed(words)), "-".join(("v1", *words))):
        if spelling in PRESETS:
            return spelling
    raise ConfigError(f"model {name!r} does not exist; known models: {', '.join(PRESETS)}")


def preset(name: str, /, **overrides: Any) -> DebertaConfig:
    """A published configuration with some fields replaced.

    Args:
        name: a key of `PRESETS`; `preset_name` finds it from other spellings.
        **overrides: fields of `DebertaConfig` to replace.

    Raises:
        ConfigError: no preset has this name, a field does not exist, or the result is refused.
    """
    if name not in PRESETS:
        raise ConfigError(f"model preset {name!r} does not exist; known presets: {', '.join(PRESETS)}")
    return DebertaConfig.from_dict({**PRESETS[name].to_dict(), **overrides})
