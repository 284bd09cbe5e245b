"""Copies between differently cut slices of one matrix: index arithmetic and strided copies.

Every tensor is seen as a matrix of its first dimension by all others. A slice along dimension 0 is a band of
rows, along dimension 1 a band of columns: a *window*. A run of elements of a flattened window is at most three
rectangles (rest of a row, whole rows, begin of a row), each a strided view of the buffer the run lies in. So
any part of any slice is copied from any other by intersecting rectangles.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SliceBounds = tuple[int, int, int]
"""(dimension, start, stop)."""


@dataclass(frozen=True)
class Window:
    """A rectangular part of a matrix: its corner and its size."""

    top: int
    left: int
    height: int
    width: int

    @property
    def num_elements(self) -> int:
        """Elements in it."""
        return self.height * self.width


@dataclass(frozen=True)
class Rectangle:
    """Rows [top, bottom) x columns [left, right) of a matrix, lying in a buffer.

    Attributes:
        address: Element of the buffer that holds (top, left).
        stride: Elements from one row to the next in the buffer.
    """

    top: int
    bottom: int
    left: int
    right: int
    address: int
    stride: int


def window(shape: Sequence[int], *, cut: SliceBounds | None) -> Window:
    """What a slice of a tensor covers of its matrix.

    Args:
        shape: Full shape; a dimension beyond the second is counted into the columns.
        cut: Slice along dimension 0 or 1; None is the whole. ``stop`` may lie behind the last row.
    """
    rows, columns = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    if cut is None:
        return Window(0, 0, rows, columns)
    dim, start, stop = cut
    assert dim in (0, 1) and dim < len(shape) and 0 <= start < stop, cut
    if dim == 0:
        return Window(start, 0, stop - start, columns)
    assert stop <= shape[1], cut
    unit = math.prod(shape[2:])
    return Window(0, start * unit, rows, (stop - start) * unit)


def rectangles(part: Window, *, begin: int, count: int, address: int) -> list[Rectangle]:
    """Elements [begin, begin + count) of the flattened window, which lie together in a buffer from ``address`` on."""
    found: list[Rectangle] = []
    end = begin + count
    while begin < end:
        row, column = divmod(begin, part.width)
        # Whole rows at once where a row begins; else what is left of the row.
        rows = (end - begin) // part.width if column == 0 else 0
        length = rows * part.width or min(part.width - column, end - begin)
        found.append(
            Rectangle(
                top=part.top + row,
                bottom=part.top + row + max(rows, 1),
                left=part.left + column,
                right=part.left + part.width if rows else part.left + column + length,
                address=address,
                stride=part.width,
            )
        )
        begin, address = begin + length, address + length
    return found


def overlap(a: Rectangle, b: Rectangle) -> Window | None:
    """What two rectangles of a matrix have in common."""
    top, bottom = max(a.top, b.top), min(a.bottom, b.bottom)
    left, right = max(a.left, b.left), min(a.right, b.right)
    return Window(top, left, bottom - top, right - left) if top < bottom and left < right else None


def view(buffer: np.ndarray, rectangle: Rectangle, *, part: Window) -> np.ndarray:
    """The elements of ``part``, which lies in the rectangle, as a strided view of the 1-D buffer."""
    first = rectangle.address + (part.top - rectangle.top) * rectangle.stride + part.left - rectangle.left
    last = first + (part.height - 1) * rectangle.stride + part.width
    assert first >= 0 and last <= buffer.size
    item = buffer.itemsize
    return np.lib.stride_tricks.as_strided(
        buffer[first:last], (part.height, part.width), (rectangle.stride * item, item), writeable=buffer.flags.writeable
    )
