"""LayerNorm(dropout(dense(x)) + residual): behind the product five passes over memory, or one where a compiler joins them.

Joined by `torch.compile`, once for all layers: a second shape makes the number of rows a variable, so no batch is compiled
for again. Random numbers are drawn outside, as ever, so masks do not depend on who computes.
"""

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deberta_dist.errors import ConfigError
from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.dropout import Dropout
from deberta_dist.models.joint_linear import Linear


class ResidualOutput(nn.Module):
    """LayerNorm(dropout(dense(x)) + residual): the end of the attention and of the feed-forward.

    Attributes:
        joined: What follows the product is one kernel; rounding apart the numbers are the same.
    """

    def __init__(self, config: DebertaConfig, *, input_size: int, site: int) -> None:
        super().__init__()
        self.dense = Linear(input_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob, site=site)
        self.joined = False

    def forward(self, x: Tensor, residual: Tensor, *, dropout_key: int | None) -> Tensor:
        x, norm, dropout = self.dense(x), self.LayerNorm, self.dropout
        if not self.joined:
            return norm(dropout(x, dropout_key) + residual)
        numbers = None
        if dropout_key is None:
            x = dropout(x, None)
        elif dropout.drops:
            numbers = dropout.numbers(x, dropout_key).flatten(0, -2)
        x, rows = x.flatten(0, -2), residual.flatten(0, -2)
        rows = _joined()(x, rows, numbers, dropout.limit, dropout.scale, norm.weight, norm.bias, norm.eps)
        return rows.view(residual.shape)


def require_compiler(device_type: str) -> None:
    """Says at once what torch.compile would say in the middle of the first step.

    Raises:
        ConfigError: there is nothing that it could compile with on this kind of device.
    """
    if device_type == "cpu":
        compilers = os.environ.get("CXX", "g++"), "c++", "clang++"
        if not any(map(shutil.which, compilers)):
            raise ConfigError(f"training.compile = true needs a C++ compiler on a CPU; there is none of {', '.join(compilers)}")
    elif importlib.util.find_spec("triton") is None:
        raise ConfigError("training.compile = true needs Triton on this device: pip install triton")


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
    if numbers is not None:
        x = (x * scale).masked_fill(numbers < limit, 0.0)
    return F.layer_norm(x + residual, (x.shape[-1],), weight, bias, eps)


@functools.cache
def _joined() -> Callable[..., Tensor]:
    from torch._inductor import config

    # A pool of compiling processes outlives a killed run; one kernel needs none.
    config.compile_threads = 1
    return torch.compile(_residual_norm, fullgraph=True)
