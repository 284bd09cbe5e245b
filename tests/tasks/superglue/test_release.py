"""Reading the benchmark's files: what is decided under which key, and every fault by file and line."""

import gzip
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest

from deberta_dist.errors import DataError
from deberta_dist.tasks.base import Release
from deberta_dist.tasks.superglue.benchmark import SUPERGLUE
from deberta_dist.tasks.superglue.tasks import MAIN_TASKS, TASKS
from tests.tasks.conftest import rows


def test_keys_and_answers(release: Release) -> None:
    assert [task.name for task in release.tasks("test")] == list(TASKS) and len(MAIN_TASKS) == 8
    assert list(release.read(TASKS["BoolQ"], "train").decisions) == [(4,), (5,), (7,), (6,)]
    assert [d.gold for d in release.read(TASKS["BoolQ"], "train").decisions.values()] == [("true",), ("false",)] * 2
    assert not any(d.gold for d in release.read(TASKS["BoolQ"], "test").decisions.values())
    # The diagnostics have one file, with labels; AX-b writes its idx as text.
    assert [d.gold[0] for d in release.read(TASKS["AX-b"], "test").decisions.values()] == ["entailment", "not_entailment"] * 2
    assert list(release.read(TASKS["AX-b"], "test").decisions) == [(4,), (5,), (7,), (6,)]
    multirc = release.read(TASKS["MultiRC"], "val")
    assert list(multirc.decisions)[:5] == [(1, 0, 0), (1, 0, 1), (1, 1, 2), (1, 1, 3), (1, 1, 4)]
    assert [d.gold[0] for d in multirc.decisions.values()][:5] == ["0", "1", "0", "1", "0"]
    record = release.read(TASKS["ReCoRD"], "val")
    # Four entities, one of them twice; their ends are inclusive.
    assert record.decisions[(2,)].labels == ("Ada", "Charles", "London") and record.decisions[(3,)].gold == ("Charles",)
    assert not record.is_official


@pytest.mark.parametrize("folder", ["", "superglue/"])
def test_a_zip_is_read_like_a_folder(data: Path, tmp_path: Path, folder: str) -> None:
    with zipfile.ZipFile(tmp_path / "combined.zip", "w") as archive:
        for path in data.rglob("*.jsonl"):
            archive.write(path, folder + str(path.relative_to(data)))
    a, b = Release(data, SUPERGLUE), Release(tmp_path / "combined.zip", SUPERGLUE)
    for task in TASKS.values():
        for split in task.counts:
            assert a.read(task, split).decisions == b.read(task, split).decisions


