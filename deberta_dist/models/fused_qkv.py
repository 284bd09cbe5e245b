"""Linear layers: several of one input as one product, and gradients that their own product adds up.

Several as one, where their weights are slices of one tensor, one behind the other: nothing is concatenated, and the weights
stay parameters of their own under their published names. They are such slices because `join_` has made them so or because a
flat buffer of weights keeps the order of the modules. That is asked in every call, beside whether each layer is as it was
built (`models.plain`): a layer that has been replaced, hooked, adapted or given another weight makes its own product, and its
sisters theirs.

A layer with an entry in ``main_grads``, float32 of its weight's shape, has its weight's gradient added there by the product
that makes it (beta = 1), in float32, and none left to autograd: 8 bytes a weight move, where a 16-bit gradient that is made,
converted and added moves 20. ``main_grad`` is Megatron's word. Biases are left to autograd, their sums in float32.

An input that can be recomputed is not saved for the backward pass, see `Entered`.

Letters: D features in, E features out of one layer.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deberta_dist.models.plain import has_own_weight, is_of_plain_class, is_plain, is_unchanged

MAIN_GRADS = "main_grads"


class Entered(NamedTuple):
    """An activation that has passed an ``enter`` module.

    Attributes:
        x: [..., D].
        saved: What products save for their backward pass: ``x``, or what it can be recomputed from.
        start: Begins to recompute ``x`` from ``saved``; returns something whose ``wait()`` gives it. None: ``saved`` is ``x``.
    """

    x: Tensor
    saved: Tensor
    start: Callable[[Tensor], Any] | None


def entered(enter: nn.Module, x: Tensor) -> Entered:
    """What ``enter`` makes of ``x``. Products recompute it where the module, unchanged, has a method ``start_recompute``."""
    output = enter(x)
    start = getattr(enter, "start_recompute", None)
    if start is None or not is_unchanged(enter):
        return Entered(output, output, None)
    return Entered(output, x.detach(), start)


def Linear(in_features: int, out_features: int, *, bias: bool = True) -> nn.Linear:
    """A layer y = x W^T + b: torch's own class, which other libraries know by its exact type, with our product beside it.

    Its attribute ``multiply`` is for layers that take its place and have a part of its weight.
    """
    layer = nn.Linear(in_features, out_features, bias=bias)
    layer.multiply = multiply
    return layer


def multiply(x: Tensor, layer: nn.Module, bias: Tensor | None = None) -> Tensor:
    """x W^T + b of ``x`` [..., D] and the weight of ``layer``; adds up the weight's gradient where there is a ``main_grad``."""
    total = main_grad(layer)
    if total is None:
        return F.linear(x, layer.weight, bias)
    (y,) = _Product.apply(x, x, None, [total], layer.weight, bias)
    return y


def linear(x: Tensor, layer: nn.Module) -> Tensor:
    """What ``layer`` makes of ``x`` [..., D]: by a call, unless torch's own layer would leave a ``main_grad`` to autograd."""
    if type(layer) is nn.Linear and main_grad(layer) is not None and is_plain(layer):
        return multiply(x, layer, layer.bias)
    return layer(x)


def without_bias(x: Tensor, layer: nn.Linear) -> Tensor:
    """What a plain ``layer`` makes of ``x`` [..., D] but for its bias, for who adds that in a pass of their own."""
    return multiply(x, layer) if type(layer) is nn.Linear else layer.without_bias(x)


def main_grad(module: nn.Module) -> Tensor | None:
    """Where products add the gradient of the module's weight; None where autograd has it."""
    return module.__dict__.get(MAIN_GRADS, {}).get("weight")


def set_main_grads(model: nn.Module, totals: Mapping[str, Tensor] | None) -> None:
    """Says where gradients are added from now on.

    Args:
        model: Its modules get an attribute ``main_grads``, parameter name -> sum.
        totals: A sum, of float32 or wider, for every parameter by its full name; None: autograd has all gradients again.
    """
    for module in model.modules():
        module.__dict__.pop(MAIN_GRADS, None)
    for name, total in (totals or {}).items():
        module_name, _, leaf = name.rpartition(".")
        vars(model.get_submodule(module_name)).setdefault(MAIN_GRADS, {})[leaf] = total


@torch.no_grad()
def add_gradients_(model: nn.Module) -> None:
    """Adds what a backward pass has left to autograd, in ``.grad``, to the sums of `set_main_grads`, all of one dtype at once."""
    left: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for module in model.modules():
        for name, total in module.__dict__.get(MAIN_GRADS, {}).items():
            parameter = module._parameters[name]
            if parameter.grad is not None:
                left[parameter.grad.dtype].append((total, parameter))
    for some in left.values():
        torch._foreach_add_([total for total, _ in some], [parameter.grad for _, parameter in some])
        for _, parameter in some:
            parameter.grad = None


