"""What the tasks of SuperGLUE share: files of JSON lines, labels with a spelling in the data and one in a submission.

Labels have one name each in this package; how the data and a submission spell them is said task by task, because it differs
and a wrong spelling scores zero without a word.

Source: Wang et al. 2019 (arXiv 1905.00537), sections 3.2 and 3.3; the benchmark authors' own writer,
nyu-mll/jiant-v1-legacy jiant/evaluate.py@8be1fade.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from deberta_dist.errors import DataError
from deberta_dist.tasks.base import TEST, Split, Task
from deberta_dist.tasks.data_files import DataFiles, integer, json_lines, require_fields
from deberta_dist.tasks.decisions import Answers, Decision, Key, shown

JsonLabel = str | int | bool
Spelling = Mapping[str, JsonLabel]
"""Name of a label -> the JSON value that stands for it."""
Submitted = tuple[Key, Any, str | None]
"""(key, label, what is wrong with its form) of a decision in a line of a submission."""

BOOLEAN: Spelling = {"true": True, "false": False}
TWO_WAY: Spelling = {"entailment": "entailment", "not_entailment": "not_entailment"}
THREE_WAY: Spelling = {name: name for name in ("entailment", "contradiction", "neutral")}
INTEGERS: Spelling = {"0": 0, "1": 1}


@dataclass(frozen=True, eq=False, kw_only=True)
class SuperGlueTask(Task):
    """A task of one decision a row, under the row's idx; subclasses say how a row becomes sequences, and more.

    Attributes:
        fields: What a row must have beside ``idx``, and the type of each.
        in_data: How the data spells the labels.
        in_submission: How a submission spells them, type included.
    """

    fields: Mapping[str, type]
    in_data: Spelling
    in_submission: Spelling

    @property
    def file_name(self) -> str:
        """In a submission."""
        return f"{self.name}.jsonl"

    def data_file(self, split: str) -> str:
        """BoolQ/train.jsonl; a diagnostic has one file, AX-b/AX-b.jsonl."""
        return f"{self.name}/{self.name if self.is_diagnostic else split}.jsonl"

    def read(self, files: DataFiles, split: str) -> Split:
        """Reads and checks a split; every one but the test split needs its answers."""
        name = self.data_file(split)
        where, content = files.where(name), files.content(name)
        rows: list[Mapping[str, Any]] = []
        decisions: dict[Key, Decision] = {}
        for line, row in json_lines(content, where=where):
            at = f"{where}, line {line}"
            require_fields(row, self.fields, at=at)
            for key, decision in self.decisions(row, line=line, at=at):
                if not decision.gold and split != TEST:
                    raise DataError(f"{at}: idx {shown(key)} has no answer, which the split {split} needs")
                if key in decisions:
                    raise DataError(f"{at}: idx {shown(key)} stands in line {decisions[key].line} already")
                decisions[key] = decision
            rows.append(row)
        if not rows:
            raise DataError(f"{where} is empty")
        sha256 = hashlib.sha256(content).hexdigest()
        return Split(task=self, name=split, where=where, sha256=sha256, rows=tuple(rows), decisions=decisions)

    def decisions(self, row: Mapping[str, Any], *, line: int, at: str) -> Iterator[tuple[Key, Decision]]:
        """What a row asks for.

        Args:
            row: Its fields have the types that `fields` names.
            line: Number of the line in its file, from 1, for messages.
            at: File and line, for messages.

        Raises:
            DataError: something in it is not what it should be.
        """
        self.check(row, at=at)
        yield (integer(self.index(row), at=at, name="idx"),), Decision(self.labels, self.gold(row, at=at), line)

    def check(self, row: Mapping[str, Any], *, at: str) -> None:
        """Refuses what the encoding of a row cannot take, beside the types of its fields."""

    def index(self, row: Mapping[str, Any]) -> Any:
        """A row's idx, not checked yet."""
        return row.get("idx")

    def gold(self, row: Mapping[str, Any], *, at: str) -> tuple[str, ...]:
        """The right label of a row or an answer by name; empty where it has none."""
        if "label" not in row:
            return ()
        for name, spelling in self.in_data.items():
            # 1 equals True in Python, and not here.
            if type(row["label"]) is type(spelling) and row["label"] == spelling:
                return (name,)
        expected = ", ".join(json.dumps(spelling) for spelling in self.in_data.values())
        raise DataError(f"{at}: label is {json.dumps(row['label'])}, {self.name} has {expected}")

    def submission_rows(self, answers: Answers) -> Iterator[dict[str, Any]]:
        """Lines of a submission, ascending idx."""
        for key in sorted(answers):
            yield {"idx": key[0], "label": self.in_submission.get(answers[key], answers[key])}

    def submitted(self, row: Mapping[str, Any], *, known: set[Key], seen: set[Key]) -> Iterator[Submitted]:
        """Every decision in a line of a submission.

        Args:
            row: A line of the submission, parsed and not checked.
            known: Keys of the data and their beginnings.
            seen: Beginnings of keys that were met so far; those of this line are added.
        """
        if row.keys() != {"idx", "label"}:
            yield (), None, f"the keys are {sorted(row)}, idx and label are expected"
        elif type(row["idx"]) is not int:
            yield (), None, f"idx is {json.dumps(row['idx'])}, a whole number is expected"
        else:
            yield (row["idx"],), row["label"], None

    def label_problem(self, label: Any, decision: Decision, *, idx: str) -> str | None:
        """What is wrong with a label of a submission."""
        if any(type(label) is type(right) and label == right for right in self.in_submission.values()):
            return None
        expected = ", ".join(json.dumps(right) for right in self.in_submission.values())
        return f"idx {idx}: label {json.dumps(label)}, {self.name} has {expected} (type included)"


def labelled(in_data: Spelling, *counts: int, in_submission: Spelling | None = None) -> dict[str, Any]:
    """What a task is made with whose decisions are among labels, or whose test split alone is.

    Args:
        in_data: How the data spells the labels.
        counts: Official number of decisions of train, val and test, or of test alone.
        in_submission: How a submission spells them; by default like the data.
    """
    splits = ("train", "val", "test") if len(counts) == 3 else ("test",)
    return {
        "labels": tuple(in_data),
        "in_data": in_data,
        "in_submission": in_data if in_submission is None else in_submission,
        "splits": splits,
        "counts": dict(zip(splits, counts, strict=True)),
    }


def row_key(row: Mapping[str, Any]) -> Key:
    """Key of a row that was read."""
    return (int(row["idx"]),)
