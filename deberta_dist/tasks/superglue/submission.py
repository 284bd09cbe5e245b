"""Writes the files of a SuperGLUE submission, and validates them, or anyone else's, before they are uploaded.

A grader that gets a wrong label, a missing row or a wrong type scores it as an error or, worse, as a wrong answer, and
uploads are few. So everything that can be checked against the data is.

Source: the file format of the benchmark authors' own writer, nyu-mll/jiant-v1-legacy jiant/evaluate.py@8be1fade.
"""

import json
from collections.abc import Mapping
from typing import Any

from deberta_dist.errors import DataError, printable
from deberta_dist.tasks.base import TEST, Release, Split, Submission, Task, Verdict
from deberta_dist.tasks.data_files import json_lines
from deberta_dist.tasks.decisions import Answers, Key, shown
from deberta_dist.tasks.superglue.task import SuperGlueTask
from deberta_dist.tasks.superglue.tasks import TASKS

_MOST_PROBLEMS = 20  # of one file
_TASK_OF = {task.file_name: task for task in TASKS.values()}


class JsonLinesSubmission(Submission):
    """Ten files of JSON lines."""

    def file_name(self, task: Task) -> str:
        """BoolQ.jsonl"""
        return _own(task).file_name

    def content(self, split: Split, answers: Answers) -> bytes:
        """The file of one task, ascending idx."""
        rows = _own(split.task).submission_rows(answers)
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")

    def missing(self, name: str) -> str:
        """A partial submission is refused."""
        return f"{name} is missing: all ten files are needed"

    def validate(self, files: Mapping[str, bytes], release: Release) -> Verdict:
        """Names, rows, idx, labels and their types, nesting, official counts."""
        verdict = Verdict()
        for name in files:
            if name not in _TASK_OF:
                near = next((one for one in _TASK_OF if one.lower() == name.lower()), None)
                verdict.errors.append(
                    f"{printable(name)}: no file of a submission has this name" + (f"; {near} is meant" if near else "")
                )
        for name, task in _TASK_OF.items():
            if name not in files:
                verdict.errors.append(self.missing(name))
            elif not release.has(task, TEST):
                verdict.errors.append(f"{name} cannot be checked: {release.path} has no {task.data_file(TEST)}")
            else:
                _validate_file(verdict, name, files[name], release.read(task, TEST))
        return verdict


def _own(task: Task) -> SuperGlueTask:
    assert isinstance(task, SuperGlueTask)
    return task


def _validate_file(verdict: Verdict, name: str, content: bytes, split: Split) -> None:
    task = split.task
    if not split.is_official:
        verdict.warnings.append(
            f"{name}: {split.where} has {len(split.decisions):,} of the official {task.counts[TEST]:,} decisions; "
            "the leaderboard would refuse it"
        )
    problems, labels, is_ascending = _check_file(content, split)
    verdict.errors += [f"{name}{problem}" for problem in problems[:_MOST_PROBLEMS]]
    if len(problems) > _MOST_PROBLEMS:
        verdict.errors.append(f"{name}: {len(problems) - _MOST_PROBLEMS} more")
    if problems:
        return
    if not is_ascending:
        verdict.warnings.append(f"{name}: its idx do not ascend, as those of the benchmark's own writer do")
    if task.labels and len(set(labels)) == 1 and len(labels) > 1:
        verdict.warnings.append(f"{name}: every label is {json.dumps(labels[0])}")


def _check_file(content: bytes, split: Split) -> tuple[list[str], list[Any], bool]:
    """(problems, each beginning with where it is; all labels; whether idx ascend)."""
    task = _own(split.task)
    problems: list[str] = []
    found: dict[Key, int] = {}
    labels: list[Any] = []
    # Passages and questions of MultiRC: those of the data, and those met so far.
    known = {key[:length] for key in split.decisions for length in (1, 2)}
    seen: set[Key] = set()
    try:
        for line, row in json_lines(content, where="", may_be_blank=False):
            at = f", line {line}"
            for key, label, problem in task.submitted(row, known=known, seen=seen):
                if problem is None and key not in split.decisions:
                    problem = f"idx {shown(key)} is not in the test data"
                if problem is None and key in found:
                    problem = f"idx {shown(key)} stands in line {found[key]} already"
                if problem is None:
                    problem = task.label_problem(label, split.decisions[key], idx=shown(key))
                if problem is not None:
                    problems.append(f"{at}: {problem}")
                    continue
                found[key] = line
                labels.append(label)
    except DataError as error:
        return [str(error)], [], True
    missing = [key for key in split.decisions if key not in found]
    if missing and not problems:
        some = ", ".join(map(shown, missing[:5]))
        problems.append(f": {len(missing)} idx of the test data are missing, the first are {some}")
    return problems, labels, list(found) == sorted(found)
