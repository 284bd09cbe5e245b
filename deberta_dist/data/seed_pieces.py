"""Candidates for the pieces of a vocabulary: strings that occur again and again, with their counts.

sentencepiece's trainer starts from such candidates and prunes them. Its own search for them loses most of them in
scripts whose letters share their first bytes (0.2.3), or takes time that grows with the square of the length of every
passage that occurs twice (0.2.2). ``tokenizer`` hands the trainer the ones counted here instead.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from deberta_dist.errors import DataError

MAX_CHARACTERS = 16
_MAX_TEXT = (1 << 31) - 1


def seed_pieces(words: Mapping[str, int], *, max_pieces: int) -> Iterator[tuple[str, int]]:
    """Strings of 2 to ``MAX_CHARACTERS`` characters that occur at least twice, with their counts.

    A string that is followed by the same character wherever it occurs is left out: the longer one stands for it.
    These are the inner nodes of the suffix tree of all words; the end of a word follows as a character of its own.

    Args:
        words: words without NUL, and how often each occurs.
        max_pieces: strings to give, the ones that cover most characters (count times length).

    Yields:
        (string, count), the one that covers most first. The same words in the same order give the same.

    Raises:
        DataError: the different words have 2^31 characters or more.
    """
    text = "\0".join((*words, ""))
    if len(text) > _MAX_TEXT:
        raise DataError(f"the different words have {len(text):,} characters, at most {_MAX_TEXT:,} can be counted")
    weights = np.repeat(
        np.fromiter(words.values(), np.float64, len(words)), np.fromiter(map(len, words), np.int64, len(words)) + 1
    )
    # A character's code is its place in the alphabet; NUL, the end of a word, is the smallest: 0.
    alphabet, codes = np.unique(np.frombuffer(text.encode("utf-32-le"), np.uint32), return_inverse=True)
    codes = codes.astype(np.int32)
    found: list[np.ndarray] = []
    # At every position in `starts` begins a string of `length` characters, the one that `strings` numbers.
    starts = np.flatnonzero(codes).astype(np.int32)
    strings = codes[starts]
    first = np.zeros(len(alphabet), np.int32)
    count: np.ndarray = np.bincount(strings, weights=weights[starts], minlength=len(alphabet))
    for length in range(1, MAX_CHARACTERS + 1):
        following = codes[starts + length]
        grows = (following > 0) & (count[strings] >= 2)
        starts = starts[grows]
        longer = strings[grows].astype(np.int64) * len(alphabet) + following[grows]
        order = np.argsort(longer)
        longer, starts = longer[order], starts[order]
        begin = np.flatnonzero(np.diff(longer, prepend=-1))
        longer_count = np.add.reduceat(weights[starts], begin) if len(begin) else np.zeros(0)
        if length > 1:
            most = np.zeros(len(count))
            np.maximum.at(most, longer[begin] // len(alphabet), longer_count)
            kept = np.flatnonzero((count >= 2) & (count > most))
            found.append(np.stack([count[kept].astype(np.int64), np.full(len(kept), length), first[kept]]))
        first = np.minimum.reduceat(starts, begin) if len(begin) else np.zeros(0, np.int32)
        strings = np.repeat(np.arange(len(begin), dtype=np.int32), np.diff(begin, append=len(longer)))
        count = longer_count
    counts, lengths, firsts = np.concatenate(found, axis=1)
    for i in np.lexsort((firsts, -lengths, -counts * lengths))[:max_pieces]:
        yield text[firsts[i] : firsts[i] + lengths[i]], int(counts[i])
