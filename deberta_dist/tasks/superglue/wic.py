"""WiC: whether a word means the same in two sentences.

First segment: sentence 1 with ``* word *``. Second: sentence 2, likewise. The characters that the row names are marked: a
search for the word fails where its form differs ("ran").
"""

from collections.abc import Iterator, Mapping
from typing import Any

from deberta_dist.errors import DataError
from deberta_dist.tasks import metrics
from deberta_dist.tasks.base import Head, Split
from deberta_dist.tasks.encoding import Example, RowEncoder, marked
from deberta_dist.tasks.superglue.task import BOOLEAN, SuperGlueTask, labelled, row_key


class WicTask(SuperGlueTask):
    """The task."""

    def check(self, row: Mapping[str, Any], *, at: str) -> None:
        """Refuses words outside of their sentences."""
        for number in ("1", "2"):
            start, end, length = row[f"start{number}"], row[f"end{number}"], len(row[f"sentence{number}"])
            if not 0 <= start < end <= length:
                raise DataError(f"{at}: characters {start} to {end} lie outside sentence{number} of {length}")

    def examples(self, split: Split, encoder: RowEncoder) -> Iterator[Example]:
        """Both sentences in one sequence."""
        for row in split.rows:
            both = [marked(row[f"sentence{i}"], [(row[f"start{i}"], row[f"end{i}"], "*")]) for i in (1, 2)]
            yield encoder.pair(row_key(row), *both)


WIC = WicTask(
    name="WiC",
    head=Head.SEQUENCE,
    **labelled(BOOLEAN, 5428, 638, 1400, in_submission={"true": "true", "false": "false"}),
    fields={
        "word": str,
        "sentence1": str,
        "sentence2": str,
        "start1": int,
        "end1": int,
        "start2": int,
        "end2": int,
    },
    measures={"accuracy": metrics.answer_accuracy},
)
