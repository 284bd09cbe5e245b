"""What happens around the runs: locks before the ranks meet, the table after the last."""

import shutil
from pathlib import Path

import pytest

from deberta_dist.errors import ConfigError
from deberta_dist.finetuning import finetune
from deberta_dist.finetuning.arguments import parse
from deberta_dist.finetuning.folder import TaskFolder
from deberta_dist.finetuning.run import identity
from deberta_dist.tasks.base import Release
from deberta_dist.tasks.predictions import predictions_file, write_predictions
from deberta_dist.tasks.superglue.benchmark import SUPERGLUE
from deberta_dist.tasks.superglue.tasks import TASKS
from tests.finetuning.small import DATA, Case


def words(directory: Path, *more: str) -> list[str]:
    """A command line."""
    return ["--init", str(directory / "dropout-0"), "--recipe", str(directory / "recipes.toml"), "--data", str(DATA), *more]


def test_whoever_works_on_any_of_the_tasks_is_found_before_the_ranks_meet(
    start_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "start_process_group", lambda **_: pytest.fail("the ranks met"))
    other = TaskFolder(tmp_path, TASKS["COPA"], 7)
    other.begin()
    with pytest.raises(ConfigError, match=r"COPA.unfinished is in use by another run"):
        finetune._run(start_directory / "finetune.sh", words(start_directory, "--task", "CB,COPA", "--out", str(tmp_path)))


def test_runs_of_another_precision_are_other_runs(start_directory: Path) -> None:
    (start_directory / "bf16.json").write_text('{"zero_optimization": {"stage": 3}, "bf16": {"enabled": true}}')
    made_from = []
    for more in ((), ("--run.deepspeed", str(start_directory / "bf16.json")), ("--run.directory", "elsewhere")):
        plan, start = Case("CB", overrides=more).plan(start_directory)
        made_from.append(identity(plan, start=start, through=None))
    assert made_from[0] == made_from[2] and made_from[0] != made_from[1]


def test_what_cannot_be_scored_costs_the_table_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = {
        key: {"entailment": 0.5, "not_entailment": 0.5} for key in Release(DATA, SUPERGLUE).read(TASKS["RTE"], "val").decisions
    }
    write_predictions(predictions_file(tmp_path / "run" / "seed-7", TASKS["RTE"], "val"), answers)
    shutil.copytree(DATA / "CB", tmp_path / "data" / "CB")
    arguments = parse(["--task", "CB", "--init", "x", "--data", str(tmp_path / "data")])
    finetune._report(tmp_path / "run", arguments, finished_before=False)
    assert "no table of scores" in (said := capsys.readouterr().out) and "RTE/val.jsonl is missing" in said
    finetune._report(tmp_path / "run", parse(["--task", "CB", "--init", "x", "--data", str(DATA)]), finished_before=False)
    assert "1 of 8, missing BoolQ" in capsys.readouterr().out and (tmp_path / "run" / "scores.md").is_file()
