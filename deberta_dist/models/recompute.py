"""Activations are saved for the backward pass, or recomputed in it."""

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
    """``function(*args)``; with ``recompute`` only its arguments are saved for the backward pass.

    Args:
        function: depends on its arguments, parameters and dropout keys only.
        *args: tensors that ``function`` is called with.
        recompute: whether the backward pass calls ``function`` again.
        dropout_key: with a key, recomputed masks are the same; without one, torch's random state is saved and restored.
        owner: the module whose training mode decides; nothing is recomputed outside training.
    """
    if not (recompute and owner.training and torch.is_grad_enabled()):
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=dropout_key is None)
