"""COPA: which of two choices is the cause or the effect of a premise; one score per choice.

First segment: the premise. Second: "because" or "so", and a choice.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from deberta_dist.errors import DataError
from deberta_dist.tasks import metrics
from deberta_dist.tasks.base import Head, Split
from deberta_dist.tasks.encoding import Example, RowEncoder, TextPart
from deberta_dist.tasks.superglue.task import INTEGERS, SuperGlueTask, labelled, row_key

_CONNECTIVES = {"cause": "because", "effect": "so"}


class CopaTask(SuperGlueTask):
    """The task."""

    def check(self, row: Mapping[str, Any], *, at: str) -> None:
        """Refuses a question for which there is no connective."""
        if row["question"] not in _CONNECTIVES:
            raise DataError(f'{at}: question is {row["question"]!r}, "cause" or "effect" is expected')

    def examples(self, split: Split, encoder: RowEncoder) -> Iterator[Example]:
        """The premise beside each choice."""
        for row in split.rows:
            word = _CONNECTIVES[row["question"]]
            seconds = [[TextPart(f"{word} {row[f'choice{i}']}", is_kept=True)] for i in (1, 2)]
            yield encoder.windowed(row_key(row), [TextPart(row["premise"])], seconds)


COPA = CopaTask(
    name="COPA",
    head=Head.CHOICE,
    **labelled(INTEGERS, 400, 100, 500),
    fields={"premise": str, "choice1": str, "choice2": str, "question": str},
    measures={"accuracy": metrics.answer_accuracy},
)
