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
from deberta_dist.tasks.segments import CONTEXT_CUT, KEPT_CUT, TextPart, encode_spans, window_starts


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
