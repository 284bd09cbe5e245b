"""Linear layers: several of one input as one product, and gradients that their own product adds up.

Several as one, where their weights lie one behind the other in memory: nothing is concatenated, the weights stay
parameters of their own under their published names, and lie so because `join_` has laid them so or because a flat buffer of
weights keeps the order of the modules. Elsewhere each layer makes its own product. One that is not as it was built, or that
has been hooked, is called (`models.plain`).

A weight with an attribute ``main_grad``, float32 of its shape, has its gradient added there by the product that makes it
(beta = 1), in float32, and none left to autograd: 8 bytes a weight move, where a 16-bit gradient that is made, converted
and added moves 20. ``main_grad`` is Megatron's word. Biases are left to autograd, their sums in float32.

An input that can be made again is not kept for the backward pass. Whoever makes such a tensor sets its attribute
``made_from`` to (what is kept instead, a function of that which begins to make it and returns something with ``wait()``).

Letters: D features in, E features out of one layer.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deberta_dist.models.plain import has_own_weight, is_of_plain_class, is_plain


def Linear(in_features: int, out_features: int, *, bias: bool = True) -> nn.Linear:
    """A layer y = x W^T + b: torch's own class, which other libraries know by its exact type, with our product beside it.

    Its attribute ``multiply`` is for layers that take its place and have a part of its weight.
    """
    layer = nn.Linear(in_features, out_features, bias=bias)
    layer.multiply = multiply
    return layer


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b of ``x`` [..., D]; adds up the weight's gradient where it has a ``main_grad``."""
    if main_grad(weight) is None:
        return F.linear(x, weight, bias)
    (y,) = _Product.apply(x, x, None, 1, weight, bias)
    return y


def linear(x: Tensor, layer: nn.Module) -> Tensor:
    """What ``layer`` makes of ``x`` [..., D]: by a call, unless torch's own layer would leave a ``main_grad`` to autograd."""
    if type(layer) is nn.Linear and main_grad(layer._parameters.get("weight")) is not None and is_plain(layer):
        return multiply(x, layer.weight, layer.bias)
    return layer(x)


def without_bias(x: Tensor, layer: nn.Linear) -> Tensor:
    """What a plain ``layer`` makes of ``x`` [..., D] but for its bias, for who adds that in a pass of their own."""
    return multiply(x, layer.weight) if type(layer) is nn.Linear else layer.without_bias(x)


def main_grad(parameter: Tensor | None) -> Tensor | None:
    """Where products add the parameter's gradient; None where autograd has it."""
    return getattr(parameter, "main_grad", None)


def is_asked_for(parameter: Tensor) -> bool:
    """Whether the backward pass that runs leads to the parameter: not where others' gradients alone are asked for."""
    return torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(parameter).node)


