"""A release in miniature: rows written by hand in the official layout, a few of every task."""

import json
from pathlib import Path
from typing import Any

import pytest

from deberta_dist.tasks.base import Release
from deberta_dist.tasks.predictions import predictions_file, write_predictions
from deberta_dist.tasks.superglue.benchmark import SUPERGLUE
from deberta_dist.tasks.superglue.tasks import TASKS

PASSAGE = "Ada met Charles in London. Ada wrote notes; Charles built a machine."
ENTITIES = [{"start": PASSAGE.index(word), "end": PASSAGE.index(word) + len(word) - 1} for word in ("Ada", "Charles", "London")]


def multirc(idx: int, first: int, *, labels: bool) -> dict[str, Any]:
    """A passage with two questions of two and three answers; question and answer idx count on through the split."""
    questions, answer = [], 5 * first
    for number, count in ((2 * first, 2), (2 * first + 1, 3)):
        answers = []
        for i in range(count):
            answers.append({"text": f"answer {i}", "idx": answer} | ({"label": i % 2} if labels else {}))
            answer += 1
        questions.append({"question": f"Which, {number}?", "idx": number, "answers": answers})
    return {"idx": idx, "version": 1.1, "passage": {"text": "Some text.", "questions": questions}}


def record(idx: int, first: int, *, labels: bool) -> dict[str, Any]:
    """A passage with two queries."""
    qas: list[dict[str, Any]] = [
        {"query": "@placeholder wrote notes.", "idx": first},
        {"query": "@placeholder built it.", "idx": first + 1},
    ]
    if labels:
        for query, name in zip(qas, ("Ada", "Charles"), strict=True):
            start = PASSAGE.index(name)
            query["answers"] = [{"start": start, "end": start + len(name) - 1, "text": name}]
    twice = {"start": PASSAGE.rindex("Ada"), "end": PASSAGE.rindex("Ada") + 2}
    return {"source": "CNN", "idx": idx, "passage": {"text": PASSAGE, "entities": [*map(dict, ENTITIES), twice]}, "qas": qas}


def rows(task: str, *, labels: bool) -> list[dict[str, Any]]:
    """Four rows or so; idx neither begins at 0 nor is in order."""
    if task == "MultiRC":
        return [multirc(1, 0, labels=labels), multirc(0, 1, labels=labels)]
    if task == "ReCoRD":
        return [record(1, 2, labels=labels), record(0, 0, labels=labels)]
    texts = {
        "BoolQ": {"question": "is it so", "passage": "So -- It is so."},
        "CB": {"premise": "It is so.", "hypothesis": "it is"},
        "COPA": {"premise": "It rained.", "choice1": "It was wet.", "choice2": "It was dry.", "question": "effect"},
        "RTE": {"premise": "It is so.", "hypothesis": "It is."},
        "WiC": {"word": "run", "sentence1": "A run.", "sentence2": "I run.", "start1": 2, "end1": 5, "start2": 2, "end2": 5},
        "WSC": {
            "text": "Ann met Eve and she smiled.",
            "target": {"span1_text": "Ann", "span1_index": 0, "span2_text": "she", "span2_index": 4},
        },
        "AX-b": {"sentence1": "It is so.", "sentence2": "It is not so."},
        "AX-g": {"premise": "He is here.", "hypothesis": "She is here.", "pair_id": 1},
    }
    spellings = list(TASKS[task].in_data.values())
    numbers = [4, 5, 7, 6] if task != "AX-b" else ["4", "5", "7", "6"]
    labelled = labels or TASKS[task].is_diagnostic
    return [
        {**texts[task], "idx": idx} | ({"label": spellings[i % len(spellings)]} if labelled else {})
        for i, idx in enumerate(numbers)
    ]


def write_release(directory: Path) -> Path:
    """All ten folders. The last line of a file has no end, as in seven official files."""
    for task in TASKS.values():
        for split in task.counts:
            path = directory / task.data_file(split)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(json.dumps(row) for row in rows(task.name, labels=split != "test")), encoding="utf-8")
    return directory


def write_run(directory: Path, release: Release, *, first: float = 0.6) -> Path:
    """A run that gives every first label ``first``, and the others the rest."""
    for task in TASKS.values():
        for split in {"val", "test"} & task.counts.keys():
            probabilities = {}
            for key, decision in release.read(task, split).decisions.items():
                rest = (1 - first) / (len(decision.labels) - 1)
                probabilities[key] = dict.fromkeys(decision.labels, rest) | {decision.labels[0]: first}
            write_predictions(predictions_file(directory, task, split), probabilities)
    return directory


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The folder of a release."""
    return write_release(tmp_path / "data")


@pytest.fixture
def release(data: Path) -> Release:
    """Likewise, opened."""
    return Release(data, SUPERGLUE)
