"""Submissions: made of predictions, averaged, zipped alike each time; and every broken one refused for its own reason."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deberta_dist.tasks.assemble import assemble, read_zip, zip_bytes
from deberta_dist.tasks.base import Release
from deberta_dist.tasks.predictions import predictions_file, write_predictions
from deberta_dist.tasks.superglue.submission import JsonLinesSubmission
from deberta_dist.tasks.superglue.tasks import TASKS
from tests.tasks.conftest import write_run
from tests.tool_calls import assert_one_line_error, call

TOOL = "make_submission.py"
LAUNCHER = "deepspeed launchers/finetune_superglue.sh"
Files = dict[str, bytes]
SUBMISSION = JsonLinesSubmission()
NAMES = [task.file_name for task in TASKS.values()]


@pytest.fixture
def files(release: Release, tmp_path: Path) -> Files:
    """A sound submission for the release."""
    return assemble([write_run(tmp_path / "run", release)], release).files


def test_a_sound_submission(files: Files, release: Release) -> None:
    verdict = SUBMISSION.validate(files, release)
    assert verdict.errors == [] and len(files) == 10
    lines = {name: [json.loads(line) for line in content.splitlines()] for name, content in files.items()}
    # Ascending idx, whatever the data's order; every spelling and type as the grader wants it.
    assert lines["BoolQ.jsonl"] == [{"idx": idx, "label": "true"} for idx in (4, 5, 6, 7)]
    assert lines["WSC.jsonl"][0] == {"idx": 4, "label": "True"} and lines["WiC.jsonl"][0]["label"] == "true"
    assert lines["COPA.jsonl"][0] == {"idx": 4, "label": 0} and lines["AX-b.jsonl"][0]["idx"] == 4
    assert [row["idx"] for row in lines["MultiRC.jsonl"]] == [0, 1]
    assert lines["MultiRC.jsonl"][1]["passage"]["questions"][0] == {
        "idx": 0,
        "answers": [{"idx": 0, "label": 0}, {"idx": 1, "label": 0}],
    }
    assert lines["ReCoRD.jsonl"] == [{"idx": idx, "label": "Ada"} for idx in range(4)]
    assert any("of the official 3,245 decisions" in warning for warning in verdict.warnings)
    assert any('CB.jsonl: every label is "entailment"' in warning for warning in verdict.warnings)


def edit(name: str, change: Callable[[list[Any]], object]) -> Callable[[Files], None]:
    """A change of a file's parsed lines."""

    def apply(files: Files) -> None:
        lines = [json.loads(line) for line in files[name].splitlines()]
        change(lines)
        files[name] = "".join(json.dumps(line) + "\n" for line in lines).encode()

    return apply


def put(name: str, content: bytes) -> Callable[[Files], None]:
    return lambda files: files.__setitem__(name, content)


def first(lines: list[Any]) -> dict[str, Any]:
    return lines[0]["passage"]["questions"][0]["answers"][0]


