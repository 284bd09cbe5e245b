"""What operators do on a GPU, as far as it can be known from their names and arguments."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# Their results are numbers on the host, or have a size that depends on numbers on the device.
_WAITING = {
    "aten::_local_scalar_dense": "item()",
    "aten::_unique": "unique",
    "aten::_unique2": "unique",
    "aten::bincount": "bincount",
    "aten::equal": "equal",
    "aten::masked_select": "masked_select",
    "aten::multinomial": "multinomial",
    "aten::nonzero": "nonzero",
    "aten::unique_consecutive": "unique",
    "aten::unique_dim": "unique",
    "aten::unique_dim_consecutive": "unique",
}
# Nothing is computed. Views are known by their schema.
_STARTING_NOTHING = {
    "aten::_local_scalar_dense",
    "aten::_pin_memory",
    "aten::_unsafe_view",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_permuted",
    "aten::empty_strided",
    "aten::is_pinned",
    "aten::is_same_size",
    "aten::lift_fresh",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::record_stream",
    "aten::resize_",
    "aten::set_",
}
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
# A number on the host is an argument of most kernels; these take its memory.
_TAKING_NO_NUMBERS = {"aten::cat", "aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::stack"}
_COLLECTIVES = {
    "c10d::_allgather_base_": "all_gather_into_tensor",
    "c10d::_reduce_scatter_base_": "reduce_scatter_tensor",
    "c10d::allgather_": "all_gather",
    "c10d::allreduce_": "all_reduce",
    "c10d::alltoall_": "all_to_all",
    "c10d::alltoall_base_": "all_to_all_single",
    "c10d::barrier": "barrier",
    "c10d::broadcast_": "broadcast",
    "c10d::gather_": "gather",
    "c10d::recv_": "recv",
    "c10d::recv_any_source_": "recv",
    "c10d::reduce_": "reduce",
    "c10d::reduce_scatter_": "reduce_scatter",
    "c10d::scatter_": "scatter",
    "c10d::send": "send",
}


class Operator:
    """What is known of an operator before it has arguments.

    Args:
        func: One overload.

    Attributes:
        name: ``aten::add.Tensor``.
        packet: ``aten::add``.
        is_collective: Of torch.distributed, which calls it ``collective``.
        is_view: Its results are views; nothing is computed, and nothing can be wrong about devices.
        is_copy: Moves numbers from one tensor to another, which may be on two devices.
        is_in_place_copy: Into its first argument.
        makes_from_data: Its argument may have been made of Python data just now.
        indexes: Takes index tensors.
        can_launch: Starts a kernel where there is anything to compute.
        call: What to call: the operator, or what emulates one that no CPU has.
    """

    def __init__(self, func: Any) -> None:
        self.name: str = func.name()
        self.packet: str = func._schema.name
        self.is_collective = func.namespace == "c10d"
        self.collective = _COLLECTIVES.get(self.packet, self.packet)
        returns = func._schema.returns
        is_alias = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        self.makes_from_data = self.packet == "aten::lift_fresh"
        self.is_view = is_alias and not self.makes_from_data
        self.is_in_place_copy = self.packet == "aten::copy_"
        self.is_copy = self.is_in_place_copy or self.packet == "aten::_to_copy"
        self.indexes = self.packet in _INDEXING
        self.can_launch = not is_alias and self.packet not in _STARTING_NOTHING
        self.call: Callable[..., Any] = func
        if self.packet in _TAKING_NO_NUMBERS and func._overloadname in ("dtype", "dtype_out"):
            self.call = functools.partial(_wide_product, getattr(torch, self.packet.removeprefix("aten::")))

    def reason_to_wait(self, args: Sequence[Any], kwargs: dict[str, Any]) -> str | None:
        """Why the host waits for the result; None if it does not. Copies are not decided here."""
        if self.packet in _WAITING:
            return _WAITING[self.packet]
        if self.name == "aten::repeat_interleave.Tensor" and kwargs.get("output_size") is None:
            return "repeat_interleave"
        if not self.indexes:
            return None
        masks = [index for index in args[1] if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)]
        if not masks or (self.packet != "aten::index" and _fills_where_masked(args, kwargs)):
            return None
        return "index by a mask"

    def indices_on_host(self, args: Sequence[Any]) -> list[Tensor]:
        """Index tensors that torch copies to the device of what is indexed, without a word."""
        if not self.indexes or not args[0].is_cuda:
            return []
        return [index for index in args[1] if isinstance(index, Tensor) and index.device.type == "cpu"]

    def is_mismatch(self, args: Sequence[Any], on_host: Sequence[Tensor]) -> bool:
        """Whether a GPU would refuse arguments of which some are on the device and some, ``on_host``, are not."""
        if self.is_copy:
            return False
        allowed = {id(index) for index in self.indices_on_host(args)}
        return any((t.dim() > 0 or self.packet in _TAKING_NO_NUMBERS) and id(t) not in allowed for t in on_host)


@functools.cache
def operator_of(func: Any) -> Operator:
    """The same for the same overload."""
    return Operator(func)


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Tensors among arguments or results, in lists too."""
    if isinstance(values, Tensor):
        yield values
        return
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


def _fills_where_masked(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """``x[mask] = number`` is a masked_fill_, which looks at no count."""
    accumulates = kwargs.get("accumulate", args[3] if len(args) > 3 else False)
    return sum(index is not None for index in args[1]) == 1 and args[2].numel() == 1 and not accumulates


def _wide_product(product: Callable[..., Tensor], *args: Any, out: Tensor | None = None, **kwargs: Any) -> Tensor:
    """A product of 16-bit numbers that is not rounded to 16 bits; the last argument is the result's dtype."""
    *operands, dtype = args
    result = product(*(operand.to(dtype) for operand in operands), **kwargs)
    return result if out is None else out.copy_(result)
