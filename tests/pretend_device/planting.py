"""What the tests of the pretended device share: where a line is planted, and a fault is found."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.pretend_device.places import ROOT
from tests.pretend_device.record import Event, Events


def planted_line(function: Callable[..., Any]) -> str:
    """``file:line`` of the line of a function that ends with the comment "planted"."""
    lines, first = inspect.getsourcelines(function)
    (number,) = [first + n for n, line in enumerate(lines) if line.rstrip().endswith("# planted")]
    return f"{Path(inspect.getsourcefile(function)).relative_to(ROOT).as_posix()}:{number}"


def only(events: Events) -> Event:
    """The one that there is."""
    assert len(events) == 1, events.report()
    return events[0]


def make_kernel() -> Any:
    """A Triton kernel, made under `PretendDevice`: elsewhere in the tests kernels are made for the interpreter."""
    import triton

    @triton.jit
    def double_kernel(x, y):
        pass

    return double_kernel
