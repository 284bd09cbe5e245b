"""BoolQ, CB, RTE and the diagnostics AX-b and AX-g: one text against another, every row a decision among labels.

===== =========== ===========
task  first       second
===== =========== ===========
BoolQ passage     question
CB    premise     hypothesis
RTE   premise     hypothesis
AX-b  sentence1   sentence2
AX-g  premise     hypothesis
===== =========== ===========

The model of RTE answers the diagnostics.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from deberta_dist.tasks import metrics
from deberta_dist.tasks.base import Head, Split
from deberta_dist.tasks.decisions import Answers
from deberta_dist.tasks.encoding import Example, RowEncoder, TextPart
from deberta_dist.tasks.superglue.task import BOOLEAN, THREE_WAY, TWO_WAY, SuperGlueTask, labelled, row_key


@dataclass(frozen=True, eq=False, kw_only=True)
class PairTask(SuperGlueTask):
    """A task whose segments are two fields of a row.

    Attributes:
        pair: Field of the first segment, the longer text, and of the second.
    """

    pair: tuple[str, str]

    def examples(self, split: Split, encoder: RowEncoder) -> Iterator[Example]:
        """The second field whole, the first in windows."""
        for row in split.rows:
            first, second = (row[field] for field in self.pair)
            yield encoder.windowed(row_key(row), [TextPart(first)], [[TextPart(second, is_kept=True)]])


class BroadCoverage(PairTask):
    """AX-b, whose official file has its numbers as text."""

    def index(self, row: Mapping[str, Any]) -> Any:
        """A row's idx."""
        idx = row.get("idx")
        return int(idx) if isinstance(idx, str) and re.fullmatch("[0-9]{1,9}", idx) else idx


def gender_parity(split: Split, answers: Answers) -> float:
    """Share of pairs that get one answer. Pairs are consecutive idx: ``pair_id`` is another number in each row."""
    by_pair: dict[int, set[str]] = defaultdict(set)
    for (idx,), answer in answers.items():
        by_pair[idx // 2].add(answer)
    return sum(len(found) == 1 for found in by_pair.values()) / len(by_pair)


def _pair(first: str, second: str) -> dict[str, Any]:
    return {"head": Head.SEQUENCE, "fields": {first: str, second: str}, "pair": (first, second)}


_INFERENCE = _pair("premise", "hypothesis")
BOOLQ = PairTask(
    name="BoolQ",
    **labelled(BOOLEAN, 9427, 3270, 3245, in_submission={"true": "true", "false": "false"}),
    **(_pair("passage", "question") | {"fields": {"question": str, "passage": str}}),
    measures={"accuracy": metrics.answer_accuracy},
)
CB = PairTask(
    name="CB",
    **labelled(THREE_WAY, 250, 56, 250),
    **_INFERENCE,
    measures={"macro_f1": metrics.answer_macro_f1, "accuracy": metrics.answer_accuracy},
)
AX_B = BroadCoverage(
    name="AX-b",
    **labelled(TWO_WAY, 1104),
    **_pair("sentence1", "sentence2"),
    measures={"matthews": partial(metrics.answer_matthews, positive="entailment")},
    answered_by="RTE",
)
AX_G = PairTask(
    name="AX-g",
    **labelled(TWO_WAY, 356),
    **_INFERENCE,
    measures={"gender_parity": gender_parity, "accuracy": metrics.answer_accuracy},
    answered_by="RTE",
)
RTE = PairTask(
    name="RTE",
    **labelled(TWO_WAY, 2490, 277, 3000),
    **_INFERENCE,
    measures={"accuracy": metrics.answer_accuracy},
    diagnostics=(AX_B, AX_G),
)
