"""Linear layers: query, key and value as one product, and products that add their weight's gradient to a float32 sum.

Layers with the same input share one product if their weights are consecutive slices of one tensor: nothing is concatenated,
and the weights stay separate parameters under their published names. They are such slices because `join_` laid them so, or
because flat parameters keep the order of the modules. Every call checks this, and that each layer is as it was built
(`models.plain`): if one has been replaced, hooked, adapted or given another weight, each layer computes its own product.

If a layer has an entry in ``main_grads``, a float32 tensor of its weight's shape, the product that computes the weight's
gradient adds it there (beta = 1) in float32, and autograd gets none. That moves 8 bytes per weight; computing a 16-bit
gradient, converting and adding it moves 20. ``main_grad`` is Megatron's word. Autograd has the biases' gradients, summed in
float32.

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
        x: Input of the products, [..., D].
        saved: What products save for their backward pass: ``x``, or a tensor from which it can be recomputed.
        start: Starts to recompute ``x`` from ``saved``; returns an object whose ``wait()`` returns it. None: ``saved`` is ``x``.
    """

    x: Tensor
    saved: Tensor
    start: Callable[[Tensor], Any] | None


def entered(enter: nn.Module, x: Tensor) -> Entered:
    """``enter(x)``, which products recompute in the backward pass if ``enter``, unchanged, has ``start_recompute``."""
    output = enter(x)
    start = getattr(enter, "start_recompute", None)
    if start is None or not is_unchanged(enter):
        return Entered(output, output, None)
    return Entered(output, x.detach(), start)


def Linear(in_features: int, out_features: int, *, bias: bool = True) -> nn.Linear:
    """A layer y = x W^T + b of torch's own class, since other libraries check for that exact type.

    Its attribute ``multiply`` is our product, for tensor-parallel layers that replace it with a slice of its weight.
    """
    layer = nn.Linear(in_features, out_features, bias=bias)
    layer.multiply = multiply  # type: ignore[assignment]  # nn.Module's attributes are declared as tensors and modules
    return layer


def multiply(x: Tensor, layer: nn.Module, bias: Tensor | None = None) -> Tensor:
    """x W^T + b of ``x`` [..., D] and the weight of ``layer``; adds the weight's gradient to its ``main_grad``, if any."""
    total = main_grad(layer)
    if total is None:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        return F.linear(x, weight, bias)
    (y,) = _Product.apply(x, x, None, [total], layer.weight, bias)
    return y


def linear(x: Tensor, layer: nn.Module) -> Tensor:
    """``layer(x)`` of ``x`` [..., D], but by `multiply` where torch's own layer would ignore a ``main_grad``."""
    if type(layer) is nn.Linear and main_grad(layer) is not None and is_plain(layer):
        return multiply(x, layer, layer.bias)
    return layer(x)


def without_bias(x: Tensor, layer: nn.Linear) -> Tensor:
    """A plain ``layer`` without its bias, for a caller that fuses the bias into its own next pass over the output."""
    if type(layer) is nn.Linear:
        return multiply(x, layer)
    return layer.without_bias(x)  # type: ignore[operator]  # layers of our own have it: `is_plain` has looked


def main_grad(module: nn.Module) -> Tensor | None:
    """The sum that products add the gradient of the module's weight to; None where autograd has it."""
    return module.__dict__.get(MAIN_GRADS, {}).get("weight")


def set_main_grads(model: nn.Module, totals: Mapping[str, Tensor] | None) -> None:
    """Sets the sums that products add weight gradients to.

    Args:
        model: Its modules get an attribute ``main_grads``, parameter name -> sum.
        totals: A sum, float32 or wider, for every parameter by its full name. None: autograd has all gradients again.
    """
    for module in model.modules():
        module.__dict__.pop(MAIN_GRADS, None)
    for name, total in (totals or {}).items():
        module_name, _, leaf = name.rpartition(".")
        vars(model.get_submodule(module_name)).setdefault(MAIN_GRADS, {})[leaf] = total


@torch.no_grad()
def add_gradients_(model: nn.Module) -> None:
    """Adds the gradients that autograd left in ``.grad`` to the sums of `set_main_grads`, in one call per dtype."""
    left: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for module in model.modules():
        for name, total in module.__dict__.get(MAIN_GRADS, {}).items():
            parameter = module._parameters[name]
            if parameter is not None and parameter.grad is not None:
                left[parameter.grad.dtype].append((total, parameter))
    for some in left.values():
        torch._foreach_add_([total for total, _ in some], [one.grad for _, one in some if one.grad is not None])
        for _, one in some:
            one.grad = None


