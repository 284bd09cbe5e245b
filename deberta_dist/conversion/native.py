"""A run's own checkpoint as a source: float32 weights by published name, whatever layout wrote them."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from deberta_dist.checkpoint.errors import CheckpointError
from deberta_dist.checkpoint.find import CHECKPOINTS_NAME, newest_complete
from deberta_dist.checkpoint.manifest import MANIFEST_NAME, Manifest
from deberta_dist.checkpoint.reader import CheckpointReader, open_checkpoint
from deberta_dist.conversion.rules import Format
from deberta_dist.conversion.weights import CHUNK_NUMBERS, ChunkedReader, Weight, Weights

FORMAT = Format(name="native")
_REOPEN_BYTES = 256 * 2**20


class NativeCheckpoint:
    """One checkpoint directory.

    Attributes:
        directory: ``.../step-00000100``.
        manifest: Step, model configuration and where each tensor's slices lie.
        weights: By published name; a tensor is read when it is asked for.
        warnings: Newer checkpoints of the run that are not whole.
    """

    def __init__(self, path: Path, *, verify: bool = True) -> None:
        """Opens a checkpoint, or the newest whole one of a run.

        Args:
            path: ``step-N/``, or a run directory.
            verify: Compare every byte with the manifest's checksums; otherwise sizes alone.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        self.warnings: list[str] = []
        if (path / MANIFEST_NAME).exists():
            self._reader = open_checkpoint(path, verify=verify)
        else:
            found = newest_complete(path / CHECKPOINTS_NAME, on_skip=self.warnings.append, verify=verify)
            if found is None:
                raise FileNotFoundError(path / CHECKPOINTS_NAME)
            self._reader = found
        self.directory: Path = self._reader.directory
        self.manifest: Manifest = self._reader.manifest
        if self.manifest.networks:  # a table may be a sum of two networks'
            raise CheckpointError(
                f"{self.directory} holds several networks ({', '.join(self.manifest.networks)} beside the model): give the "
                "run's weights/, which its end writes, instead"
            )
        self.weights: Weights = {
            name: Weight(self._reader.shape(name), torch.float32, _InCheckpoint(self, name), (name,))
            for name in self._reader.names
        }

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a tensor."""
        return self._reader.shape(name)

    def read_range(self, name: str, *, begin: int, count: int) -> Tensor:
        """Some of a tensor's numbers, see `CheckpointReader.read_range`."""
        # The reader maps files, and what has been read of a map counts as memory of this process.
        if self._reader.bytes_copied > _REOPEN_BYTES:
            self._reader = CheckpointReader(self.directory)
        return self._reader.read_range(name, begin=begin, count=count)

    def verify(self) -> None:
        """Compares every byte with the manifest's checksums. Raises CheckpointError."""
        self._reader.verify()


class _InCheckpoint(ChunkedReader):
    """A tensor whose slices lie in the files of several ranks."""

    def __init__(self, checkpoint: NativeCheckpoint, name: str) -> None:
        super().__init__(checkpoint.shape(name), torch.float32)
        self._checkpoint, self._name = checkpoint, name

    def parts(self) -> Iterator[Tensor]:
        count = math.prod(self.shape)
        for begin in range(0, count, CHUNK_NUMBERS):
            yield self._checkpoint.read_range(self._name, begin=begin, count=min(CHUNK_NUMBERS, count - begin))
