"""A run's own checkpoint as a source: float32 weights by published name, whatever layout wrote them."""

import functools
from pathlib import Path

import torch
from torch import Tensor

from deberta_dist.checkpoint.find import newest_complete
from deberta_dist.checkpoint.formats.rules import Format
from deberta_dist.checkpoint.formats.weights import Weight, Weights
from deberta_dist.checkpoint.manifest import Manifest
from deberta_dist.checkpoint.reader import CheckpointReader, open_checkpoint

FORMAT = Format(name="native")
_REOPEN_BYTES = 256 * 2**20
_PART = 1 << 24


class NativeCheckpoint:
    """One checkpoint directory.

    Attributes:
        directory: ``.../step-00000100``.
        manifest: Its manifest.
        weights: Its weights, unread.
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
        if (path / "manifest.json").exists():
            self._reader = open_checkpoint(path, verify=verify)
        else:
            found = newest_complete(path / "checkpoints", on_skip=self.warnings.append, verify=verify)
            if found is None:
                raise FileNotFoundError(path / "checkpoints")
            self._reader = found
        self.directory: Path = self._reader.directory
        self.manifest: Manifest = self._reader.manifest
        self.weights: Weights = {
            name: Weight(tuple(self._reader.shape(name)), torch.float32, functools.partial(self._read, name), (name,))
            for name in self._reader.names
        }

    def _read(self, name: str) -> Tensor:
        result = torch.empty(self._reader.shape(name))
        numbers = result.view(-1)
        for begin in range(0, numbers.numel(), _PART):
            # The reader maps files, and what has been read of a map counts as memory of this process.
            if self._reader.bytes_copied > _REOPEN_BYTES:
                self._reader = CheckpointReader(self.directory)
            count = min(_PART, numbers.numel() - begin)
            numbers[begin : begin + count] = self._reader.read_range(name, begin=begin, count=count)
        return result

    def verify(self) -> None:
        """Compares every byte with the manifest's checksums. Raises CheckpointError."""
        self._reader.verify()