def is_asked_for(parameter: Tensor) -> bool:
    """Whether the backward pass that runs leads to the parameter: not where others' gradients alone are asked for."""
    return torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(parameter).node)


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left right, of matrices; the sums and ``total`` are float32 (float64), the factors of 16 bits or as wide."""
    if left.dtype == total.dtype:
        torch.addmm(total, left, right, out=total)
    elif left.device.type == "cpu":  # has no such product
        torch.addmm(total, left.to(total.dtype), right.to(total.dtype), out=total)
    else:
        torch.addmm(total, left, right, total.dtype, out=total)


def joint_linear(x: Tensor | Entered, layers: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
    """What each of ``layers`` makes of ``x`` [..., D]: [..., E] each, slices of one tensor where there was one product."""
    x, saved, start = x if isinstance(x, Entered) else (x, x, None)
    # A compiler cannot see where memory lies, and joins what it likes.
    if torch.compiler.is_compiling() or torch.compiler.is_exporting() or not all(map(is_plain, layers)):
        return tuple(linear(x, layer) for layer in layers)
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    if len({bias is None for bias in biases}) > 1:
        return tuple(linear(x, layer) for layer in layers)
    totals = [main_grad(layer) for layer in layers]
    if start is not None or totals[0] is not None:
        return _Product.apply(x, saved, start, totals, *weights, *biases)
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
            whole = _joined([parameter.detach() for parameter in parameters])
            parts = whole.split([parameter.shape[0] for parameter in parameters])
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.data = part


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    if not tensors[0].is_meta:
        return torch.cat(tensors)
    # There is nothing to copy, and for its shape alone torch imports a compiler: most of the time of a small conversion.
    return tensors[0].new_empty((sum(tensor.shape[0] for tensor in tensors), *tensors[0].shape[1:]))


def adjacent(tensors: Sequence[Tensor], *, dim: int = 0) -> Tensor | None:
    """The tensor of which ``tensors`` are slices that follow each other along ``dim``; None if they are not."""
    first = tensors[0]
    storage, offset = first.untyped_storage(), first.storage_offset()
    for tensor in tensors:
        if (
            tensor.untyped_storage() is not storage
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
    """One product, of an input that is recomputed or of weights whose gradients it adds up."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        saved: Tensor,
        start: Callable[[Tensor], Any] | None,
        totals: Sequence[Tensor | None],
        *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        weights, biases = parameters[: len(totals)], parameters[len(totals) :]
        ctx.save_for_backward(saved, *weights)
        ctx.start, ctx.totals, ctx.parameters = start, totals, parameters
        bias = None if biases[0] is None else _together(biases)
        outputs = F.linear(x, _together(weights), bias)
        return outputs.split([weight.shape[0] for weight in weights], dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "an input that is recomputed, or a weight with a main_grad, was differentiated with create_graph=True; "
                "they have no second derivative"
            )
        saved, *weights = ctx.saved_tensors
        x = saved if ctx.start is None else ctx.start(saved)
        gradient = _side_by_side(gradients)
        rows = gradient.flatten(0, -2)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = (rows @ _together(weights)).view(*gradient.shape[:-1], -1)
        x = (x if ctx.start is None else x.wait()).flatten(0, -2)  # it was on its way during the product above
        has_bias = ctx.parameters[-1] is not None
        if ctx.totals[0] is None:
            d_weights, d_biases = _parameter_gradients(rows, x, weights, needs=any(ctx.needs_input_grad[4:]))
        elif is_asked_for(ctx.parameters[0]):
            d_weights, d_biases = [None] * len(weights), _add_gradients(rows, x, ctx.totals, has_bias=has_bias)
        else:
            d_weights = d_biases = [None] * len(weights)
        return d_x, None, None, None, *d_weights, *(d_biases if has_bias else [None] * len(weights))


def _parameter_gradients(
    rows: Tensor, x: Tensor, weights: Sequence[Tensor], *, needs: bool
) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
    """Gradients of weights and biases, for autograd."""
    if not needs:
        return [None] * len(weights), [None] * len(weights)
    sizes = [weight.shape[0] for weight in weights]
    return (rows.T @ x).split(sizes), rows.sum(dim=0).split(sizes)


def _add_gradients(rows: Tensor, x: Tensor, totals: Sequence[Tensor], *, has_bias: bool) -> Sequence[Tensor | None]:
    """Adds the gradients of weights to their sums; returns those of biases."""
    sizes = [total.shape[0] for total in totals]
    whole = adjacent(totals)
    parts = [(whole, rows)] if whole is not None else zip(totals, rows.split(sizes, dim=-1), strict=True)
    for total, part in parts:
        add_product_(total, part.T, x)
    return rows.sum(dim=0, dtype=totals[0].dtype).split(sizes) if has_bias else [None] * len(totals)
