"""The data as the benchmark distributes it: a folder, or ``combined.zip``, read strictly and with line numbers.

What a split asks for is a set of *decisions*, one per row, per answer (MultiRC) or per query (ReCoRD), each under a key
made of the data's own idx. Predictions, scores and submissions meet in these keys and never in the order of lines.
"""

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deberta_dist.errors import DataError, printable
from deberta_dist.files.foreign import HEAD_BYTES, begins_like, head_of, refuse_foreign
from deberta_dist.files.strict_json import loads
from deberta_dist.tasks.registry import PER_ANSWER, PER_CANDIDATE, TASKS, Task

Key = tuple[int, ...]
"""(idx,), or (passage, question, answer) of MultiRC."""


@dataclass(frozen=True)
class Decision:
    """One thing to decide.

    Attributes:
        labels: What may be answered, by name; for a query of ReCoRD its passage's entities, each text once.
        gold: Right answers by name: one, or every accepted text of a query; empty where they are not public.
        line: Of the file, from 1.
    """

    labels: tuple[str, ...]
    gold: tuple[str, ...]
    line: int


@dataclass(frozen=True)
class Split:
    """One file of the release.

    Attributes:
        task: Its task.
        name: train, val or test.
        where: The file, for messages.
        sha256: Of its content.
        rows: Its rows as they stand there.
        decisions: By key, in the file's order.
    """

    task: Task
    name: str
    where: str
    sha256: str
    rows: tuple[Mapping[str, Any], ...] = field(repr=False)
    decisions: Mapping[Key, Decision] = field(repr=False)

    @property
    def is_official(self) -> bool:
        """Whether it has the official number of decisions."""
        return len(self.decisions) == self.task.counts.get(self.name)


class Release:
    """A folder in the official layout (``BoolQ/train.jsonl`` ... ``AX-b/AX-b.jsonl``), or a zip of one.

    Args:
        path: Folder or zip file; in a zip the layout may lie in a folder of its own.

    Raises:
        DataError: neither.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._members: dict[str, str] = {}
        if self.path.is_dir():
            return
        try:
            with zipfile.ZipFile(self.path) as archive:
                names = archive.namelist()
        except (OSError, zipfile.BadZipFile) as error:
            head = head_of(self.path)
            refuse_foreign(head, path)
            raise DataError(
                f"{path} is neither a folder nor a zip file of SuperGLUE data ({error}){begins_like(head)}"
            ) from error
        for wanted in {task.data_file(split) for task in TASKS.values() for split in task.counts}:
            found = [name for name in names if name == wanted or name.endswith(f"/{wanted}")]
            if len(found) > 1:
                raise DataError(f"{path} holds {wanted} twice: {', '.join(found)}")
            if found:
                self._members[wanted] = found[0]

    def has(self, task: Task, split: str) -> bool:
        """Whether it holds a split."""
        wanted = task.data_file(split)
        # A link that leads nowhere counts: a task must not go missing without a word.
        return split in task.counts and (wanted in self._members or os.path.lexists(self.path / wanted))

    def tasks(self, split: str) -> list[Task]:
        """Tasks of which it holds a split, in the order of the leaderboard."""
        return [task for task in TASKS.values() if self.has(task, split)]

    def _content(self, wanted: str, *, where: str) -> bytes:
        try:
            if not self._members:
                return (self.path / wanted).read_bytes()
            with zipfile.ZipFile(self.path) as archive:
                return archive.read(self._members[wanted])
        # Damaged and encrypted archives fail in every part of the reader, each with an error of its own.
        except Exception as error:
            link = self.path / wanted
            if link.is_symlink() and not link.exists():
                to = os.readlink(link)
                raise DataError(f"{where} is a link that leads nowhere, to {to}: mend it, or take it away") from error
            raise DataError(f"{where} cannot be read ({type(error).__name__}: {error})") from error

    def read(self, task: Task, split: str) -> Split:
        """Reads and checks a split.

        Raises:
            DataError: it is missing, or a line is not what it should be; the message has file and line.
        """
        wanted = task.data_file(split)
        where = str(self.path / wanted)
        if not self.has(task, split):
            raise DataError(f"{where} is missing: {task.name} needs the split {split}")
        content = self._content(wanted, where=where)
        rows: list[Mapping[str, Any]] = []
        decisions: dict[Key, Decision] = {}
        for line, row in json_lines(content, where=where):
            at = f"{where}, line {line}"
            _require_fields(row, task.fields, at=at)
            for key, decision in _decisions(task, row, line=line, at=at):
                if not decision.gold and split != "test":
                    raise DataError(f"{at}: idx {shown(key)} has no answer, which the split {split} needs")
                if key in decisions:
                    raise DataError(f"{at}: idx {shown(key)} stands in line {decisions[key].line} already")
                decisions[key] = decision
            rows.append(row)
        if not rows:
            raise DataError(f"{where} is empty")
        sha256 = hashlib.sha256(content).hexdigest()
        return Split(task=task, name=split, where=where, sha256=sha256, rows=tuple(rows), decisions=decisions)


def json_lines(content: bytes, *, where: str, may_be_blank: bool = True) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not empty.

    Args:
        content: Of the file.
        where: Its name, for messages.
        may_be_blank: Whether empty lines are passed over; the end of the last line is none.

    Raises:
        DataError: a line is not an object of JSON in UTF-8, or has a key twice.
    """
    refuse_foreign(content, where)
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            if may_be_blank or (number == len(lines) and not line):
                continue
            raise DataError(f"{where}, line {number}: empty")
        try:
            value = loads(line, any_numbers=True)
        except ValueError as error:
            like = begins_like(content[:HEAD_BYTES])
            if isinstance(error, UnicodeDecodeError) and not like:
                byte = f"0x{line[error.start]:02x}, byte {error.start} of the line"
                raise DataError(f"{where}, line {number}: not UTF-8 ({byte}): convert the file to UTF-8") from error
            raise DataError(f"{where}, line {number}: not valid JSON ({error}){like}") from error
        if not isinstance(value, dict):
            raise DataError(f"{where}, line {number}: {type(value).__name__}, where an object is expected")
        yield number, value


