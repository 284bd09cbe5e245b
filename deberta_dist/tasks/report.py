"""Reports fine-tuned models: scores of every run and of their ensemble, beside published ones and another model's.

Everything is scored on rows with public answers: the validation split, and the diagnostics' only one.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deberta_dist.errors import DataError, encodable, printable
from deberta_dist.tasks.base import Benchmark, Release
from deberta_dist.tasks.predictions import prediction_folders, predictions_file
from deberta_dist.tasks.scores import Spread, TaskScores, read_scored_split, score_runs, scored_split
from deberta_dist.tasks.significance import Comparison, compare

_HEADER = ("task", "metric", "mean ± std (runs)", "ensemble", "each run", "one label always")
_LEGEND = (
    "std: sample standard deviation over runs. ensemble: score of the mean of their probabilities. one label always: the "
    "constant answer that scores most."
)
_NOT_THE_SAME = "Published rows ({source}) are scores of the TEST split, ours of the VALIDATION split: other examples."
_NUMBERS = "no one two three four five six seven eight nine ten eleven twelve".split()
_P_VALUE = "p: Welch's t-test of the task scores over runs, two-sided; each task for itself, not corrected for their number."


@dataclass(frozen=True)
class _Table:
    """One table.

    Attributes:
        title: One line above the table; a heading in Markdown.
        header: Names of the columns, as many as each row has cells.
        rows: As many cells each.
        below: Sentences under the table; a list in Markdown.
        names: Columns, from the first, that stand to the left; numbers stand to the right.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    below: Sequence[str] = ()
    names: int = 1

    def text(self) -> str:
        """Columns of spaces under a title."""
        lines = [[printable(cell) for cell in row] for row in (self.header, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        shown = [self.title, ""]
        for line in lines:
            cells = enumerate(zip(line, widths, strict=True))
            shown.append("  ".join(c.ljust(w) if column < self.names else c.rjust(w) for column, (c, w) in cells).rstrip())
        return "\n".join([*shown, *self.below])

    def markdown(self) -> str:
        """A table of GitHub's dialect under a heading."""
        lines = [[_cell(cell) for cell in row] for row in (self.header, *self.rows)]
        lines.insert(1, ["---"] * self.names + ["---:"] * (len(self.header) - self.names))
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join([f"## {self.title}", table, *([_bullets(self.below)] if self.below else [])])


@dataclass(frozen=True)
class ScoreReport:
    """Scores, and what is worth knowing of them.

    Attributes:
        benchmark: Whose tasks they are.
        directories: The runs, in the order of the column `each run`.
        against: Those of the other model.
        scores: By task, of the runs that have it.
        others: Scores of the other model's runs, by task.
        comparisons: By task, where both have it.
        notes: What is missing or remarkable, one line each.
    """

    benchmark: Benchmark
    directories: tuple[Path, ...]
    against: tuple[Path, ...]
    scores: Mapping[str, TaskScores]
    others: Mapping[str, TaskScores]
    comparisons: Mapping[str, Comparison]
    notes: tuple[str, ...]

    def overall(self) -> dict[str, tuple[float | None, str]]:
        """The leaderboard's average of the runs' means and of the ensembles, as `Benchmark.overall` gives it."""
        return {
            "mean": self.benchmark.overall({name: found.spread().mean for name, found in self.scores.items()}),
            "ensemble": self.benchmark.overall({name: found.ensemble.task_score for name, found in self.scores.items()}),
        }

    def text(self) -> str:
        """For a terminal, without a final line end."""
        notes = [f"note: {line}" for line in self.notes]
        return "\n\n".join([*(table.text() for table in self._tables()), *(["\n".join(notes)] if notes else [])])

    def markdown(self) -> str:
        """The same tables, as GitHub shows them."""
        notes = [f"## Notes\n\n{_bullets(self.notes)}"] if self.notes else []
        return "\n\n".join([f"# {self.benchmark.name} scores", *(table.markdown() for table in self._tables()), *notes]) + "\n"

    def json(self) -> str:
        """All numbers unrounded, in percent; what is not there is null."""
        overall, main = self.overall(), self.benchmark.main_tasks
        content = {
            "unit": "percent",
            "split": "validation",
            "runs": [encodable(str(path)) for path in self.directories],
            "against": [encodable(str(path)) for path in self.against],
            "overall": {
                "mean": overall["mean"][0],
                "ensemble": overall["ensemble"][0],
                "missing": [name for name in main if name not in self.scores],
            },
            "tasks": {name: _as_json(found) for name, found in self.scores.items() if name in main},
            "diagnostics": {name: _as_json(found) for name, found in self.scores.items() if name not in main},
            "comparisons": {name: asdict(found) for name, found in self.comparisons.items()},
            "published": self._published(),
            "notes": list(self.notes),
        }
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    def _published(self) -> dict[str, Any]:
        rows = [asdict(row) for row in self.benchmark.published]
        return {"source": self.benchmark.published_source, "split": "test", "rows": rows}

    def _tables(self) -> Iterator[_Table]:
        main = [found for found in self.scores.values() if not found.split.task.is_diagnostic]
        diagnostics = [found for found in self.scores.values() if found.split.task.is_diagnostic]
        if main:
            below = (self._average_sentence(), _LEGEND, f"Runs: {_listed(self.directories)}.")
            title = f"{self.benchmark.name}, validation split, percent"
            yield _Table(title, _HEADER, self._score_rows(main), below, names=2)
            if self.benchmark.published:
                yield self._beside_published()
        if diagnostics:
            yield _Table("Diagnostics, percent, outside of the average", _HEADER, self._score_rows(diagnostics), names=2)
        if self.against:
            yield self._beside_other()

    def _average_sentence(self) -> str:
        overall = self.overall()
        tasks = _counted(len(self.benchmark.main_tasks), "task")
        if overall["mean"][0] is None:
            return f"No average of the {tasks}: {overall['mean'][1]}."
        return f"Average of the {tasks}: of means {overall['mean'][1]}, of ensembles {overall['ensemble'][1]}."

    def _score_rows(self, tasks: Sequence[TaskScores]) -> list[tuple[str, ...]]:
        """A row for every metric, and of several one for their mean, which is what the constant is compared with."""
        rows: list[tuple[str, ...]] = []
        for found in tasks:
            task = found.split.task
            constant = f"{found.constant[1]:.1f} ({found.constant[0]})" if found.constant else "-"
            lines = [(name, name, found.ensemble.metrics[name]) for name in task.metrics]
            lines += [("mean of both", "", found.ensemble.task_score)] if len(lines) > 1 else []
            for title, metric, ensemble in lines:
                by_run = dict(zip(found.directories, found.values(metric), strict=True))
                each = [f"{by_run[path]:.1f}" if path in by_run else "-" for path in self.directories]
                last = constant if title == lines[-1][0] else ""
                spread = _shown(found.spread(metric))
                rows.append((task.name, title, spread, f"{ensemble:.1f}", " ".join(each), last))
        return rows

    def _beside_published(self) -> _Table:
        """Rows of models, columns of tasks, as on the leaderboard."""
        tasks, main = self.benchmark.tasks, self.benchmark.main_tasks
        means = {
            task: {metric: found.spread(metric).mean for metric in found.split.task.metrics}
            for task, found in self.scores.items()
        }
        ensembles = {task: found.ensemble.metrics for task, found in self.scores.items()}
        averages = {kind: "-" if value is None else text for kind, (value, text) in self.overall().items()}
        rows = [
            _model_row("ours, mean of runs", main, means, averages["mean"]),
            _model_row("ours, ensemble", main, ensembles, averages["ensemble"]),
            *(_model_row(f"{row.name} (test)", main, row.metrics, f"{row.average:.1f}") for row in self.benchmark.published),
        ]
        pairs = [f"{name}: {'/'.join(tasks[name].metrics)}" for name in main if len(tasks[name].metrics) > 1]
        below = [_NOT_THE_SAME.format(source=self.benchmark.published_source)]
        below += [f"Of two metrics, {'; '.join(pairs)}."] if pairs else []
        return _Table("Beside published scores", ("model", *main, "average"), rows, below)

    def _beside_other(self) -> _Table:
        rows = []
        unknown: dict[str, list[str]] = {}
        for name in self.benchmark.tasks:
            ours, theirs = self.scores.get(name), self.others.get(name)
            if ours is None or theirs is None:
                if ours is not theirs:
                    unknown.setdefault("only one side has it", []).append(name)
                continue
            found = self.comparisons[name]
            a, b = ours.spread(), theirs.spread()
            rows.append((name, _shown(a), _shown(b), f"{a.mean - b.mean:+.1f}", _shown_p(found.p_value)))
            if found.reason:
                unknown.setdefault(found.reason, []).append(name)
        below = [f"No test for {', '.join(names)}: {reason}." for reason, names in unknown.items()]
        header = ("task", "ours (runs)", "other (runs)", "difference", "p")
        below = [_P_VALUE, *below, f"Other runs: {_listed(self.against)}."]
        return _Table("Against another model, task scores", header, rows, below)


def make_report(directories: Sequence[Path], release: Release, against: Sequence[Path] = ()) -> ScoreReport:
    """Scores runs on the rows of a release that have answers.

    Args:
        directories: Runs, or folders of ``seed-*`` runs; each may have some of the tasks.
        release: With those tasks' validation splits and diagnostics.
        against: Runs of another model, to compare with.

    Raises:
        DataError: a run is no folder or given twice; there is nothing to score; predictions or data are missing, damaged
            or do not belong to each other.
    """
    benchmark = release.benchmark
    ours = prediction_folders(directories, benchmark)
    theirs = prediction_folders([*ours, *against], benchmark)[len(ours) :]
    scores: dict[str, TaskScores] = {}
    others: dict[str, TaskScores] = {}
    notes = []
    for task in benchmark.tasks.values():
        having = [
            [path for path in side if predictions_file(path, task, scored_split(task)).is_file()] for side in (ours, theirs)
        ]
        split = read_scored_split(release, task) if any(having) else None
        if any(having) and split is None:
            notes.append(f"{task.name} is not scored: its rows in {_listed([release.path])} have no answers")
        for own, into in zip(having, (scores, others), strict=True):
            if own and split is not None:
                into[task.name] = score_runs(own, split)
    for side, found, name in ((ours, scores, "--predictions"), (theirs, others, "--against")):
        if side and not found:
            diagnostics = " or ".join(task.name for task in benchmark.tasks.values() if task.is_diagnostic)
            nor = f", nor test.jsonl of {diagnostics}" if diagnostics else ""
            raise DataError(f"nothing to score in {name} {side[0]}: no TASK/val.jsonl{nor}")
        used = {path for task_scores in found.values() for path in task_scores.directories}
        notes += [f"{_listed([path])} has nothing to score" for path in side if path not in used]
    return ScoreReport(
        benchmark=benchmark,
        directories=tuple(ours),
        against=tuple(theirs),
        scores=scores,
        others=others,
        comparisons={name: compare(found.values(), others[name].values()) for name, found in scores.items() if name in others},
        notes=(*notes, *_notes(scores, benchmark, count=len(ours))),
    )


def _notes(scores: Mapping[str, TaskScores], benchmark: Benchmark, *, count: int) -> Iterator[str]:
    for task in benchmark.tasks.values():
        if task.name not in scores:
            yield f"{task.name} is missing; it is made by: {benchmark.command_for(task)}"
            continue
        found = scores[task.name]
        if len(found.runs) < count:
            yield f"{task.name}: {len(found.runs)} of {count} runs have it"
        if found.constant is not None and found.constant[1] > found.ensemble.task_score:
            label, reached = found.constant
            yield f"{task.name}: {found.ensemble.task_score:.1f} is below the {reached:.1f} of always answering {label!r}"
    partial = [
        f"{name} {len(split.decisions):,} of {split.task.counts[split.name]:,}"
        for name, split in ((name, found.split) for name, found in scores.items())
        if not split.is_official
    ]
    if partial:
        yield f"not the official number of decisions: {', '.join(partial)}"


def _model_row(name: str, tasks: Sequence[str], values: Mapping[str, Mapping[str, float]], average: str) -> tuple[str, ...]:
    cells = ["/".join(f"{value:.1f}" for value in values[task].values()) if task in values else "-" for task in tasks]
    return name, *cells, average


def _counted(number: int, noun: str) -> str:
    """Eight tasks, one task, 13 tasks."""
    return f"{_NUMBERS[number] if number < len(_NUMBERS) else number} {noun}{'' if number == 1 else 's'}"


def _shown(values: Spread) -> str:
    deviation = "" if values.deviation is None else f" ± {values.deviation:.2f}"
    return f"{values.mean:.1f}{deviation} ({values.count})"


def _shown_p(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def _listed(paths: Sequence[Path]) -> str:
    return ", ".join(printable(str(path)) for path in paths)


def _as_json(found: TaskScores) -> dict[str, Any]:
    names = found.split.task.metrics
    return {
        "decisions": len(found.split.decisions),
        "official_decisions": found.split.task.counts.get(found.split.name),
        "runs": [
            {"directory": encodable(str(path)), **asdict(score), "run": said}
            for path, score, said in zip(found.directories, found.runs, found.descriptions, strict=True)
        ],
        "metrics": {name: asdict(found.spread(name)) for name in names},
        "task_score": asdict(found.spread()),
        "ensemble": asdict(found.ensemble),
        "constant": {"label": found.constant[0], "task_score": found.constant[1]} if found.constant else None,
    }


def _bullets(lines: Sequence[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {line}" for line in lines)


def _cell(text: str) -> str:
    """Without what would end it: names of folders may hold anything."""
    return printable(text).replace("\\", "\\\\").replace("|", "\\|")
