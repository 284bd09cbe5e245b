"""Rows as sequences of tokens: how each task is put to the model.

A decision is one or several sequences ``[CLS] first [SEP] second [SEP]``; the segments of a row keep its order.

=========== ============================ ==================================== =====================================
task        first                        second                               scored
=========== ============================ ==================================== =====================================
BoolQ       passage                      question                             two classes
CB RTE MNLI premise                      hypothesis                           three or two classes
AX-b AX-g   premise                      hypothesis                           by the RTE model
MultiRC     passage                      question and one answer              two classes, every answer by itself
COPA        premise                      "because" or "so" and a choice       one number a choice
ReCoRD      passage                      query, a candidate for @placeholder  one number a candidate
WiC         sentence 1, ``* word *``     sentence 2, ``* word *``             two classes
WSC         text, ``* noun *`` and       the noun's text                      two classes
            ``# pronoun #``
=========== ============================ ==================================== =====================================

- *Long first segments* (passages, premises) become overlapping windows, each with the whole second segment; a
  decision's logits are the mean over its windows. Nothing is lost up to ``max_windows``.
- *Second segments* get half of the length at most, or what a short first one leaves: the question, the query around
  its candidate.
- *WiC* marks the characters that the row names: a search for the word fails where its form differs ("ran").
- *WSC* marks words by index, faults of the data handled in `wsc`; the noun stands in the second segment as well, for
  the rows in which the text has it in another form.
- *ReCoRD* takes every entity's text once. In training a query has at most ``max_train_choices`` of them, a right one
  among them; several right ones share the credit.
- *Marks* are characters, as in T5 (Raffel et al. 2019, arXiv 1910.10683, appendix D): a vocabulary without them shows
  the model [UNK] at their place.

WiC and WSC have no windows: a text that is too long keeps the tokens nearest to its marked words. How many rows were
cut, and in how many that reached what the label depends on, is counted and told.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.errors import DataError
from deberta_dist.tasks.release import Key, Split
from deberta_dist.tasks.segments import CONTEXT_CUT, KEPT_CUT, Part, encode_parts, sequences, window_starts
from deberta_dist.tasks.superglue import wsc
from deberta_dist.tasks.superglue.benchmark import PER_ANSWER, PER_CANDIDATE, Task

_PAIRS = {
    "BoolQ": ("passage", "question"),
    "CB": ("premise", "hypothesis"),
    "RTE": ("premise", "hypothesis"),
    "MNLI": ("premise", "hypothesis"),
    "AX-b": ("sentence1", "sentence2"),
    "AX-g": ("premise", "hypothesis"),
}
_CONNECTIVES = {"cause": "because", "effect": "so"}
_PLACEHOLDER = "@placeholder"


@dataclass(frozen=True)
class Example:
    """One decision as ids.

    Attributes:
        key: The decision's.
        first: int32 [F].
        seconds: One for a classification, one per choice otherwise.
        gold: Indices of the right labels or choices; empty where unknown.
    """

    key: Key
    first: np.ndarray
    seconds: tuple[np.ndarray, ...]
    gold: tuple[int, ...]


@dataclass(frozen=True)
class Lengths:
    """How long sequences may be, tokens.

    Attributes:
        max_seq_length: Of a sequence.
        window_overlap: Shared by neighbouring windows; at most a quarter of ``max_seq_length``.
        max_windows: Of one sequence's first segment.
    """

    max_seq_length: int
    window_overlap: int
    max_windows: int


@dataclass(frozen=True)
class Features:
    """A split as ids.

    Attributes:
        split: What it was made of.
        examples: In ascending key.
        notes: What happened to long and odd rows, one line each.
    """

    split: Split
    examples: Sequence[Example]
    notes: Sequence[str]
    _tokenizer: Tokenizer
    _lengths: Lengths

    def sequences(self, example: Example, choice: int) -> list[np.ndarray]:
        """Ids of one choice's windows, int32 [S] each; a classification has choice 0 alone."""
        lengths = self._lengths
        return sequences(
            self._tokenizer,
            example.first,
            example.seconds[choice],
            max_seq_length=lengths.max_seq_length,
            overlap=lengths.window_overlap,
            max_windows=lengths.max_windows,
        )


def has_choices(task: Task) -> bool:
    """Whether a decision is among sequences instead of among classes."""
    return task.kind == PER_CANDIDATE or task.name == "COPA"


def num_outputs(task: Task) -> int:
    """Numbers that the model gives for a sequence."""
    return 1 if has_choices(task) else len(task.labels)


def encode_split(split: Split, tokenizer: Tokenizer, lengths: Lengths) -> Features:
    """All decisions of a split as ids.

    Raises:
        DataError: a query has nothing to choose from, or no placeholder.
    """
    encoder = _Encoder(split, tokenizer, lengths)
    examples = sorted(encoder.examples(), key=lambda example: example.key)
    assert [example.key for example in examples] == sorted(split.decisions)
    return Features(split, examples, encoder.notes(len(examples)), tokenizer, lengths)


