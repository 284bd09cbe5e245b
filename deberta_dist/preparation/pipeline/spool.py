"""Spool files: the encoded documents of a stretch of one input, stored until all inputs are read.

A spool file is one safetensors file, complete or absent; a document is one row of each array. Written by ``encode``; ``duplicates``
and ``shards`` read from it what they need and no more. Each array has a CRC-32, compared wherever the whole of it is read.
"""

import json
import zlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from deberta_dist.errors import DataError
from deberta_dist.preparation.pipeline.publish import publish

SUFFIX = ".part"
HASH_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What was read of some stretch of text, and what became of it.

    Attributes:
        num_read: documents read, dropped ones among them.
        num_bytes: bytes read (of compressed files: after decompression).
        kept: documents that were encoded; duplicates are still among them.
        dropped: documents dropped, by rule.
        altered: documents kept that were altered, by reason.
        seconds: processor time taken.
    """

    num_read: int = 0
    num_bytes: int = 0
    kept: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    altered: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            num_read=self.num_read + other.num_read,
            num_bytes=self.num_bytes + other.num_bytes,
            kept=self.kept + other.kept,
            dropped=dict(Counter(self.dropped) + Counter(other.dropped)),
            altered=dict(Counter(self.altered) + Counter(other.altered)),
            seconds=self.seconds + other.seconds,
        )


def write_spool_file(
    path: Path,
    *,
    ids: np.ndarray,
    lengths: np.ndarray,
    num_bytes: np.ndarray,
    hashes: np.ndarray,
    held_out: np.ndarray,
    signatures: np.ndarray | None,
    counts: Counts,
    is_last: bool,
) -> None:
    """Writes a spool file; replaces one of that name, whose content is the same.

    Args:
        ids: token ids of all documents kept, one after another, uint16 or uint32 [sum of lengths].
        lengths: tokens of each, integers [N].
        num_bytes: bytes of each document's text, integers [N].
        hashes: 128 bits of each document's normalised text, uint64 [N, 2].
        held_out: whether each belongs to the held-out split, bool [N].
        signatures: MinHash signatures, uint8 [N, K], or None.
        counts: of the stretch of input that the spool file covers.
        is_last: whether the file range ends with this spool file.
    """
    # By hash, so that a search for duplicates reads one contiguous range of hashes; the sort is stable.
    order = np.lexsort((hashes[:, 1], hashes[:, 0])).astype(np.uint32)
    tensors = {
        "ids": ids,
        "lengths": lengths.astype(np.uint32),
        "num_bytes": num_bytes.astype(np.uint32),
        "hash_high": np.ascontiguousarray(hashes[order, 0]),
        "hash_low": np.ascontiguousarray(hashes[order, 1]),
        "order": order,
        "held_out": held_out.astype(np.uint8),
    }
    if signatures is not None:
        tensors["signatures"] = signatures
    publish(path, checked(tensors, counts=vars(counts), is_last=is_last))


def checked(tensors: Mapping[str, np.ndarray], **metadata: Any) -> bytes:
    """A safetensors file with a checksum of every array, for ``read_checked``; ``metadata`` is what JSON can hold."""
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    metadata["crc32"] = {name: zlib.crc32(tensor.data) for name, tensor in tensors.items()}
    return save(tensors, {name: json.dumps(value) for name, value in metadata.items()})


def read_checked(path: Path, *names: str) -> tuple[np.ndarray, ...]:
    """Whole arrays of a file that ``checked`` has made, in the order of ``names``.

    Raises:
        DataError: the file is missing or damaged.
    """
    try:
        with safe_open(path, "np") as file:
            expected = json.loads(file.metadata()["crc32"])
            tensors = tuple(file.get_tensor(name) for name in names)
    except (SafetensorError, OSError, LookupError, TypeError, ValueError) as error:
        raise damaged(path, str(error)) from error
    for name, tensor in zip(names, tensors, strict=True):
        if zlib.crc32(tensor) != expected[name]:
            raise damaged(path, f"the checksum of {name} is another")
    return tensors


def damaged(path: Path, why: str) -> DataError:
    """The error for a damaged file of the working directory, which the same command rewrites once it is removed."""
    return DataError(f"{path} is damaged ({why}): remove this file and run the same command again")


class SpoolFile:
    """A spool file on disk; arrays are read when asked for.

    Attributes:
        counts: what was read of the stretch of input that it covers.
        is_last: whether the file range ends with it.
        num_documents: rows of its arrays.
    """

    def __init__(self, path: Path) -> None:
        """Reads the header.

        Raises:
            DataError: the file is missing or no complete spool file.
        """
        self.path = path
        try:
            with safe_open(path, "np") as file:
                metadata = file.metadata() or {}
                self.counts = Counts(**json.loads(metadata["counts"]))
                self.is_last: bool = json.loads(metadata["is_last"])
                self.num_documents: int = file.get_slice("lengths").get_shape()[0]
        except (SafetensorError, OSError, LookupError, TypeError, ValueError) as error:
            raise damaged(path, str(error)) from error

    def read(self, *names: str) -> tuple[np.ndarray, ...]:
        """Whole arrays, in the order of ``names``.

        Raises:
            DataError: the file is missing or damaged.
        """
        return read_checked(self.path, *names)

    def verify_hashes(self) -> None:
        """Reads what ``hash_range`` reads a few at a time; a bit that has flipped could hide a duplicate.

        Raises:
            DataError: the file is missing or damaged.
        """
        self.read("hash_high", "hash_low", "order")

    def hash_range(self, low: int, high: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Documents whose hash has its upper 64 bits in ``low`` .. ``high`` - 1 (None: up to the end).

        Returns:
            (hash_high, hash_low, document), uint64, uint64 and uint32; documents count from 0 within the spool file.
        """
        with safe_open(self.path, "np") as file:
            names = ("hash_high", "hash_low", "order")
            high_bits, low_bits, order = (file.get_slice(name) for name in names)

            def first(value: int) -> int:
                return bisect_left(range(self.num_documents), value, key=lambda i: int(high_bits[i : i + 1][0]))

            # Bisection in the file: a handful of numbers are read, not the 16 bytes of every document.
            start = first(low)
            stop = self.num_documents if high is None else first(high)
            if start == stop:  # safetensors refuses an empty slice
                return np.empty(0, np.uint64), np.empty(0, np.uint64), np.empty(0, np.uint32)
            return high_bits[start:stop], low_bits[start:stop], order[start:stop]


def as_json(counts: Counts) -> dict[str, Any]:
    """Counts for the report."""
    return {**vars(counts), "seconds": round(counts.seconds, 3)}
