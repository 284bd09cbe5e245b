"""Removal of documents that hold a piece of a benchmark: any n words in a row of one of its strings.

The n-grams of the benchmark's files are kept as sorted hashes; a document with one of them is refused only after the
words themselves were compared. Corpus preparation builds the set once and asks for every document.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deberta_dist.corpus.inputs import files_below
from deberta_dist.corpus.words import Words, ngram_hashes, split_words
from deberta_dist.errors import ConfigError, DataError

SUFFIXES = (".json", ".jsonl", ".tsv", ".txt")
_BATCH_CHARACTERS = 1 << 20
_NGRAMS_PER_FILTER_WORD = 4  # at most
_SPACE = b" "


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
        quick_shift: see above.
        fingerprint: SHA-256 of n and the hashes, hexadecimal; the same for the same n-grams, however they are filed.
    """

    n: int
    hashes: np.ndarray
    places: np.ndarray
    text: bytes
    quick_filter: np.ndarray
    quick_shift: int
    fingerprint: str

    def shares(self, text: str) -> bool:
        """Whether a document has an n-gram of the set."""
        return self.first_shared(text) is not None

    def first_shared(self, text: str) -> str | None:
        """The first n-gram of a document that is in the set, folded, one space between words; None without one."""
        words = split_words(text)
        hashes = ngram_hashes(words.hashes, n=self.n)
        bits = _bits(hashes)
        candidates = np.flatnonzero(self.quick_filter[hashes >> np.uint64(self.quick_shift)] & bits == bits)
        if not len(candidates):
            return None
        found = np.minimum(np.searchsorted(self.hashes, hashes[candidates]), len(self.hashes) - 1)
        equal = self.hashes[found] == hashes[candidates]
        for first, place in zip(candidates[equal].tolist(), self.places[found[equal]].tolist(), strict=True):
            ngram = " ".join(words.slice(first, first + self.n))
            if self.text.startswith(ngram.encode() + _SPACE, place):
                return ngram
        return None


def benchmark_ngrams(paths: Iterable[str | Path], *, n: int = 13) -> NgramSet:
    """The n-grams of benchmark files, such as a folder of SuperGLUE with a folder for every task.

    A string is: of .json and .jsonl files every string value at any depth, keys left out; of .tsv and .txt files
    every line. No n-gram reaches from one string into the next, and strings of fewer than n words give none: a short
    question can be shared, a passage cannot.

    Words are those of ``split_words``: case, width, composition and punctuation do not matter. A Chinese or Japanese
    character counts as one word, so that 13 of them are about 8 words of English: take a larger n for benchmarks in
    these languages. In Thai, Lao, Khmer and Burmese a word is all that stands between two spaces, so that the shared
    text has to be much longer than 13 of their words.

    Args:
        paths: files, and folders, which stand for every file below them with one of these endings; names that begin
            with a dot are passed over.
        n: words of one n-gram.

    Raises:
        ConfigError: n is below 1.
        DataError: a path is missing or has another ending, a folder has no such file, a file cannot be read, is not
            UTF-8 or not JSON, or no string anywhere has n words.
    """
    if n < 1:
        raise ConfigError(f"n = {n}: an n-gram of a benchmark has at least 1 word (13 are usual)")
    paths = list(paths)
    files = _list_files(paths)
    hashes, places, texts = [], [], []
    offset = 0
    for batch in _batches(_strings(files)):
        batch_hashes, batch_places, text = _ngrams(batch, n=n)
        hashes.append(batch_hashes)
        places.append(batch_places + offset)
        texts.append(text)
        offset += len(text)
    distinct, first = np.unique(np.concatenate([np.empty(0, np.uint64), *hashes]), return_index=True)
    if not len(distinct):
        given = ", ".join(map(str, paths))
        raise DataError(f"no string of {given} has {n} words: nothing to look for; take a smaller n")
    all_places = np.concatenate(places)[first]
    log_words = max(1, (len(distinct) // _NGRAMS_PER_FILTER_WORD).bit_length())
    quick_filter = np.zeros(1 << log_words, dtype=np.uint64)
    np.bitwise_or.at(quick_filter, distinct >> np.uint64(64 - log_words), _bits(distinct))
    digest = hashlib.sha256(f"{n}-grams\n".encode())
    digest.update(distinct.astype("<u8").data)
    return NgramSet(
        n=n,
        hashes=distinct,
        places=all_places.astype(np.uint32) if offset < 1 << 32 else all_places,
        text=b"".join(texts),
        quick_filter=quick_filter,
        quick_shift=64 - log_words,
        fingerprint=digest.hexdigest(),
    )


def _ngrams(strings: list[str], *, n: int) -> tuple[np.ndarray, np.ndarray, bytes]:
    """(hashes uint64 [num_ngrams], places in the text uint64 [num_ngrams], the words in UTF-8) of a few strings."""
    parts = list(map(split_words, strings))
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
    return np.concatenate([np.empty(0, np.uint64), *hashes]), np.concatenate([np.empty(0, np.uint64), *places]), text


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


def _list_files(paths: Iterable[str | Path]) -> list[Path]:
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            below = files_below(path, suffixes=SUFFIXES)
            if not below:
                raise DataError(f"benchmark {path} has no {', '.join(SUFFIXES)} files below it")
            files += below
        elif not path.is_file():
            raise DataError(f"benchmark {path} does not exist")
        elif path.suffix not in SUFFIXES:
            raise DataError(f"benchmark {path} ends in none of {', '.join(SUFFIXES)}: unpack or convert it first")
        else:
            files.append(path)
    return files


def _strings(files: Iterable[Path]) -> Iterator[str]:
    """Every string of the files."""
    for path in files:
        try:
            # Only a line feed ends a line, whatever else Unicode counts as a line end.
            with open(path, encoding="utf-8-sig", newline="\n") as file:
                if path.suffix == ".json":
                    yield from _string_values(file.read(), place=str(path))
                elif path.suffix == ".jsonl":
                    for number, line in enumerate(file, start=1):
                        if not line.isspace():
                            yield from _string_values(line, place=f"{path}:{number}")
                else:
                    yield from file
        except OSError as error:
            raise DataError(f"benchmark {path} cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise DataError(f"benchmark {path} is not UTF-8 ({error.reason}): convert it first") from error


def _string_values(text: str, *, place: str) -> Iterator[str]:
    """Every string in a JSON value, in the order of the text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"benchmark {place} is not JSON ({error})") from error
    rest = [value]
    while rest:
        value = rest.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            rest += reversed(value.values())
        elif isinstance(value, list):
            rest += reversed(value)
