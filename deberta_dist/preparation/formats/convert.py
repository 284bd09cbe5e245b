"""Converts between token files and Megatron's indexed datasets, streaming: memory for the largest document is enough.

Called by tools/convert_corpus.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from deberta_dist.data.corpus_index import TOKENS_SUFFIX
from deberta_dist.data.token_corpus import TokenCorpus, open_corpus
from deberta_dist.data.token_writer import TokenFileWriter
from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.errors import ConfigError, DataError
from deberta_dist.files.atomic import refuse_existing
from deberta_dist.preparation.formats.inspect import corpus_faults
from deberta_dist.preparation.formats.megatron import MegatronFile, paths
from deberta_dist.preparation.formats.megatron_writer import MegatronWriter

MEGATRON_SUFFIXES = (".idx", ".bin")
_BLOCK = 1 << 18


@dataclass(frozen=True, kw_only=True)
class ConvertReport:
    """What a conversion wrote.

    Attributes:
        paths: the files written.
        num_documents, num_tokens: documents and tokens written.
        num_empty_documents: documents of the source that were left out because they have no ids.
        num_eod: ids at the end of documents which were dropped or appended.
    """

    paths: tuple[Path, ...]
    num_documents: int
    num_tokens: int
    num_empty_documents: int
    num_eod: int


def convert_corpus(
    source: str | Path,
    target: str | Path,
    *,
    tokenizer: Tokenizer,
    strip_eod: int | None = None,
    append_eod: int | None = None,
) -> ConvertReport:
    """Writes the documents of ``source``, in order, in the other format. A terminal shows how far it is.

    Args:
        source: X.tokens, or a directory of them with an index, whose files are put together; or X.idx or X.bin, which
            stand for both.
        target: X.tokens for a Megatron dataset; for a token file X, X.idx or X.bin, of which X.idx and X.bin
            are made.
        tokenizer: the one that made the ids. A token file knows it; of a Megatron dataset it is the user's word,
            and its hash is written into the token file.
        strip_eod: of Megatron datasets: id to drop where a document ends with it, once.
        append_eod: for Megatron datasets: id to put at the end of each document.

    Raises:
        ConfigError: the suffixes are not one of each format, an option is of the other direction, or an id given
            is negative or, to be appended, outside the vocabulary.
        DataError: a target exists; the source is damaged, as ``MegatronFile`` and ``corpus_faults`` say; it was made
            with another tokenizer, holds ids outside the vocabulary, or no documents with ids. No file is left
            behind.
    """
    source, target = Path(source), Path(target)
    if source.suffix in MEGATRON_SUFFIXES and target.suffix == TOKENS_SUFFIX:
        if append_eod is not None:
            raise ConfigError("--append-eod is for writing Megatron datasets: remove it, or give --strip-eod")
        if strip_eod is not None and strip_eod < 0:
            raise ConfigError(f"--strip-eod {strip_eod}: expected an id, 0 or more")
        return _from_megatron(source.with_suffix(""), target, tokenizer=tokenizer, strip_eod=strip_eod)
    if (source.suffix == TOKENS_SUFFIX or source.is_dir()) and target.suffix != TOKENS_SUFFIX:
        if strip_eod is not None:
            raise ConfigError("--strip-eod is for reading Megatron datasets: remove it, or give --append-eod")
        if append_eod is not None and not 0 <= append_eod < tokenizer.num_tokens:
            raise ConfigError(
                f"--append-eod {append_eod} is outside the {tokenizer.num_tokens} tokens of {tokenizer.path}: "
                f"for example [SEP] is {tokenizer.sep_id}"
            )
        prefix = target.with_suffix("") if target.suffix in MEGATRON_SUFFIXES else target
        return _to_megatron(source, prefix, tokenizer=tokenizer, append_eod=append_eod)
    raise ConfigError(
        f"SOURCE {source} and TARGET {target}: expected X.idx or X.bin and Y{TOKENS_SUFFIX}, or X{TOKENS_SUFFIX} "
        "or a directory of them and the prefix of .idx and .bin"
    )


def _from_megatron(prefix: Path, target: Path, *, tokenizer: Tokenizer, strip_eod: int | None) -> ConvertReport:
    refuse_existing(target)
    dataset = MegatronFile(prefix)
    num_empty = 0
    with (
        TokenFileWriter(
            target,
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.num_tokens,
            source=dataset.bin_path.name,
        ) as writer,
        _progress(dataset.ids.nbytes) as progress,
    ):
        for ids in dataset.documents(vocab_size=tokenizer.num_tokens, strip_eod=strip_eod):
            if ids.size:
                writer.add_document(ids)
                progress.update(ids.nbytes)
            else:
                num_empty += 1
    return ConvertReport(
        paths=(target,),
        num_documents=writer.num_documents,
        num_tokens=writer.num_tokens,
        num_empty_documents=num_empty,
        num_eod=dataset.num_tokens - writer.num_tokens,
    )


def _to_megatron(source: Path, prefix: Path, *, tokenizer: Tokenizer, append_eod: int | None) -> ConvertReport:
    corpus = open_corpus(source)
    corpus.require_tokenizer(tokenizer)
    for path in paths(prefix):
        refuse_existing(path)
    # Megatron's files carry no checksum: what is damaged here would pass for right from now on.
    for fault in corpus_faults(corpus).values():
        if fault is not None:
            raise DataError(f"{source} is damaged: {fault}")
    with (
        MegatronWriter(prefix, vocab_size=tokenizer.num_tokens, append_eod=append_eod) as writer,
        _progress(corpus.num_tokens * corpus.dtype.itemsize) as progress,
    ):
        for ids in _documents(corpus):
            writer.add_document(ids)
            progress.update(ids.nbytes)
    return ConvertReport(
        paths=(writer.index_path, writer.bin_path),
        num_documents=writer.num_documents,
        num_tokens=writer.num_tokens,
        num_empty_documents=0,
        num_eod=writer.num_tokens - corpus.num_tokens,
    )


def _documents(corpus: TokenCorpus) -> Iterator[np.ndarray]:
    for file in corpus.files():
        mapped = np.asarray(file.ids)
        for start in range(0, file.num_documents, _BLOCK):
            for begin, end in pairwise(file.document_offsets[start : start + _BLOCK + 1].tolist()):
                yield mapped[begin:end]


def _progress(num_bytes: int) -> tqdm:
    # None: a bar on a terminal, nothing in a file or a pipe.
    return tqdm(total=num_bytes, desc="convert", unit="B", unit_scale=True, disable=None, leave=False)
