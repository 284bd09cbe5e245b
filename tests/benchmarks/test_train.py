"""The benchmark of optimizer steps: this package and DeepSpeed's engine train the same model."""

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from benchmarks import train
from deberta_dist.errors import ConfigError

SMALL = ("--length", "32", "--micro-batches", "2", "--micro-batch-size", "2", "--layers", "2")


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return argparse.Namespace(**vars(parser.parse_args(words)), rounds=1, verb="train", json=None)


def test_all_contestants_are_the_default() -> None:
    assert arguments().contestants.split(",") == [train.OURS, train.SAME_MODEL, train.HUGGING_FACE]


@pytest.mark.parametrize(
    ("layout", "peers"), [("1x1x2", [train.SAME_MODEL, train.HUGGING_FACE]), ("2x1x1+sp", [train.SAME_MODEL])]
)
def test_contestants_take_the_same_steps(
    layout: str,
    peers: list[str],
    forked_ranks: Callable[[], AbstractContextManager[None]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    contestants = [train.OURS, *peers]
    with forked_ranks():
        found = train.run(arguments(*SMALL, "--layout", layout, "--contestants", ",".join(contestants)))["figures"]
    assert list(found) == contestants
    assert found[train.OURS]["loss"] == pytest.approx(found[train.SAME_MODEL]["loss"], rel=1e-5)
    if train.HUGGING_FACE in peers:
        # Another model: its loss is near, and not the same.
        assert found[train.OURS]["loss"] != pytest.approx(found[train.HUGGING_FACE]["loss"], rel=1e-5)
    assert all(row["range"][0] > 0 for row in found.values())
    assert f"ours {layout}" in capsys.readouterr().out


def test_an_unknown_contestant_is_refused() -> None:
    with pytest.raises(ConfigError, match="theirs; there are ours, deepspeed, huggingface"):
        train.run(arguments("--contestants", "theirs"))


def test_weights_made_on_the_device_are_for_ours_alone() -> None:
    with pytest.raises(ConfigError, match="--device-weights is for --contestants ours: the others would start from other"):
        train.run(arguments("--device-weights"))
