"""Encodes texts as sequences of tokens; every task's encoding is built from this.

A decision is one or several sequences ``[CLS] first [SEP] second [SEP]``. How a row becomes segments is said in its task's
file; here they are brought to length.

- *Long first segments* (passages, premises) become overlapping windows, each with the whole second segment; a
  decision's logits are the mean over its windows. Nothing is lost up to ``max_windows``.
- *Second segments* get half of the length at most, or what a short first one leaves: the question, the query around
  its candidate.
- *Marks* around words are characters, as in T5 (Raffel et al. 2019, arXiv 1910.10683, appendix D): a vocabulary without
  them shows the model [UNK] at their place. A text with marked words has no windows: one that is too long keeps the tokens
  nearest to them.

How many rows were cut, and in how many of them what the label depends on, is counted and logged.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.tasks.decisions import Decision, Key

NOT_CUT, CONTEXT_CUT, KEPT_CUT = "not cut", "context cut", "kept part cut"


@dataclass(frozen=True)
class TextPart:
    """Some text of a segment.

    Attributes:
        text: Its words; parts are joined by spaces.
        is_kept: Whether the label depends on just these words.
    """

    text: str
    is_kept: bool = False


def encode_spans(tokenizer: Tokenizer, parts: Sequence[TextPart], *, limit: int) -> tuple[np.ndarray, str]:
    """Ids of a segment of at most ``limit`` tokens.

    Where it is longer, the tokens nearest to a kept part stay, in their order; without a kept part the first ones do.

    Returns:
        (ids, int32; what that took: ``NOT_CUT``, ``CONTEXT_CUT`` or ``KEPT_CUT``).
    """
    encoded = [tokenizer.encode(part.text) for part in parts]
    ids = np.array([i for text_ids in encoded for i in text_ids], dtype=np.int32)
    if len(ids) <= limit:
        return ids, NOT_CUT
    is_kept = np.repeat([part.is_kept for part in parts], [len(text_ids) for text_ids in encoded])
    return ids[_nearest(is_kept, limit=limit)], KEPT_CUT if is_kept.sum() > limit else CONTEXT_CUT


def _nearest(is_kept: np.ndarray, *, limit: int) -> np.ndarray:
    """Positions of the ``limit`` tokens nearest to a kept one, ascending."""
    positions = np.arange(len(is_kept))
    kept = positions[is_kept]
    if not len(kept):
        return positions[:limit]
    after = np.searchsorted(kept, positions).clip(max=len(kept) - 1)
    before = (after - 1).clip(min=0)
    distance = np.minimum(abs(kept[after] - positions), abs(kept[before] - positions))
    return np.sort(np.argsort(distance, kind="stable")[:limit])


def window_starts(length: int, *, room: int, overlap: int, most: int) -> np.ndarray:
    """Where the windows over a first segment begin.

    Neighbours share at least ``overlap`` tokens and every window is full; where more than ``most`` would be needed,
    so many are spread evenly and may leave gaps.

    Args:
        length: Tokens of the whole segment.
        room: Tokens of a window, more than ``overlap``.
        overlap: Tokens that neighbouring windows share; less than a window has.
        most: Windows at most, from 1.
    """
    if length <= room:
        return np.zeros(1, dtype=np.int64)
    needed = 1 + -(-(length - room) // (room - overlap))
    return np.linspace(0, length - room, num=min(needed, most)).astype(np.int64)


def sequences(
    tokenizer: Tokenizer, first: np.ndarray, second: np.ndarray, *, max_seq_length: int, overlap: int, max_windows: int
) -> list[np.ndarray]:
    """``[CLS] window of first [SEP] second [SEP]`` for every window; without a second segment ``[CLS] window [SEP]``.

    Returns:
        int32 ids of at most ``max_seq_length`` tokens each.
    """
    cls, sep = [tokenizer.cls_id], [tokenizer.sep_id]
    tail = np.concatenate([sep, second, sep] if len(second) else [sep]).astype(np.int32)
    room = max_seq_length - 1 - len(tail)
    starts = window_starts(len(first), room=room, overlap=overlap, most=max_windows)
    return [np.concatenate([cls, first[start : start + room], tail]).astype(np.int32) for start in starts]


@dataclass(frozen=True)
class Example:
    """One decision as ids.

    Attributes:
        first: int32 [F].
        seconds: One for a classification, one per choice otherwise.
        gold: Indices of the right labels or choices; empty where unknown.
    """

    key: Key
    first: np.ndarray
    seconds: tuple[np.ndarray, ...]
    gold: tuple[int, ...]


@dataclass(frozen=True)
class SequenceLengths:
    """How long sequences may be, tokens.

    Attributes:
        max_seq_length: Tokens of a sequence at most, special tokens included.
        window_overlap: Shared by neighbouring windows; at most a quarter of ``max_seq_length``.
        max_windows: Of one sequence's first segment.
    """

    max_seq_length: int
    window_overlap: int
    max_windows: int


class RowEncoder:
    """Makes the examples of a split of the segments that its task names.

    Args:
        tokenizer: The one that the model was pre-trained with.
        lengths: How long sequences may be.
    """

    def __init__(self, decisions: Mapping[Key, Decision], tokenizer: Tokenizer, lengths: SequenceLengths) -> None:
        self._decisions, self._tokenizer, self._lengths = decisions, tokenizer, lengths
        # Half of what three special tokens leave.
        self._second_limit = (lengths.max_seq_length - 3) // 2
        self._counts: Counter[str] = Counter()

    def count(self, what: str) -> None:
        """Counts a row to which something happened, under the words of the log."""
        self._counts[what] += 1

    def notes(self, where: str, *, of: int) -> list[str]:
        """What was counted, one line each.

        Args:
            where: Task and split, with which every line begins.
            of: Number of examples in the split, to which the counts are compared.
        """
        return [f"{where}: {what} in {number:,} of {of:,}" for what, number in sorted(self._counts.items())]

    def windowed(self, key: Key, first: Sequence[TextPart], seconds: Sequence[Sequence[TextPart]]) -> Example:
        """A first segment in windows as long as need be, beside each second one.

        Args:
            first: The text that is cut into overlapping windows.
            seconds: One for a decision among labels, one a choice for a decision among choices.
        """
        ids, _ = encode_spans(self._tokenizer, first, limit=2**31)
        lengths = self._lengths
        # What a short first segment leaves is the second's.
        limit = max(self._second_limit, lengths.max_seq_length - 3 - len(ids))
        encoded = [self._cut(second, limit=limit) for second in seconds]
        room = lengths.max_seq_length - 3 - max(len(second) for second, _ in encoded)
        starts = window_starts(len(ids), room=room, overlap=lengths.window_overlap, most=2**31)
        if len(starts) > lengths.max_windows:
            self._counts[f"more than {lengths.max_windows} windows, so gaps between them,"] += 1
        elif len(starts) > 1:
            self._counts["several windows"] += 1
        return self._example(key, ids, encoded)

    def _example(self, key: Key, first: np.ndarray, seconds: Sequence[tuple[np.ndarray, str]], *cuts: str) -> Example:
        happened = {*cuts, *(how for _, how in seconds)}
        if KEPT_CUT in happened:
            self._counts["what the label depends on was cut"] += 1
        elif CONTEXT_CUT in happened:
            self._counts["a segment was cut, marked words and answers whole,"] += 1
        decision = self._decisions[key]
        gold = tuple(i for i, label in enumerate(decision.labels) if label in decision.gold)
        return Example(key, first, tuple(second for second, _ in seconds), gold)

    def _cut(self, parts: Sequence[TextPart], *, limit: int) -> tuple[np.ndarray, str]:
        return encode_spans(self._tokenizer, parts, limit=limit)

    def pair(self, key: Key, first: Sequence[TextPart], second: Sequence[TextPart]) -> Example:
        """Both segments in one sequence without windows: what one does not need of its half, the other has."""
        room = self._lengths.max_seq_length - 3
        tail, tail_cut = self._cut(second, limit=room)
        head, head_cut = self._cut(first, limit=room - min(len(tail), self._second_limit))
        if len(head) + len(tail) > room:
            tail, tail_cut = self._cut(second, limit=room - len(head))
        return self._example(key, head, [(tail, tail_cut)], head_cut)


def marked(text: str, spans: Sequence[tuple[int, int, str]]) -> list[TextPart]:
    """A text with marks around (first character, character after the last) of it."""
    parts, end = [], 0
    for start, stop, mark in sorted(spans):
        parts += [TextPart(text[end:start]), TextPart(f"{mark} {text[start:stop]} {mark}", is_kept=True)]
        end = stop
    return [*parts, TextPart(text[end:])]
