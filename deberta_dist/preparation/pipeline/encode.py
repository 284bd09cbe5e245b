"""First half of a preparation: every file range of the inputs is encoded into spool files, by any number of processes.

Every document is cleaned, judged by rules that look at it alone, hashed and encoded. What depends on other documents
(duplicates, shards) comes after all work items are done.
"""

import hashlib
import string
import time
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deberta_dist.data.token_file import id_dtype
from deberta_dist.data.tokenizer import Tokenizer, clean_text
from deberta_dist.preparation.filtering.contamination import NgramSet
from deberta_dist.preparation.filtering.near_duplicates import signature, signature_bytes
from deberta_dist.preparation.pipeline.publish import wait_for
from deberta_dist.preparation.pipeline.recipe import PreparationRecipe
from deberta_dist.preparation.pipeline.spool import HASH_BYTES, SUFFIX, Counts, SpoolFile, write_spool_file
from deberta_dist.preparation.pipeline.work_items import WorkItem
from deberta_dist.preparation.pipeline.workers import Worker
from deberta_dist.preparation.reading.documents import REPLACED_UTF8
from deberta_dist.preparation.reading.texts import Document, read_documents

CLEANED = "nul_or_surrogate"
EMPTY = "empty"
CONTAMINATED = "contaminated"

_WHITESPACE = string.whitespace.encode("ascii")
_LOWER = bytes(range(256)).lower()
_REPORT_BYTES = 1 << 18
_SEPARATOR = b"\0"  # in no text: clean_text takes it out


def document_hash(text: bytes) -> bytes:
    """128 bits of a document: equal for texts that differ only in case, white space and Unicode's spelling.

    BLAKE2b of the text after NFKC, full case folding and removal of white space.

    Args:
        text: its text, UTF-8, as ``clean_text`` leaves it.
    """
    folded = text if text.isascii() else _folded(text)
    return hashlib.blake2b(folded.translate(_LOWER, _WHITESPACE), digest_size=HASH_BYTES).digest()


def _folded(text: bytes) -> bytes:
    """``_fold``, but for the case of ASCII letters: looks at the few characters of most texts that are not ASCII alone.

    Each is taken with the ASCII character before it, which a combining mark may join; nothing joins an ASCII character
    from behind.
    """
    content = np.frombuffer(text, np.uint8)
    is_other = content > 127
    is_other[:-1] |= is_other[1:]
    others = content[is_other].tobytes()
    if 4 * len(others) > len(text):
        return _fold(text)
    if _fold(others) == others.lower():
        return text
    edges = np.flatnonzero(np.diff(is_other, prepend=False, append=False)).tolist()
    starts, stops = edges[::2], edges[1::2]
    runs = _fold(_SEPARATOR.join([text[a:b] for a, b in zip(starts, stops, strict=True)])).split(_SEPARATOR)
    between = [text[a:b] for a, b in zip(stops, [*starts[1:], len(text)], strict=True)]
    return text[: starts[0]] + b"".join([text for pair in zip(runs, between, strict=True) for text in pair])


def _fold(text: bytes) -> bytes:
    return unicodedata.normalize("NFKC", text.decode("utf-8")).casefold().encode("utf-8")


def held_out_below(percent: float) -> int:
    """A document is held out where the lower 64 bits of its hash are below this: its upper ones order duplicates."""
    return round(percent / 100 * 2**64)


def spool_path(directory: Path, item: WorkItem, number: int) -> Path:
    """Where spool file ``number`` of a work item lies."""
    return directory / f"{item.name}.{number}{SUFFIX}"


def finished_spool_files(directory: Path, item: WorkItem) -> tuple[list[SpoolFile], bool]:
    """The spool files of a work item that are there, in order, and whether they are all of it."""
    spool: list[SpoolFile] = []
    while (path := spool_path(directory, item, len(spool))).exists():
        spool.append(SpoolFile(path))
        if spool[-1].is_last:
            return spool, True
    return spool, False


class Spool(NamedTuple):
    """Everything that is encoded.

    Attributes:
        files: in the order of the input.
        item_numbers: for each file the number of the work item that it came from.
    """

    files: list[SpoolFile]
    item_numbers: list[int]


def collect_spool(work_items: Sequence[WorkItem], *, directory: Path) -> Spool:
    """The spool of finished work items; reads every file's hashes, so that no duplicate is sought in a damaged one.

    Raises:
        DataError: a file is missing or damaged.
    """
    spool = Spool([], [])
    for number, item in enumerate(work_items):
        found: list[SpoolFile] = []
        wait_for(f"{item.file.path}: its spool files in {directory} have", partial(_is_spooled, directory, item, found))
        for spool_file in found:
            spool_file.verify_hashes()
        spool.files.extend(found)
        spool.item_numbers.extend([number] * len(found))
    return spool


def _is_spooled(directory: Path, item: WorkItem, found: list[SpoolFile]) -> bool:
    """Puts the spool files of a work item that are finished by now into ``found``; True if the last one is among them."""
    found[:], is_last = finished_spool_files(directory, item)
    return is_last


