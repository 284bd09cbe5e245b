"""DeBERTa's published way from a line of pieces to a batch, written anew: the peer of ``data_masking.py``.

A corpus is a list of lines, each the pieces of one sample with spaces between them. A sample is split again, masked
piece by piece with a ``random.Random`` of its own, looked up, padded to the full length and collated. Left out, which
is to its advantage: pickled examples (here the lines are plain strings), cutting to length (the lines fit) and the call
per piece that tells whether it continues a word (here a set is asked).

Source: DeBERTa/apps/tasks/mlm_task.py and DeBERTa/data/dynamic_dataset.py, microsoft/DeBERTa, described, not copied.
"""

import math
import random
from bisect import bisect
from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.utils.data import default_collate

_SPECIAL = frozenset(("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"))


class PublishedMasking:
    """Batches of masked samples as the published program makes them, with its constants."""

    def __init__(
        self,
        lines: Sequence[str],
        *,
        pieces: Sequence[str],
        word_starts: Iterable[str],
        max_length: int,
        max_ngram: int,
    ) -> None:
        """Takes the corpus.

        Args:
            lines: one sample each, its pieces joined with spaces, without ``[CLS]`` and ``[SEP]``.
            pieces: all pieces of the vocabulary, in the order of their ids.
            word_starts: the pieces that begin a word; others continue one.
            max_length: tokens of a sample, ``[CLS]`` and ``[SEP]`` included.
            max_ngram: longest span, words.
        """
        self._lines = lines
        self._pieces = list(pieces)
        self._ids = {piece: number for number, piece in enumerate(pieces)}
        self._word_starts = frozenset(word_starts)
        self._max_length = max_length
        self._max_targets = math.ceil(max_length * 0.15 / 10) * 10
        self._whole_words = max_ngram > 1
        self._cumulative = list(accumulate(1 / n for n in range(1, max_ngram + 1)))

    def batch(self, samples: Sequence[int]) -> dict[str, Tensor]:
        """input_ids, position_ids, input_mask and labels of some lines, int32 [B, S] each; labels are 0 off targets."""
        return default_collate([self._features(self._lines[sample], random.Random(sample)) for sample in samples])

    def _features(self, line: str, rng: random.Random) -> dict[str, Tensor]:
        pieces = ["[CLS]", *line.strip().split(), "[SEP]"]
        labels = self._mask(pieces, rng)
        ids = [self._ids[piece] for piece in pieces]
        columns = {
            "input_ids": ids,
            "position_ids": list(range(len(ids))),
            "input_mask": [1] * len(ids),
            "labels": labels,
        }
        padding = [0] * (self._max_length - len(ids))
        return {name: torch.tensor(column + padding, dtype=torch.int) for name, column in columns.items()}

    def _mask(self, pieces: list[str], rng: random.Random) -> list[int]:
        """Replaces targets among ``pieces`` and returns the labels."""
        words: list[list[int]] = []
        for place, piece in enumerate(pieces):
            if piece in _SPECIAL:
                continue
            if words and self._whole_words and piece not in self._word_starts:
                words[-1].append(place)
            else:
                words.append([place])
        is_taken = self._spans(len(words), rng)
        quota = min(self._max_targets, max(1, round(len(pieces) * 0.15)))
        labels = [0] * len(pieces)
        num_targets = 0
        for word, taken in zip(words, is_taken, strict=True):
            if not taken:
                continue
            for place in word:
                labels[place] = self._ids[pieces[place]]
                pieces[place] = self._replacement(pieces[place], rng)
            num_targets += len(word)
            if num_targets >= quota:
                break
        return labels

    def _spans(self, num_words: int, rng: random.Random) -> list[bool]:
        """Whether each word lies in a span: one span per window, windows six times as wide as their span."""
        is_taken = [False] * num_words
        begin = 0
        while begin < num_words:
            length = 1 + bisect(self._cumulative, rng.random() * self._cumulative[-1])
            width = min(6 * length, num_words - begin)
            first = begin + rng.randint(0, width - 1)
            end = min(first + length, num_words)
            is_taken[first:end] = [True] * (end - first)
            begin = max(begin + width, end)
        return is_taken

    def _replacement(self, piece: str, rng: random.Random) -> str:
        kind = rng.random()
        if kind < 0.8:
            return "[MASK]"
        return piece if kind < 0.9 else rng.choice(self._pieces)
