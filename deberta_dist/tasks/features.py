"""An encoded split of a task, on which fine-tuning trains and predicts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.tasks.base import Split
from deberta_dist.tasks.encoding import Example, RowEncoder, SequenceLengths
from deberta_dist.tasks.segments import sequences


@dataclass(frozen=True)
class Features:
    """A split as ids, as fine-tuning reads it.

    Attributes:
        split: What it was made of.
        examples: One for each decision, in ascending order of keys: no order of a file decides what is trained.
        notes: What happened to long and odd rows, one line each.
    """

    split: Split
    examples: Sequence[Example]
    notes: Sequence[str]
    _tokenizer: Tokenizer
    _lengths: SequenceLengths

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


def encode_split(split: Split, tokenizer: Tokenizer, lengths: SequenceLengths) -> Features:
    """All decisions of a split as ids.

    Raises:
        DataError: a row cannot be put to the model; the task's message has file and line.
    """
    encoder = RowEncoder(split.decisions, tokenizer, lengths)
    examples = sorted(split.task.examples(split, encoder), key=lambda example: example.key)
    assert [example.key for example in examples] == sorted(split.decisions)
    notes = encoder.notes(f"{split.task.name} {split.name}", of=len(examples))
    return Features(split, examples, notes, tokenizer, lengths)