@torch.no_grad()
def add_gradients_(parameters: Iterable[Tensor]) -> None:
    """Adds what a backward pass has left to autograd, in ``.grad``, to every ``main_grad``, all of one dtype at once."""
    left: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            left[parameter.grad.dtype].append(parameter)
    for some in left.values():
        torch._foreach_add_([parameter.main_grad for parameter in some], [parameter.grad for parameter in some])
        for parameter in some:
            parameter.grad = None


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left right, of matrices; the sums and ``total`` are float32 (float64), the factors of 16 bits or as wide."""
    if left.dtype == total.dtype:
        torch.addmm(total, left, right, out=total)
    elif left.device.type == "cpu":  # has no such product
        torch.addmm(total, left.to(total.dtype), right.to(total.dtype), out=total)
    else:
        torch.addmm(total, left, right, total.dtype, out=total)


def joint_linear(x: Tensor, layers: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
    """What each of ``layers`` makes of ``x`` [..., D]: [..., E] each, slices of one tensor where there was one product."""
    # A compiler cannot see where memory lies, and joins what it likes.
    if torch.compiler.is_compiling() or torch.compiler.is_exporting() or not all(map(is_plain, layers)):
        return tuple(linear(x, layer) for layer in layers)
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    if len({bias is None for bias in biases}) > 1:
        return tuple(linear(x, layer) for layer in layers)
    kept, make = getattr(x, "made_from", (None, None))
    if make is not None or main_grad(weights[0]) is not None:
        return _Product.apply(x, x if kept is None else kept, make, len(layers), *weights, *biases)
    # Under autocast a product chooses its own precision.
    kind = x.device.type
    is_cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if is_cast or len(layers) == 1 or biases[0] is None or adjacent(weights) is None or adjacent(biases) is None:
        return tuple(F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))
    outputs = F.linear(x, _Together.apply(*weights), _Together.apply(*biases))
    return _Apart.apply(outputs, [weight.shape[0] for weight in weights])


@torch.no_grad()
def join_(layers: Sequence[nn.Linear]) -> None:
    """Lays the weights of ``layers`` one behind the other, and their biases; values stay. Not of what has replaced a layer."""
    if not all(is_of_plain_class(layer) and has_own_weight(layer) for layer in layers):
        return
    for parameters in ([layer.weight for layer in layers], [layer.bias for layer in layers]):
        if len({None if p is None else (p.dtype, p.device, p.shape[1:]) for p in parameters}) > 1 or parameters[0] is None:
            continue
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


class _Product(torch.autograd.Function):
    """One product, of an input that is not kept or of weights whose gradients it adds up."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kept: Tensor,
        make: Callable[[Tensor], Any] | None,
        num_layers: int,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        weights, biases = parameters[:num_layers], parameters[num_layers:]
        ctx.save_for_backward(kept, *weights)
        ctx.make, ctx.parameters = make, parameters
        bias = None if biases[0] is None else _together(biases)
        outputs = F.linear(x, _together(weights), bias)
        return outputs.split([weight.shape[0] for weight in weights], dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "an input that is made again, or a weight with a main_grad, was differentiated with create_graph=True; "
                "they have no second derivative"
            )
        kept, *weights = ctx.saved_tensors
        x = kept if ctx.make is None else ctx.make(kept)
        gradient = _side_by_side(gradients)
        rows = gradient.flatten(0, -2)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = (rows @ _together(weights)).view(*gradient.shape[:-1], -1)
        x = (x if ctx.make is None else x.wait()).flatten(0, -2)  # it was on its way during the product above
        parameters = ctx.parameters
        has_bias = parameters[-1] is not None
        if main_grad(parameters[0]) is None:
            d_weights, d_biases = _parameter_gradients(rows, x, weights, needs=any(ctx.needs_input_grad[2:]))
        else:
            d_weights, d_biases = _added_gradients(rows, x, parameters[: len(weights)], has_bias=has_bias)
        return d_x, None, None, None, *d_weights, *(d_biases if has_bias else [None] * len(weights))


def _parameter_gradients(
    rows: Tensor, x: Tensor, weights: Sequence[Tensor], *, needs: bool
) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
    """Gradients of weights and biases, for autograd."""
    if not needs:
        return [None] * len(weights), [None] * len(weights)
    sizes = [weight.shape[0] for weight in weights]
    return (rows.T @ x).split(sizes), rows.sum(dim=0).split(sizes)


def _added_gradients(
    rows: Tensor, x: Tensor, weights: Sequence[Tensor], *, has_bias: bool
) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
    """None, for gradients of weights that have been added, and gradients of biases."""
    nothing = [None] * len(weights)
    if not is_asked_for(weights[0]):
        return nothing, nothing
    totals, sizes = [main_grad(weight) for weight in weights], [weight.shape[0] for weight in weights]
    whole = adjacent(totals)
    parts = [(whole, rows)] if whole is not None else zip(totals, rows.split(sizes, dim=-1), strict=True)
    for total, part in parts:
        add_product_(total, part.T, x)
    return nothing, rows.sum(dim=0, dtype=totals[0].dtype).split(sizes) if has_bias else nothing
