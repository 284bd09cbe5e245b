"""A CUDA device without a GPU: tensors that say ``cuda:0`` with their numbers in the host's memory, and a record.

    with PretendDevice() as device:
        device.mark(model.layer[1], "layer 1")
        with device.phase("step 1"):
            trainer.step(...)
        waits = device.record.host_waits().where(within="step 1")
        assert not waits, waits.report()

What is real: the tensors (``torch.Tensor``, not a subclass), their numbers, autograd with its device threads, pinned memory,
collectives (over gloo). What is not: time, streams, Triton kernels (counted, not run; their outputs stay as they were, and
fresh memory is zero) and compiled functions (run uncompiled, counted as the kernels that a compiler makes of them).

Use it in processes of `tests.harness.run_ranks` only. Everything is undone on exit, except two things that last as long as
a process: autograd starts its device threads with the first backward pass and never again, so the device has to be there
before it; and what the product has cached on the device stays there. A fresh process has neither.

Not seen: kernels beyond the first of an operator (a sort is one launch here), waits inside of CUDA's own kernels, and
operators of threads that were there before the device.
"""

import contextlib
import ctypes
import functools
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Self
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode

from tests.pretend_device import operators
from tests.pretend_device.build import load
from tests.pretend_device.compiled import Compiled, Kernels
from tests.pretend_device.cuda_api import replaced
from tests.pretend_device.places import Place, innermost_line
from tests.pretend_device.record import Event, Kind, Record


@dataclass
class _Thread:
    """What is known of a thread.

    Attributes:
        transfers: Copies between host and device that are accounted for.
        phases: Open marks.
        is_paused: Nothing is recorded.
        last: Place of the last event of a backward pass.
    """

    transfers: int
    phases: list[str] = field(default_factory=list)
    is_paused: bool = False
    last: Place = Place("", "", (), "backward")