def is_asked_for(parameter: Tensor) -> bool:
    """Whether the running backward pass computes the parameter's gradient; `torch.autograd.grad` may ask for others only."""
    return torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(parameter).node)


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left right, of matrices. ``total`` and the sums are float32 or float64, the factors 16 bits or as wide."""
    if left.dtype == total.dtype:
        torch.addmm(total, left, right, out=total)
    elif left.device.type == "cpu":  # torch has no product of 16-bit factors with a float32 result there
        torch.addmm(total, left.to(total.dtype), right.to(total.dtype), out=total)
    else:
        torch.addmm(total, left, right, total.dtype, out=total)


def joint_linear(x: Tensor | Entered, layers: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
    """Output of each of ``layers`` for ``x`` [..., D], [..., E] each; slices of one tensor if they share a product."""
    x, saved, start = x if isinstance(x, Entered) else (x, x, None)
    # A compiler traces tensors without memory, so adjacency means nothing to it; it fuses products itself.
    if torch.compiler.is_compiling() or torch.compiler.is_exporting() or not all(map(is_plain, layers)):
        return tuple(linear(x, layer) for layer in layers)
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    if len({bias is None for bias in biases}) > 1:
        return tuple(linear(x, layer) for layer in layers)
    totals = [main_grad(layer) for layer in layers]
    if start is not None or totals[0] is not None:
        return _Product.apply(x, saved, start, totals, *weights, *biases)
    # Under autocast each product chooses its own precision: leave it to torch.
    kind = x.device.type
    is_cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if is_cast or len(layers) == 1 or biases[0] is None or adjacent(weights) is None or adjacent(biases) is None:
        return tuple(F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))
    outputs = F.linear(x, _Together.apply(*weights), _Together.apply(*biases))
    return _Apart.apply(outputs, [weight.shape[0] for weight in weights])


@torch.no_grad()
def join_(layers: Sequence[nn.Linear]) -> None:
    """Lays the weights of ``layers`` side by side in one tensor, and their biases, without changing values.

    Does nothing if a layer has been replaced, or its weight is not an ordinary parameter (pruned, parametrised).
    """
    if not all(is_of_plain_class(layer) and has_own_weight(layer) for layer in layers):
        return
    for parameters in ([layer.weight for layer in layers], [layer.bias for layer in layers]):
        if len({None if p is None else (p.dtype, p.device, p.shape[1:]) for p in parameters}) > 1 or parameters[0] is None:
            continue
        if adjacent(parameters) is None:
            whole = _joined([parameter.detach() for parameter in parameters])
            slices = whole.split([parameter.shape[0] for parameter in parameters])
            for parameter, values in zip(parameters, slices, strict=True):
                parameter.data = values


def _joined(tensors: list[Tensor]) -> Tensor:
    if not tensors[0].is_meta:
        return torch.cat(tensors)
    # There is nothing to copy, and for its shape alone torch imports a compiler: most of the time of a small conversion.
    return tensors[0].new_empty((sum(tensor.shape[0] for tensor in tensors), *tensors[0].shape[1:]))


def adjacent(tensors: Sequence[Tensor], *, dim: int = 0) -> Tensor | None:
    """The tensor of which ``tensors`` are consecutive slices along ``dim``; None if they are not."""
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
    return torch.cat(tuple(tensors)) if view is None else view


def _side_by_side(gradients: Sequence[Tensor]) -> Tensor:
    # `adjacent` returns a view without autograd history; if the backward pass is itself differentiated, copy instead.
    view = None if torch.is_grad_enabled() else adjacent(gradients, dim=-1)
    return torch.cat(tuple(gradients), dim=-1) if view is None else view


class _Together(torch.autograd.Function):
    """Adjacent parameters as one tensor. Its backward splits the gradient, and autograd skips what is not asked for."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.sizes = [parameter.shape[0] for parameter in parameters]
        view = adjacent(parameters)
        assert view is not None, "whoever joins them has looked"
        return view

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient.split(ctx.sizes)


class _Apart(torch.autograd.Function):
    """One output as several; if their gradients come back side by side in one tensor, they are not copied."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
        return outputs.detach().split(sizes, dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _side_by_side(gradients), None


class _Product(torch.autograd.Function):
    """One product whose input is recomputed in the backward pass, or whose weights have a ``main_grad``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        saved: Tensor,
        start: Callable[[Tensor], Any] | None,
        totals: Sequence[Tensor | None],
        *parameters: Any,
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
    pairs = [(whole, rows)] if whole is not None else zip(totals, rows.split(sizes, dim=-1), strict=True)
    for total, gradient in pairs:
        add_product_(total, gradient.T, x)
    return rows.sum(dim=0, dtype=totals[0].dtype).split(sizes) if has_bias else [None] * len(totals)
