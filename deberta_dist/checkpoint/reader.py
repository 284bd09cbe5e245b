"""Reading slices of named tensors from a checkpoint, whatever layout wrote it.

Used by training on resume, and by conversion and inspection, which have no process group. Files are mapped
when a slice first needs them, and only the pages that hold the slice are read.
"""

import os
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deberta_dist.checkpoint.errors import CheckpointError
from deberta_dist.checkpoint.manifest import MANIFEST_NAME, FlatRange, Manifest, TensorEntry, TensorSlice, read_manifest
from deberta_dist.checkpoint.rectangles import SliceBounds, overlap, rectangles, view, window
from deberta_dist.checkpoint.shard_file import STATES, ShardMaps, hash_file, map_shard_file
from deberta_dist.checkpoint.slices import check_table, shard_slices
from deberta_dist.files.foreign import head_of, refuse_foreign
from deberta_dist.parallel.flat_layout import FlatLayout, ShardState
from deberta_dist.parallel.mesh import MeshRank, MeshShape
from deberta_dist.parallel.tensor.sharding_rules import SHARDING_RULES, Rules

# Each mapped file holds a descriptor; a checkpoint may have thousands of files.
MAX_MAPPED_FILES = 64
MAX_THREADS = 8


class CheckpointReader:
    """One checkpoint directory. Nothing but the manifest is read until it is asked for.

    Args:
        directory: ``.../step-00000100``.

    Raises:
        CheckpointVersionError: it has a newer format.
        CheckpointError: its manifest is missing, damaged, or contradicts itself.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.manifest: Manifest = read_manifest(self.directory)
        check_table(self.manifest.tensors, files=self.manifest.files, where=self.directory / MANIFEST_NAME)
        self.bytes_copied = 0
        """Bytes handed out so far."""
        self._mapped: OrderedDict[str, ShardMaps] = OrderedDict()

    @property
    def names(self) -> tuple[str, ...]:
        """Published names of all tensors, in model order."""
        return tuple(self.manifest.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a tensor. Raises CheckpointError where there is none of that name."""
        return self._entry(name).shape

    def read(self, name: str, *, state: str = "weight", cut: SliceBounds | None = None) -> Tensor:
        """A tensor or a slice of it, float32 on the CPU.

        Args:
            name: Published name of the tensor.
            state: ``weight``, ``exp_avg`` or ``exp_avg_sq``.
            cut: (dimension 0 or 1, start, stop); None is the whole tensor. ``stop`` may lie behind the last row
                of dimension 0, where a vocabulary is padded: there are zeros.

        Raises:
            CheckpointError: no such tensor, or a file that is needed is missing or not what it should be.
        """
        shape = list(self.shape(name))
        if cut is not None:
            shape[cut[0]] = cut[2] - cut[1]
        count = window(self.shape(name), cut=cut).num_elements
        return self.read_range(name, begin=0, count=count, state=state, cut=cut).view(shape)

    def read_range(self, name: str, *, begin: int, count: int, state: str = "weight", cut: SliceBounds | None = None) -> Tensor:
        """Elements [begin, begin + count) of a flattened slice, without reading the rest of it.

        Args, errors: as for ``read``.
        """
        assert state in STATES, state
        entry = self._entry(name)
        target_window = window(entry.shape, cut=cut)
        assert begin >= 0 and count >= 0 and begin + count <= target_window.num_elements, (name, cut, begin, count)
        # Rows of vocabulary padding are no data, whatever the files hold there: they stay zero.
        result = np.zeros(count, dtype=np.float32)
        targets = rectangles(target_window, begin=begin, count=count, address=0)
        rows = entry.shape[0] if entry.shape else 1
        for tensor_slice in entry.slices:
            source_window = window(entry.shape, cut=_slice_cut(entry, tensor_slice))
            for flat_range in tensor_slice.ranges:
                sources = rectangles(source_window, begin=flat_range.begin, count=flat_range.count, address=flat_range.offset)
                for source in sources:
                    for target in targets:
                        common = overlap(source, target)
                        if common is None or common.top >= rows:
                            continue
                        if common.top + common.height > rows:  # the writer's vocabulary padding is not data
                            common = type(common)(common.top, common.left, rows - common.top, common.width)
                        numbers = self._shard(flat_range, state=state)
                        view(result, target, part=common)[:] = view(numbers, source, part=common)
                        self.bytes_copied += 4 * common.num_elements
        return torch.from_numpy(result)

    def read_shards(
        self,
        layout: FlatLayout,
        *,
        shape: MeshShape,
        mesh_rank: MeshRank,
        rules: Rules = SHARDING_RULES,
        saved_name: Callable[[str], str] = str,
    ) -> list[ShardState]:
        """A rank's shard of every flat parameter, as ``WeightStore.copy_shards`` gave it to the writer.

        Args:
            layout: What the rank owns.
            shape: Sizes of the reader's mesh.
            mesh_rank: Whose shards are read.
            rules: How the network's modules are split.
            saved_name: What the checkpoint calls a parameter of the layout.

        Raises:
            CheckpointError: as for ``read``.
        """
        full_shapes = {name: self.shape(saved_name(name)) for name in layout.places}
        slices_by_flat = shard_slices(layout, shape=shape, mesh_rank=mesh_rank, full_shapes=full_shapes, rules=rules)
        shards = []
        for size, own in zip(layout.sizes, slices_by_flat, strict=True):
            # Padding between the slices is in no checkpoint: it depends on the layout.
            values = {state: torch.zeros(size // shape.data) for state in STATES}
            for shard_slice in own:
                for state in STATES:
                    values[state][shard_slice.offset : shard_slice.offset + shard_slice.count] = self.read_range(
                        saved_name(shard_slice.name),
                        begin=shard_slice.begin,
                        count=shard_slice.count,
                        state=state,
                        cut=shard_slice.cut,
                    )
            shards.append(ShardState(**values))
        return shards

    def check_sizes(self) -> None:
        """Whether every file is there in full length; reads nothing. Raises CheckpointError naming the file."""
        for name in self.manifest.files:
            self._check_size(name)

    def verify_file(self, name: str) -> None:
        """Whether a file is, bit for bit, what was written. Raises CheckpointError naming it and what is wrong."""
        self._check_size(name)
        path = self.directory / name
        try:
            found = hash_file(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
        if found != self.manifest.files[name].sha256:
            raise CheckpointError(f"{path}: its checksum is not the manifest's: its contents have changed")
        map_shard_file(path)

    def verify(self) -> None:
        """Whether every file is, bit for bit, what was written; several are hashed at once. Raises CheckpointError."""
        self.check_sizes()
        with ThreadPoolExecutor(max_workers=min(MAX_THREADS, os.cpu_count() or 1)) as pool:
            checks = [pool.submit(self.verify_file, name) for name in self.manifest.files]
            try:
                for check in checks:
                    check.result()
            finally:
                # One damaged file is enough: the others, maybe terabytes, need not be read.
                pool.shutdown(cancel_futures=True)

    def _check_size(self, name: str) -> None:
        path, expected = self.directory / name, self.manifest.files[name].bytes
        try:
            size = os.stat(path).st_size
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing") from error
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
        if size != expected:
            refuse_foreign(head_of(path), path, error=CheckpointError)
            problem = "truncated" if size < expected else "too long"
            raise CheckpointError(f"{path} is {problem}: it has {size} bytes, the manifest says {expected}")

    def _entry(self, name: str) -> TensorEntry:
        if name not in self.manifest.tensors:
            raise CheckpointError(f"{self.directory} has no tensor {name}: it belongs to another model")
        return self.manifest.tensors[name]

    def _shard(self, flat_range: FlatRange, *, state: str) -> np.ndarray:
        """The mapped shard that holds a flat range."""
        file = flat_range.file
        if file not in self._mapped:
            self._check_size(file)
            self._mapped[file] = map_shard_file(self.directory / file)
            # Arrays that are still in use keep their mapping alive; only the descriptor count is bounded here.
            if len(self._mapped) > MAX_MAPPED_FILES:
                self._mapped.popitem(last=False)
        self._mapped.move_to_end(file)
        shard = self._mapped[file].get((flat_range.flat, state))
        if shard is None or flat_range.offset + flat_range.count > shard.size:
            raise CheckpointError(f"{self.directory / file} does not hold what the manifest says: it belongs to another layout")
        return shard


def open_checkpoint(directory: str | Path, *, verify: bool = True) -> CheckpointReader:
    """Opens a checkpoint, by default after every byte of it has been checked.

    Args:
        directory: ``.../step-00000100``.
        verify: False where another rank has verified it.

    Raises:
        CheckpointError: it is not whole. The message names the file and what is wrong.
    """
    reader = CheckpointReader(directory)
    if verify:
        reader.verify()
    return reader


def _slice_cut(entry: TensorEntry, tensor_slice: TensorSlice) -> SliceBounds | None:
    return None if entry.cut_dim is None else (entry.cut_dim, tensor_slice.start, tensor_slice.stop)
