"""The seam of tasks holds: one that this file alone knows is fine-tuned, scored and predicted through the public path."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deberta_dist.errors import ConfigError, DataError
from deberta_dist.finetuning import finetune
from deberta_dist.finetuning.arguments import parse, usage
from deberta_dist.tasks.base import Benchmark, Head, Release, Split, Task
from deberta_dist.tasks.data_files import DataFiles
from deberta_dist.tasks.decisions import Answers, Decision, Key
from deberta_dist.tasks.encoding import Example, RowEncoder, TextPart
from deberta_dist.tasks.predictions import read_predictions, require_covering
from deberta_dist.tasks.report import make_report
from tests.harness import free_port, run_ranks

COLOURS = ("red", "green", "blue")
TEXTS = ("the sea is wide", "a leaf fell", "it was on fire")


def neighbours(split: Split, answers: Answers) -> float:
    """A right answer counts 1, red for green or green for red a half."""
    points = {("red", "green"): 0.5, ("green", "red"): 0.5}
    found = [(decision.gold[0], answers[key]) for key, decision in split.decisions.items()]
    return sum(1.0 if a == b else points.get((a, b), 0.0) for a, b in found) / len(found)


class ColourTask(Task):
    """One text a line, ``key|text|colour``; keys are words."""

    def data_file(self, split: str) -> str:
        return f"{split}.txt"

    def read(self, files: DataFiles, split: str) -> Split:
        content = files.content(self.data_file(split))
        rows: list[dict[str, Any]] = []
        decisions = {}
        for line, text in enumerate(content.decode().splitlines(), start=1):
            key, words, colour = text.split("|")
            if colour not in ("", *self.labels):
                raise DataError(f"{files.where(self.data_file(split))}, line {line}: colour is {colour!r}")
            rows.append({"key": key, "text": words})
            decisions[(key,)] = Decision(self.labels, (colour,) if colour else (), line)
        where, sha256 = files.where(self.data_file(split)), hashlib.sha256(content).hexdigest()
        return Split(task=self, name=split, where=where, sha256=sha256, rows=tuple(rows), decisions=decisions)

    def examples(self, split: Split, encoder: RowEncoder) -> Iterator[Example]:
        for row in split.rows:
            yield encoder.windowed((row["key"],), [TextPart(row["text"])], [[]])

    def parse_key(self, value: Any, *, at: str) -> Key:
        if not isinstance(value, str):
            raise DataError(f"{at}: idx is {value!r}, a word is expected")
        return (value,)


COLOUR = ColourTask(name="Colour", head=Head.SEQUENCE, labels=COLOURS, measures={"neighbours": neighbours})
TOYS = Benchmark(name="Toys", tasks={"Colour": COLOUR}, order=("Colour",), command="toys", data_help="three files")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Eight rows to train on, four to score, three to answer."""
    for split, count in (("train", 8), ("val", 4), ("test", 3)):
        lines = [f"{split}-{i}|{TEXTS[i % 3]} {i}|{COLOURS[i % 3] if split != 'test' else ''}" for i in range(count)]
        (tmp_path / f"{split}.txt").write_text("\n".join(lines))
    return tmp_path


def words(directory: Path, data: Path, *more: str) -> list[str]:
    (data / "recipes.toml").write_text("[Colour]\n")
    fixed = ["--task", "Colour", "--data", str(data), "--init", str(directory / "dropout-0"), "--out", str(data / "run")]
    settings = {"training.epochs": "2", "training.global_batch_size": "8", "optimizer.learning_rate": "1e-3"}
    settings |= {"data.max_seq_length": "32", "data.window_overlap": "8", "training.seed": "7"}
    given = [word for key, value in settings.items() for word in (f"--{key}", value)]
    return [*fixed, "--recipe", str(data / "recipes.toml"), *given, *more]


def fine_tune(directory: Path, arguments: list[str], port: int) -> None:
    os.environ["MASTER_PORT"] = str(port)
    finetune.main(str(directory / "finetune.sh"), arguments, benchmark=TOYS)


def test_two_steps_scores_and_predictions(start_directory: Path, data: Path) -> None:
    run_ranks(1, fine_tune, start_directory, words(start_directory, data), free_port(), timeout=120)
    folder = data / "run" / "seed-7"
    metrics = [json.loads(line) for line in (folder / "Colour" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics if "loss" in line] == [1, 2]
    release = Release(data, TOYS)
    for split, count in (("val", 4), ("test", 3)):
        path = folder / "Colour" / f"{split}.jsonl"
        found = read_predictions(path, parse_key=COLOUR.parse_key)
        require_covering(found, release.read(COLOUR, split), where=path)
        assert list(found) == [(f"{split}-{i}",) for i in range(count)]
    run = json.loads((folder / "Colour" / "run.json").read_text())
    assert run["steps"] == 2 and list(run["metrics"]) == ["neighbours"]
    # The report scores what was predicted; the run has measured the same.
    report = make_report([data / "run"], release)
    assert report.scores["Colour"].runs[0].metrics == run["metrics"] and report.overall()["mean"][0] == run["score"]
    assert "Toys, validation split, percent" in (text := (data / "run" / "scores.txt").read_text())
    assert "Average of the one task" in text and "published" not in text
    config = json.loads((folder / "Colour" / "weights" / "config.json").read_text())
    assert config["id2label"] == {"0": "red", "1": "green", "2": "blue"}
    with pytest.raises(DataError, match="idx is 'val-0', a whole number"):
        read_predictions(folder / "Colour" / "val.jsonl")


def test_what_the_command_line_knows_comes_from_the_benchmark(start_directory: Path, data: Path) -> None:
    text = usage(TOYS)
    assert "Fine-tunes a DeBERTa on Toys." in text and "Colour, or all" in text and "--intermediate" not in text
    assert parse(words(start_directory, data), TOYS).tasks == ("Colour",)
    with pytest.raises(ConfigError, match="--task Other: 'Other' is none of Colour; or all alone"):
        parse(["--task", "Other", "--data", "x", "--init", "x"], TOYS)
    with pytest.raises(ConfigError, match="'Colour' is none of RTE"):
        parse(["--task", "Colour", "--data", "x", "--init", "x"])
    (data / "train.txt").write_text("a|b|pink")
    with pytest.raises(DataError, match=r"train.txt, line 1: colour is 'pink'"):
        finetune._run(start_directory / "finetune.sh", words(start_directory, data), benchmark=TOYS)
