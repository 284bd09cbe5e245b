"""ReCoRD: which entity of a passage a query leaves out; every query has candidates of its own, with one score each.

First segment: the passage. Second: the query with a candidate instead of ``@placeholder``. Every entity's text is
taken once. In training a query has at most ``max_train_choices`` of them, a right one among them; several right ones share
the credit.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from deberta_dist.errors import DataError
from deberta_dist.tasks import metrics
from deberta_dist.tasks.base import TRAIN, Head, Split
from deberta_dist.tasks.data_files import as_object, integer, require_fields
from deberta_dist.tasks.decisions import Decision, Key
from deberta_dist.tasks.encoding import Example, RowEncoder, TextPart
from deberta_dist.tasks.superglue.task import SuperGlueTask, labelled

_PLACEHOLDER = "@placeholder"


class RecordTask(SuperGlueTask):
    """The task."""

    def decisions(self, row: Mapping[str, Any], *, line: int, at: str) -> Iterator[tuple[Key, Decision]]:
        """Every query of a passage."""
        require_fields(row["passage"], {"text": str, "entities": list}, at=f"{at}: passage")
        text = row["passage"]["text"]
        entities: dict[str, None] = {}
        for entity in row["passage"]["entities"]:
            here = f"{at}: entity"
            start, end = (integer(as_object(entity, at=here).get(name), at=here, name=name) for name in ("start", "end"))
            # The end is the entity's last character.
            if not start <= end < len(text):
                raise DataError(f"{here}: {start} to {end} lies outside the passage of {len(text)} characters")
            entities[text[start : end + 1]] = None
        for query in row["qas"]:
            here = f"{at}: query"
            require_fields(as_object(query, at=here), {"query": str}, at=here)
            answers = query.get("answers", [])
            texts = [as_object(answer, at=here).get("text") for answer in answers] if isinstance(answers, list) else [None]
            if not all(isinstance(text, str) for text in texts):
                raise DataError(f"{here}: an answer has no text")
            gold = dict.fromkeys(text for text in texts if isinstance(text, str))
            yield (integer(query.get("idx"), at=here, name="idx"),), Decision(tuple(entities), tuple(gold), line)

    def examples(self, split: Split, encoder: RowEncoder) -> Iterator[Example]:
        """The passage beside the query with each of its candidates."""
        for row in split.rows:
            yield from _queries(row, split, encoder)

    def label_problem(self, label: Any, decision: Decision, *, idx: str) -> str | None:
        """Whether a submission answers with a text that is no entity."""
        if isinstance(label, str) and label in decision.labels:
            return None
        return f"idx {idx}: {json.dumps(label, ensure_ascii=False)} is no {self.candidate}"


def _queries(row: Mapping[str, Any], split: Split, encoder: RowEncoder) -> Iterator[Example]:
    # Highlights are sentences of their own: the mark between them is no language.
    passage = [TextPart(row["passage"]["text"].replace("@highlight", " "))]
    for query in row["qas"]:
        key = (query["idx"],)
        candidates = split.decisions[key].labels
        if not candidates or _PLACEHOLDER not in query["query"]:
            lack = f"no {_PLACEHOLDER}" if candidates else "no entity in its passage"
            raise DataError(f"{split.where}, line {split.decisions[key].line}: query {key[0]} has {lack}")
        seconds = [_substituted(query["query"], candidate) for candidate in candidates]
        example = encoder.windowed(key, passage, seconds)
        if split.name == TRAIN and not example.gold:
            encoder.count("no right answer among the passage's entities, so nothing to learn,")
        yield example


def _substituted(query: str, candidate: str) -> list[TextPart]:
    before, _, after = query.partition(_PLACEHOLDER)
    # Further placeholders stand for the same.
    return [TextPart(before), TextPart(candidate, is_kept=True), TextPart(after.replace(_PLACEHOLDER, candidate))]


RECORD = RecordTask(
    name="ReCoRD",
    head=Head.CHOICE,
    **labelled({}, 100730, 10000, 10000),
    fields={"passage": dict, "qas": list},
    measures={
        "f1": metrics.over_mentions(metrics.token_f1),
        "em": metrics.over_mentions(metrics.exact_match),
    },
    candidate="entity of the passage",
    unlearnable="no query has its answer among its passage's entities",
)
