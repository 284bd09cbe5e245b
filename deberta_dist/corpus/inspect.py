"""What a token file holds, and what is wrong with it where it is damaged; behind tools/inspect_corpus.py."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from deberta_dist.data.token_file import FORMAT_VERSION, TokenFile
from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.errors import ConfigError, DataError, printable

_BLOCK = 1 << 18
_QUANTILES = {"median": 50, "p95": 95}


def inspect(
    path: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    num_documents: int = 0,
    document: int | None = None,
    verify: bool = False,
) -> dict[str, Any]:
    """What is in a token file, as JSON.

    Args:
        path: the file.
        tokenizer: decodes the documents shown. None: they are shown as ids.
        num_documents: how many documents to show, from the first.
        document: number of the one document to show instead, from 0.
        verify: read all of it and check it.

    Returns:
        The header's fields; ``lengths`` as ``length_statistics``; ``documents``: number, num_tokens, and text or
        ids of those asked for; ``verified``: as ``faults``, None if not asked for. Damage that ``verify`` finds
        leaves ``documents`` empty, and ``lengths`` None where the offsets are wrong.

    Raises:
        ConfigError: there is no document of that number.
        DataError: as ``TokenFile``; the tokenizer is another than the corpus was made with; or, without
            ``verify``, the document offsets do not ascend.
    """
    file = TokenFile(path)
    if tokenizer is not None:
        file.require_tokenizer(tokenizer)
    if num_documents < 0:
        raise ConfigError(f"--documents {num_documents}: expected a number of documents, 0 or more")
    if document is not None and not 0 <= document < file.num_documents:
        raise ConfigError(f"--document {document}: {path} has documents 0 to {file.num_documents - 1}")
    verified = faults(file) if verify else None
    offsets_fault = verified["offsets"] if verified is not None else _offsets_fault(file)
    if offsets_fault is not None and not verify:
        raise DataError(f"{path} is damaged: {offsets_fault}")
    shown = range(min(num_documents, file.num_documents)) if document is None else (document,)
    if is_damaged(verified):
        shown = ()
    return {
        "path": str(path),
        "format_version": FORMAT_VERSION,
        "dtype": file.ids.dtype.name,
        "vocab_size": file.vocab_size,
        "tokenizer_sha256": file.tokenizer_sha256,
        "checksum": file.checksum,
        "source": file.source,
        "num_tokens": file.num_tokens,
        "num_documents": file.num_documents,
        "num_bytes": file.path.stat().st_size,
        "lengths": None if offsets_fault else length_statistics(file.document_offsets),
        "verified": verified,
        "documents": [_document(file, number, tokenizer=tokenizer) for number in shown],
    }


def is_damaged(verified: Mapping[str, str | None] | None) -> bool:
    """Whether ``faults`` found one."""
    return verified is not None and any(fault is not None for fault in verified.values())


def length_statistics(offsets: np.ndarray) -> dict[str, int]:
    """Lengths of documents: min, median, p95 and max, in tokens.

    The q-quantile is the smallest length that a share q of the documents does not exceed, so each number is the
    length of a document. Takes memory for the lengths in the smallest type that holds them: at most as much as
    the offsets, half of it up to 2**32 tokens a document.

    Args:
        offsets: where documents begin, and the end, ascending, int64 [num_documents + 1].
    """
    count = len(offsets) - 1
    starts = range(0, count, _BLOCK)
    largest = max(int(np.diff(offsets[start : start + _BLOCK + 1]).max()) for start in starts)
    lengths = np.empty(count, dtype=np.min_scalar_type(largest))
    for start in starts:
        block = np.diff(offsets[start : start + _BLOCK + 1])
        lengths[start : start + len(block)] = block
    ranks = {name: -(-percent * count // 100) - 1 for name, percent in _QUANTILES.items()}
    lengths.partition(sorted(ranks.values()))
    quantiles = {name: int(lengths[rank]) for name, rank in ranks.items()}
    return {"min": int(lengths.min()), **quantiles, "max": largest}


def faults(file: TokenFile) -> dict[str, str | None]:
    """What is wrong with the content of a token file; reads all of it once.

    Args:
        file: the file. A terminal shows how far it is.

    Returns:
        ``checksum``, ``ids`` (each below vocab_size), ``offsets`` (ascending from 0 to num_tokens): None where it
        is right, otherwise what is wrong and where.
    """
    digest = hashlib.sha256()
    position = num_bad = 0
    first_bad: tuple[int, int] | None = None
    size = file.ids.nbytes + file.document_offsets.nbytes
    # None: a bar on a terminal, nothing in a file or a pipe.
    with tqdm(total=size, desc="verify", unit="B", unit_scale=True, disable=None, leave=False) as progress:
        for block in file.blocks():
            digest.update(block)
            count = min(len(block) // file.ids.itemsize, file.num_tokens - position)
            ids = np.frombuffer(block[: count * file.ids.itemsize], file.ids.dtype)
            bad = np.flatnonzero(ids >= file.vocab_size)
            if bad.size and first_bad is None:
                first_bad = (position + int(bad[0]), int(ids[bad[0]]))
            num_bad += bad.size
            position += count
            progress.update(len(block))
    found = digest.hexdigest()
    offsets_fault = _offsets_fault(file)
    ids_fault = None
    if first_bad is not None:
        place, value = first_bad
        where = f"token {place} (byte {file.ids.offset + place * file.ids.itemsize}"
        if offsets_fault is None:
            where += f", document {int(np.searchsorted(file.document_offsets, place, side='right')) - 1}"
        ids_fault = f"id {value} at {where}) is not below vocab_size = {file.vocab_size}; {num_bad:,} such ids in all"
    return {
        "checksum": None if found == file.checksum else f"content has SHA-256 {found}, the header says {file.checksum}",
        "ids": ids_fault,
        "offsets": offsets_fault,
    }


def _offsets_fault(file: TokenFile) -> str | None:
    """The first offset that is not above the one before; ``TokenFile`` has looked at the first and the last."""
    offsets = file.document_offsets
    for start in range(0, file.num_documents, _BLOCK):
        block = offsets[start : start + _BLOCK + 1]
        wrong = np.flatnonzero(block[1:] <= block[:-1])
        if wrong.size:
            number = start + int(wrong[0])
            place = offsets.offset + (number + 1) * offsets.itemsize
            return (
                f"document {number} begins at token {int(offsets[number])} and ends at {int(offsets[number + 1])} "
                f"(offset at byte {place}); expected offsets that ascend from 0 to {file.num_tokens}"
            )
    return None


def _document(file: TokenFile, number: int, *, tokenizer: Tokenizer | None) -> dict[str, Any]:
    begin, end = file.document_offsets[number : number + 2].tolist()
    ids = file.ids[begin:end].tolist()
    content = {"ids": ids} if tokenizer is None else {"text": tokenizer.decode(ids)}
    return {"number": number, "num_tokens": len(ids), **content}


def describe(found: Mapping[str, Any]) -> str:
    """`inspect` for the screen."""
    lines = [
        f"{found['path']}: token file, format version {found['format_version']}",
        f"  {found['num_tokens']:,} tokens in {found['num_documents']:,} documents, {found['dtype']}, "
        f"{found['num_bytes']:,} bytes",
        f"  vocabulary: {found['vocab_size']:,}, tokenizer SHA-256 {found['tokenizer_sha256']}",
        f"  source: {printable(found['source']) or 'not recorded'}",
    ]
    if found["lengths"] is not None:
        lengths = ", ".join(f"{name} {length:,}" for name, length in found["lengths"].items())
        lines.append(f"  document lengths in tokens: {lengths}")
    for name, fault in (found["verified"] or {}).items():
        lines.append(f"  {name}: {'right' if fault is None else f'WRONG: {fault}'}")
    for document in found["documents"]:
        content = document["text"] if "text" in document else " ".join(map(str, document["ids"]))
        lines += [f"document {document['number']}, {document['num_tokens']:,} tokens:", content]
    return "\n".join(lines)