class PretendDevice(TorchDispatchMode):
    """The device, while it is entered.

    Args:
        index: Number of the current device, of which new tensors are.
        count: Number of devices.
        compiled: Functions that the product compiles, with the number of their kernels (`compiled.count_kernels`).

    Attributes:
        record: What happened.
        has_nccl_alone: Process groups carry no tensors of the host.

    Raises:
        RuntimeError: on entering: another one is entered, or autograd has started its threads, which it does once,
            without the device.
    """

    def __init__(
        self, *, index: int = 0, count: int = 1, compiled: Mapping[Callable[..., Any], Kernels] = MappingProxyType({})
    ) -> None:
        super().__init__()
        self._compiled = compiled
        self.record = Record()
        self.count = count
        self.has_nccl_alone = False
        self._index = index
        self._library = load()
        self._library.pretend_device_transfers.restype = ctypes.c_uint64
        self._library.pretend_device_install.restype = ctypes.c_bool
        self._threads: dict[int, _Thread] = {}
        # Who entered: its phases and pauses hold for the device threads, which work for it.
        self._main = self._thread()
        # Number of an autograd node -> where its forward operator was called.
        self._origins: dict[int, Place] = {}
        self._numbers: Counter[tuple[str, ...]] = Counter()
        self._stack = contextlib.ExitStack()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or every operator would pass through a wrapper that the compiler needs

    @property
    def device(self) -> torch.device:
        """The current one."""
        return torch.device("cuda", self._index)

    def __enter__(self) -> Self:
        if not self._library.pretend_device_install(self.count):
            raise RuntimeError("a PretendDevice is entered already in this process; give it more devices by count")
        with contextlib.ExitStack() as stack:
            stack.callback(self._library.pretend_device_remove)
            self.set_current(self._index)
            stack.enter_context(replaced(self))
            _require_device_threads(self.device)
            self._main = self._thread()
            self._main.transfers = self._library.pretend_device_transfers()
            self._main.is_paused = False
            stack.enter_context(mock.patch.object(threading.Thread, "run", self._recorded(threading.Thread.run)))
            super().__enter__()
            stack.push(super().__exit__)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._main.is_paused = True  # for threads that go on
        self._stack.__exit__(*exception)

    def _recorded(self, run: Callable[[threading.Thread], None]) -> Callable[[threading.Thread], None]:
        """Threads of the program are recorded like it: torch's modes are each thread's own."""

        @functools.wraps(run)
        def run_recorded(thread: threading.Thread) -> None:
            _push_mode(self)
            try:
                run(thread)
            finally:
                _pop_mode()

        return run_recorded

    # Marks.

    @contextlib.contextmanager
    def phase(self, label: str) -> Iterator[None]:
        """Events of the block belong to a phase, and so do those of the backward passes through it."""
        phases = self._thread().phases
        phases.append(label)
        try:
            yield
        finally:
            phases.pop()

    def mark(self, owner: Any, label: str, *, method: str = "forward") -> None:
        """Every call of a method is a phase, until the device is left.

        Args:
            owner: An object, whose attribute is replaced.
            label: Of the phase. ``{}`` in it stands for the number of the call, from 0 in every phase around it.
            method: Name of the method.
        """
        call = getattr(owner, method)
        was_own = method in vars(owner)

        @functools.wraps(call)
        def marked(*args: Any, **kwargs: Any) -> Any:
            number = self._next_number(label) if "{}" in label else 0
            with self.phase(label.format(number)):
                return call(*args, **kwargs)

        object.__setattr__(owner, method, marked)
        if was_own:
            self._stack.callback(object.__setattr__, owner, method, call)
        else:
            self._stack.callback(object.__delattr__, owner, method)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing of the block is recorded."""
        thread = self._thread()
        before, thread.is_paused = thread.is_paused, True
        try:
            yield
        finally:
            thread.is_paused = before
            thread.transfers = self._library.pretend_device_transfers()

    def _thread(self) -> _Thread:
        number = threading.get_ident()
        if number not in self._threads:
            self._threads[number] = _Thread(self._library.pretend_device_transfers())
        return self._threads[number]

    def _is_paused(self) -> bool:
        return self._main.is_paused or self._thread().is_paused

    def _next_number(self, label: str) -> int:
        key = (*self._thread().phases, label)
        self._numbers[key] += 1
        return self._numbers[key] - 1

    # What `cuda_api.Listener` asks for.

    def current_index(self) -> int:
        """Number of the current device."""
        return self._index

    def set_current(self, index: int) -> None:
        """Makes another device the current one."""
        self._index = index
        self._library.pretend_device_set_current(index)

    def note_wait(self, reason: str) -> None:
        """Records that the host waits."""
        self._note("wait", reason)

    def note_kernel(self, name: str, values: list[Any]) -> None:
        """Records the launch of a Triton kernel, and the arguments that it could not read."""
        self._note("launch", f"triton {name}")
        for value in values:
            if isinstance(value, torch.Tensor) and not value.is_cuda:
                self._note("mismatch", f"triton {name} with a tensor {tuple(value.shape)} on {value.device}")

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Runs it uncompiled and records as many launches as a compiler makes kernels."""
        return Compiled(function, kernels=self._compiled.get(function), device=self)

    def note_compiled(self, name: str, *, num_kernels: int) -> None:
        """Records the launches of a compiled function."""
        for _ in range(num_kernels):
            self._note("launch", f"compiled {name}")

    # Operators.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operator = operators.operator_of(func)
        if self._is_paused():
            return operator.call(*args, **kwargs)
        if operator.is_view:
            self._remember_origin()
            return operator.call(*args, **kwargs)
        tensors = [*operators.tensors_in(args), *operators.tensors_in(kwargs)]
        if operator.is_collective:
            self._note_collective(operator, args, tensors)
            return operator.call(*args, **kwargs)
        on_host = [t for t in tensors if not t.is_cuda]
        makes_on_device = (asked_for := kwargs.get("device")) is not None and torch.device(asked_for).type == "cuda"
        if len(on_host) == len(tensors) and not makes_on_device:
            return operator.call(*args, **kwargs)
        at = self._here()
        result = operator.call(*args, **kwargs)
        thread, transfers = self._thread(), self._library.pretend_device_transfers()
        unexplained, thread.transfers = transfers - thread.transfers, transfers
        if on_host and len(on_host) < len(tensors) and operator.is_mismatch(args, on_host):
            shapes = ", ".join(f"{t.device}{list(t.shape)}" for t in tensors)
            self._note("mismatch", f"{operator.name} of {shapes}", at=at)
        for index in operator.indices_on_host(args):
            self._note_copy_to_device(f"{operator.name} with indices on the host", index.nbytes, at=at)
        if operator.is_copy:
            if self._note_if_crossing(operator, args, kwargs, result, at=at):
                return result
        elif (reason := operator.reason_to_wait(args, kwargs)) is not None:
            self._note("wait", reason, at=at)
        elif unexplained and operator.makes_from_data:
            self._note_copy_to_device("from Python data", args[0].nbytes, at=at)
        elif unexplained:
            self._note("wait", f"a transfer in {operator.name}", at=at)
        written = [*operators.tensors_in((result,))] or tensors
        if operator.can_launch and any(t.numel() for t in written):
            self._note("launch", operator.name, at=at)
        return result

    def _note_if_crossing(self, operator: Any, args: Any, kwargs: Any, result: torch.Tensor, *, at: Place) -> bool:
        """Records a copy between host and device; whether it was one."""
        to, source = (args[0], args[1]) if operator.is_in_place_copy else (result, args[0])
        if to.is_cuda == source.is_cuda:
            return False
        non_blocking = kwargs.get("non_blocking", args[2] if operator.is_in_place_copy and len(args) > 2 else False)
        host = source if to.is_cuda else to
        is_pinned = host.is_pinned()
        # A copy to pageable memory of the host is over when the call returns, whatever it is asked for.
        blocks = not non_blocking or not (to.is_cuda or is_pinned)
        kind, way = ("copy to device", "to the device") if to.is_cuda else ("copy to host", "to the host")
        self._note(kind, operator.name, num_bytes=host.nbytes, is_pinned=is_pinned, blocks=blocks, at=at)
        if blocks:
            self._note("wait", f"copy {way}", at=at)
        return True

    def _note_copy_to_device(self, name: str, num_bytes: int, *, at: Place) -> None:
        """Of pageable memory, which the host waits for."""
        self._note("copy to device", name, num_bytes=num_bytes, blocks=True, at=at)
        self._note("wait", f"copy to the device: {name}", at=at)

    def _note_collective(self, operator: Any, args: Any, tensors: list[torch.Tensor]) -> None:
        group = next(a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type()))
        is_on_host = any(not t.is_cuda for t in tensors) and operator.collective != "barrier"
        self._note(
            "collective",
            operator.collective,
            num_bytes=max((t.nbytes for t in tensors), default=0),
            group_size=torch.distributed.ProcessGroup.unbox(group).size(),
            is_on_host=is_on_host,
        )
        if is_on_host and self.has_nccl_alone:
            self._note("mismatch", f"{operator.collective} of a tensor of the host over NCCL")

    # Places.

    def _note(self, kind: Kind, name: str, *, at: Place | None = None, **details: Any) -> None:
        if not self._is_paused():
            self.record.events.append(Event(kind, name, *(at or self._here()), **details))

    def _here(self) -> Place:
        """Where the program is. In a backward pass operators without a line of their own have their forward operator's."""
        node = torch._C._current_autograd_node()
        thread = self._thread()
        line = innermost_line(in_backward=node is not None)
        if node is None:
            place = Place(line.site, line.library, tuple(thread.phases), "forward")
            if thread is self._main:
                self._origins.setdefault(_newest_node(), place)
            return place
        # Sums of gradients have no forward operator: they belong to what was before them in this thread.
        origin = self._origins.get(node._sequence_nr(), thread.last)
        phases = tuple(dict.fromkeys(itertools.chain(self._main.phases, origin.phases, thread.phases)))
        if line.is_recomputed:
            return Place(line.site, line.library, phases, "recompute")
        thread.last = Place(line.site or origin.site, line.library, phases, "backward")
        return thread.last

    def _remember_origin(self) -> None:
        """Of an operator of which nothing is recorded, for its backward pass."""
        is_new = self._thread() is self._main and _newest_node() not in self._origins
        if is_new and torch._C._current_autograd_node() is None:
            self._here()


def _newest_node() -> int:
    """Number of the autograd node that was made last in this thread: an operator's own, if it has one, when it is called."""
    return torch._C._autograd._get_sequence_nr() - 1


def _require_device_threads(device: torch.device) -> None:
    loss = torch.ones((), device=device, requires_grad=True) * 2
    try:
        loss.backward()
    except RuntimeError as error:
        raise RuntimeError(
            "autograd ran in this process before the device was there, and makes its threads once: enter PretendDevice in "
            "a process of its own (tests.harness.run_ranks), before any backward pass"
        ) from error