class _Encoder:
    def __init__(self, split: Split, tokenizer: Tokenizer, lengths: Lengths) -> None:
        self._split, self._tokenizer, self._lengths = split, tokenizer, lengths
        # Half of what three special tokens leave.
        self._second_limit = (lengths.max_seq_length - 3) // 2
        self._counts: Counter[str] = Counter()

    def examples(self) -> Iterator[Example]:
        """Every decision, in the file's order."""
        name, kind = self._split.task.name, self._split.task.kind
        for row in self._split.rows:
            if kind == PER_ANSWER:
                yield from self._answers(row)
            elif kind == PER_CANDIDATE:
                yield from self._queries(row)
            elif name == "COPA":
                yield self._copa(row)
            elif name == "WiC":
                yield self._wic(row)
            elif name == "WSC":
                yield self._wsc(row)
            else:
                first, second = (row[field] for field in _PAIRS[name])
                yield self._windowed(_key(row), [Part(first)], [[Part(second, is_kept=True)]])

    def notes(self, count: int) -> list[str]:
        """What was counted, in words."""
        where = f"{self._split.task.name} {self._split.name}"
        return [f"{where}: {what} in {number:,} of {count:,}" for what, number in sorted(self._counts.items())]

    def _windowed(self, key: Key, first: Sequence[Part], seconds: Sequence[Sequence[Part]]) -> Example:
        ids, _ = encode_parts(self._tokenizer, first, limit=2**31)
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
        decision = self._split.decisions[key]
        gold = tuple(i for i, label in enumerate(decision.labels) if label in decision.gold)
        return Example(key, first, tuple(second for second, _ in seconds), gold)

    def _cut(self, parts: Sequence[Part], *, limit: int) -> tuple[np.ndarray, str]:
        return encode_parts(self._tokenizer, parts, limit=limit)

    def _answers(self, row: Mapping[str, Any]) -> Iterator[Example]:
        for question in row["passage"]["questions"]:
            for answer in question["answers"]:
                key = (row["idx"], question["idx"], answer["idx"])
                second = [Part(question["question"]), Part(answer["text"], is_kept=True)]
                yield self._windowed(key, [Part(row["passage"]["text"])], [second])

    def _queries(self, row: Mapping[str, Any]) -> Iterator[Example]:
        # Highlights are sentences of their own: the mark between them is no language.
        passage = [Part(row["passage"]["text"].replace("@highlight", " "))]
        for query in row["qas"]:
            key = (query["idx"],)
            candidates = self._split.decisions[key].labels
            if not candidates or _PLACEHOLDER not in query["query"]:
                lack = f"no {_PLACEHOLDER}" if candidates else "no entity in its passage"
                raise DataError(f"{self._split.where}, line {self._split.decisions[key].line}: query {key[0]} has {lack}")
            seconds = [_substituted(query["query"], candidate) for candidate in candidates]
            example = self._windowed(key, passage, seconds)
            if self._split.name == "train" and not example.gold:
                self._counts["no right answer among the passage's entities, so nothing to learn,"] += 1
            yield example

    def _copa(self, row: Mapping[str, Any]) -> Example:
        word = _CONNECTIVES[row["question"]]
        seconds = [[Part(f"{word} {row[f'choice{i}']}", is_kept=True)] for i in (1, 2)]
        return self._windowed(_key(row), [Part(row["premise"])], seconds)

    def _wic(self, row: Mapping[str, Any]) -> Example:
        both = [_marked(row[f"sentence{i}"], [(row[f"start{i}"], row[f"end{i}"], "*")]) for i in (1, 2)]
        return self._pair(_key(row), *both)

    def _wsc(self, row: Mapping[str, Any]) -> Example:
        text, target = row["text"], row["target"]
        spans = []
        for number, mark in ((1, "*"), (2, "#")):
            start, end, how = wsc.find_span(text, target[f"span{number}_text"], target[f"span{number}_index"])
            spans.append((start, end, mark))
            if how != wsc.AT_INDEX:
                self._counts[f"a span stands {how},"] += 1
        if max(spans[0][0], spans[1][0]) < min(spans[0][1], spans[1][1]):
            spans = spans[1:]  # they overlap: the pronoun is what the second segment does not tell
        return self._pair(_key(row), _marked(text, spans), [Part(target["span1_text"], is_kept=True)])

    def _pair(self, key: Key, first: Sequence[Part], second: Sequence[Part]) -> Example:
        """Both in one sequence: what one does not need of its half, the other has."""
        room = self._lengths.max_seq_length - 3
        tail, tail_cut = self._cut(second, limit=room)
        head, head_cut = self._cut(first, limit=room - min(len(tail), self._second_limit))
        if len(head) + len(tail) > room:
            tail, tail_cut = self._cut(second, limit=room - len(head))
        return self._example(key, head, [(tail, tail_cut)], head_cut)


def _key(row: Mapping[str, Any]) -> Key:
    return (int(row["idx"]),)


def _marked(text: str, spans: Sequence[tuple[int, int, str]]) -> list[Part]:
    """A text with marks around (first character, character after the last) of it."""
    parts, end = [], 0
    for start, stop, mark in sorted(spans):
        parts += [Part(text[end:start]), Part(f"{mark} {text[start:stop]} {mark}", is_kept=True)]
        end = stop
    return [*parts, Part(text[end:])]


def _substituted(query: str, candidate: str) -> list[Part]:
    before, _, after = query.partition(_PLACEHOLDER)
    # Further placeholders stand for the same.
    return [Part(before), Part(candidate, is_kept=True), Part(after.replace(_PLACEHOLDER, candidate))]