def integer(value: Any, *, at: str, name: str) -> int:
    """A whole number from 0 on.

    Raises:
        DataError: it is something else.
    """
    if type(value) is not int or value < 0:
        raise DataError(f"{at}: {name} is {printable(repr(value))}, a whole number from 0 on is expected")
    return value


def shown(key: Key) -> str:
    """A key for messages."""
    return "/".join(map(str, key))


def _require_fields(row: Mapping[str, Any], fields: Mapping[str, type], *, at: str) -> None:
    for name, kind in fields.items():
        if type(row.get(name)) is not kind:
            found = f"is {type(row[name]).__name__}" if name in row else "is missing"
            raise DataError(f"{at}: {name} {found}, {kind.__name__} is expected")


def _decisions(task: Task, row: Mapping[str, Any], *, line: int, at: str) -> Iterator[tuple[Key, Decision]]:
    if task.kind == PER_ANSWER:
        yield from _answers(task, row, line=line, at=at)
    elif task.kind == PER_CANDIDATE:
        yield from _queries(row, line=line, at=at)
    else:
        idx = row.get("idx")
        if task.name == "AX-b" and isinstance(idx, str) and re.fullmatch("[0-9]{1,9}", idx):
            idx = int(idx)  # the official file has its numbers as text
        _check_fields(task, row, at=at)
        yield (integer(idx, at=at, name="idx"),), Decision(task.labels, _gold(task, row, at=at), line)


def _gold(task: Task, row: Mapping[str, Any], *, at: str) -> tuple[str, ...]:
    if "label" not in row:
        return ()
    for name, spelling in task.in_data.items():
        # 1 equals True in Python, and not here.
        if type(row["label"]) is type(spelling) and row["label"] == spelling:
            return (name,)
    expected = ", ".join(json.dumps(spelling) for spelling in task.in_data.values())
    raise DataError(f"{at}: label is {json.dumps(row['label'])}, {task.name} has {expected}")


def _answers(task: Task, row: Mapping[str, Any], *, line: int, at: str) -> Iterator[tuple[Key, Decision]]:
    passage = integer(row.get("idx"), at=at, name="idx")
    _require_fields(row["passage"], {"text": str, "questions": list}, at=f"{at}: passage")
    seen: set[int] = set()
    for question in row["passage"]["questions"]:
        here = f"{at}: question"
        _require_fields(_object(question, at=here), {"question": str, "answers": list}, at=here)
        number = integer(question.get("idx"), at=here, name="idx")
        if number in seen:
            raise DataError(f"{here} {number} stands in its passage twice")
        seen.add(number)
        for answer in question["answers"]:
            there = f"{here} {number}: answer"
            _require_fields(_object(answer, at=there), {"text": str}, at=there)
            key = (passage, number, integer(answer.get("idx"), at=there, name="idx"))
            yield key, Decision(task.labels, _gold(task, answer, at=there), line)


def _queries(row: Mapping[str, Any], *, line: int, at: str) -> Iterator[tuple[Key, Decision]]:
    _require_fields(row["passage"], {"text": str, "entities": list}, at=f"{at}: passage")
    text = row["passage"]["text"]
    entities: dict[str, None] = {}
    for entity in row["passage"]["entities"]:
        here = f"{at}: entity"
        start, end = (integer(_object(entity, at=here).get(name), at=here, name=name) for name in ("start", "end"))
        # The end is the entity's last character.
        if not start <= end < len(text):
            raise DataError(f"{here}: {start} to {end} lies outside the passage of {len(text)} characters")
        entities[text[start : end + 1]] = None
    for query in row["qas"]:
        here = f"{at}: query"
        _require_fields(_object(query, at=here), {"query": str}, at=here)
        answers = query.get("answers", [])
        texts = [_object(answer, at=here).get("text") for answer in answers] if isinstance(answers, list) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise DataError(f"{here}: an answer has no text")
        gold = dict.fromkeys(texts)
        yield (integer(query.get("idx"), at=here, name="idx"),), Decision(tuple(entities), tuple(gold), line)


def _check_fields(task: Task, row: Mapping[str, Any], *, at: str) -> None:
    """What the encoding of a row relies on beside the types of its fields."""
    if task.name == "COPA" and row["question"] not in ("cause", "effect"):
        raise DataError(f'{at}: question is {row["question"]!r}, "cause" or "effect" is expected')
    if task.name == "WiC":
        for number in ("1", "2"):
            start, end, length = row[f"start{number}"], row[f"end{number}"], len(row[f"sentence{number}"])
            if not 0 <= start < end <= length:
                raise DataError(f"{at}: characters {start} to {end} lie outside sentence{number} of {length}")
    if task.name == "WSC":
        fields = {"span1_text": str, "span1_index": int, "span2_text": str, "span2_index": int}
        _require_fields(row["target"], fields, at=f"{at}: target")
        for number in ("1", "2"):
            index, words = row["target"][f"span{number}_index"], len(row["text"].split())
            if not 0 <= index < words:
                raise DataError(f"{at}: target: span{number}_index is {index}, the text has {words} words")


def _object(value: Any, *, at: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{at}: {type(value).__name__}, where an object is expected")
    return value
