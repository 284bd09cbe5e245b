"""Counts the bytes a process hands to torch's process groups, by kind: what is sent, not what a formula says.

Every collective and every send passes torch's dispatcher on its way to the backend, DeepSpeed's and the pipeline
schedules' too; ``Traffic`` listens there, below all of them. Convention as in ``planning/communication.py``: bytes of
the larger of input and output, for a point-to-point message what is sent, nothing in a group of one.
"""

import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

# Operator of c10d -> kind, as planning/communication.py has it.
COLLECTIVES = {
    "_allgather_base_": "zero_gather",
    "_reduce_scatter_base_": "zero_reduce",
    "broadcast_": "tie_broadcast",
    "reduce_": "tie_reduce",
}
NORMS = "deepspeed_norms"
"""DeepSpeed's own all-reduces: checks, the norm of an offloaded gradient. The formula leaves them out."""
# Who asks tells all-reduces apart, and what is tensor-parallel: its group of all ranks may be the world's own group.
TENSOR = "tensor"
ALL_REDUCES = {
    "deberta_dist.parallel.tensor": TENSOR,
    "deberta_dist.training": "scalars",
    "deberta_dist.parallel.zero": "scalars",
    "deepspeed": NORMS,
}
# Received bytes are counted where they are sent.
SILENT = ("recv_", "recv_any_source_", "barrier", "monitored_barrier_")


class Traffic(TorchDispatchMode):
    """Counts while it is entered; the calling thread alone, which on a CPU runs the backward pass as well.

    Attributes:
        bytes_by_kind: Kinds of ``planning/communication.py``, ``NORMS``; any other message by its operator's name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes_by_kind: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if operator.namespace in ("c10d", "_c10d_functional"):
            name = operator._schema.name.partition("::")[2]
            group = _group(args)
            if name not in SILENT and (group is None or group.size() > 1):
                self.bytes_by_kind[_kind(name, args, group)] += max(_num_bytes(argument) for argument in args)
        return operator(*args, **(kwargs or {}))


def _kind(name: str, args: tuple, group: ProcessGroup | None) -> str:
    kind = ALL_REDUCES.get(_caller(), name)
    if name == "allreduce_" or kind == TENSOR:
        return kind
    if name == "send":
        return "pipeline_activations" if args[2] > group.rank() else "pipeline_gradients"
    return COLLECTIVES.get(name, name)


def _caller() -> str:
    """The innermost of the packages in ``ALL_REDUCES`` that is being run."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        for package in ALL_REDUCES:
            if module == package or module.startswith(f"{package}."):
                return package
        frame = frame.f_back
    return ""


def _group(args: tuple) -> ProcessGroup | None:
    for argument in args:
        if isinstance(argument, torch.ScriptObject) and argument._type().qualified_name().endswith(".ProcessGroup"):
            return ProcessGroup.unbox(argument)
    return None


def _num_bytes(argument: Any) -> int:
    if isinstance(argument, Tensor):
        return argument.nbytes
    return sum(map(_num_bytes, argument)) if isinstance(argument, (list, tuple)) else 0
