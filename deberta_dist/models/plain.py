"""Which modules do just what their weights say, so that a faster way to the same numbers may read these past them.

Several products of one input as one, a table that is used whole, a kernel that joins a sum and its LayerNorm: they read
weights instead of calling modules. That is right while the modules are those that were built. One that somebody has put in
their place (an adapter, a quantised layer, a subclass), or changed (hooks, a parametrisation, pruning, another ``forward``),
or whose weight is no ordinary tensor, is called instead. Readers ask in every pass, because modules change later.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from deberta_dist.errors import ConfigError

_FORWARDS: Mapping[type[nn.Module], Any] = MappingProxyType(
    {kind: kind.forward for kind in (nn.Linear, nn.Embedding, nn.LayerNorm, nn.Conv1d)}
)
"""Taken when this file is imported: whoever replaces a class's ``forward`` later has changed what its modules do."""
_NUMBERS = (nn.Parameter, Tensor)
_WITHOUT_WEIGHTS = (nn.Identity, nn.ModuleList, nn.ModuleDict)
_SHOWN = 4


def is_plain(module: nn.Module) -> bool:
    """Whether a call of a module computes what its class does of its own weight and bias, and nothing else happens.

    Gradient hooks of its parameters do not matter.
    """
    return is_unchanged(module) and has_own_weight(module)


def is_unchanged(module: nn.Module) -> bool:
    """Whether a call of a module runs its class's own ``forward`` and nothing else.

    The classes are torch's, and those of our own that say so: they have ``plain_forward``, which is their ``forward``. A
    subclass does not say so by inheriting it.
    """
    kind = type(module)
    return (
        is_of_plain_class(module)
        and kind.forward is (_FORWARDS.get(kind) or kind.__dict__["plain_forward"])
        and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
        and not _has_global_hooks()
        and module._compiled_call_impl is None
    )


def is_of_plain_class(module: nn.Module) -> bool:
    """Whether a module is of a class of which models are built, and has no ``forward`` of its own; hooked or not."""
    kind = type(module)
    return (kind in _FORWARDS or "plain_forward" in kind.__dict__) and "forward" not in module.__dict__


def has_own_weight(module: nn.Module) -> bool:
    """Whether a module itself holds its weight and its bias, if any, and they are ordinary tensors."""
    parameters = module._parameters
    bias = parameters.get("bias", module.__dict__.get("bias"))  # pruning leaves its result in the latter
    return type(parameters.get("weight")) in _NUMBERS and (bias is None or type(bias) in _NUMBERS)


def is_own_table(module: nn.Module) -> bool:
    """Whether the weight of an embedding, hooked or not, is what it gives for every row."""
    return is_of_plain_class(module) and has_own_weight(module)


def whole_table(module: nn.Module, num_rows: int, *, device: torch.device) -> Tensor:
    """All rows of an embedding that is also used as a matrix, [num_rows, width].

    Its weight, which hooks do not change: they are for what is looked up. Of a module in its place, what it gives for every
    row.
    """
    if is_own_table(module):
        assert isinstance(module.weight, Tensor)
        return module.weight
    return module(torch.arange(num_rows, device=device))


def require_unchanged(model: nn.Module) -> None:
    """Refuses a model with modules that are not as they were built, where they are cut and their weights kept elsewhere.

    Raises:
        ConfigError: it has some.
    """
    changed = [
        f"{name} ({type(module).__module__}.{type(module).__qualname__})"
        for name, module in model.named_modules()
        if type(module) not in _WITHOUT_WEIGHTS and not _is_ours(module, is_whole=module is model)
    ]
    if changed:
        more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        raise ConfigError(
            f"the model has modules that are not as deberta_dist builds them: {', '.join(changed[:_SHOWN])}{more}; the trainer "
            "cuts and shards its own layers alone: merge adapters into the weights, and remove hooks and parametrisations"
        )


def _is_ours(module: nn.Module, *, is_whole: bool) -> bool:
    """``is_whole``: the model itself, whose class is its network's affair; what it holds is cut, not what it does."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    if hooks or "forward" in module.__dict__:
        return False
    if is_of_plain_class(module):
        return has_own_weight(module) or not module._parameters
    if is_whole and not module._parameters:
        return True
    return type(module).__module__.partition(".")[0] == __name__.partition(".")[0]


def _has_global_hooks() -> bool:
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )
