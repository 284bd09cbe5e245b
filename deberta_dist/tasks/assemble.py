"""From the predictions of one or several runs to the files of a submission, with what is worth knowing of them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deberta_dist.errors import DataError
from deberta_dist.tasks import metrics
from deberta_dist.tasks.predictions import (
    RUN_NAME,
    average,
    decide,
    predictions_file,
    read_predictions,
    require_covering,
)
from deberta_dist.tasks.registry import TASKS, Task
from deberta_dist.tasks.release import Release, json_lines
from deberta_dist.tasks.submission import majority, submission_lines


@dataclass
class Assembly:
    """A submission before it is validated.

    Attributes:
        files: By name.
        missing: Tasks without predictions.
        warnings: What is worth a look.
        sources: By task: the prediction files with their checksums, what their makers say of them, validation scores.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    missing: list[Task] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    sources: dict[str, Any] = field(default_factory=dict)


def assemble(directories: Sequence[Path], release: Release) -> Assembly:
    """Averages the runs that have predictions for a task, task by task, and writes its file.

    Args:
        directories: Runs; each may have some of the tasks, several of one task are an ensemble.
        release: With the test splits, and validation splits where scores are wanted.

    Raises:
        DataError: predictions are damaged, not for this data, or not for the same rows.
    """
    result = Assembly()
    for task in TASKS.values():
        own = [path for path in directories if predictions_file(path, task, "test").is_file()]
        if not own:
            result.missing.append(task)
            continue
        split = release.read(task, "test")
        files = [predictions_file(path, task, "test") for path in own]
        result.files[task.file_name] = submission_lines(split, decide(split, _ensemble(files, split)))
        scores = _validation_scores(own, task, release)
        result.sources[task.name] = {
            "predictions": [{"file": str(path), "sha256": _sha256(path)} for path in files],
            "runs": [_described(path) for path in own],
            "validation": scores,
        }
        if scores is not None and scores["score"] < scores["majority_accuracy"] and "accuracy" in scores["metrics"]:
            result.warnings.append(
                f"{task.file_name}: {scores['score']:.1f} on the validation split is below the "
                f"{scores['majority_accuracy']:.1f} of always answering {scores['majority']!r}"
            )
    return result


def _ensemble(files: Sequence[Path], split):
    runs = []
    for path in files:
        found = read_predictions(path)
        require_covering(found, split, where=path)
        runs.append(found)
    return average(runs, names=files)


def _validation_scores(directories: Sequence[Path], task: Task, release: Release) -> dict[str, Any] | None:
    """Scores of the same ensemble on labelled rows: the validation split, or a diagnostic itself."""
    name = "test" if task.is_diagnostic else "val"
    files = [predictions_file(path, task, name) for path in directories]
    if not release.has(task, name) or not all(path.is_file() for path in files):
        return None
    split = release.read(task, name)
    if not all(decision.gold for decision in split.decisions.values()):
        return None
    found = metrics.score(split, decide(split, _ensemble(files, split)))
    label, share = majority(split)
    return {
        "metrics": found,
        "score": metrics.task_score(found),
        "majority": label,
        "majority_accuracy": 100.0 * share,
    }


def _described(directory: Path) -> Any:
    path = directory / RUN_NAME
    if not path.is_file():
        return None
    content = path.read_bytes().replace(b"\n", b" ")
    described = [value for _, value in json_lines(content, where=str(path))]
    if len(described) != 1:
        raise DataError(f"{path} does not hold one object")
    return described[0]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