class DocumentEncoder:
    """Turns work items into spool files, one after another.

    Args:
        recipe: what is done with each document.
        tokenizer: the one that the recipe names.
        ngrams: n-grams of benchmarks, as the recipe names them; None: there are none.
        directory: where spool files are written.
    """

    def __init__(self, *, recipe: PreparationRecipe, tokenizer: Tokenizer, ngrams: NgramSet | None, directory: Path) -> None:
        self.recipe = recipe
        self.tokenizer = tokenizer
        self.ngrams = ngrams
        self._directory = directory

    def encode(self, item: WorkItem, *, worker: Worker) -> bool:
        """Writes what is missing of a work item's spool files.

        Returns:
            Whether anything was missing.

        Raises:
            DataError: as ``read_documents``, or the disk is full. Spool files written before stay.
        """
        spool, is_complete = finished_spool_files(self._directory, item)
        if is_complete:
            return False
        number, skipped = len(spool), sum(spool_file.counts.num_read for spool_file in spool)
        batch = _Batch(self, all_held_out=item.held_out)
        for document in read_documents(item.file, options=self.recipe.reading, file_range=item.file_range):
            # What an earlier start has finished is read again, for nobody knows where it ends in the file, and not encoded.
            if skipped:
                skipped -= 1
                continue
            if batch.is_full:
                # Only now: an empty spool file behind the last document would be one too many.
                batch.write(spool_path(self._directory, item, number), is_last=False)
                number += 1
                batch = _Batch(self, all_held_out=item.held_out)
            batch.add(document)
            if batch.unreported_bytes >= _REPORT_BYTES:
                batch.report(worker)
        batch.report(worker)
        batch.write(spool_path(self._directory, item, number), is_last=True)
        return True


class _Batch:
    """The documents of the spool file that is being filled."""

    def __init__(self, encoder: DocumentEncoder, *, all_held_out: bool) -> None:
        self._encoder = encoder
        self._recipe = encoder.recipe
        self._all_held_out = all_held_out
        self._dtype = id_dtype(encoder.tokenizer.num_tokens)
        self._began = time.process_time()
        self._ids: list[np.ndarray] = []
        self._num_bytes: list[int] = []
        self._hashes: list[bytes] = []
        self._signatures: list[bytes] = []
        self._dropped: Counter[str] = Counter()
        self._altered: Counter[str] = Counter()
        self._num_read = self._read_bytes = self._reported_bytes = self._num_tokens = self._reported_tokens = 0

    @property
    def is_full(self) -> bool:
        """Whether the spool file is large enough to be written."""
        return self._read_bytes >= self._recipe.piece_bytes

    @property
    def unreported_bytes(self) -> int:
        """Bytes read since the last ``report``."""
        return self._read_bytes - self._reported_bytes

    def report(self, worker: Worker) -> None:
        """Reports the bytes and tokens since the last report."""
        worker.report(num_bytes=self._read_bytes - self._reported_bytes, num_tokens=self._num_tokens - self._reported_tokens)
        self._reported_bytes, self._reported_tokens = self._read_bytes, self._num_tokens

    def add(self, document: Document) -> None:
        """Encodes a document, or counts why not."""
        self._num_read += 1
        self._read_bytes += document.num_bytes
        text = clean_text(document.text)
        dropped = self._keep(text) if document.fault in (None, REPLACED_UTF8) else document.fault
        if dropped is not None:
            self._dropped[dropped] += 1
            return
        if document.fault is not None:
            self._altered[REPLACED_UTF8] += 1
        if text is not document.text:
            self._altered[CLEANED] += 1

    def _keep(self, text: str) -> str | None:
        """Encodes a document and keeps it; or the rule by which it is dropped."""
        if not text or text.isspace():
            return EMPTY
        if (failed := self._recipe.filters.first_failed(text)) is not None:
            return failed
        if self._encoder.ngrams is not None and self._encoder.ngrams.shares(text):
            return CONTAMINATED
        ids = self._encoder.tokenizer.encode_array(text, is_clean=True)
        if not ids.size:
            return EMPTY
        self._ids.append(ids.astype(self._dtype))
        self._num_tokens += ids.size
        content = text.encode("utf-8")
        self._num_bytes.append(len(content))
        self._hashes.append(document_hash(content))
        if self._recipe.near_duplicates is not None:
            self._signatures.append(signature(text))
        return None

    def write(self, path: Path, *, is_last: bool) -> None:
        """Writes the spool file."""
        # Stored whole; a hash never depends on the machine's byte order.
        hashes = np.frombuffer(b"".join(self._hashes), ">u8").astype(np.uint64).reshape(-1, 2)
        held_out = np.full(len(hashes), self._all_held_out)
        held_out |= hashes[:, 1] < np.uint64(min(held_out_below(self._recipe.held_out_percent), 2**64 - 1))
        write_spool_file(
            path,
            ids=np.concatenate([np.empty(0, self._dtype), *self._ids]),
            lengths=np.array([ids.size for ids in self._ids], np.uint32),
            num_bytes=np.array(self._num_bytes, np.uint32),
            hashes=hashes,
            held_out=held_out,
            signatures=self._signature_array(),
            counts=Counts(
                num_read=self._num_read,
                num_bytes=self._read_bytes,
                kept=len(self._ids),
                dropped=dict(self._dropped),
                altered=dict(self._altered),
                seconds=time.process_time() - self._began,
            ),
            is_last=is_last,
        )

    def _signature_array(self) -> np.ndarray | None:
        if self._recipe.near_duplicates is None:
            return None
        return np.frombuffer(b"".join(self._signatures), np.uint8).reshape(-1, signature_bytes())
