"""Where the tensors that a rank owns lie in its flat parameters, and the shard of them that a rank stores.

Arithmetic only: the weight store shards flat parameters without knowing their contents, and a checkpoint finds every tensor
slice in them by this table.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Element count to which every tensor is aligned inside its flat parameter: 128 bytes in bf16.
ALIGNMENT = 64


@dataclass(frozen=True)
class FlatLayout:
    """Where each owned tensor lies in the flat parameters.

    Attributes:
        sizes: Elements of each flat parameter, padded to a multiple of ``ALIGNMENT`` x data-parallel size.
        places: name -> (index of the flat parameter, offset, shape).
    """

    sizes: tuple[int, ...]
    places: Mapping[str, tuple[int, int, tuple[int, ...]]]

    def views(self, flats: Sequence[Tensor]) -> dict[str, Tensor]:
        """The owned tensors by name as views of ``flats``."""
        return {
            name: flats[index][offset : offset + torch.Size(shape).numel()].view(shape)
            for name, (index, offset, shape) in self.places.items()
        }


@dataclass(frozen=True)
class ShardState:
    """This rank's shard of one flat parameter and of Adam's two moments, float32 [size / data_parallel_size] each."""

    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


def lay_out(
    shapes: Mapping[str, tuple[int, ...]], *, groups: Sequence[Callable[[str], bool]], data_parallel_size: int
) -> FlatLayout:
    """Lays tensors out in one flat parameter per group, in the order of ``shapes``.

    Every rank has the same number of flat parameters whatever its stage holds, because DeepSpeed compares
    parameter ids across the whole world; a group without tensors is one aligned row of padding.

    Args:
        shapes: Local shape of every owned tensor by name.
        groups: Predicates on the name; exactly one holds for each.
        data_parallel_size: Number of shards; every flat parameter is padded so that they are equal and aligned.
    """
    lengths = [0] * len(groups)
    places: dict[str, tuple[int, int, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        (index,) = [i for i, belongs in enumerate(groups) if belongs(name)]
        places[name] = (index, lengths[index], tuple(shape))
        lengths[index] += _round_up(torch.Size(shape).numel(), ALIGNMENT)
    # Every shard begins on an aligned address too, so the whole is a multiple of both.
    sizes = tuple(_round_up(max(length, 1), ALIGNMENT * data_parallel_size) for length in lengths)
    return FlatLayout(sizes=sizes, places=places)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
