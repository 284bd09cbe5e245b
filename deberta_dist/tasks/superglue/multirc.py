"""MultiRC: whether an answer to a question about a passage is right; each answer is a decision of its own.

First segment: the passage. Second: a question and one of its answers. Answers are nested in questions and these in
passages, in the data as in a submission, and a decision's key is (passage, question, answer).
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from deberta_dist.errors import DataError
from deberta_dist.tasks import metrics
from deberta_dist.tasks.base import Head, Split
from deberta_dist.tasks.data_files import as_object, integer, require_fields
from deberta_dist.tasks.decisions import Answers, Decision, Key, shown
from deberta_dist.tasks.encoding import Example, RowEncoder, TextPart
from deberta_dist.tasks.superglue.task import INTEGERS, Submitted, SuperGlueTask, labelled


class MultircTask(SuperGlueTask):
    """The task."""

    def decisions(self, row: Mapping[str, Any], *, line: int, at: str) -> Iterator[tuple[Key, Decision]]:
        """Every answer of every question of a passage."""
        passage = integer(row.get("idx"), at=at, name="idx")
        require_fields(row["passage"], {"text": str, "questions": list}, at=f"{at}: passage")
        seen: set[int] = set()
        for question in row["passage"]["questions"]:
            here = f"{at}: question"
            require_fields(as_object(question, at=here), {"question": str, "answers": list}, at=here)
            number = integer(question.get("idx"), at=here, name="idx")
            if number in seen:
                raise DataError(f"{here} {number} stands in its passage twice")
            seen.add(number)
            for answer in question["answers"]:
                there = f"{here} {number}: answer"
                require_fields(as_object(answer, at=there), {"text": str}, at=there)
                key = (passage, number, integer(answer.get("idx"), at=there, name="idx"))
                yield key, Decision(self.labels, self.gold(answer, at=there), line)

    def examples(self, split: Split, encoder: RowEncoder) -> Iterator[Example]:
        """Every answer with its question against the passage."""
        for row in split.rows:
            for question in row["passage"]["questions"]:
                for answer in question["answers"]:
                    key = (row["idx"], question["idx"], answer["idx"])
                    second = [TextPart(question["question"]), TextPart(answer["text"], is_kept=True)]
                    yield encoder.windowed(key, [TextPart(row["passage"]["text"])], [second])

    def submission_rows(self, answers: Answers) -> Iterator[dict[str, Any]]:
        """A line for every passage."""
        passages: dict[Any, dict[Any, list[dict[str, Any]]]] = {}
        for passage, question, answer in sorted(answers):
            label = self.in_submission[answers[passage, question, answer]]
            passages.setdefault(passage, {}).setdefault(question, []).append({"idx": answer, "label": label})
        for passage, questions in passages.items():
            listed = [{"idx": question, "answers": found} for question, found in questions.items()]
            yield {"idx": passage, "passage": {"questions": listed}}

    def submitted(self, row: Mapping[str, Any], *, known: set[Key], seen: set[Key]) -> Iterator[Submitted]:
        """Every answer in a line."""
        try:
            _require(row.keys() == {"idx", "passage"} and row["passage"].keys() == {"questions"})
            passage = (_whole(row["idx"]),)
            questions = _filled(row["passage"]["questions"])
            if problem := _container_problem("passage", passage, known=known, seen=seen):
                yield passage, None, problem
                return
            for question in questions:
                _require(question.keys() == {"idx", "answers"})
                asked = (*passage, _whole(question["idx"]))
                answers = _filled(question["answers"])
                if problem := _container_problem("question", asked, known=known, seen=seen):
                    yield asked, None, problem
                    continue
                for answer in answers:
                    _require(answer.keys() == {"idx", "label"})
                    yield (*asked, _whole(answer["idx"])), answer["label"], None
        except (ValueError, TypeError, AttributeError):
            form = '{"idx": P, "passage": {"questions": [{"idx": Q, "answers": [{"idx": A, "label": 0 or 1}]}]}}'
            yield (), None, f"not nested as {form}"


def _container_problem(kind: str, key: Key, *, known: set[Key], seen: set[Key]) -> str | None:
    if key not in known:
        return f"{kind} idx {shown(key)} is not in the test data"
    if key in seen:
        return f"{kind} idx {shown(key)} is there twice"
    seen.add(key)
    return None


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError


def _whole(value: Any) -> int:
    _require(type(value) is int)
    return value


def _filled(value: Any) -> list[Any]:
    _require(type(value) is list and len(value) > 0)
    return value


def question_em(split: Split, answers: Answers) -> float:
    """Share of questions of which every answer is judged right."""
    is_right: dict[Key, bool] = defaultdict(lambda: True)
    for key, decision in split.decisions.items():
        is_right[key[:2]] &= answers[key] == decision.gold[0]
    return sum(is_right.values()) / len(is_right)


MULTIRC = MultircTask(
    name="MultiRC",
    head=Head.SEQUENCE,
    **labelled(INTEGERS, 27243, 4848, 9693),
    fields={"passage": dict},
    measures={"f1a": partial(metrics.answer_f1, positive="1"), "em": question_em},
)
