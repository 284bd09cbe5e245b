"""The same initial weights for every layout: a function of the seed and the published parameter name.

The full tensor is drawn on the CPU and cut afterwards. So every layout, and a model built on the meta device and filled
later, starts with the same numbers.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def initial_tensor(name: str, shape: Sequence[int], *, seed: int, std: float) -> Tensor:
    """Initial value of one full parameter, float32 on the CPU.

    N(0, std) for matrices, convolutions and tables; ones for LayerNorm weights; zeros for biases.

    Args:
        name: published parameter name, e.g. ``deberta.encoder.layer.0.output.dense.weight``.
        shape: of the full tensor, before tensor parallelism divides it.
        seed: ``training.seed``; mixed with the name.
        std: ``initializer_range`` of the model.
    """
    if name.endswith("bias"):
        return torch.zeros(*shape, device="cpu", dtype=torch.float32)
    if name.endswith("LayerNorm.weight"):
        return torch.ones(*shape, device="cpu", dtype=torch.float32)
    # A hash and not Python's own: that differs from process to process.
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little"))
    return torch.empty(*shape, device="cpu", dtype=torch.float32).normal_(0.0, std, generator=generator)


@torch.no_grad()
def initialise_(model: nn.Module, *, seed: int, std: float, prefix: str = "") -> None:
    """Sets the initial weights of a whole model. Parameters on the meta device are left alone.

    Args:
        model: a model with published parameter names.
        seed: mixed with each name; see `initial_tensor`.
        std: ``initializer_range`` of the model.
        prefix: put before the model's own names to get the published ones.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            parameter.copy_(initial_tensor(prefix + name, parameter.shape, seed=seed, std=std))


@contextmanager
def without_memory() -> Iterator[None]:
    """Modules created inside are on the meta device: names and shapes, no numbers.

    The modules' own initialisation is skipped. On the meta device it has no effect, but it imports torch's compiler, which
    takes longer than the rest of a short command.
    """
    with torch.device("meta"), _NoInitialisation():
        yield


class _NoInitialisation(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return (kwargs or {}).get("tensor", args[0] if args else None)
        return func(*args, **(kwargs or {}))
