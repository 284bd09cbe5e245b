"""Which documents repeat an earlier one, exactly or nearly.

Exactly: in bounded memory, every process takes a range of hashes at a time. The first document of equal hash in the order
of the input stays. Spool files hold their hashes sorted, so a range is one contiguous read from each; how many ranges there are
depends on the memory allowed, what is found does not. Nearly: one process asks ``NearDuplicates`` in the order of the input.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import safe_open

from deberta_dist.preparation.filtering.near_duplicates import NearDuplicates
from deberta_dist.preparation.pipeline.publish import publish, wait_for
from deberta_dist.preparation.pipeline.spool import SpoolFile, checked, read_checked

# Per document of a range: hash 16, spool file and document 4 each, the sort's order 8, and copies of some of them.
BYTES_PER_DOCUMENT = 64


def num_ranges(num_documents: int, *, memory_bytes: int) -> int:
    """Into how many ranges the hashes are cut so that one fits into ``memory_bytes``."""
    return max(1, math.ceil(num_documents * BYTES_PER_DOCUMENT / memory_bytes))


def bounds(number: int, *, count: int) -> tuple[int, int | None]:
    """Upper 64 bits of the hashes of range ``number`` of ``count``: from the first, to below the second."""
    edge = [2**64 * n // count for n in (number, number + 1)]
    return edge[0], None if number + 1 == count else edge[1]


def find_duplicates(spool: Sequence[SpoolFile], *, number: int, count: int, path: Path) -> None:
    """Writes the duplicates of one range of hashes.

    Args:
        spool: all spool files, in the order of the input.
        number: of the range, 0 .. count - 1.
        count: how many ranges there are.
        path: file to write, for ``DroppedDocuments``.
    """
    low, high = bounds(number, count=count)
    found = [spool_file.hash_range(low, high) for spool_file in spool]
    sizes = [len(documents) for _, _, documents in found]
    which = np.repeat(np.arange(len(spool), dtype=np.uint32), sizes)
    hash_high, hash_low, documents = (
        np.concatenate([arrays[i] for arrays in found]) if found else np.empty(0, np.uint64) for i in range(3)
    )
    # lexsort takes the least significant key first: by hash, then in the order of the input, whose first document stays.
    order = np.lexsort((documents, which, hash_low, hash_high))
    same = np.zeros(len(order), bool)
    same[1:] = (np.diff(hash_high[order]) == 0) & (np.diff(hash_low[order]) == 0)
    write_dropped(path, which=which[order[same]], documents=documents[order[same]], num_spool_files=len(spool))


def find_near_duplicates(spool: Sequence[SpoolFile], *, threshold: float, dropped: "DroppedDocuments", path: Path) -> None:
    """Writes the documents that are near an earlier one, exact duplicates aside.

    Args:
        spool: all spool files, in the order of the input.
        threshold: as of ``NearDuplicates``, which also says how much memory is needed.
        dropped: documents that are no more, and near nothing.
        path: file to write, for ``DroppedDocuments``.
    """
    memory = NearDuplicates(threshold)
    which: list[int] = []
    documents: list[int] = []
    for number, spool_file in enumerate(spool):
        (signatures,) = spool_file.read("signatures")
        for document in np.flatnonzero(dropped.keep(number, num_documents=spool_file.num_documents)).tolist():
            if memory.is_duplicate(signatures[document].tobytes()):
                which.append(number)
                documents.append(document)
    write_dropped(path, which=np.array(which, np.uint32), documents=np.array(documents, np.uint32), num_spool_files=len(spool))


def write_dropped(path: Path, *, which: np.ndarray, documents: np.ndarray, num_spool_files: int) -> None:
    """Writes a list of documents to drop.

    Args:
        which: spool file of each, integers [N].
        documents: its number in that spool file, integers [N].
        num_spool_files: how many spool files there are.
    """
    order = np.lexsort((documents, which))
    starts = np.searchsorted(which[order], np.arange(num_spool_files + 1))
    tensors: dict[str, np.ndarray] = {"documents": documents[order].astype(np.uint32), "starts": starts.astype(np.uint64)}
    publish(path, checked(tensors))


class DroppedDocuments:
    """Lists of documents to drop, read for one spool file after another.

    Args:
        paths: files of ``write_dropped``.

    Raises:
        DataError: one is missing or damaged.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        for path in self._paths:
            wait_for(f"{path} has", path.exists)
        self._starts: list[np.ndarray] = []
        for path in self._paths:
            # The documents are looked at once, for damage, and not kept.
            self._starts.append(read_checked(path, "starts", "documents")[0])

    def of(self, file_number: int) -> np.ndarray:
        """Numbers of the documents of a spool file to drop, integers, in no order."""
        found = [np.empty(0, np.uint32)]
        for path, starts in zip(self._paths, self._starts, strict=True):
            start, stop = starts[file_number : file_number + 2].tolist()
            if start < stop:
                with safe_open(path, "np") as file:
                    found.append(file.get_slice("documents")[start:stop])
        return np.concatenate(found)

    def keep(self, file_number: int, *, num_documents: int) -> np.ndarray:
        """Which documents of a spool file stay, bool [num_documents]."""
        kept = np.ones(num_documents, bool)
        kept[self.of(file_number)] = False
        return kept
