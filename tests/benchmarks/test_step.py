"""The step benchmark: the models compared are the same model, and what differs by design is said."""

import argparse

import pytest

from benchmarks import peers, step


def test_models_agree_where_they_compute_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    step.add_arguments(parser)
    arguments = parser.parse_args(["--preset", "tiny-v2", "--layers", "3", "--length", "48"])
    found = step.run(argparse.Namespace(**vars(arguments), rounds=1))
    assert 0 < found["agreement"]["hidden states"][peers.HUGGING_FACE] < 1e-5
    figures = found["figures"]
    assert figures.keys() == {step.OURS, peers.HUGGING_FACE}
    assert all(row["range"][0] > 0 for row in figures.values())
    assert figures[step.OURS]["saved_bytes"] < figures[peers.HUGGING_FACE]["saved_bytes"]
    text = capsys.readouterr().out
    assert "tiny-v2 with 3 layers, 2 x 48 tokens" in text and "has no enhanced mask decoder" in text
