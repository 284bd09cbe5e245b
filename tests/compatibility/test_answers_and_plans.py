"""Predictions, submissions, calibrations and plans that version 0.1.0 wrote are read, and give what they gave."""

import json
import re
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.compatibility.commands import dry_run, same_numbers, tool

TASKS = "BoolQ CB COPA MultiRC ReCoRD RTE WiC WSC AX-b AX-g".split()


def members(file: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_predictions_make_the_same_submission(made: Path, tmp_path: Path) -> None:
    """Every line of all ten files; the older zip is valid as well."""
    words = ("--predictions", made / "answers", "--data", made / "inputs/superglue", "--out", tmp_path / "submission.zip")
    tool("make_submission", *words)
    found, expected = members(tmp_path / "submission.zip"), members(made / "submission.zip")
    assert found == expected and sorted(expected) == sorted(f"{task}.jsonl" for task in TASKS)
    tool("make_submission", "--validate", made / "submission.zip", "--data", made / "inputs/superglue")


def test_a_spoilt_submission_is_refused(made: Path, tmp_path: Path) -> None:
    """That the older one is valid says something."""
    with zipfile.ZipFile(tmp_path / "spoilt.zip", "w") as archive:
        for name, content in members(made / "submission.zip").items():
            archive.writestr(name, content.replace(b"entailment", b"contradiction") if name == "RTE.jsonl" else content)
    tool("make_submission", "--validate", tmp_path / "spoilt.zip", "--data", made / "inputs/superglue", code=65)


def test_predictions_have_the_same_scores(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)  # the directories of the runs are among the scores, as they were given
    words = ("--predictions", "answers", "--data", "inputs/superglue", "--json", tmp_path / "scores.json")
    tool("report_scores", *words)
    found, expected = (json.loads((path / "scores.json").read_text(encoding="utf-8")) for path in (tmp_path, made))
    assert found["tasks"].keys() >= {"RTE", "MultiRC"}
    same_numbers(found["tasks"], expected["tasks"], relative=1e-9)


def layout_written_by(planned: dict) -> dict:
    """Without paths, which are written as seen from the new file."""
    paths = {"data": ("sources", "validation", "tokenizer"), "run": ("directory", "deepspeed")}
    return {
        section: {key: value for key, value in table.items() if key not in paths.get(section, ())}
        for section, table in planned.items()
    }


@pytest.mark.parametrize("searched", ["one", pytest.param("all", marks=pytest.mark.slow)])
def test_a_calibration_gives_the_same_plan(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, searched: str) -> None:
    """The layout that the planner chose and wrote, key by key: of all layouts, or where no other is asked for."""
    monkeypatch.chdir(made)
    expected = tomllib.loads((made / "planned.toml").read_text(encoding="utf-8"))
    parallel, training = expected["parallel"], expected["training"]
    words = ["--gpus", 8, "--gpu", "a100-40", "--calibration", "calibration.json", "--toml", tmp_path / "planned.toml"]
    if searched == "one":
        words += ["--tensor", parallel["tensor_parallel_size"], "--pipeline", parallel["pipeline_parallel_size"]]
        words += ["--micro-batch", training["micro_batch_size"], "--recompute", training["recompute"]]
        words += ["--schedule", parallel["schedule"], "--offload", "none"]
    tool("plan_layout", "pretrain.toml", *words)
    found = tomllib.loads((tmp_path / "planned.toml").read_text(encoding="utf-8"))
    same_numbers(layout_written_by(found), layout_written_by(expected), relative=1e-9)
    # The seconds per step that the calibration gives.
    first = [(path / "planned.toml").read_text(encoding="utf-8").splitlines()[0] for path in (tmp_path, made)]
    assert re.findall(r"[0-9.]+", first[0]) == re.findall(r"[0-9.]+", first[1])


def test_a_plan_starts(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dry run of a TOML that the planner wrote then."""
    planned = tomllib.loads((made / "planned.toml").read_text(encoding="utf-8"))
    shape = [planned["parallel"].get(f"{axis}_parallel_size", 1) for axis in ("tensor", "pipeline", "data")]
    printed = dry_run(made / "planned.sh", "--world-size", 8, monkeypatch=monkeypatch)
    assert "tensor {} x pipeline {} x data {}".format(*shape) in printed
