"""Removes documents that contain n consecutive words of any string of a benchmark.

The n-grams of the benchmark's files are kept as sorted hashes; a document with one of them is refused only after the
words themselves were compared. Corpus preparation builds the set once and asks for every document.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deberta_dist.data.tokenizer import clean_text
from deberta_dist.errors import ConfigError, DataError
from deberta_dist.preparation.filtering.benchmark_texts import Derived, list_benchmark, texts_of
from deberta_dist.preparation.filtering.words import Words, ngram_hashes, split_words
from deberta_dist.preparation.reading.inputs import PassedOver

_BATCH_CHARACTERS = 1 << 20
_NGRAMS_PER_FILTER_WORD = 4  # at most
_SPACE = b" "


@dataclass(frozen=True, kw_only=True)
class Used:
    """What a benchmark's file gave to look for.

    Attributes:
        path: as a string, so that report.json can hold it.
        num_texts: strings found in the file.
        num_searched: those of them that have n words.
    """

    path: str
    num_texts: int
    num_searched: int


@dataclass(frozen=True, kw_only=True, eq=False)
class NgramSet:
    """The n-grams of a benchmark; can be pickled, and does not change.

    A 13-gram of English takes 8 bytes for its hash, 4 for its place, 2 to 4 for the quick filter, and the text is kept
    once. Of two n-grams with one hash the second is lost: with 20 million n-grams, a chance of 1 in 90,000 that there
    are two such.

    Attributes:
        n: words of one n-gram.
        hashes: sorted and distinct; uint64 [num_ngrams].
        places: where each n-gram begins in ``text``, in bytes; uint32 or uint64 [num_ngrams].
        text: the benchmark's words in UTF-8, a space after each.
        quick_filter: Bloom filter of one word of memory a hash; h has the bits of ``_bits(h)`` in number
            h >> quick_shift; uint64 [power of two].
        quick_shift: 64 less the logarithm of the filter's length: the upper bits of a hash choose its number.
        fingerprint: SHA-256 of n and the hashes, hexadecimal; the same for the same n-grams, however they are filed.
        files: where they come from.
        passed_over: what lay beside these files and was not read.
    """

    n: int
    hashes: np.ndarray
    places: np.ndarray
    text: bytes
    quick_filter: np.ndarray
    quick_shift: int
    fingerprint: str
    files: tuple[Used, ...] = ()
    passed_over: PassedOver = PassedOver()

    def shares(self, text: str) -> bool:
        """Whether a document has an n-gram of the set."""
        return self.first_shared(text) is not None

    def first_shared(self, text: str) -> str | None:
        """The first n-gram of a document that is in the set, folded, one space between words; None without one."""
        words = split_words(text)
        hashes = ngram_hashes(words.hashes, n=self.n)
        bits = _bits(hashes)
        # Nearly every n-gram of a clean document fails here, by one look-up instead of a binary search.
        candidates = np.flatnonzero(self.quick_filter[hashes >> np.uint64(self.quick_shift)] & bits == bits)
        if not len(candidates):
            return None
        # The position behind the end, for a hash above all others, is no element.
        found = np.minimum(np.searchsorted(self.hashes, hashes[candidates]), len(self.hashes) - 1)
        equal = self.hashes[found] == hashes[candidates]
        for first, place in zip(candidates[equal].tolist(), self.places[found[equal]].tolist(), strict=True):
            ngram = " ".join(words.slice(first, first + self.n))
            if self.text.startswith(ngram.encode() + _SPACE, place):
                return ngram
        return None


def benchmark_ngrams(paths: Iterable[str | Path], *, n: int = 13) -> NgramSet:
    """The n-grams of benchmark files, such as a benchmark's data with a folder for every task.

    A string is what ``texts_of`` yields. No n-gram reaches from one string into the next, and strings of fewer than n
    words give none: a short question can be shared, a passage cannot.

    Words are those of ``split_words``: case, width, composition and punctuation do not matter. A Chinese or Japanese
    character counts as one word, so that 13 of them are about 8 words of English: take a larger n for benchmarks in
    these languages. In Thai, Lao, Khmer and Burmese a word is all that stands between two spaces, so that the shared
    text has to be much longer than 13 of their words.

    Args:
        paths: as for ``list_benchmark``.
        n: words of one n-gram.

    Raises:
        ConfigError: n is below 1.
        DataError: as ``list_benchmark`` and ``texts_of``; a file has no text, or no string anywhere has n words.
    """
    if n < 1:
        raise ConfigError(f"--benchmark-ngram, n = {n}: an n-gram of a benchmark has at least 1 word (usually 13)")
    paths = list(paths)
    files, passed_over = list_benchmark(paths)
    hashes, places, texts, used = [], [], [], []
    offset = 0
    for one in files:
        num_texts = num_searched = 0
        for batch in _batches(texts_of(one)):
            batch_hashes, batch_places, text, is_searched = _ngrams(batch, n=n)
            hashes.append(batch_hashes)
            places.append(batch_places + offset)
            texts.append(text)
            offset += len(text)
            num_searched += sum(is_searched)
            num_texts += sum(
                found or (string.strip() != "" and not isinstance(string, Derived))
                for string, found in zip(batch, is_searched, strict=True)
            )
        if not num_texts:
            raise DataError(f"benchmark {one.file.path} has no text: it would be no safeguard; fix or remove it")
        used.append(Used(path=str(one.file.path), num_texts=num_texts, num_searched=num_searched))
    distinct, first = np.unique(np.concatenate([np.empty(0, np.uint64), *hashes]), return_index=True)
    if not len(distinct):
        given = ", ".join(map(str, paths))
        raise DataError(f"no string of {given} has {n} words: nothing to look for; take a smaller n")
    all_places = np.concatenate(places)[first]
    log_words = max(1, (len(distinct) // _NGRAMS_PER_FILTER_WORD).bit_length())
    quick_filter = np.zeros(1 << log_words, dtype=np.uint64)
    # With .at: several hashes may set bits of one word, of which an indexed |= would store the last alone.
    np.bitwise_or.at(quick_filter, distinct >> np.uint64(64 - log_words), _bits(distinct))
    digest = hashlib.sha256(f"{n}-grams\n".encode())
    # Little-endian on any machine: a preparation that is resumed elsewhere compares fingerprints.
    digest.update(distinct.astype("<u8").data)
    return NgramSet(
        n=n,
        hashes=distinct,
        places=all_places.astype(np.uint32) if offset < 1 << 32 else all_places,
        text=b"".join(texts),
        quick_filter=quick_filter,
        quick_shift=64 - log_words,
        fingerprint=digest.hexdigest(),
        files=tuple(used),
        passed_over=passed_over,
    )


def _ngrams(strings: list[str], *, n: int) -> tuple[np.ndarray, np.ndarray, bytes, list[bool]]:
    """Of a few strings: hashes and places in the text, uint64 [num_ngrams]; the words in UTF-8; which have n words."""
    # As documents are cleaned before they are compared.
    parts = [split_words(clean_text(string)) for string in strings]
    hashes = [ngram_hashes(part.hashes, n=n) for part in parts]
    places = []
    texts: list[bytes] = []
    offset = 0
    for part, part_hashes in zip(parts, hashes, strict=True):
        if len(part_hashes):
            words = _encoded(part)
            lengths = np.fromiter(map(len, words), np.uint64, len(words)) + np.uint64(1)
            ends = np.cumsum(lengths)
            places.append((ends - lengths)[: len(part_hashes)] + np.uint64(offset))
            texts += words
            offset += int(ends[-1])
    text = b"".join(word + _SPACE for word in texts)
    none = np.empty(0, np.uint64)
    return np.concatenate([none, *hashes]), np.concatenate([none, *places]), text, [len(part) > 0 for part in hashes]


def _bits(hashes: np.ndarray) -> np.ndarray:
    """Two bits of the quick filter, by the lowest twelve bits of a hash; uint64 [num_hashes]."""
    one, low = np.uint64(1), np.uint64(63)
    return one << (hashes & low) | one << (hashes >> np.uint64(6) & low)


def _encoded(words: Words) -> list[bytes]:
    return [word.encode() for word in words.slice(0, len(words.hashes))]


def _batches(strings: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    num_characters = 0
    for string in strings:
        batch.append(string)
        num_characters += len(string)
        if num_characters >= _BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    yield batch
