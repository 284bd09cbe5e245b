"""The pipeline benchmark: every schedule runs, and none is better than its work allows."""

import argparse

import pytest

from benchmarks import pipeline
from deberta_dist.errors import ConfigError


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    pipeline.add_arguments(parser)
    return argparse.Namespace(**vars(parser.parse_args(words)), rounds=1)


def test_every_schedule_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    found = pipeline.run(arguments("--processes", "2", "--micro-batches", "2", "--milliseconds", "10"))
    bubbles = {row["schedule"]: row["bubble"] for row in found["rows"]}
    assert bubbles.keys() == pipeline.SCHEDULES.keys()
    # Sleeping is never shorter than asked for, so these cannot be beaten.
    assert min(bubbles["GPipe"], bubbles["1F1B"]) > pipeline.formula(processes=2, micro_batches=2, stages_per_rank=1) - 1e-3
    assert bubbles["Interleaved1F1B"] > pipeline.formula(processes=2, micro_batches=2, stages_per_rank=2) - 1e-3
    assert all(0 < bubble < 1 for bubble in bubbles.values())
    text = capsys.readouterr().out
    assert "formula, 1 stage a rank" in text and "33.3%" in text


@pytest.mark.parametrize("words", [("--processes", "1"), ("--micro-batches", "3"), ("--milliseconds", "0")])
def test_numbers_that_make_no_pipeline_are_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=words[0]):
        pipeline.run(arguments(*words))
