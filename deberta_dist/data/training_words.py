"""Counts the distinct words of a text, from which a vocabulary is trained.

A piece never reaches over white space, so words with counts teach the trainer what the text would, in a fraction of
its memory and time, however often passages repeat. What has no white space for long (base64, rules, DNA, one line of
minified code) is cut first: the trainer's sums overflow in such a run. Called by ``tokenizer``.
"""

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

WORD_START = "\u2581"

# The trainer takes the first for white space, and skips words with the second, its mark for unknown characters.
_SPLITS_WORDS = {ord(WORD_START): " ", 0x2585: " "}
_ZERO_WIDTH_JOINER = "\u200d"
_VIRAMA_CLASS = 9  # the vowel killer of Indic scripts: the next letter forms one cluster with what is before it
_LEADING_VOWELS = frozenset("\u0e40\u0e41\u0e42\u0e43\u0e44\u0ec0\u0ec1\u0ec2\u0ec3\u0ec4")  # Thai, Lao
_EXTENDING = (("\u1160", "\u11ff"), ("\U0001f3fb", "\U0001f3ff"))  # Hangul vowels and finals, skin tones


@dataclass(frozen=True, kw_only=True)
class TrainingWords:
    """Words of a text.

    Attributes:
        counts: word -> how often, in the order in which they come first; without ``WORD_START``. No word holds
            white space, and none is longer than the limit.
        num_cut_runs: runs without white space that were longer, and were cut.
        num_cut_characters: characters of those runs, once normalised.
    """

    counts: dict[str, int]
    num_cut_runs: int
    num_cut_characters: int


def count_words(texts: Iterable[str], *, normalize: Callable[[str], str], max_run_characters: int) -> TrainingWords:
    """Counts the words of texts.

    Args:
        texts: any number; read once, one at a time.
        normalize: what the tokenizer does to a text before it splits it.
        max_run_characters: longest word, in normalised characters; longer ones are cut as ``cut_run`` says.
    """
    runs: Counter[str] = Counter()
    for text in texts:
        runs.update(normalize(text).translate(_SPLITS_WORDS).split())
    counts: dict[str, int] = {}
    num_runs = num_characters = 0
    for run, count in runs.items():
        if len(run) <= max_run_characters:
            counts[run] = counts.get(run, 0) + count
            continue
        num_runs += count
        num_characters += count * len(run)
        for text in cut_run(run, max_characters=max_run_characters):
            counts[text] = counts.get(text, 0) + count
    return TrainingWords(counts=counts, num_cut_runs=num_runs, num_cut_characters=num_characters)


def cut_run(run: str, *, max_characters: int) -> Iterator[str]:
    """Parts of a run of characters without white space, none longer than ``max_characters``; together the run.

    A part ends behind the last punctuation mark or symbol in the second half of what is allowed, where no piece
    would reach over anyway (Chinese, Japanese, minified code); without one, at the last place that does not take a
    user-perceived character apart; without that, at the limit.
    """
    start = 0
    while len(run) - start > max_characters:
        limit = start + max_characters
        stop = None
        for at in range(limit, start + max_characters // 2, -1):
            if _is_joined(run[at - 1], run[at]):
                continue
            stop = stop or at
            if unicodedata.category(run[at - 1])[0] in "PS":
                stop = at
                break
        stop = stop or limit
        yield run[start:stop]
        start = stop
    yield run[start:]


def _is_joined(before: str, after: str) -> bool:
    """Whether two characters are one to the reader: base and accent, emoji sequences, syllables of some scripts."""
    if before.isascii() and after.isascii():
        return False
    return (
        unicodedata.category(after)[0] == "M"
        or _ZERO_WIDTH_JOINER in (before, after)
        or unicodedata.combining(before) == _VIRAMA_CLASS
        or before in _LEADING_VOWELS
        or any(low <= after <= high for low, high in _EXTENDING)
    )
