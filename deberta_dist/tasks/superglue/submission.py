"""The files of a submission: written from answers, and validated, ours or anyone's, before they are uploaded.

A grader that gets a wrong label, a missing row or a wrong type scores it as an error or, worse, as a wrong answer, and
uploads are few. So everything that can be checked against the data is.

Source: the file format of the benchmark authors' own writer, nyu-mll/jiant-v1-legacy jiant/evaluate.py@8be1fade.
"""

import io
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from deberta_dist.errors import DataError, printable
from deberta_dist.tasks.release import Key, Release, Split, json_lines, shown
from deberta_dist.tasks.superglue.benchmark import PER_ANSWER, PER_CANDIDATE, TASKS, Task

_MAX_FILE_BYTES = 64 * 2**20
_MOST_PROBLEMS = 20  # of one file
_TASK_OF = {task.file_name: task for task in TASKS.values()}


@dataclass
class Verdict:
    """What is wrong with a submission.

    Attributes:
        errors: Each makes it worthless; with file and line.
        warnings: Each is worth a look.
    """

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def submission_lines(split: Split, answers: Mapping[Key, str]) -> bytes:
    """The file of one task, ascending idx.

    Args:
        split: The test split.
        answers: By name, for every decision.
    """
    task = split.task
    if task.kind == PER_ANSWER:
        rows: Iterator[dict[str, Any]] = _nested(task, answers)
    else:
        spelling = task.in_submission
        rows = ({"idx": key[0], "label": spelling.get(answers[key], answers[key])} for key in sorted(answers))
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")


def _nested(task: Task, answers: Mapping[Key, str]) -> Iterator[dict[str, Any]]:
    passages: dict[int, dict[int, list[dict[str, Any]]]] = {}
    for passage, question, answer in sorted(answers):
        label = task.in_submission[answers[passage, question, answer]]
        passages.setdefault(passage, {}).setdefault(question, []).append({"idx": answer, "label": label})
    for passage, questions in passages.items():
        listed = [{"idx": question, "answers": found} for question, found in questions.items()]
        yield {"idx": passage, "passage": {"questions": listed}}


def zip_bytes(files: Mapping[str, bytes]) -> bytes:
    """A zip with the files at its top level; equal files give equal bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, files[name])
    return buffer.getvalue()


def read_zip(path: Path) -> tuple[dict[str, bytes], list[str]]:
    """(files by name, what is wrong with the zip itself). Nothing is unpacked to disk.

    Raises:
        DataError: it is no zip file.
    """
    files, errors = {}, []
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                name = entry.filename
                parts = PurePosixPath(name).parts
                if name.startswith("/") or "\\" in name or ".." in parts:
                    errors.append(f"{printable(name)} leads out of the folder that it is unpacked in")
                elif not name or entry.is_dir() or name.startswith("__MACOSX/"):
                    continue
                elif len(parts) > 1:
                    errors.append(f"{printable(name)} lies in a folder: the files belong at the top level")
                elif name in files:
                    errors.append(f"{printable(name)} is there twice")
                elif name not in _TASK_OF:
                    files[name] = b""  # its name is the fault; what is in it need not be unpacked
                elif entry.file_size > _MAX_FILE_BYTES:
                    errors.append(f"{printable(name)} has {entry.file_size:,} bytes")
                elif entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    errors.append(f"{printable(name)} is compressed in a way that not everyone can unpack: deflate it")
                else:
                    files[name] = archive.read(entry)
    # Hostile archives fail in every part of the reader, each with an error of its own.
    except Exception as error:
        raise DataError(f"{path} is no zip file that can be read ({type(error).__name__}: {error})") from error
    return files, errors


def validate(files: Mapping[str, bytes], release: Release) -> Verdict:
    """Checks the files of a submission against the test data.

    Args:
        files: By name.
        release: With the test splits of all ten tasks.
    """
    verdict = Verdict()
    for name in files:
        if name not in _TASK_OF:
            near = next((one for one in _TASK_OF if one.lower() == name.lower()), None)
            verdict.errors.append(
                f"{printable(name)}: no file of a submission has this name" + (f"; {near} is meant" if near else "")
            )
    for name, task in _TASK_OF.items():
        if name not in files:
            verdict.errors.append(f"{name} is missing: all ten files are needed")
            continue
        if not release.has(task, "test"):
            verdict.errors.append(f"{name} cannot be checked: {release.path} has no {task.data_file('test')}")
            continue
        split = release.read(task, "test")
        if not split.is_official:
            verdict.warnings.append(
                f"{name}: {split.where} has {len(split.decisions):,} of the official {task.counts['test']:,} decisions; "
                "the leaderboard would refuse it"
            )
        problems, labels, is_ascending = _check_file(files[name], split)
        verdict.errors += [f"{name}{problem}" for problem in problems[:_MOST_PROBLEMS]]
        if len(problems) > _MOST_PROBLEMS:
            verdict.errors.append(f"{name}: {len(problems) - _MOST_PROBLEMS} more")
        if problems:
            continue
        if not is_ascending:
            verdict.warnings.append(f"{name}: its idx do not ascend, as those of the benchmark's own writer do")
        if task.kind != PER_CANDIDATE and len(set(labels)) == 1 and len(labels) > 1:
            verdict.warnings.append(f"{name}: every label is {json.dumps(labels[0])}")
    return verdict


def _check_file(content: bytes, split: Split) -> tuple[list[str], list[Any], bool]:
    """(problems, each beginning with where it is; all labels; whether idx ascend)."""
    problems: list[str] = []
    found: dict[Key, int] = {}
    labels: list[Any] = []
    # Passages and questions of MultiRC: those of the data, and those met so far.
    known = {key[:length] for key in split.decisions for length in (1, 2)}
    seen: set[Key] = set()
    try:
        for line, row in json_lines(content, where="", may_be_blank=False):
            at = f", line {line}"
            for key, label, problem in _rows(row, split, known=known, seen=seen):
                if problem is None and key not in split.decisions:
                    problem = f"idx {shown(key)} is not in the test data"
                if problem is None and key in found:
                    problem = f"idx {shown(key)} stands in line {found[key]} already"
                if problem is None:
                    problem = _label_problem(label, split, key)
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


def _rows(row: Mapping[str, Any], split: Split, *, known: set[Key], seen: set[Key]) -> Iterator[tuple[Key, Any, str | None]]:
    """(key, label, what is wrong with its form) of every decision in a line."""
    if split.task.kind == PER_ANSWER:
        yield from _nested_rows(row, known=known, seen=seen)
        return
    if row.keys() != {"idx", "label"}:
        yield (), None, f"the keys are {sorted(row)}, idx and label are expected"
    elif type(row["idx"]) is not int:
        yield (), None, f"idx is {json.dumps(row['idx'])}, a whole number is expected"
    else:
        yield (row["idx"],), row["label"], None


def _nested_rows(row: Mapping[str, Any], *, known: set[Key], seen: set[Key]) -> Iterator[tuple[Key, Any, str | None]]:
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


def _label_problem(label: Any, split: Split, key: Key) -> str | None:
    task = split.task
    idx = shown(key)
    if task.kind == PER_CANDIDATE:
        if isinstance(label, str) and label in split.decisions[key].labels:
            return None
        return f"idx {idx}: {json.dumps(label, ensure_ascii=False)} is no entity of the passage"
    if any(type(label) is type(right) and label == right for right in task.in_submission.values()):
        return None
    expected: Sequence[str] = [json.dumps(right) for right in task.in_submission.values()]
    return f"idx {idx}: label {json.dumps(label)}, {task.name} has {', '.join(expected)} (type included)"
