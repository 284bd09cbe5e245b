"""Candidates for pieces against counting every string of every word."""

import random
import time
from collections import Counter, defaultdict

import pytest

from deberta_dist.data.seed_pieces import MAX_CHARACTERS, seed_pieces


def counted(words: dict[str, int]) -> dict[str, int]:
    """By definition: strings that occur twice or more, and are not always followed by the same character."""
    counts: Counter[str] = Counter()
    followed: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for word, count in words.items():
        for start in range(len(word)):
            for stop in range(start + 2, min(start + MAX_CHARACTERS, len(word)) + 1):
                counts[word[start:stop]] += count
                if stop < len(word):
                    followed[word[start:stop]][word[stop]] += count
    return {piece: count for piece, count in counts.items() if count >= 2 and max(followed[piece].values(), default=0) < count}


@pytest.mark.parametrize("alphabet", ["ab", "abcdefgh", "\u0e01\u0e02\u0e03\u4e00\U0001f600"])
def test_counts_are_those_of_the_definition(alphabet: str) -> None:
    draw = random.Random(0)
    words = {
        "".join(draw.choices(alphabet, k=draw.randint(1, 40))): draw.choice([1, 1, 2, 7]) for _ in range(draw.randint(50, 90))
    }
    found = list(seed_pieces(words, max_pieces=10**6))
    assert dict(found) == counted(words) and len(dict(found)) == len(found) > 50
    covered = [len(piece) * count for piece, count in found]
    assert covered == sorted(covered, reverse=True)
    assert list(seed_pieces(words, max_pieces=20)) == found[:20]


@pytest.mark.parametrize("words", [{}, {"a": 5}, {"ab": 1}])
def test_nothing_that_occurs_twice(words: dict[str, int]) -> None:
    assert list(seed_pieces(words, max_pieces=10)) == []


def test_long_repeats_take_no_longer() -> None:
    """An algorithm that looks at every repeat in full would take minutes here."""
    began = time.monotonic()
    found = dict(seed_pieces({"-" * 200_000: 1, "ab" * 100_000: 3}, max_pieces=100))
    assert found["-" * 16] == 200_000 - 15 and time.monotonic() - began < 20
