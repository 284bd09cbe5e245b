"""Describes what a corpus holds and, if it is damaged, what is wrong. Called by ``deberta-dist inspect-corpus``."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from deberta_dist.data.token_corpus import TokenCorpus, open_corpus
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
    """What is in a corpus, as JSON.

    Args:
        path: token file, or directory of them.
        tokenizer: decodes the documents shown. None: they are shown as ids.
        num_documents: how many documents to show, from the first.
        document: number of the one document to show instead, from 0.
        verify: read all of it and check it.

    Returns:
        The header's fields; ``files``: those of a directory, as its index has them; ``lengths`` as
        ``length_statistics``; ``documents``: number, num_tokens, and text or ids of those asked for; ``verified``: as
        ``corpus_faults``, None if not asked for. Damage that ``verify`` finds leaves ``documents`` empty, and
        ``lengths`` None where the offsets are wrong.

    Raises:
        ConfigError: there is no document of that number.
        DataError: as ``open_corpus``; the tokenizer is another than the corpus was made with; or, without
            ``verify``, the document offsets do not ascend.
    """
    corpus = open_corpus(path)
    if tokenizer is not None:
        corpus.require_tokenizer(tokenizer)
    if num_documents < 0:
        raise ConfigError(f"--documents {num_documents}: expected a number of documents, 0 or more")
    if document is not None and not 0 <= document < corpus.num_documents:
        raise ConfigError(f"--document {document}: {path} has documents 0 to {corpus.num_documents - 1}")
    verified = corpus_faults(corpus) if verify else None
    if verified is None:
        for file in corpus.files():
            if (offsets_fault := _offsets_fault(file)) is not None:
                raise DataError(f"{file.path} is damaged: {offsets_fault}")
    has_offsets = verified is None or verified["offsets"] is None
    shown: Sequence[int] = range(min(num_documents, corpus.num_documents)) if document is None else (document,)
    if is_damaged(verified):
        shown = ()
    return {
        "path": str(path),
        "format_version": FORMAT_VERSION,
        "dtype": corpus.dtype.name,
        "vocab_size": corpus.vocab_size,
        "tokenizer_sha256": corpus.tokenizer_sha256,
        "checksum": corpus.checksum,
        "source": corpus.source,
        "num_tokens": corpus.num_tokens,
        "num_documents": corpus.num_documents,
        "num_bytes": sum(file.path.stat().st_size for file in corpus.files()),
        "files": [asdict(shard) for shard in corpus.shards] if corpus.path.is_dir() else [],
        "lengths": length_statistics(file.document_offsets for file in corpus.files()) if has_offsets else None,
        "verified": verified,
        "documents": [_document(corpus, number, tokenizer=tokenizer) for number in shown],
    }


def is_damaged(verified: Mapping[str, str | None] | None) -> bool:
    """Whether ``faults`` found one."""
    return verified is not None and any(fault is not None for fault in verified.values())


def length_statistics(offsets: Iterable[np.ndarray]) -> dict[str, int]:
    """Lengths of documents: min, median, p95 and max, in tokens.

    The q-quantile is the smallest length that a share q of the documents does not exceed, so each number is the
    length of a document. Takes memory for the lengths in the smallest type that holds them: at most as much as
    the offsets, half of it for one file of documents up to 2**32 tokens.

    Args:
        offsets: of each file, where documents begin, and the end, ascending, int64 [num_documents + 1].
    """
    parts = [_lengths(of_file) for of_file in offsets]
    lengths = parts[0] if len(parts) == 1 else np.concatenate(parts)
    ranks = {name: -(-percent * lengths.size // 100) - 1 for name, percent in _QUANTILES.items()}
    lengths.partition(sorted(ranks.values()))
    quantiles = {name: int(lengths[rank]) for name, rank in ranks.items()}
    return {"min": int(lengths.min()), **quantiles, "max": int(lengths.max())}


def _lengths(offsets: np.ndarray) -> np.ndarray:
    count = len(offsets) - 1
    starts = range(0, count, _BLOCK)
    largest = max(int(np.diff(offsets[start : start + _BLOCK + 1]).max()) for start in starts)
    lengths = np.empty(count, dtype=np.min_scalar_type(largest))
    for start in starts:
        block = np.diff(offsets[start : start + _BLOCK + 1])
        lengths[start : start + len(block)] = block
    return lengths


def corpus_faults(corpus: TokenCorpus) -> dict[str, str | None]:
    """``faults`` of all files; of a directory each names the first file that has it, and how many more have it."""
    found: dict[str, list[str]] = {}
    for file in corpus.files():
        where = "" if file.path == corpus.path else f"{file.path.name}: "
        for name, fault in faults(file).items():
            found.setdefault(name, []).extend([] if fault is None else [where + fault])
    more = {name: f"; {len(texts) - 1} more files" if len(texts) > 1 else "" for name, texts in found.items()}
    return {name: texts[0] + more[name] if texts else None for name, texts in found.items()}


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
            ids = np.frombuffer(block[: count * file.dtype.itemsize], file.dtype)
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


def _document(corpus: TokenCorpus, number: int, *, tokenizer: Tokenizer | None) -> dict[str, Any]:
    begin, end = corpus.document_offsets(number, number + 2).tolist()
    ids = corpus.read(begin, end).tolist()
    content = {"ids": ids} if tokenizer is None else {"text": tokenizer.decode(ids)}
    return {"number": number, "num_tokens": len(ids), **content}


def describe(found: Mapping[str, Any]) -> str:
    """`inspect` for the screen."""
    count = len(found["files"])
    kind = f"{count} token files" if count else "token file"
    lines = [
        f"{found['path']}: {kind}, format version {found['format_version']}",
        f"  {found['num_tokens']:,} tokens in {found['num_documents']:,} documents, {found['dtype']}, "
        f"{found['num_bytes']:,} bytes",
        f"  vocabulary: {found['vocab_size']:,}, tokenizer SHA-256 {found['tokenizer_sha256']}",
        f"  source: {printable(found['source']) or 'not recorded'}",
    ]
    if found["lengths"] is not None:
        lengths = ", ".join(f"{name} {length:,}" for name, length in found["lengths"].items())
        lines.append(f"  document lengths in tokens: {lengths}")
    for file in found["files"]:
        lines.append(f"  {file['name']}: {file['num_tokens']:,} tokens in {file['num_documents']:,} documents")
    for name, fault in (found["verified"] or {}).items():
        lines.append(f"  {name}: {'right' if fault is None else f'WRONG: {fault}'}")
    for document in found["documents"]:
        content = document["text"] if "text" in document else " ".join(map(str, document["ids"]))
        lines += [f"document {document['number']}, {document['num_tokens']:,} tokens:", content]
    return "\n".join(lines)
