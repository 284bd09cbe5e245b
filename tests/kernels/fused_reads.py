"""Which elements the threads of a warp read at once, found in compiled kernels (``fused_resources``). Needs no Triton.

One load of a warp costs as many memory transactions as it touches lines. The compiler decides which thread takes which
element, and its versions decide differently; a wrong choice changes no number and makes a gather many times slower. So
the tests read the choice in Triton's own assembly, where a load looks like this:

    %4 = tt.load %3, %2 : tensor<64x32x!tt.ptr<bf16>, #blocked>
"""

import re
from typing import NamedTuple

_LANES = 32
_DEFINITION = re.compile(r"\s*%(\w+) = [\w.]+ %(\w+)")
_LAYOUT = re.compile(r"^(#\w+) = (#ttg\..*)$", re.MULTILINE)
_READ = re.compile(r"= (?:tt\.load|ttg\.async_copy_global_to_local) %(\w+).*?: tensor<((?:\d+x){2,})!tt\.ptr<\w+>, (#\w+)>")


class Read(NamedTuple):
    """One load of a tile from memory.

    Attributes:
        argument: the kernel's parameter that is read.
        shape: of the tile.
        elements: place in the tile that each of the 32 threads of the first warp reads with its first instruction.
    """

    argument: str
    shape: tuple[int, ...]
    elements: tuple[tuple[int, ...], ...]

    def neighbours(self, dim: int) -> int:
        """How many threads from the first on take elements that follow each other along ``dim``."""
        first = self.elements[0]
        following = (tuple(i + step * (d == dim) for d, i in enumerate(first)) for step in range(_LANES))
        matches = [ours == theirs for ours, theirs in zip(self.elements, following, strict=True)]
        return matches.index(False) if False in matches else _LANES


def reads(assembly: str) -> list[Read]:
    """Every load of a tile with two dimensions, in the order of the program.

    Args:
        assembly: of one kernel, ``compiled.asm["ttgir"]``.

    Raises:
        ValueError: a load has a layout that is not understood, or an address that does not begin with a parameter.
    """
    layouts = dict(_LAYOUT.findall(assembly))
    begins_with: dict[str, str | None] = {}
    found = []
    # Line by line: two loops one behind the other may use a name twice.
    for line in assembly.splitlines():
        if "tt.func" in line:
            begins_with = {name: name for name in re.findall(r"%(\w+): !tt\.ptr<", line)}
        elif definition := _DEFINITION.match(line):
            # The first operand of whatever makes a pointer is the pointer that it was.
            begins_with[definition[1]] = begins_with.get(definition[2])
        if read := _READ.search(line):
            pointer, sizes, layout = read.groups()
            parameter = begins_with.get(pointer)
            if parameter is None:
                raise ValueError(f"no parameter is the origin of {pointer} in {line.strip()}")
            shape = tuple(int(size) for size in sizes.split("x")[:-1])
            elements = tuple(_element(layouts[layout], lane, shape) for lane in range(_LANES))
            found.append(Read(parameter, shape, elements))
    return found


def _element(layout: str, lane: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Place of the first element of a thread of the first warp."""
    if layout.startswith("#ttg.blocked"):
        per_thread, per_warp, order = (_numbers(layout, name) for name in ("sizePerThread", "threadsPerWarp", "order"))
        place = [0] * len(shape)
        for dim in order:
            place[dim] = lane % per_warp[dim] * per_thread[dim] % shape[dim]
            lane //= per_warp[dim]
        return tuple(place)
    if layout.startswith("#ttg.linear"):
        bases = re.findall(r"\[([\d, ]+)\]", _inside(r"lane = \[(\[.*?\])\]", layout))
        place = [0] * len(shape)
        for bit, base in enumerate(bases):
            for dim, step in enumerate(base.split(",")):
                place[dim] ^= int(step) * (lane >> bit & 1)
        return tuple(place)
    raise ValueError(f"no reading of the layout {layout}")


def _numbers(layout: str, name: str) -> list[int]:
    return [int(number) for number in _inside(rf"{name} = \[([\d, ]+)\]", layout).split(",")]


def _inside(pattern: str, layout: str) -> str:
    found = re.search(pattern, layout)
    if found is None:
        raise ValueError(f"no reading of the layout {layout}")
    return found[1]
