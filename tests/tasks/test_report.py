"""Reports: numbers worked out by hand, what is missing or cannot be told, and the three forms of the result."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from deberta_dist.errors import DataError
from deberta_dist.tasks.base import Release
from deberta_dist.tasks.predictions import predictions_file, write_predictions
from deberta_dist.tasks.report import make_report
from deberta_dist.tasks.superglue.tasks import MAIN_TASKS, TASKS
from tests.tasks.conftest import write_run
from tests.tool_calls import assert_one_line_error, call

TOOL = "report_scores.py"
# The right answers of BoolQ are true, false, true, false under idx 4, 5, 7, 6.
BOOLQ = {
    "seed-1": {4: 0.9, 5: 0.1, 7: 0.9, 6: 0.1},  # all right
    "seed-2": {4: 0.9, 5: 0.1, 7: 0.4, 6: 0.1},  # one wrong
    "seed-3": {4: 0.6, 5: 0.9, 7: 0.4, 6: 0.1},  # two wrong; the mean of the three is right everywhere
}


def write_boolq(run: Path, seeds: Sequence[str] = tuple(BOOLQ)) -> Path:
    for seed in seeds:
        probabilities = {(idx,): {"true": share, "false": 1 - share} for idx, share in BOOLQ[seed].items()}
        write_predictions(predictions_file(run / seed, TASKS["BoolQ"], "val"), probabilities)
    return run


def write_answers(directory: Path, name: str, answers: dict[int, str]) -> None:
    task = TASKS[name]
    probabilities = {(idx,): {label: float(label == answer) for label in task.labels} for idx, answer in answers.items()}
    write_predictions(predictions_file(directory, task, "test" if task.is_diagnostic else "val"), probabilities)


def write_right(directory: Path, release: Release) -> Path:
    """A run without a fault."""
    for task in TASKS.values():
        split = release.read(task, "test" if task.is_diagnostic else "val")
        right = {
            key: {label: float(label == decision.gold[0]) for label in decision.labels}
            for key, decision in split.decisions.items()
        }
        write_predictions(predictions_file(directory, task, split.name), right)
    return directory


def rows_of(text: str, name: str) -> list[list[str]]:
    """Cells of the lines that begin with a name."""
    return [re.split(r"\s{2,}", line) for line in text.splitlines() if line.startswith(f"{name}  ")]


def test_mean_deviation_and_ensemble(release: Release, tmp_path: Path) -> None:
    run = write_boolq(tmp_path / "run")
    write_answers(run / "seed-1", "CB", {4: "entailment", 5: "contradiction", 7: "neutral", 6: "entailment"})
    write_answers(run / "seed-3", "CB", {4: "entailment", 5: "contradiction", 7: "entailment", 6: "entailment"})
    report = make_report([run], release)
    boolq, cb = report.scores["BoolQ"], report.scores["CB"]
    assert boolq.values() == boolq.values("accuracy") == (100.0, 75.0, 50.0)
    assert (boolq.spread().mean, boolq.spread().deviation, boolq.spread().count) == (75.0, 25.0, 3)
    assert boolq.ensemble.task_score == 100.0 and boolq.constant == ("true", 50.0)
    # F1 by class 4/5, 1 and 0, three of four right.
    assert cb.runs[1].metrics == pytest.approx({"macro_f1": 60.0, "accuracy": 75.0})
    assert cb.runs[1].task_score == pytest.approx(67.5)
    assert (cb.spread().mean, cb.spread().deviation) == pytest.approx((83.75, 32.5 / math.sqrt(2)))
    assert cb.spread("macro_f1").deviation == pytest.approx(40 / math.sqrt(2))
    assert report.overall()["mean"] == (None, "2 of 8, missing COPA, MultiRC, ReCoRD, RTE, WiC, WSC")

    text = report.text()
    assert rows_of(text, "BoolQ") == [["BoolQ", "accuracy", "75.0 ± 25.00 (3)", "100.0", "100.0 75.0 50.0", "50.0 (true)"]]
    # Of equal probabilities the ensemble takes the task's first label, here the wrong one.
    assert rows_of(text, "CB")[0] == ["CB", "macro_f1", "80.0 ± 28.28 (2)", "60.0", "100.0 - 60.0"]
    assert rows_of(text, "CB")[2][1:] == ["mean of both", "83.8 ± 22.98 (2)", "67.5", "100.0 - 67.5", "36.1 (entailment)"]
    assert rows_of(text, "ours, ensemble") == [["ours, ensemble", "100.0", "60.0/75.0", *"------", "-"]]
    assert "No average of the eight tasks: 2 of 8, missing COPA" in text and "note: CB: 2 of 3 runs have it" in text
    assert "note: WSC is missing; it is made by: deepspeed launchers/finetune_superglue.sh --task WSC" in text
    assert "note: AX-b is missing; it is made by: deepspeed launchers/finetune_superglue.sh --task RTE" in text
    assert "not the official number of decisions: BoolQ 4 of 3,270, CB 4 of 56" in text


def test_the_average_needs_all_eight(release: Release, tmp_path: Path) -> None:
    runs = [write_right(tmp_path / "right", release), write_run(tmp_path / "first", release, first=0.9)]
    report = make_report(runs, release)
    means = {name: report.scores[name].spread().mean for name in MAIN_TASKS}
    # Always the first label: half right but in CB (F1 2/3, 0, 0), MultiRC (nothing) and ReCoRD (half).
    assert report.scores["CB"].runs[1].task_score == pytest.approx((200 / 9 + 50) / 2)
    expected = dict.fromkeys(MAIN_TASKS, 75.0) | {"CB": (100 + (200 / 9 + 50) / 2) / 2, "MultiRC": 50.0}
    assert means == pytest.approx(expected)
    mean, ensemble = (report.overall()[kind] for kind in ("mean", "ensemble"))
    assert mean[0] == pytest.approx(sum(expected.values()) / 8) and ensemble == (100.0, "100.0")
    assert f"of means {mean[1]}, of ensembles 100.0" in report.text()
    # Apart from the eight: AX-g's pairs of neighbours have different answers.
    assert report.scores["AX-b"].runs[0].metrics == {"matthews": 100.0}
    assert report.scores["AX-g"].runs[0].metrics == {"gender_parity": 0.0, "accuracy": 100.0}
    for path in runs:
        predictions_file(path, TASKS["WSC"], "val").unlink()
    report = make_report(runs, release)
    assert "No average of the eight tasks: 7 of 8, missing WSC." in report.text()
    assert json.loads(report.json())["overall"] == {"mean": None, "ensemble": None, "missing": ["WSC"]}


def test_published_rows_stand_beside_ours(release: Release, tmp_path: Path) -> None:
    text = make_report([write_right(tmp_path / "run", release)], release).text()
    assert rows_of(text, "DeBERTa 1.5B + SiFT (test)")[0][1:] == (
        ["90.4", "94.9/97.2", "96.8", "88.2/63.7", "94.5/94.1", "93.2", "76.4", "95.9", "89.9"]
    )
    assert rows_of(text, "ours, mean of runs")[0][1:] == (
        ["100.0", "100.0/100.0", "100.0", "100.0/100.0", "100.0/100.0", "100.0", "100.0", "100.0", "100.0"]
    )
    assert "(arXiv 2006.03654, Table 5) are scores of the TEST split, ours of the VALIDATION split" in text
    # One run has no deviation.
    assert rows_of(text, "BoolQ")[0][2] == "100.0 (1)"


def test_against_another_model(release: Release, tmp_path: Path) -> None:
    ours, theirs = write_boolq(tmp_path / "ours"), write_boolq(tmp_path / "theirs", ("seed-1", "seed-2"))
    for side in (ours, theirs):
        for seed in ("seed-1", "seed-2"):
            write_answers(side / seed, "WSC", {4: "true", 5: "false", 7: "true", 6: "false"})
    write_answers(ours / "seed-1", "RTE", {4: "entailment", 5: "entailment", 7: "entailment", 6: "entailment"})
    write_answers(theirs / "seed-1", "RTE", {4: "entailment", 5: "entailment", 7: "entailment", 6: "entailment"})
    write_answers(theirs / "seed-1", "WiC", {4: "true", 5: "false", 7: "true", 6: "false"})
    report = make_report([ours], release, against=[theirs])
    # 100, 75, 50 and 100, 75: t = -12.5 / sqrt(625 / 3 + 312.5 / 2) = -0.6547 with 2.882 degrees of freedom; the density
    # between -t and t was integrated with Simpson's rule.
    assert report.comparisons["BoolQ"].p_value == pytest.approx(0.561151, abs=1e-6)
    text = report.text()
    assert rows_of(text, "BoolQ")[-1] == ["BoolQ", "75.0 ± 25.00 (3)", "87.5 ± 17.68 (2)", "-12.5", "0.561"]
    assert rows_of(text, "WSC")[-1][3:] == ["+0.0", "-"] and rows_of(text, "RTE")[-1][3:] == ["+0.0", "-"]
    assert "No test for WSC: the runs of neither side differ among themselves." in text
    assert "No test for RTE: two runs or more on each side are needed, 1 and 1 are there." in text
    assert "No test for WiC: only one side has it." in text
    told = json.loads(report.json(), parse_constant=pytest.fail)["comparisons"]
    assert list(told) == ["BoolQ", "RTE", "WSC"] and told["WSC"]["p_value"] is None
    with pytest.raises(DataError, match="seed-1 is given twice"):
        make_report([ours], release, against=[ours / "seed-1"])


def test_what_is_worth_a_look(release: Release, data: Path, tmp_path: Path) -> None:
    run = write_boolq(tmp_path / "run")
    (run / "seed-4").mkdir()
    write_answers(run / "seed-1", "COPA", {4: "1", 5: "0", 7: "1", 6: "0"})
    write_answers(run / "seed-1", "AX-b", dict.fromkeys((4, 5, 6, 7), "entailment"))
    path = data / "AX-b/AX-b.jsonl"
    path.write_text(re.sub(r', "label": "\w+"', "", path.read_text()))
    report = make_report([run], release)
    assert any(line.endswith("seed-4 has nothing to score") for line in report.notes)
    assert "COPA: 0.0 is below the 50.0 of always answering '0'" in report.notes
    assert any(line.startswith("AX-b is not scored: its rows in") for line in report.notes)
    assert list(report.scores) == ["BoolQ", "COPA"]
    with pytest.raises(DataError, match="nothing to score in --predictions .*seed-4: no TASK/val.jsonl"):
        make_report([run / "seed-4"], release)
    with pytest.raises(DataError, match="nothing to score in --against .*seed-4"):
        make_report([run / "seed-1"], release, against=[run / "seed-4"])


def test_predictions_for_other_rows_are_refused(release: Release, tmp_path: Path) -> None:
    run = write_boolq(tmp_path / "run")
    path = predictions_file(run / "seed-2", TASKS["BoolQ"], "val")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(DataError, match=r"seed-2/BoolQ/val.jsonl is not for .*: 1 of its idx have none, the first are 4"):
        make_report([run], release)
    refused = call(TOOL, "--predictions", "run", "--data", "data", "--json", "s.json", cwd=tmp_path)
    assert_one_line_error(refused, code=65, words="1 of its idx have none")
    assert not (tmp_path / "s.json").exists()


def test_the_tool(release: Release, tmp_path: Path) -> None:
    odd = "a|b\nc\x1b[31m"
    write_boolq(tmp_path / "run")
    (tmp_path / "run/seed-1/BoolQ/run.json").write_text('{"checkpoint": "x", "loss": NaN}')
    write_boolq(tmp_path / odd, ("seed-1", "seed-3"))
    words = ("--predictions", "run", "--data", "data", "--against", odd, "--json", "out/s.json", "--markdown", "s.md")
    made = call(TOOL, *words, cwd=tmp_path)
    assert made.returncode == 0 and made.stderr == "" and "\x1b" not in made.stdout
    assert "75.0 ± 25.00 (3)" in made.stdout and "75.0 ± 35.36 (2)" in made.stdout
    found = json.loads((tmp_path / "out/s.json").read_text(), parse_constant=pytest.fail)
    assert list(found) == (
        ["unit", "split", "runs", "against", "overall", "tasks", "diagnostics", "comparisons", "published", "notes"]
    )
    assert found["runs"] == ["run/seed-1", "run/seed-2", "run/seed-3"] and found["diagnostics"] == {}
    boolq = found["tasks"]["BoolQ"]
    assert [run["task_score"] for run in boolq["runs"]] == [100.0, 75.0, 50.0]
    assert [run["run"] for run in boolq["runs"]] == [{"checkpoint": "x", "loss": "NaN"}, None, None]
    assert boolq["task_score"] == {"mean": 75.0, "deviation": 25.0, "count": 3} and boolq["ensemble"]["task_score"] == 100.0
    assert found["published"]["rows"][4]["metrics"]["CB"] == {"macro_f1": 94.9, "accuracy": 97.2}
    tables = re.findall(r"(?:^\|.*\|\n)+", (tmp_path / "s.md").read_text(), flags=re.MULTILINE)
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert len(tables) == 3 and "| BoolQ | accuracy | 75.0 ± 25.00 (3) | 100.0 |" in tables[0]
    # Nothing is replaced, and nothing half done.
    refused = call(TOOL, *words[:4], "--json", "t.json", "--markdown", "s.md", cwd=tmp_path)
    assert_one_line_error(refused, code=65, words="s.md exists already")
    assert not (tmp_path / "t.json").exists()
    refused = call(TOOL, "--predictions", "nowhere", "--data", "data", cwd=tmp_path)
    assert_one_line_error(refused, code=65, words="nowhere is not a folder of predictions")
    (tmp_path / "data/BoolQ/val.jsonl").unlink()
    refused = call(TOOL, *words[:4], cwd=tmp_path)
    assert_one_line_error(refused, code=65, words="BoolQ/val.jsonl is missing: BoolQ needs the split val")
