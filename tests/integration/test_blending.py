"""A run on two sources: the same losses for every number of data-parallel ranks and over a resume, and no other sources."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from deberta_dist.training import pretrain
from tests.harness import free_port, run_ranks
from tests.integration.test_resume import ROOT, SAVED, STEPS, history, interrupted, settings_of

SOURCES = {"data.sources.half.proportion": 0.3, "data.sources.all.proportion": 0.7}


def pretrain_rank(launcher: str, arguments: list[str], port: int) -> None:
    os.environ["MASTER_PORT"] = str(port)
    pretrain._run(Path(launcher), arguments)


def run(corpus: Path, directory: Path, data_parallel_size: int, **changes: object) -> None:
    """As the runs of the resume tests, with sources in the place of ``data.train``."""
    text = (ROOT / "launchers" / "pretrain_demo.toml").read_text().replace("../", f"{ROOT}/")
    launcher = directory.with_suffix(".sh")
    launcher.with_suffix(".toml").write_text("".join(x for x in text.splitlines(True) if not x.startswith("train =")))
    settings = settings_of(corpus, directory, (1, 1, data_parallel_size)) | SOURCES
    settings |= {"data.sources.half.path": corpus / "other.tokens", "data.sources.all.path": corpus / "train.tokens"}
    settings |= changes
    del settings["data.train"]
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    run_ranks(data_parallel_size, pretrain_rank, str(launcher), arguments, free_port())


def records(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("blended") / "one"
    run(corpus, directory, 1)
    return directory


def test_ranks_and_resumes_change_nothing(corpus: Path, tmp_path: Path, whole: Path) -> None:
    run(corpus, tmp_path / "two", 2)
    continued = interrupted(whole, tmp_path / "continued")
    run(corpus, continued, 2)
    for directory in (tmp_path / "two", continued):
        np.testing.assert_allclose(history(directory), history(whole), rtol=1e-5)
    steps = [record for record in records(whole) if "loss" in record]
    assert len(steps) == STEPS and len({step["loss"] for step in steps}) == STEPS
    (first, *_), (*_, last) = records(continued), [r for r in records(whole) if "copy_seconds" in r]
    for record, consumed in ((first, 8 * SAVED), (last, 8 * STEPS)):
        place = record["position"]
        given = {name: where["epoch"] * where["num_samples"] + where["index"] for name, where in place.items()}
        assert sum(given.values()) == consumed and abs(given["half"] - 0.3 * consumed) < 1
    # 32 samples: neither source is read once.
    assert steps[-1]["epochs"] == {name: round(n / place[name]["num_samples"], 6) for name, n in given.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.sources.half.proportion": 0.4}, "data.sources.half.proportion = 0.4, 0.3 there"),
        ({"data.sources.half.path": "train.tokens", "data.max_seq_length": 30},
         "data.max_seq_length = 30, 32 there; data.sources.half is another text"),
        ({"data.sources.more.path": "train.tokens", "data.sources.more.proportion": 1}, "data.sources.more is new"),
    ],
)  # fmt: skip
def test_other_sources_are_refused(corpus: Path, tmp_path: Path, whole: Path, changes: dict, message: str) -> None:
    directory = interrupted(whole, tmp_path / "run")
    changes = {key: corpus / value if key.endswith("path") else value for key, value in changes.items()}
    with pytest.raises(AssertionError, match=message):
        run(corpus, directory, 1, **changes)
    assert not (directory / "metrics.jsonl").exists()
