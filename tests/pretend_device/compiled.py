"""Functions that the product compiles: run as they are, counted as the kernels that a compiler makes of them."""

import contextlib
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from tests.pretend_device.cuda_api import CAPABILITY

# The one that is there before a device replaces it.
_compile = torch.compile


class Kernels(NamedTuple):
    """How many kernels a compiler makes of a function."""

    forward: int
    backward: int


class Recorder(Protocol):
    """The device, as far as it is needed here."""

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """Nothing of the block is recorded."""

    def note_compiled(self, name: str, *, num_kernels: int) -> None:
        """Records the launches of a compiled function."""


def count_kernels(function: Callable[..., Tensor], arguments: Callable[[], Sequence[Any]]) -> Kernels:
    """Compiles a function for the pretended device and counts what its passes launch.

    torch's compiler writes its Triton kernels for an H200, whether there is one or not, and the wrapper that launches them
    runs; the kernels do not. In a process that has entered a `PretendDevice`. Takes some ten seconds.

    Args:
        function: Of tensors and other values to one tensor.
        arguments: Makes them; sizes are the product's, since they decide into how many kernels a reduction is split.
    """
    from torch._inductor import config
    from torch._inductor.async_compile import AsyncCompile

    launched: list[str] = []

    def kernel(_: Any, name: str, *source: Any, **options: Any) -> Any:
        return types.SimpleNamespace(run=lambda *args, **kwargs: launched.append(name))

    def empty_strided(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device="cuda")

    with (
        _disable_current_modes(),
        mock.patch.object(AsyncCompile, "triton", kernel),
        mock.patch.object(torch._C._dynamo.guards, "_empty_strided_cuda", empty_strided),
        _triton_driver(),
        config.patch(compile_threads=1, force_disable_caches=True),
        warnings.catch_warnings(action="ignore"),
    ):
        output = _compile(function, fullgraph=True)(*arguments())
        forward = len(launched)
        output.sum().backward()
    return Kernels(forward, len(launched) - forward)


@contextlib.contextmanager
def _triton_driver() -> Iterator[None]:
    """Triton looks for the driver's library as soon as somebody asks for the kind of GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    target = GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)
    with mock.patch.object(driver, "_active", types.SimpleNamespace(get_current_target=lambda: target)):
        yield


class Compiled:
    """Stands for ``torch.compile(function)``.

    Args:
        function: Of tensors and other values to one tensor.
        kernels: How many launches its passes are; None: it must not be called.
        device: Where they are recorded.
    """

    def __init__(self, function: Callable[..., Tensor], *, kernels: Kernels | None, device: Recorder) -> None:
        self.function, self.kernels, self.device = function, kernels, device

    def __call__(self, *args: Any) -> Tensor:
        if self.kernels is None:
            raise RuntimeError(f"PretendDevice(compiled=...) does not say how many kernels {self.function.__name__} is")
        return _Uncompiled.apply(self, *args)

    def note(self, num_kernels: int) -> None:
        """Records launches."""
        self.device.note_compiled(self.function.__name__, num_kernels=num_kernels)


class _Uncompiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compiled: Compiled, *args: Any) -> Tensor:
        ctx.compiled = compiled
        ctx.args = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args]
        with compiled.device.paused(), torch.enable_grad():
            ctx.output = compiled.function(*ctx.args)
        compiled.note(compiled.kernels.forward)
        return ctx.output.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [n for n, a in enumerate(ctx.args) if isinstance(a, Tensor) and a.requires_grad]
        with ctx.compiled.device.paused():
            found = torch.autograd.grad(ctx.output, [ctx.args[n] for n in wanted], gradient)
        ctx.compiled.note(ctx.compiled.kernels.backward)
        gradients: list[Tensor | None] = [None] * len(ctx.args)
        for number, value in zip(wanted, found, strict=True):
            gradients[number] = value
        return None, *gradients