def test_what_is_no_release(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for path in (tmp_path / "file", tmp_path / "nowhere"):
        with pytest.raises(DataError, match="neither a folder nor a zip file"):
            Release(path, SUPERGLUE)
    (data / "RTE/val.jsonl").unlink()
    with pytest.raises(DataError, match=r"RTE/val.jsonl is missing: RTE needs the split val"):
        Release(data, SUPERGLUE).read(TASKS["RTE"], "val")
    (data / "RTE/train.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"RTE/train.jsonl is empty"):
        Release(data, SUPERGLUE).read(TASKS["RTE"], "train")
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive:
        for folder in ("a/", "b/"):
            archive.write(data / "CB/val.jsonl", folder + "CB/val.jsonl")
    with pytest.raises(DataError, match="holds CB/val.jsonl twice"):
        Release(tmp_path / "twice.zip", SUPERGLUE)


def _set(path: str, value: Any):
    """A change of one field, e.g. passage.entities.0.end."""

    def change(row: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for part in parents:
            row = row[int(part) if part.isdecimal() else part]
        if value is None:
            del row[last]
        else:
            row[last] = value

    return change


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("BoolQ", _set("label", "true"), 'label is "true", BoolQ has true, false'),
        ("BoolQ", _set("label", 1), "label is 1, BoolQ has true, false"),
        ("COPA", _set("label", True), "label is true, COPA has 0, 1"),
        ("CB", _set("label", "not_entailment"), 'label is "not_entailment", CB has "entailment"'),
        ("RTE", _set("idx", "4"), "idx is '4', a whole number"),
        ("RTE", _set("label", None), "idx 4 has no answer, which the split train needs"),
        ("COPA", _set("question", "why"), 'question is \'why\', "cause" or "effect"'),
        ("WiC", _set("end2", 99), "characters 2 to 99 lie outside sentence2 of 6"),
        ("WSC", _set("target.span2_index", 6), "target: span2_index is 6, the text has 6 words"),
        ("WSC", _set("target.span1_text", None), "target: span1_text is missing"),
        ("MultiRC", _set("passage.questions.1.idx", 0), "question 0 stands in its passage twice"),
        ("ReCoRD", _set("qas.0.answers", 5), "an answer has no text"),
        ("ReCoRD", _set("qas.0.answers.0.text", ["x"]), "an answer has no text"),
        ("RTE", _set("idx", -1), "idx is -1, a whole number"),
        ("RTE", _set("idx", 1.0), "idx is 1.0, a whole number"),
        ("RTE", _set("idx", None), "idx is None"),
        ("RTE", _set("premise", None), "premise is missing, str is expected"),
        ("WiC", _set("start1", "2"), "start1 is str, int is expected"),
        ("MultiRC", _set("passage.questions.0.answers.1.label", "1"), 'question 0: answer: label is "1"'),
        ("MultiRC", _set("passage.questions.0.answers.1.idx", 0), "idx 1/0/0 stands in line 1 already"),
        ("MultiRC", _set("passage.questions.1.idx", None), "question: idx is None"),
        ("MultiRC", _set("passage.questions", None), "passage: questions is missing"),
        ("ReCoRD", _set("passage.entities.0.end", 999), "entity: 0 to 999 lies outside the passage"),
        ("ReCoRD", _set("qas.1.idx", 2), "idx 2 stands in line 1 already"),
        ("ReCoRD", _set("qas.0.answers.0.text", None), "an answer has no text"),
    ],
)
def test_a_faulty_line_is_named(data: Path, task: str, change, message: str) -> None:
    path = data / TASKS[task].data_file("train")
    found = rows(task, labels=True)
    change(found[0])
    path.write_text("\n".join(map(json.dumps, found)))
    with pytest.raises(DataError) as caught:
        Release(data, SUPERGLUE).read(TASKS[task], "train")
    assert f"{path}, line 1" in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize(
    "text", ['{"idx": 1', "[1]", '{"idx": 1, "idx": 2}', '{"idx": NaN}', "\udcff", '{"premise": "\\ud83d"}']
)
def test_a_malformed_line_is_named(data: Path, text: str) -> None:
    path = data / "CB/train.jsonl"
    path.write_bytes(path.read_bytes() + b"\n\n" + text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=r"CB/train.jsonl, line 6: "):
        Release(data, SUPERGLUE).read(TASKS["CB"], "train")


def test_numbers_of_any_length_stand_in_fields_that_are_not_read(data: Path) -> None:
    path = data / "CB/train.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line.replace("{", '{"weight": ' + "9" * 5000 + ', "other": 1e999, ', 1) for line in lines))
    read = Release(data, SUPERGLUE).read(TASKS["CB"], "train")
    assert len(read.decisions) == len(lines)
    path.write_text(lines[0].replace('"idx": ', '"idx": ' + "9" * 5000))
    with pytest.raises(DataError, match=r"CB/train.jsonl, line 1: idx is '9{199}, a whole number"):
        Release(data, SUPERGLUE).read(TASKS["CB"], "train")

    path.write_text(re.sub('"premise": "[^"]*"', '"premise": ' + "9" * 5000, lines[0]))
    with pytest.raises(DataError, match=r"line 1: premise is LongInteger, str is expected"):
        Release(data, SUPERGLUE).read(TASKS["CB"], "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"{}", mtime=0), r"line 1: not valid JSON .*; it begins like gzip data"),
        (b"{}\xe9", r"line 1: not UTF-8 \(0xe9, byte 2 of the line\): convert"),
        (None, "leads nowhere, to nowhere: fix or remove it"),
    ],
)
def test_a_foreign_file_is_told_and_its_task_not_passed_over(data: Path, content: bytes | None, message: str) -> None:
    path = data / "CB/train.jsonl"
    path.unlink()
    if content is None:
        path.symlink_to("nowhere")
    else:
        path.write_bytes(content)
    release = Release(data, SUPERGLUE)
    assert TASKS["CB"] in release.tasks("train")
    with pytest.raises(DataError, match=rf"CB/train.jsonl.*{message}"):
        release.read(TASKS["CB"], "train")


def test_a_duplicate_idx_is_named(data: Path) -> None:
    path = data / "CB/train.jsonl"
    path.write_text(path.read_text() + "\n" + path.read_text().splitlines()[1])
    with pytest.raises(DataError, match=r"line 5: idx 5 stands in line 2 already"):
        Release(data, SUPERGLUE).read(TASKS["CB"], "train")


def test_a_damaged_zip_is_named(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "combined.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(data / "CB/val.jsonl", "CB/val.jsonl")
    content = bytearray(path.read_bytes())
    content[content.index(b"premise")] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"CB/val.jsonl cannot be read \(BadZipFile"):
        Release(path, SUPERGLUE).read(TASKS["CB"], "val")
