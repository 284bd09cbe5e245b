"""Which modules compute exactly what their weights say, so that an optimisation may read the weights instead of calling them.

The fused QKV product, the shared word embeddings and the fused residual kernel read weights. That is right while the modules
are as they were built. A module that has been replaced (an adapter, a quantised layer, a subclass) or changed (hooks, a
parametrisation, pruning, another ``forward``), or whose weight is not an ordinary tensor, is called instead. This is checked
in every pass, because modules may change at any time.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from deberta_dist.errors import ConfigError

_FORWARDS = MappingProxyType({kind: kind.forward for kind in (nn.Linear, nn.Embedding, nn.LayerNorm, nn.Conv1d)})
"""As they are when this file is imported, so that a later replacement of a class's ``forward`` is noticed."""
_NUMBERS = (nn.Parameter, Tensor)
_WITHOUT_WEIGHTS = (nn.Identity, nn.ModuleList, nn.ModuleDict)
_SHOWN = 4


def is_plain(module: nn.Module) -> bool:
    """Whether calling a module computes its class's function of its own weight and bias, and does nothing else.

    Gradient hooks on its parameters do not matter: autograd runs them whoever reads the parameter.
    """
    return is_unchanged(module) and has_own_weight(module)


def is_unchanged(module: nn.Module) -> bool:
    """Whether calling a module runs its class's own ``forward`` and nothing else.

    The classes are torch's, and our own that define ``plain_forward`` as an alias of ``forward``. A subclass that inherits the
    alias does not count.
    """
    kind = type(module)
    forwards: Mapping[type[nn.Module], Any] = _FORWARDS
    return (
        is_of_plain_class(module)
        and kind.forward is (forwards.get(kind) or kind.__dict__["plain_forward"])
        and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
        and not _has_global_hooks()
        and module._compiled_call_impl is None
    )


def is_of_plain_class(module: nn.Module) -> bool:
    """Whether a module's class is one of those, without a ``forward`` set on the instance; it may have hooks."""
    kind = type(module)
    return (kind in _FORWARDS or "plain_forward" in kind.__dict__) and "forward" not in module.__dict__


def has_own_weight(module: nn.Module) -> bool:
    """Whether a module's weight, and its bias, if any, are its own and ordinary tensors."""
    parameters = module._parameters
    bias = parameters.get("bias", module.__dict__.get("bias"))  # pruning leaves its result in the latter
    return type(parameters.get("weight")) in _NUMBERS and (bias is None or type(bias) in _NUMBERS)


def is_own_table(module: nn.Module) -> bool:
    """Whether an embedding's weight holds what it returns for every row; it may have hooks."""
    return is_of_plain_class(module) and has_own_weight(module)


def whole_table(module: nn.Module, num_rows: int, *, device: torch.device) -> Tensor:
    """All rows of an embedding that is also used as a matrix, [num_rows, width].

    That is its weight: hooks apply to look-ups only. A module that has replaced it is called for every row.
    """
    if is_own_table(module):
        assert isinstance(module.weight, Tensor)
        return module.weight
    return module(torch.arange(num_rows, device=device))


def require_unchanged(model: nn.Module) -> None:
    """Refuses a model with changed modules, where layers are replaced and their weights moved to a weight store.

    Raises:
        ConfigError: a module is not as it was built; the message names the first few.
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
            "divides and shards only its own layers: merge adapters into the weights, and remove hooks and parametrisations"
        )


def _is_ours(module: nn.Module, *, is_whole: bool) -> bool:
    """Whether a module is as it was built. ``is_whole``: it is the model itself, which may be of a class of the user's."""
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