BROKEN: dict[str, tuple[Callable[[Files], object], str]] = {
    "a file is missing": (lambda f: f.pop("WiC.jsonl"), "WiC.jsonl is missing: all ten files are needed"),
    "a file too many": (put("notes.txt", b""), "notes.txt: no file of a submission has this name"),
    "a name in other letters": (lambda f: f.update({"boolq.jsonl": f.pop("BoolQ.jsonl")}), "BoolQ.jsonl is meant"),
    "not JSON": (put("CB.jsonl", b'{"idx": 4, "label": entailment}\n'), "CB.jsonl, line 1: not valid JSON"),
    "not an object": (put("CB.jsonl", b"[4]\n"), "CB.jsonl, line 1: list, where an object is expected"),
    "empty": (put("CB.jsonl", b""), "CB.jsonl: 4 idx of the test data are missing, the first are 4, 5, 7, 6"),
    "idx as text": (edit("RTE.jsonl", lambda x: x[1].update(idx="5")), 'RTE.jsonl, line 2: idx is "5", a whole number'),
    "idx as a boolean": (edit("RTE.jsonl", lambda x: x[1].update(idx=True)), "RTE.jsonl, line 2: idx is true"),
    "idx from enumeration": (edit("RTE.jsonl", lambda x: x[0].update(idx=0)), "RTE.jsonl, line 1: idx 0 is not in the test"),
    "idx twice": (edit("RTE.jsonl", lambda x: x.append(x[0])), "RTE.jsonl, line 5: idx 4 stands in line 1 already"),
    "a row is missing": (edit("RTE.jsonl", lambda x: x.pop(2)), "RTE.jsonl: 1 idx of the test data are missing"),
    "a key too many": (edit("RTE.jsonl", lambda x: x[0].update(p=0.5)), "the keys are ['idx', 'label', 'p']"),
    "a key is missing": (edit("RTE.jsonl", lambda x: x[0].pop("label")), "the keys are ['idx'], idx and label"),
    "label as a boolean": (edit("BoolQ.jsonl", lambda x: x[0].update(label=True)), 'label true, BoolQ has "true", "false"'),
    "label with a capital": (edit("WiC.jsonl", lambda x: x[0].update(label="True")), 'label "True", WiC has "true"'),
    "label without one": (edit("WSC.jsonl", lambda x: x[0].update(label="true")), 'label "true", WSC has "True"'),
    "label as text": (edit("COPA.jsonl", lambda x: x[0].update(label="0")), 'idx 4: label "0", COPA has 0, 1'),
    "label as a boolean for a number": (edit("COPA.jsonl", lambda x: x[0].update(label=True)), "label true, COPA has 0, 1"),
    "label of another task": (edit("CB.jsonl", lambda x: x[0].update(label="not_entailment")), 'CB has "entailment"'),
    "label null": (edit("AX-b.jsonl", lambda x: x[0].update(label=None)), "AX-b.jsonl, line 1: idx 4: label null"),
    "choice 2 of COPA": (edit("COPA.jsonl", lambda x: x[0].update(label=2)), "label 2, COPA has 0, 1"),
    "answers without nesting": (edit("MultiRC.jsonl", lambda x: x[0].update(label=0)), "MultiRC.jsonl, line 1: not nested as"),
    "answer as text": (edit("MultiRC.jsonl", lambda x: first(x).update(label="0")), 'label "0", MultiRC has 0, 1'),
    "answer is missing": (
        edit("MultiRC.jsonl", lambda x: x[0]["passage"]["questions"][1]["answers"].pop()),
        "MultiRC.jsonl: 1 idx of the test data are missing, the first are 0/3/9",
    ),
    "answer idx local": (edit("MultiRC.jsonl", lambda x: first(x).update(idx=0)), "idx 0/2/0 is not in the test data"),
    "passage twice": (edit("MultiRC.jsonl", lambda x: x.append(x[0])), "MultiRC.jsonl, line 3: passage idx 0 is there twice"),
    "passage unknown": (edit("MultiRC.jsonl", lambda x: x[0].update(idx=9)), "passage idx 9 is not in the test data"),
    "passage without questions": (edit("MultiRC.jsonl", lambda x: x[0]["passage"].update(questions=[])), "not nested as"),
    "question twice": (
        edit("MultiRC.jsonl", lambda x: x[0]["passage"]["questions"].append(x[0]["passage"]["questions"][0])),
        "question idx 0/2 is there twice",
    ),
    "question unknown": (
        edit("MultiRC.jsonl", lambda x: x[0]["passage"]["questions"].append({"idx": 99, "answers": [{"idx": 1, "label": 0}]})),
        "question idx 0/99 is not in the test data",
    ),
    "answers as text": (
        edit("MultiRC.jsonl", lambda x: x[0]["passage"]["questions"].append({"idx": 99, "answers": ""})),
        "not nested as",
    ),
    "an empty line": (put("CB.jsonl", b'{"idx": 4, "label": "neutral"}\n\n'), "CB.jsonl, line 2: empty"),
    "not an entity": (edit("ReCoRD.jsonl", lambda x: x[0].update(label="Babbage")), '"Babbage" is no entity of the passage'),
    "entity's number": (edit("ReCoRD.jsonl", lambda x: x[0].update(label=1)), "idx 0: 1 is no entity of the passage"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_submission_is_refused_for_its_own_reason(name: str, files: Files, release: Release) -> None:
    break_it, reason = BROKEN[name]
    break_it(files)
    errors = SUBMISSION.validate(files, release).errors
    assert errors and reason in errors[0], errors
    assert len(errors) <= 2, "one fault, one reason"


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        ("../BoolQ.jsonl", "leads out of the folder"),
        ("/BoolQ.jsonl", "leads out of the folder"),
        ("a\\..\\BoolQ.jsonl", "leads out of the folder"),
        ("submission/BoolQ.jsonl", "lies in a folder: the files belong at the top level"),
        ("CB.jsonl", "CB.jsonl is there twice"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_that_is_wrong_itself(files: Files, data: Path, tmp_path: Path, member: str, reason: str) -> None:
    path = tmp_path / "theirs.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr(zipfile.ZipInfo(member), b"")
    assert any(reason in error for error in read_zip(path, NAMES)[1])
    refused = call(TOOL, "--validate", path, "--data", data, cwd=tmp_path)
    assert refused.returncode == 65 and reason in refused.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "run", "theirs.zip"]


def test_the_tool_from_predictions_to_a_valid_zip(release: Release, data: Path, tmp_path: Path) -> None:
    for seed, share in (("a", 0.9), ("b", 0.3), ("c", 0.2)):
        write_run(tmp_path / seed, release, first=share)
        for name in ("RTE", "CB"):
            (tmp_path / seed / name / "run.json").write_text(json.dumps({"seed": seed, "of": name}, indent=2))
    (tmp_path / "b/AX-g/run.json").write_text('{"of": "AX-g"}')
    made = call(TOOL, "--predictions", "a", "b", "c", "--data", "data", "--out", "s.zip", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "s.zip: 10 of 10 files" in made.stdout and "valid" in made.stdout
    valid = call(TOOL, "--validate", "s.zip", "--data", "data", cwd=tmp_path)
    assert valid.returncode == 0 and "is a valid submission" in valid.stdout
    with zipfile.ZipFile(tmp_path / "s.zip") as archive:
        assert archive.namelist() == sorted(task.file_name for task in TASKS.values())
        # (0.9 + 0.3 + 0.2) / 3 < 0.5: the second of two labels.
        assert json.loads(archive.read("BoolQ.jsonl").splitlines()[0]) == {"idx": 4, "label": "false"}
    manifest = json.loads((tmp_path / "s.manifest.json").read_text())
    # Each task by its own model; the diagnostics by RTE's, where they say nothing themselves.
    assert [run["seed"] for run in manifest["tasks"]["RTE"]["runs"]] == ["a", "b", "c"]
    described = {name: [run and run["of"] for run in task["runs"]] for name, task in manifest["tasks"].items()}
    assert described["CB"] == ["CB"] * 3 and described["AX-b"] == ["RTE"] * 3 and described["BoolQ"] == [None] * 3
    assert described["AX-g"] == ["RTE", "AX-g", "RTE"]
    assert manifest["tasks"]["RTE"]["validation"]["metrics"]["accuracy"] == 50.0 and not manifest["zip"]["is_partial"]
    refused = call(TOOL, "--predictions", "a", "--data", "data", "--out", "s.zip", cwd=tmp_path)
    assert_one_line_error(refused, code=65, words="s.zip exists already")
    call(TOOL, "--predictions", "a", "b", "c", "--data", "data", "--out", "t.zip", cwd=tmp_path)
    assert (tmp_path / "s.zip").read_bytes() == (tmp_path / "t.zip").read_bytes()


def test_a_partial_zip_says_so(release: Release, tmp_path: Path) -> None:
    write_run(tmp_path / "run", release)
    for name in ("WSC", "AX-g"):
        predictions_file(tmp_path / "run", TASKS[name], "test").unlink()
    words = ("--predictions", "run", "--data", "data", "--out", "s.zip")
    refused = call(TOOL, *words, cwd=tmp_path)
    assert refused.returncode == 65 and not (tmp_path / "s.zip").exists()
    for name, task in (("WSC", "WSC"), ("AX-g", "RTE")):
        how = f"no run/{name}/test.jsonl, which is made by: {LAUNCHER} --task {task} --data DIR --init CHECKPOINT\n"
        assert f"wrong: {name}.jsonl is missing: all ten files are needed; {how}" in refused.stderr
    made = call(TOOL, *words, "--partial", cwd=tmp_path)
    assert made.returncode == 0 and "s.partial.zip: 8 of 10 files" in made.stdout and "not for submission" in made.stdout
    with zipfile.ZipFile(tmp_path / "s.partial.zip") as archive:
        notice = archive.read("NOT_FOR_SUBMISSION.txt").decode()
    assert "a grader would refuse it" in notice and f"missing AX-g.jsonl: {how}" in notice and notice.endswith(how)
    missing = json.loads((tmp_path / "s.partial.manifest.json").read_text())["missing"]
    assert missing["WSC"].startswith(f"{LAUNCHER} --task WSC ") and list(missing) == ["WSC", "AX-g"]
    refused = call(TOOL, "--validate", "s.partial.zip", "--data", "data", cwd=tmp_path)
    assert refused.returncode == 65 and "NOT_FOR_SUBMISSION.txt: no file of a submission has this name" in refused.stderr


def test_runs_that_say_nothing_or_speak_twice_are_refused(release: Release, tmp_path: Path) -> None:
    write_run(tmp_path / "run", release)
    (tmp_path / "empty").mkdir()
    words = ("--data", "data", "--out", "s.zip", "--partial", "--predictions")
    for runs, message in ((("empty",), "empty holds no predictions"), (("run", "./run"), "run is given twice")):
        assert_one_line_error(call(TOOL, *words, *runs, cwd=tmp_path), code=65, words=message)
    assert not (tmp_path / "s.partial.zip").exists()


def test_scores_below_a_constant_answer_are_told(release: Release, tmp_path: Path) -> None:
    """Whatever the task's metric: a constant answer of COPA has 50, the wrong half of it nothing."""
    run = write_run(tmp_path / "run", release)
    (run / "COPA/run.json").write_text('{"loss": NaN, "norm": 1e999}')
    found = assemble([run], release)
    # Constants themselves are not below the best of them, but for the one that MultiRC's F1 makes nothing of.
    (warning,) = [warning for warning in found.warnings if "below" in warning]
    assert warning.startswith("MultiRC.jsonl: 0.0 on the validation split is below the 28.6")
    assert found.sources["COPA"]["validation"]["constant_score"] == 50.0 and found.sources["COPA"]["runs"] == [
        {"loss": "NaN", "norm": "1e999"}
    ]
    assert found.sources["MultiRC"]["validation"]["constant"] == "1"
    path = predictions_file(run, TASKS["COPA"], "val")
    split = release.read(TASKS["COPA"], "val")
    wrong = {key: {"0": float(d.gold[0] == "1"), "1": float(d.gold[0] == "0")} for key, d in split.decisions.items()}
    path.unlink()
    write_predictions(path, wrong)
    (warning,) = [warning for warning in assemble([run], release).warnings if "COPA" in warning]
    assert "COPA.jsonl: 0.0 on the validation split is below the 50.0 of always answering" in warning
    path.unlink()
    assert any("no score" in warning for warning in assemble([run], release).warnings)


def test_hostile_zips_are_one_line(data: Path, tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(5):
            archive.writestr(f"x{number}", bytes(2**20))
    files, errors = read_zip(bomb, NAMES)
    assert set(files.values()) == {b""} and not errors, "what has no right name is not unpacked"
    with zipfile.ZipFile(tmp_path / "odd.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("CB.jsonl", b"x")
        archive.writestr("a\nerror: fake\x1b[31m", b"")
    assert "compressed in a way" in read_zip(tmp_path / "odd.zip", NAMES)[1][0]
    shown = call(TOOL, "--validate", "odd.zip", "--data", "data", cwd=tmp_path)
    assert shown.returncode == 65 and "\x1b" not in shown.stderr and "\nerror: fake" not in shown.stderr
    for content in (b"", b"PK\x03\x04", bomb.read_bytes()[:-30]):
        (tmp_path / "torn.zip").write_bytes(content)
        result = call(TOOL, "--validate", "torn.zip", "--data", "data", cwd=tmp_path)
        assert_one_line_error(result, code=65, words="not a readable zip file")


def test_equal_files_make_equal_zips() -> None:
    files = {"b": b"1", "a": b"2" * 1000}
    assert zip_bytes(files) == zip_bytes(dict(reversed(files.items())))
