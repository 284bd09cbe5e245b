"""Where the program is, by the Python stack."""

import functools
import re
import sys
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from tests.pretend_device.record import Direction

ROOT = Path(__file__).parents[2]
_PRODUCT = f"{ROOT}/deberta_dist/"
_TESTS = f"{ROOT}/tests/"
_OWN = f"{Path(__file__).parent}/"
_OWN_TESTS = re.compile(r"/(test_\w+|planting|small_runs)\.py$")
# What calls operators in the product's place. The rest of torch is between any line and its operator.
_LIBRARY = re.compile(r"/site-packages/((?:torch/(?:distributed|optim)/|(?!torch/|triton/)).*)")


class Place(NamedTuple):
    """Where an event comes from: attributes of `record.Event`."""

    site: str
    library: str
    phases: tuple[str, ...]
    direction: Direction


class Line(NamedTuple):
    """The innermost lines of the stack.

    Attributes:
        site: Of the product, ``file:line`` below its package; else of the tests, below the repository.
        library: Of a library that the product has called, ``""`` where it calls the operator itself.
        is_recomputed: A checkpoint computes again.
    """

    site: str
    library: str
    is_recomputed: bool


def innermost_line(*, in_backward: bool) -> Line:
    """Of the frames above this one.

    Args:
        in_backward: Looks for a checkpoint as well, which takes the whole stack.
    """
    frame: FrameType | None = sys._getframe(1)
    site = of_tests = library = ""
    while frame is not None:
        owner, name = _owner(frame.f_code.co_filename)
        line = f"{name}:{frame.f_lineno}"
        if owner == "product":
            site = site or line
        elif owner == "tests":
            of_tests = of_tests or line
        elif owner == "library" and not site and not of_tests:
            library = library or line
        elif owner == "checkpoint" and in_backward:
            return Line(site or of_tests, library, True)
        if site and not in_backward:
            break
        frame = frame.f_back
    return Line(site or of_tests, library, False)


@functools.cache
def _owner(file: str) -> tuple[str, str]:
    """Whose a file is, and its name in reports."""
    if file.startswith(_PRODUCT):
        return "product", file.removeprefix(_PRODUCT)
    if file.endswith("/torch/utils/checkpoint.py"):
        return "checkpoint", ""
    if found := _LIBRARY.search(file):
        return "library", found[1]
    if file.startswith(_TESTS) and (not file.startswith(_OWN) or _OWN_TESTS.search(file)):
        return "tests", file.removeprefix(f"{ROOT}/")
    return "other", ""
