"""Which attention a model runs with: what a user asks for, checked before anything starts, and the log's line on it."""

import torch
from torch import nn

from deberta_dist.errors import ConfigError
from deberta_dist.kernels import IMPLEMENTATIONS, unavailable_reason
from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.layers import DisentangledSelfAttention
from deberta_dist.models.positions import relative_positions
from deberta_dist.values import AUTO


def set_attention(model: nn.Module, wish: str) -> None:
    """Makes every layer of ``model`` attend by ``wish``: "auto" or one of `kernels.IMPLEMENTATIONS`."""
    assert wish in (AUTO, *IMPLEMENTATIONS), wish
    for module in model.modules():
        if isinstance(module, DisentangledSelfAttention):
            module.implementation = None if wish == AUTO else wish


def require_attention(wish: str, config: DebertaConfig, *, dtype: torch.dtype, device: torch.device, where: str) -> None:
    """Refuses a wish that cannot be had, before a process group exists.

    Args:
        wish: "auto" or one of `kernels.IMPLEMENTATIONS`.
        config: of the model.
        dtype: of its weights.
        device: that it will run on.
        where: what the wish is called in the message, e.g. the file and key.

    Raises:
        ConfigError: the fused attention is asked for and cannot be had.
    """
    if wish == "fused" and (reason := _unavailable_reason(config, dtype=dtype, device=device)) is not None:
        raise ConfigError(f'{where} = "fused" is not available: {reason}. "auto" takes the fastest that can run')


def describe_attention(wish: str, config: DebertaConfig, *, dtype: torch.dtype, device: torch.device) -> str:
    """One line for a log: the implementation, and why it is not the fused one.

    A warning where a GPU is there, nobody asked for another one, and the fused attention is not used: that costs a
    multiple of the time and memory, and nothing else would tell.
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
