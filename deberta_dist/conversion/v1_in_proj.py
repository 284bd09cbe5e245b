"""Structural rules for v1's fused ``in_proj``: split into separate projections, and fused again.

``in_proj`` [3 N H, D] holds query, key and value rows of head 0, then of head 1, and so on. Keys and position keys
have no bias in this form. Used by the official and the Hugging Face format.

Source: microsoft/DeBERTa DeBERTa/deberta/disentangled_attention.py@4d7fe0bd, ``_pre_load_hook``.
"""

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from deberta_dist.checkpoint.errors import CheckpointError
from deberta_dist.conversion.weights import Weight, Weights, shorten
from deberta_dist.errors import ConfigError
from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.published_state import V1_LEAVES

_SELF = ".attention.self."
_SEPARATE_TO_FUSED = {separate: fused for fused, separate in V1_LEAVES.items()}
LEAVES = ("in_proj.weight", *V1_LEAVES)
"""What the names of the fused form end with."""
_PROJECTIONS = ("query_proj.weight", "key_proj.weight", "value_proj.weight")
_BIASES_WITHOUT_PLACE = ("key_proj.bias", "pos_key_proj.bias")


def separate(weights: Weights, *, head_size: int) -> Weights:
    """Cuts fused projections; the biases that this form lacks are zero. Other weights pass.

    Args:
        weights: Published names, fused or not.
        head_size: Rows of one head: in `in_proj` each head's query, key and value follow each other.

    Raises:
        CheckpointError: the rows of an ``in_proj`` are not three times whole heads.
    """
    found: Weights = {}
    for name, weight in weights.items():
        stem, _, leaf = name.rpartition(_SELF)
        stem += _SELF
        if leaf == "in_proj.weight":
            rows = weight.shape[0] // 3 if len(weight.shape) == 2 else 0
            if not rows or rows * 3 != weight.shape[0] or rows % head_size:
                raise CheckpointError(f"{name} is {list(weight.shape)}: not three times heads of {head_size} rows")
            # One after the other is asked for its third: the joined tensor is read once, not three times.
            whole = _ReadOnce(weight.read, uses=len(_PROJECTIONS))
            for number, part in enumerate(_PROJECTIONS):
                found[stem + part] = replace(
                    weight,
                    shape=(rows, weight.shape[1]),
                    read=functools.partial(_third, whole, number, head_size),
                    why="cut out of the fused projection of v1, which interleaves heads",
                )
            # Without it a loader that tolerates missing keys would leave the module's random bias in place.
            found[stem + "key_proj.bias"] = _zeros(rows, weight.dtype)
        elif leaf in V1_LEAVES:
            found[stem + V1_LEAVES[leaf]] = replace(weight, why="named so in the fused form of v1")
            if leaf == "pos_proj.weight" and weight.shape:
                found[stem + "pos_key_proj.bias"] = _zeros(weight.shape[0], weight.dtype)
        else:
            found[name] = weight
    return found


def obstacles(weights: Weights, *, config: DebertaConfig) -> list[str]:
    """Why a model has no fused form, one reason each; empty where it has. Reads the key biases."""
    found = []
    if config.share_att_key:
        found.append("share_att_key: it has no position projections of its own")
    if config.position_buckets >= 1:
        found.append("position_buckets: its distances are in buckets")
    if config.conv_kernel_size > 0 or config.norm_rel_ebd != "none":
        found.append("a convolution or a normalised relative table")
    found += [
        f"{name} is not zero, and the fused form has no place for it"
        for name, weight in weights.items()
        # By bits: zero with a minus sign would come back without it.
        if name.endswith(tuple(_SELF + leaf for leaf in _BIASES_WITHOUT_PLACE))
        and weight.read().contiguous().view(torch.uint8).any()
    ]
    return found


def fuse(weights: Weights, *, config: DebertaConfig) -> Weights:
    """Joins separate projections into the fused form of v1.

    Raises:
        ConfigError: the model has no fused form, or a key bias would be lost.
    """
    reasons = obstacles(weights, config=config)
    if reasons:
        raise ConfigError(f"the fused form of v1 cannot hold this model without loss: {shorten(reasons)}")
    found: Weights = {}
    for name, weight in weights.items():
        stem, _, leaf = name.rpartition(_SELF)
        stem += _SELF
        if leaf == _PROJECTIONS[0]:
            parts = [weights[stem + part] for part in _PROJECTIONS]
            found[stem + "in_proj.weight"] = Weight(
                shape=(3 * weight.shape[0], weight.shape[1]),
                dtype=weight.dtype,
                read=functools.partial(_joined, parts, config.head_size),
                origin=tuple(key for part in parts for key in part.origin),
                why="query, key and value joined, heads interleaved",
            )
        elif leaf in _SEPARATE_TO_FUSED:
            found[stem + _SEPARATE_TO_FUSED[leaf]] = replace(weight, why="named so in the fused form of v1")
        elif leaf not in (*_PROJECTIONS, *_BIASES_WITHOUT_PLACE):
            found[name] = weight
    return found


def lost_biases(weights: Weights) -> list[str]:
    """Keys of the biases which `fuse` leaves out (they are zero)."""
    return [
        key
        for name, weight in weights.items()
        if name.endswith(tuple(_SELF + leaf for leaf in _BIASES_WITHOUT_PLACE))
        for key in weight.origin
    ]


class _ReadOnce:
    """Keeps a tensor from its first use to its last."""

    def __init__(self, read: Callable[[], Tensor], *, uses: int) -> None:
        self._read, self._uses, self._left = read, uses, 0
        self._tensor: Tensor | None = None

    def __call__(self) -> Tensor:
        if self._tensor is None:
            self._tensor, self._left = self._read(), self._uses
        tensor = self._tensor
        self._left -= 1
        if self._left == 0:
            self._tensor = None
        return tensor


def _third(whole: Callable[[], Tensor], number: int, head_size: int) -> Tensor:
    # [3 N H, D] -> [N, 3, H, D]: q, k and v alternate per head, so a plain chunk(3) would mix heads.
    return whole().unflatten(0, (-1, 3, head_size))[:, number].flatten(0, 1)


def _joined(parts: list[Weight], head_size: int) -> Tensor:
    return torch.stack([part.read().unflatten(0, (-1, head_size)) for part in parts], dim=1).flatten(0, 2)


def _zeros(size: int, dtype: torch.dtype) -> Weight:
    return Weight(
        shape=(size,),
        dtype=dtype,
        read=lambda: torch.zeros(size, dtype=dtype),
        origin=(),
        why="zero: the fused form of v1 has no such bias (what a fresh module holds would change the scores)",
    )
