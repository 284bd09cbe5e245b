"""Several linear layers of one input as one product, where their weights lie one behind the other in memory.

Nothing is concatenated: the weights stay parameters of their own under their published names, and lie so because
`join_` has laid them so or because a flat buffer of weights keeps the order of the modules. Elsewhere each layer makes
its own product.

An input that can be made again is not kept for the backward pass. Whoever makes such a tensor sets its attribute
``made_from`` to (what is kept instead, a function of that which begins to make it and returns something with ``wait()``).

Letters: D features in, E features out of one layer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def joint_linear(x: Tensor, layers: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
    """What each of ``layers`` makes of ``x`` [..., D]: [..., E] each, slices of one tensor where there was one product."""
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    kept, make = getattr(x, "made_from", (None, None))
    if make is not None:
        return _MadeAgain.apply(x, kept, make, len(layers), *weights, *biases)
    # Under autocast a product chooses its own precision.
    kind = x.device.type
    is_cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if is_cast or len(layers) == 1 or adjacent(weights) is None or adjacent(biases) is None:
        return tuple(F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))
    outputs = F.linear(x, _Together.apply(*weights), _Together.apply(*biases))
    return _Apart.apply(outputs, [weight.shape[0] for weight in weights])


@torch.no_grad()
def join_(layers: Sequence[nn.Linear]) -> None:
    """Lays the weights of ``layers`` one behind the other, and their biases; values stay."""
    for parameters in ([layer.weight for layer in layers], [layer.bias for layer in layers]):
        if adjacent(parameters) is None:
            whole = torch.cat([parameter.detach() for parameter in parameters])
            parts = whole.split([parameter.shape[0] for parameter in parameters])
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.data = part


def adjacent(tensors: Sequence[Tensor], *, dim: int = 0) -> Tensor | None:
    """One view of tensors that follow each other along ``dim`` in the same memory; None if they do not."""
    first = tensors[0]
    offset = first.storage_offset()
    for tensor in tensors:
        if (
            tensor.untyped_storage()._cdata != first.untyped_storage()._cdata
            or tensor.storage_offset() != offset
            or tensor.stride() != first.stride()
            or tensor.dtype != first.dtype
        ):
            return None
        offset += tensor.shape[dim] * tensor.stride(dim)
    shape = list(first.shape)
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    if shape[dim] > 1 and len(shape) > 1 and dim == len(shape) - 1 and first.stride(-2) < shape[dim]:
        return None  # the next row begins within this one
    return first.detach().as_strided(shape, first.stride())


def _together(tensors: Sequence[Tensor]) -> Tensor:
    view = adjacent(tensors)
    return torch.cat(tensors) if view is None else view


def _side_by_side(gradients: Sequence[Tensor]) -> Tensor:
    # A view of memory has no history: what is differentiated again is copied.
    view = None if torch.is_grad_enabled() else adjacent(gradients, dim=-1)
    return torch.cat(gradients, dim=-1) if view is None else view


class _Together(torch.autograd.Function):
    """Adjacent parameters as one; torch's own product then knows which gradients are asked for."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.sizes = [parameter.shape[0] for parameter in parameters]
        return adjacent(parameters)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient.split(ctx.sizes)


class _Apart(torch.autograd.Function):
    """One output as several; gradients that lie side by side are not copied."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
        return outputs.detach().split(sizes, dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _side_by_side(gradients), None


class _MadeAgain(torch.autograd.Function):
    """One product of an input that is not kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kept: Tensor,
        make: Callable[[Tensor], Any],
        num_layers: int,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        weights, biases = parameters[:num_layers], parameters[num_layers:]
        ctx.save_for_backward(kept, *weights)
        ctx.make = make
        outputs = F.linear(x, _together(weights), _together(biases))
        return outputs.split([weight.shape[0] for weight in weights], dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("an input that is made again was differentiated with create_graph=True; it has no second derivative")
        kept, *weights = ctx.saved_tensors
        x_again = ctx.make(kept)
        sizes = [weight.shape[0] for weight in weights]
        gradient = _side_by_side(gradients)
        rows = gradient.flatten(0, -2)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = (rows @ _together(weights)).view(*gradient.shape[:-1], -1)
        x = x_again.wait()  # it was on its way during the product above
        d_weights = d_biases = [None] * len(weights)
        if any(ctx.needs_input_grad[2:]):
            d_weights = (rows.T @ x.flatten(0, -2)).split(sizes)
            d_biases = rows.sum(dim=0).split(sizes)
        return d_x, None, None, None, *d_weights, *d_biases
