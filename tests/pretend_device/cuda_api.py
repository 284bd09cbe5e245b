"""The Python half of a pretended device: what torch, Triton and torch.distributed are asked in its place.

torch.cuda's functions talk to the driver through C functions that a CPU build does not have; here they answer for an H200.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, Protocol
from unittest import mock

import torch
import torch.distributed as dist

CAPABILITY = (9, 0)
NAME = "NVIDIA H200"
MEMORY_BYTES = 139 * 2**30


class Listener(Protocol):
    """Who is told what the program asks for."""

    count: int
    has_nccl_alone: bool

    def current_index(self) -> int:
        """Of the device that new tensors come to."""

    def set_current(self, index: int) -> None:
        """Changes it."""

    def note_wait(self, reason: str) -> None:
        """The host waits for all that it has asked for."""

    def note_kernel(self, name: str, values: list[Any]) -> None:
        """A Triton kernel is launched."""

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """What stands for a function that would be compiled."""


@contextlib.contextmanager
def replaced(listener: Listener) -> Iterator[None]:
    """Puts every replacement in its place, and takes it away again."""
    with contextlib.ExitStack() as stack:
        for name, value in _cuda_functions(listener).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value, create=True))
        stack.enter_context(mock.patch.object(torch.cuda.random, "device_count", torch.cuda.device_count))
        for name, value in _driver_functions(listener).items():
            # A CPU build has none of them.
            stack.enter_context(mock.patch.object(torch._C, name, value, create=True))
        stack.enter_context(mock.patch.object(torch.Tensor, "record_stream", lambda *_: None))
        stack.enter_context(mock.patch.object(torch, "compile", _compile_of(listener)))
        stack.enter_context(_triton_kernels(listener))
        start = _without_nccl(dist.init_process_group, listener)
        for module in (dist, dist.distributed_c10d):
            stack.enter_context(mock.patch.object(module, "init_process_group", start))
            stack.enter_context(mock.patch.object(module, "split_group", _split_on_gloo))
        yield


def _driver_functions(listener: Listener) -> dict[str, Callable[..., Any]]:
    """What torch.cuda's own functions call."""
    return {
        "_cuda_getCurrentRawStream": lambda index: 0,
        "_cuda_getDevice": listener.current_index,
        "_cuda_setDevice": listener.set_current,
        "_cuda_synchronize": lambda: listener.note_wait("torch.cuda.synchronize"),
    }


def _cuda_functions(listener: Listener) -> dict[str, Any]:
    """Names of torch.cuda, private ones included where others bind to them when they are imported."""

    def index_of(device: Any) -> int:
        index = device if isinstance(device, int) else torch.device("cuda" if device is None else device).index
        return listener.current_index() if index is None else index

    def exchange(index: int) -> int:
        before = listener.current_index()
        if index >= 0:
            listener.set_current(index)
        return before

    class Stream:
        """Of the one stream that there is."""

        cuda_stream = 0

        def __init__(self, device: Any = None, **_: Any) -> None:
            self.device = torch.device("cuda", index_of(device))

        def __enter__(self) -> "Stream":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def query(self) -> bool:
            return True

        def record_event(self, event: Any = None) -> Any:
            return event or Event()

        def wait_event(self, event: Any) -> None:
            pass

        def wait_stream(self, stream: Any) -> None:
            pass

        def synchronize(self) -> None:
            listener.note_wait("Stream.synchronize")

    class Event:
        """Something that has happened."""

        def __init__(self, **_: Any) -> None:
            pass

        def record(self, stream: Any = None) -> None:
            pass

        def wait(self, stream: Any = None) -> None:
            pass

        def query(self) -> bool:
            return True

        def elapsed_time(self, end: Any) -> float:
            return 0.0

        def synchronize(self) -> None:
            listener.note_wait("Event.synchronize")

    class Properties:
        """What torch.cuda.get_device_properties says that anybody here asks."""

        name, major, minor = NAME, *CAPABILITY
        total_memory = MEMORY_BYTES
        multi_processor_count, warp_size, max_threads_per_multi_processor = 132, 32, 2048
        shared_memory_per_block_optin, regs_per_multiprocessor = 232448, 65536

    functions: dict[str, Callable[..., Any]] = {
        "_exchange_device": exchange,
        "_maybe_exchange_device": lambda index: exchange(index),
        "_is_in_bad_fork": lambda: False,
        "is_available": lambda: True,
        "device_count": lambda: listener.count,
        "_get_device_properties": lambda index: Properties,
        "is_bf16_supported": lambda including_emulation=True: True,
        "current_stream": lambda device=None: Stream(device),
        "default_stream": lambda device=None: Stream(device),
        "set_stream": lambda stream: None,
        "stream": lambda stream: contextlib.nullcontext(stream),
        "mem_get_info": lambda device=None: (MEMORY_BYTES, MEMORY_BYTES),
        "memory_stats": lambda device=None: {},
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "is_current_stream_capturing": lambda: False,
    }
    numbers = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
    functions |= dict.fromkeys(numbers, lambda device=None: 0)
    resets = ("reset_peak_memory_stats", "reset_max_memory_allocated", "reset_accumulated_memory_stats")
    functions |= dict.fromkeys(resets, lambda device=None: None)
    generators = (torch.default_generator,) * listener.count
    return functions | {"_initialized": True, "Stream": Stream, "Event": Event, "default_generators": generators}


def _compile_of(listener: Listener) -> Callable[..., Any]:
    def compile(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
        return listener.compiled if function is None else listener.compiled(function)

    return compile


@contextlib.contextmanager
def _triton_kernels(listener: Listener) -> Iterator[None]:
    """Kernels are not run: they leave their arguments, whose memory was zero when it was new, as they are."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if not warmup:
            listener.note_kernel(kernel.fn.__name__, [*args, *kwargs.values()])

    def refuse(kernel: Any, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"{kernel.fn.__name__} was made for Triton's interpreter, before PretendDevice was entered")

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(InterpretedFunction, "run", refuse),
        # Kernels that are imported from now on are those of a GPU.
        mock.patch.dict(os.environ, TRITON_INTERPRET="0"),
    ):
        yield


def _without_nccl(start: Callable[..., Any], listener: Listener) -> Callable[..., Any]:
    """Gloo carries what NCCL would. Where NCCL is alone, the listener has to know: it takes no tensor of the host."""

    def init_process_group(backend: str | None = None, *args: Any, device_id: Any = None, **kwargs: Any) -> None:
        listener.has_nccl_alone = backend == "nccl"
        start("gloo", *args, **kwargs)

    return init_process_group


def _split_on_gloo(*, split_ranks: list[list[int]], timeout: timedelta) -> dist.ProcessGroup | None:
    """What NCCL does with the world at once: gloo makes the groups one by one."""
    groups = {tuple(ranks): dist.new_group(ranks, timeout=timeout) for ranks in split_ranks}
    return next((group for ranks, group in groups.items() if dist.get_rank() in ranks), None)
