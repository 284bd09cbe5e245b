"""Computes and checks which bytes of which shard file hold each tensor slice of a layout.

Pure functions. The writer's rank 0 turns everybody's ``FlatLayout`` into the manifest's table of tensors; a
reader turns its own into the slices that fill its shards. Only this file and the sharding rules know how a rank's slice
of a tensor is cut.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deberta_dist.checkpoint.errors import CheckpointError
from deberta_dist.checkpoint.manifest import FileEntry, FlatRange, TensorEntry, TensorSlice
from deberta_dist.checkpoint.rectangles import SliceBounds, window
from deberta_dist.checkpoint.shard_file import STATES
from deberta_dist.parallel.flat_layout import FlatLayout
from deberta_dist.parallel.mesh import MeshRank, MeshShape
from deberta_dist.parallel.tensor import sharding_rules

SliceOwner = tuple[int, int]
"""(pipeline rank, tensor rank)."""


@dataclass(frozen=True)
class ShardSlice:
    """Elements [begin, begin + count) of a flattened slice of a tensor, and where they lie in a rank's shard.

    Attributes:
        name: Published name of the tensor.
        cut: Slice of the tensor that the rank holds, as (dim, start, stop); None: all of it.
        begin: First element, in the flattened slice.
        count: Number of elements.
        offset: Place of the first element in the shard.
    """

    name: str
    cut: SliceBounds | None
    begin: int
    count: int
    offset: int


def shard_file_name(rank: int) -> str:
    """Name of the file that global ``rank`` writes."""
    return f"rank-{rank:05d}.safetensors"


def local_cut(
    name: str, *, full_shape: Sequence[int], rank: int, size: int, rules: sharding_rules.Rules = sharding_rules.SHARDING_RULES
) -> SliceBounds | None:
    """The slice of a published tensor that tensor-parallel ``rank`` of ``size`` holds, vocabulary padding included."""
    cut = sharding_rules.parameter_sharding(name, rules)
    if cut.dim is None or size == 1:
        return None
    length = full_shape[cut.dim]
    if cut.kind == sharding_rules.VOCAB:
        length = sharding_rules.padded_vocabulary(length, tensor_parallel_size=size)
    bounds = sharding_rules.local_slice(length, rank=rank, size=size)
    return cut.dim, bounds.start, bounds.stop


def tensor_table(
    layouts: Mapping[SliceOwner, FlatLayout],
    *,
    shape: MeshShape,
    full_shapes: Mapping[str, tuple[int, ...]],
    rules: sharding_rules.Rules = sharding_rules.SHARDING_RULES,
    first_flat: int = 0,
) -> dict[str, TensorEntry]:
    """The manifest's ``tensors`` for everything that a network's layout owns.

    Args:
        layouts: What each model-parallel rank, (pipeline, tensor), owns; all of them.
        full_shapes: Full shape of every published parameter.
        rules: How the network's modules are split.
        first_flat: Number of its first flat parameter in a rank's file: behind those of the networks before it.
    """
    owners: dict[str, list[SliceOwner]] = {name: [] for name in full_shapes}
    for owner in sorted(layouts, key=lambda owner: owner[1]):
        for name in layouts[owner].places:
            owners[name].append(owner)
    table: dict[str, TensorEntry] = {}
    for name, full_shape in full_shapes.items():
        dim = sharding_rules.parameter_sharding(name, rules).dim
        expected = [None] if dim is None else list(range(shape.tensor))
        assert len(owners[name]) == len(expected), f"{name} is owned by {owners[name]}"
        slices = []
        for tensor, owner in zip(expected, owners[name], strict=True):
            assert tensor in (None, owner[1]), f"slice {tensor} of {name} is owned by {owner}"
            cut = local_cut(name, full_shape=full_shape, rank=owner[1], size=shape.tensor, rules=rules)
            start, stop = cut[1:] if cut else (0, full_shape[dim or 0] if full_shape else 1)
            local_shape = layouts[owner].places[name][2]
            assert math.prod(local_shape) == window(full_shape, cut=cut).num_elements, (name, local_shape)
            ranges = _flat_ranges(name, layouts[owner], shape=shape, owner=owner, first_flat=first_flat)
            slices.append(TensorSlice(start, stop, ranges))
        table[name] = TensorEntry(shape=tuple(full_shape), cut_dim=dim, slices=tuple(slices))
    return table


def shard_slices(
    layout: FlatLayout,
    *,
    shape: MeshShape,
    mesh_rank: MeshRank,
    full_shapes: Mapping[str, tuple[int, ...]],
    rules: sharding_rules.Rules = sharding_rules.SHARDING_RULES,
) -> tuple[tuple[ShardSlice, ...], ...]:
    """What a rank's shard of each flat parameter consists of, in order; between the slices lies padding.

    Args:
        layout: What the rank owns.
        mesh_rank: Whose shard is described.
        full_shapes: Full shape of every published parameter.
        rules: How the network's modules are split.
    """
    found: list[list[ShardSlice]] = [[] for _ in layout.sizes]
    for name, (flat, offset, local_shape) in layout.places.items():
        cut = local_cut(name, full_shape=full_shapes[name], rank=mesh_rank.tensor, size=shape.tensor, rules=rules)
        for data, begin, count, shard_offset in _spread(layout, flat, offset, math.prod(local_shape), shape.data):
            if data == mesh_rank.data:
                found[flat].append(ShardSlice(name, cut, begin, count, shard_offset))
    return tuple(tuple(sorted(slices, key=lambda item: item.offset)) for slices in found)


def check_table(tensors: Mapping[str, TensorEntry], *, files: Mapping[str, FileEntry], where: object) -> None:
    """Checks that slices tile every tensor, flat ranges tile every slice, and no element of a file is used twice.

    Args:
        tensors: Table of a manifest, not checked yet.
        files: Shard files that the manifest lists; a range in any other file is refused.
        where: Prefix of messages: the manifest's path.

    Raises:
        CheckpointError: something is missing, overlaps, or lies outside its file.
    """
    used: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for name, entry in tensors.items():
        problem = _problem(entry)
        for tensor_slice in entry.slices:
            for flat_range in tensor_slice.ranges:
                used.setdefault((flat_range.file, flat_range.flat), []).append((flat_range.offset, flat_range.count))
                if flat_range.file not in files:
                    problem = problem or f"{flat_range.file[:100]!r} is not one of the files"
        if problem:
            raise CheckpointError(f"{where}: {name}: {problem}")
    for (file, flat), runs in used.items():
        end = 0
        for offset, count in sorted(runs):
            if offset < end:
                raise CheckpointError(f"{where}: elements of {file}, flat parameter {flat}, are used twice")
            end = offset + count
        if end * len(STATES) * 4 > files[file].bytes:
            raise CheckpointError(f"{where}: ranges of flat parameter {flat} lie outside {file}")


def _problem(entry: TensorEntry) -> str | None:
    dim, shape = entry.cut_dim, entry.shape
    if dim is not None and (dim not in (0, 1) or dim >= len(shape)):
        return f"a tensor of shape {list(shape)} cannot be cut along dimension {dim}"
    if not entry.slices or (dim is None and len(entry.slices) > 1):
        return f"it has {len(entry.slices)} slices"
    length = shape[dim or 0] if shape else 1
    end = 0
    for tensor_slice in entry.slices:
        if tensor_slice.start != end or tensor_slice.stop <= tensor_slice.start:
            return f"its slices do not lie side by side at {tensor_slice.start}"
        end = tensor_slice.stop
        # Rows behind the real ones are vocabulary padding; columns have none.
        if end > length and dim != 0:
            return f"its slices end at {end} and not at {length}"
        slice_shape = [end - tensor_slice.start if i == dim else size for i, size in enumerate(shape)]
        begin = 0
        for flat_range in tensor_slice.ranges:
            if flat_range.begin != begin or flat_range.count < 1:
                return f"the ranges of its slice at {tensor_slice.start} do not lie side by side"
            begin += flat_range.count
        if begin != math.prod(slice_shape):
            return f"the ranges of its slice at {tensor_slice.start} have {begin} elements, not {math.prod(slice_shape)}"
    if end < length:
        return f"its slices end at {end} and not at {length}"
    return None


def _flat_ranges(
    name: str, layout: FlatLayout, *, shape: MeshShape, owner: SliceOwner, first_flat: int
) -> tuple[FlatRange, ...]:
    flat, offset, local_shape = layout.places[name]
    ranges = []
    for data, begin, count, shard_offset in _spread(layout, flat, offset, math.prod(local_shape), shape.data):
        rank = shape.rank(MeshRank(pipeline=owner[0], data=data, tensor=owner[1]))
        ranges.append(FlatRange(shard_file_name(rank), first_flat + flat, shard_offset, begin, count))
    return tuple(ranges)


def _spread(layout: FlatLayout, flat: int, offset: int, count: int, data_parallel_size: int) -> list[tuple[int, int, int, int]]:
    """A run of a flat parameter over its shards: (data rank, begin in the run, elements, offset in the shard)."""
    assert layout.sizes[flat] % data_parallel_size == 0 and offset + count <= layout.sizes[flat]
    shard = layout.sizes[flat] // data_parallel_size
    found, begin = [], 0
    while begin < count:
        data, shard_offset = divmod(offset + begin, shard)
        length = min(count - begin, shard - shard_offset)
        found.append((data, begin, length, shard_offset))
        begin += length
    return found
