"""Predictions of runs: which folders hold them, what is refused in them, and averages of several."""

from pathlib import Path

import pytest

from deberta_dist.errors import DataError
from deberta_dist.tasks.assemble import assemble
from deberta_dist.tasks.base import Release
from deberta_dist.tasks.predictions import (
    average,
    decide,
    prediction_folders,
    predictions_file,
    read_predictions,
    require_covering,
)
from deberta_dist.tasks.superglue.benchmark import SUPERGLUE
from deberta_dist.tasks.superglue.tasks import TASKS
from tests.tasks.conftest import write_run
from tests.tool_calls import call


def test_a_whole_run_stands_for_its_seeds(release: Release, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for seed, share in ((9, 0.9), (10, 0.3), (100, 0.2)):
        write_run(run / f"seed-{seed}", release, first=share)
    (run / "seed-notes.txt").touch()
    seeds = [run / "seed-9", run / "seed-10", run / "seed-100"]
    assert prediction_folders([run], SUPERGLUE) == seeds and prediction_folders(seeds, SUPERGLUE) == seeds
    assert assemble([run], release).files == assemble(seeds, release).files
    made = call("make_submission.py", "--predictions", "run", "--data", "data", "--out", "s.zip", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    with pytest.raises(DataError, match="seed-10 is given twice: it would count twice"):
        prediction_folders([run, seeds[1]], SUPERGLUE)
    with pytest.raises(DataError, match="nowhere is not a folder of predictions"):
        prediction_folders([run, tmp_path / "nowhere"], SUPERGLUE)
    (run / "CB").mkdir()
    with pytest.raises(DataError, match=r"holds seed-\* folders and predictions of its own"):
        prediction_folders([run], SUPERGLUE)


def test_averages_need_the_same_rows(release: Release, tmp_path: Path) -> None:
    split = release.read(TASKS["CB"], "test")
    path = predictions_file(write_run(tmp_path / "run", release), TASKS["CB"], "test")
    run = read_predictions(path)
    require_covering(run, split, where=path)
    assert average([run, run], names=["a", "b"]) == run
    fewer = {key: value for key, value in run.items() if key != (5,)}
    with pytest.raises(DataError, match="a and b are not predictions of the same rows: idx 5 is in one alone"):
        average([run, fewer], names=["a", "b"])
    other = {**run, (5,): {"true": 1.0}}
    with pytest.raises(DataError, match="other labels for idx 5"):
        average([run, other], names=["a", "b"])
    with pytest.raises(DataError, match="1 of its idx have none, the first are 5"):
        require_covering(fewer, split, where=path)
    with pytest.raises(DataError, match="1 idx are not in it, the first are 9"):
        require_covering({**run, (9,): run[(5,)]}, split, where=path)
    with pytest.raises(DataError, match="idx 5 has labels"):
        require_covering(other, split, where=path)
    # Of equal ones the first in the task's order.
    tied = {key: {"neutral": 0.4, "contradiction": 0.4, "entailment": 0.2} for key in run}
    assert set(decide(split, tied).values()) == {"contradiction"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"idx": 4, "probabilities": {"a": 0.5, "b": 0.4}}', "add up to 0.9000, not 1"),
        ('{"idx": 4, "probabilities": {"a": -0.5, "b": 1.5}}', "probability of 'a' is -0.5"),
        ('{"idx": 4, "probabilities": {"a": "1"}}', "probability of 'a' is '1'"),
        ('{"idx": 4, "probabilities": {"a": true}}', "probability of 'a' is True"),
        ('{"idx": "4", "probabilities": {"a": 1}}', "idx is '4'"),
        ('{"idx": 4, "label": "a"}', "idx and probabilities is expected"),
        ('{"idx": 3, "probabilities": {"a": 1}}', "idx 3 is there already"),
    ],
)
def test_damaged_predictions_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text('{"idx": 3, "probabilities": {"a": 1.0}}\n' + line)
    with pytest.raises(DataError, match="test.jsonl, line 2") as caught:
        read_predictions(path)
    assert message in str(caught.value)
