"""LayerNorm(dropout(dense(x)) + residual): after the product five passes over memory, or one in a fused kernel.

The kernel is our own on a GPU (`kernels.rows`), or `torch.compile`'s with ``training.compile``: compiled once for all layers,
and a second time with a variable number of rows when a second shape comes. All of them drop the same elements.
"""

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deberta_dist.errors import ConfigError
from deberta_dist.kernels.dropout import COLUMN, FIRST, SECOND, keep_probability, signed, threshold
from deberta_dist.kernels.fused.availability import compiler_reason
from deberta_dist.kernels.rows import fuses_rows, residual_norm, row_words
from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.dropout import Dropout
from deberta_dist.models.fused_qkv import Linear, linear, without_bias
from deberta_dist.models.plain import is_plain, is_unchanged


class ResidualOutput(nn.Module):
    """LayerNorm(dropout(dense(x)) + residual): the end of the attention and of the feed-forward.

    Attributes:
        joined: Whether what follows the product is compiled into one kernel; results differ by rounding only.
    """

    def __init__(self, config: DebertaConfig, *, input_size: int, site: int) -> None:
        super().__init__()
        self.dense = Linear(input_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob, site=site)
        self.joined = False

    def forward(self, x: Tensor, residual: Tensor, *, dropout_key: int | None, width: int | None = None) -> Tensor:
        """[B, T, D]; for ``width`` see `Dropout.forward`."""
        norm, dropout = self.LayerNorm, self.dropout
        # A module that has been replaced or hooked has to be called; only plain ones can be fused.
        is_joined = is_plain(norm) and norm.bias is not None and is_unchanged(dropout)
        if self.joined and is_joined and not torch.compiler.is_exporting():
            return self._compiled(linear(x, self.dense), residual, dropout_key=dropout_key, width=width)
        draws = dropout.drops and dropout_key is None
        exporting = torch.compiler.is_exporting()
        if exporting or draws or not is_joined or not fuses_rows(x) or not is_plain(self.dense) or self.dense.bias is None:
            return norm(dropout(linear(x, self.dense), dropout_key, width=width) + residual)
        return residual_norm(
            without_bias(x, self.dense),
            self.dense.bias,
            residual,
            norm.weight,
            norm.bias,
            eps=norm.eps,
            p=dropout.p if dropout.drops else 0.0,
            seed=dropout.seed(dropout_key) if dropout.drops else 0,
            numbers=dropout.row_numbers(residual, width),
        )

    def _compiled(self, x: Tensor, residual: Tensor, *, dropout_key: int | None, width: int | None) -> Tensor:
        norm, dropout = self.LayerNorm, self.dropout
        weight, bias = _NoLeaf.apply(norm.weight), _NoLeaf.apply(norm.bias)
        rows, of_residual = x.flatten(0, -2), residual.flatten(0, -2)
        if dropout.drops and dropout_key is not None and x.device.type == "cuda":
            numbers = dropout.row_numbers(x, width)
            low, high = row_words(len(rows), seed=dropout.seed(dropout_key), numbers=numbers, device=x.device)
            joined, limit = _joined(_hashed_residual_norm), (low, high, threshold(dropout.p), keep_probability(dropout.p))
            return joined(rows, of_residual, *limit, weight, bias, norm.eps).view(residual.shape)
        drawn = None
        if dropout_key is None:
            rows = dropout(rows, None)
        elif dropout.drops:
            drawn = dropout.numbers(x, dropout_key, width=width).flatten(0, -2)
        joined = _joined(_residual_norm)
        return joined(rows, of_residual, drawn, dropout.limit, dropout.scale, weight, bias, norm.eps).view(residual.shape)


class _NoLeaf(torch.autograd.Function):
    """Identity. torch.compile rejects a leaf, or a view of one, whose gradient has another dtype (float32) than itself."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        return parameter.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def require_compiler(device_type: str) -> None:
    """Checks beforehand what would otherwise fail within torch.compile in the first step.

    Raises:
        ConfigError: torch.compile finds no compiler for this kind of device.
    """
    if device_type == "cpu":
        compilers = os.environ.get("CXX", "g++"), "c++", "clang++"
        if not any(map(shutil.which, compilers)):
            raise ConfigError(f"training.compile = true needs a C++ compiler on a CPU; there is none of {', '.join(compilers)}")
    elif importlib.util.find_spec("triton") is None:
        raise ConfigError("training.compile = true needs Triton on this device: pip install triton")
    elif (reason := compiler_reason()) is not None:
        raise ConfigError(f"training.compile = true is not available: {reason}")


def _residual_norm(
    x: Tensor,
    residual: Tensor,
    numbers: Tensor | None,
    limit: int,
    scale: float,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Tensor:
    """With numbers drawn from a generator, int16 like ``x``; None if nothing is dropped here."""
    if numbers is not None:
        x = (x * scale).masked_fill(numbers < limit, 0.0)
    return F.layer_norm(x + residual, (x.shape[-1],), weight, bias, eps)


def _hashed_residual_norm(
    x: Tensor,
    residual: Tensor,
    low: Tensor,
    high: Tensor,
    limit: int,
    kept_share: float,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Tensor:
    """With numbers computed from the words of each row, [R, 1], and the column (`kernels.dropout`)."""
    words = low + torch.arange(x.shape[-1], dtype=torch.int32, device=x.device) * signed(COLUMN, bits=32)
    words = (words ^ (words >> 16)) * FIRST + high
    words = (words ^ (words >> 15)) * signed(SECOND, bits=32)
    x = (x / kept_share).masked_fill((words >> 1) < limit, 0.0)
    return F.layer_norm(x + residual, (x.shape[-1],), weight, bias, eps)


@functools.cache
def _joined(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    from torch._inductor import config

    # Inductor's pool of compiling processes would outlive a killed run, and a single kernel does not need it.
    config.compile_threads = 1
    return torch.compile(function, fullgraph=True)
