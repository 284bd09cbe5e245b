"""Activations kept or computed again in the backward pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from deberta_dist.errors import ConfigError
from deberta_dist.values import RECOMPUTE


def require_recompute_mode(mode: str) -> str:
    """Returns ``mode``.

    Raises:
        ConfigError: it is not one of `RECOMPUTE`.
    """
    if mode not in RECOMPUTE:
        raise ConfigError(f"recompute = {mode!r} is not one of {', '.join(RECOMPUTE)}")
    return mode


def call_with_recompute(
    function: Callable[..., Any], *args: Any, recompute: bool, dropout_key: int | None, owner: nn.Module
) -> Any:
    """``function(*args)``, keeping only its inputs for the backward pass if ``recompute``.

    Args:
        function: computes from its arguments, parameters and keys alone.
        args: its arguments.
        recompute: whether to compute again in the backward pass.
        dropout_key: with a key the masks come out the same by themselves; without, torch's random state is kept.
        owner: the module whose training mode decides; nothing is recomputed outside training.
    """
    if not (recompute and owner.training and torch.is_grad_enabled()):
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=dropout_key is None)
