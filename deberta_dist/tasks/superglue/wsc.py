"""WSC: whether a pronoun refers to a noun.

First segment: the text with ``* noun *`` and ``# pronoun #``. Second: the noun, for the rows in which the text has it in
another form.

Words are marked by index, and the released data have faults: ``span_index`` counts words of ``text.split()``. In the
official files the words at it are others than ``span_text`` in 3 rows of train, 1 of val and 10 of test, even without case
and punctuation: "Dad" for "Dad's", spans that are not contiguous, a wrong index.
"""

import re
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deberta_dist.errors import DataError
from deberta_dist.tasks import metrics
from deberta_dist.tasks.base import Head, Split
from deberta_dist.tasks.data_files import require_fields
from deberta_dist.tasks.encoding import Example, RowEncoder, TextPart, marked
from deberta_dist.tasks.superglue.task import BOOLEAN, SuperGlueTask, labelled, row_key

_PUNCTUATION = string.punctuation + "\u2018\u2019\u201c\u201d\u2014"

AT_INDEX, ELSEWHERE, INDEX_ALONE = "at its index", "elsewhere in the text", "nowhere: the word at its index is taken"


def find_span(text: str, span: str, index: int) -> tuple[int, int, str]:
    """Characters of a span.

    Args:
        text: The row's text, in which words are counted between white space.
        span: The span's words, as the row spells them.
        index: Of its first word in ``text.split()``.

    Returns:
        (first character, character after the last, how it was found): at its index, compared without case and
        punctuation, a genitive included; else where its words stand nearest to the index; else the one word at the
        index.
    """
    words = list(re.finditer(r"\S+", text))
    wanted = [_bare(word) for word in span.split()]
    found = [_bare(match.group()) for match in words]
    starts = [i for i in range(len(words) - len(wanted) + 1) if wanted and _agree(found[i : i + len(wanted)], wanted)]
    if not starts:
        return words[index].start(), words[index].end(), INDEX_ALONE
    start = min(starts, key=lambda start: abs(start - index))
    how = AT_INDEX if start == index else ELSEWHERE
    return words[start].start(), words[start + len(wanted) - 1].end(), how


def _agree(found: Sequence[str], wanted: Sequence[str]) -> bool:
    *firsts, last = zip(found, wanted, strict=True)
    return all(a == b for a, b in firsts) and last[0] in (last[1], f"{last[1]}'s", f"{last[1]}s")


def _bare(word: str) -> str:
    return word.lower().replace("\u2019", "'").strip(_PUNCTUATION)


class WscTask(SuperGlueTask):
    """The task."""

    def check(self, row: Mapping[str, Any], *, at: str) -> None:
        """Refuses words that the text does not have."""
        fields = {"span1_text": str, "span1_index": int, "span2_text": str, "span2_index": int}
        require_fields(row["target"], fields, at=f"{at}: target")
        for number in ("1", "2"):
            index, words = row["target"][f"span{number}_index"], len(row["text"].split())
            if not 0 <= index < words:
                raise DataError(f"{at}: target: span{number}_index is {index}, the text has {words} words")

    def examples(self, split: Split, encoder: RowEncoder) -> Iterator[Example]:
        """The text and the noun in one sequence."""
        for row in split.rows:
            yield _example(row, encoder)


def _example(row: Mapping[str, Any], encoder: RowEncoder) -> Example:
    text, target = row["text"], row["target"]
    spans = []
    for number, mark in ((1, "*"), (2, "#")):
        start, end, how = find_span(text, target[f"span{number}_text"], target[f"span{number}_index"])
        spans.append((start, end, mark))
        if how != AT_INDEX:
            encoder.count(f"a span stands {how},")
    if max(spans[0][0], spans[1][0]) < min(spans[0][1], spans[1][1]):
        spans = spans[1:]  # they overlap: the pronoun is what the second segment does not tell
    return encoder.pair(row_key(row), marked(text, spans), [TextPart(target["span1_text"], is_kept=True)])


WSC = WscTask(
    name="WSC",
    head=Head.SEQUENCE,
    # With a capital in a submission, unlike other tasks of true and false.
    **labelled(BOOLEAN, 554, 104, 146, in_submission={"true": "True", "false": "False"}),
    fields={"text": str, "target": dict},
    measures={"accuracy": metrics.answer_accuracy},
)
