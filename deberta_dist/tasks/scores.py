"""Scores of one task on labelled rows: every run, their spread and their ensemble.

The report prints them, a submission's manifest keeps them.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deberta_dist.tasks import metrics
from deberta_dist.tasks.base import TEST, VALIDATION, Release, Split, Task
from deberta_dist.tasks.predictions import average, decide, described, predictions_file, read_runs


@dataclass(frozen=True)
class Score:
    """What one set of answers reaches.

    Attributes:
        metrics: Percent, by the names of the task's metrics.
        task_score: Mean of the metrics, in percent; the leaderboard averages this over tasks.
    """

    metrics: Mapping[str, float]
    task_score: float


@dataclass(frozen=True)
class Spread:
    """Several runs' values of one number.

    Attributes:
        mean: Arithmetic mean, in percent.
        deviation: Sample standard deviation, with n - 1; None of one run.
        count: Number of runs.
    """

    mean: float
    deviation: float | None
    count: int


@dataclass(frozen=True)
class TaskScores:
    """A task's scores on one split.

    Attributes:
        split: With its right answers.
        directories: The runs that have predictions for it.
        runs: Scores, run by run.
        descriptions: What the makers of the runs say of them.
        ensemble: Score of the mean of the runs' probabilities.
        constant: The label that scores most where it answers everything, and that task score; None where
            every decision has candidates of its own.
    """

    split: Split
    directories: tuple[Path, ...]
    runs: tuple[Score, ...]
    descriptions: tuple[Any, ...]
    ensemble: Score
    constant: tuple[str, float] | None

    def values(self, metric: str = "") -> tuple[float, ...]:
        """A metric of every run, or the task score."""
        return tuple(run.metrics[metric] if metric else run.task_score for run in self.runs)

    def spread(self, metric: str = "") -> Spread:
        """Likewise, over the runs."""
        return spread(self.values(metric))


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation of one value or more."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), deviation, len(values))


def scored_split(task: Task) -> str:
    """The split with public answers that no training has seen: validation, or a diagnostic's only one."""
    return TEST if task.is_diagnostic else VALIDATION


def read_scored_split(release: Release, task: Task) -> Split | None:
    """The split that a task's runs are scored on; None where it has no answers.

    Raises:
        DataError: it is missing or damaged.
    """
    split = release.read(task, scored_split(task))
    return split if all(decision.gold for decision in split.decisions.values()) else None


def score_runs(directories: Sequence[Path], split: Split) -> TaskScores:
    """Scores runs and their ensemble.

    Args:
        directories: One or more, each with predictions for the split.
        split: With right answers.

    Raises:
        DataError: predictions are missing, damaged, not for this data, or not for the same candidates.
    """
    files = [predictions_file(path, split.task, split.name) for path in directories]
    runs = read_runs(files, split)
    scores = []
    for probabilities in (*runs, average(runs, names=files)):
        found = metrics.score(split, decide(split, probabilities))
        scores.append(Score(found, metrics.task_score(found)))
    return TaskScores(
        split=split,
        directories=tuple(directories),
        runs=tuple(scores[:-1]),
        descriptions=tuple(described(path, split.task) for path in directories),
        ensemble=scores[-1],
        constant=metrics.best_constant(split) if split.task.labels else None,
    )
