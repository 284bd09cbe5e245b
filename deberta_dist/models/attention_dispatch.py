"""The user's choice of attention implementation: checked before a run starts, set in a model, described in the log."""

import torch
from torch import nn

from deberta_dist.errors import ConfigError
from deberta_dist.kernels import IMPLEMENTATIONS, unavailable_reason
from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.layers import DisentangledSelfAttention
from deberta_dist.models.positions import relative_positions
from deberta_dist.values import AUTO


def set_attention(model: nn.Module, wish: str) -> None:
    """Sets the implementation of every layer of ``model`` to ``wish``: "auto" or one of `kernels.IMPLEMENTATIONS`."""
    assert wish in (AUTO, *IMPLEMENTATIONS), wish
    for module in model.modules():
        if isinstance(module, DisentangledSelfAttention):
            module.implementation = None if wish == AUTO else wish


def require_attention(wish: str, config: DebertaConfig, *, dtype: torch.dtype, device: torch.device, where: str) -> None:
    """Refuses an implementation that is not available, before a process group exists.

    Args:
        wish: "auto" or one of `kernels.IMPLEMENTATIONS`.
        config: the model's, for its head size and position buckets.
        dtype: compute dtype of the model.
        device: the device that the model will run on.
        where: what ``wish`` is called in the message, e.g. file and key.

    Raises:
        ConfigError: ``wish`` is "fused" and the fused attention is not available.
    """
    if wish == "fused" and (reason := _unavailable_reason(config, dtype=dtype, device=device)) is not None:
        raise ConfigError(f'{where} = "fused" is not available: {reason}. "auto" takes the fastest that can run')


def describe_attention(wish: str, config: DebertaConfig, *, dtype: torch.dtype, device: torch.device) -> str:
    """One line for a log: the implementation, and why it is not the fused one.

    A warning if there is a GPU and "auto" cannot use the fused attention: that costs a multiple of time and memory, and
    nothing else would show it.
    """
    if wish != AUTO:
        return f"attention: {wish}, as asked for"
    reason = _unavailable_reason(config, dtype=dtype, device=device)
    if reason is None:
        return "attention: fused"
    if device.type == "cuda":
        return f"warning: attention: portable, which is slower than fused: {reason}"
    return f"attention: portable ({reason})"


def _unavailable_reason(config: DebertaConfig, *, dtype: torch.dtype, device: torch.device) -> str | None:
    key_BNSH = torch.empty(1, config.num_attention_heads, 1, config.head_size, dtype=dtype, device=device)
    positions = relative_positions(
        num_buckets=config.position_buckets, max_distance=config.max_relative_distance, device=device
    )
    # Masks are of segments: padding and documents alike.
    return unavailable_reason(key_BNSH, positions=positions, mask=None)
