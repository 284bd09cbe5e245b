"""The save benchmark: every contestant writes the whole state, and the pause is a part of ours."""

import argparse
from pathlib import Path

import pytest

from benchmarks import save
from benchmarks.convert import AND_FSYNC
from deberta_dist.models.masked_lm import DebertaForMaskedLM
from deberta_dist.models.presets import preset


def test_everyone_saves_the_same_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = save.run(argparse.Namespace(preset="tiny-v2", directory=tmp_path, rounds=2))
    num_parameters = sum(parameter.numel() for parameter in DebertaForMaskedLM(preset("tiny-v2")).parameters())
    assert found["parameters"] == num_parameters
    figures = found["figures"]
    assert list(figures) == [save.PAUSE, save.OURS, AND_FSYNC, "torch.save + fsync", "DeepSpeed save_checkpoint"]
    for row in figures.values():
        assert len(row["rounds"]) == 2 and row["wall_seconds"] > 0
        # Weights and two moments in float32, padding and what describes them.
        assert 12 * num_parameters <= row["bytes"] < 20 * num_parameters
    assert figures[save.PAUSE]["wall_seconds"] < figures[save.OURS]["wall_seconds"]
    assert not list(tmp_path.iterdir())
    assert "saving tiny-v2" in capsys.readouterr().out
