"""The seam between fine-tuning and what it answers: `Task` and `Benchmark`.

A task reads files into decisions with keys of the data's own, encodes them as sequences, names its head, turns logits into
answers and scores answers. A benchmark is a set of tasks with the writer and validator of its submission. Fine-tuning, the
reports and the tools know tasks through these classes alone: a new task is one file with a subclass of `Task`, and a place
in a `Benchmark`; `registry.py` lists the benchmarks that can be asked for. Nothing here needs torch.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.errors import DataError
from deberta_dist.tasks.data_files import DataFiles, integer
from deberta_dist.tasks.decisions import Answers, Decision, Key
from deberta_dist.tasks.encoding import Example, RowEncoder, SequenceLengths, sequences

TRAIN, VALIDATION, TEST = "train", "val", "test"


class Head(Enum):
    """What the model gives for a sequence; the values are those of `values.HeadKind`.

    Spans, tokens, several labels at once and plain numbers become members with the first task that answers so. What depends on the
    head: `Task.num_outputs` and `Task.probabilities` here, the loss and the batches of ``finetuning/``, and what the
    exported configuration says of the classifier.
    """

    SEQUENCE = "sequence"
    """A logit for every label: a decision is one sequence, or the mean over its windows."""
    CHOICE = "choice"
    """One logit: a decision is among several sequences, one a choice."""


@dataclass(frozen=True)
class Split:
    """One file of the data.

    Attributes:
        name: train, val or test.
        where: The file, or member of a zip, as messages name it.
        sha256: Of the file's bytes, in hex; predictions name it, so that they are not scored on another release.
        rows: Its rows as they stand there.
        decisions: By key, in the file's order.
    """

    task: "Task"
    name: str
    where: str
    sha256: str
    rows: tuple[Mapping[str, Any], ...] = field(repr=False)
    decisions: Mapping[Key, Decision] = field(repr=False)

    @property
    def is_official(self) -> bool:
        """Whether it has the official number of decisions, where there is one."""
        return len(self.decisions) == self.task.counts.get(self.name, len(self.decisions))


Measure = Callable[[Split, Answers], float]
"""A metric of a task, from 0 to 1 (a correlation from -1), on a split whose right answers are known."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Task(ABC):
    """One task.

    Attributes:
        name: Also of its folder of predictions, of its table in a file of recipes, and on the command line.
        head: What the model gives for a sequence.
        labels: Their names, in the order of the classifier's rows, in which ties are decided; empty where every decision has
            candidates of its own.
        measures: Metrics by name; the mean of all is the task's score.
        splits: Those that it has: "train" and "val" to be trained, "test" to be predicted as well.
        counts: Official number of decisions by split; empty where nobody counts.
        answered_by: Task whose model answers this one; empty for its own.
        diagnostics: Tasks that this one's model answers as well.
        candidate: What one of a decision's own candidates is, for messages.
        unlearnable: What is wrong with training rows of which none has a right answer among its choices, for messages.
        data_help: Where its files are, for the usage of a task that is outside of a benchmark's own data.
    """

    name: str
    head: Head
    labels: tuple[str, ...]
    measures: Mapping[str, Measure]
    splits: tuple[str, ...] = (TRAIN, VALIDATION, TEST)
    counts: Mapping[str, int] = field(default_factory=dict)
    answered_by: str = ""
    diagnostics: tuple["Task", ...] = ()
    candidate: str = "candidate of this decision"
    unlearnable: str = "no row has a right answer to learn"
    data_help: str = ""

    @abstractmethod
    def data_file(self, split: str) -> str:
        """Path of a split inside the benchmark's data."""

    @abstractmethod
    def read(self, files: DataFiles, split: str) -> Split:
        """Reads and checks a split.

        Raises:
            DataError: a line is not what it should be; the message has file and line.
        """

    @abstractmethod
    def examples(self, split: Split, encoder: RowEncoder) -> Iterator[Example]:
        """Every decision of a split as sequences, in any order.

        Raises:
            DataError: a row cannot be put to the model; the message has file and line.
        """

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of its metrics."""
        return tuple(self.measures)

    @property
    def is_diagnostic(self) -> bool:
        """Whether another task's model answers it; an overall score leaves it aside."""
        return bool(self.answered_by)

    @property
    def num_outputs(self) -> int:
        """Numbers that the model gives for a sequence."""
        return 1 if self.head is Head.CHOICE else len(self.labels)

    def parse_key(self, value: Any, *, at: str) -> Key:
        """A key as a line of predictions has it: one part, or a list of several.

        Raises:
            DataError: a part is not what the data's keys are made of, whole numbers unless the task says otherwise.
        """
        return whole_numbers(value, at=at)

    def probabilities(self, decision: Decision, logits: Sequence[Sequence[np.ndarray]]) -> dict[str, float]:
        """What the model thinks of a decision: the mean over windows, then a softmax over labels or choices.

        Args:
            logits: Of every choice (of a decision among labels: one) and every window of it, float64 [num_outputs].
        """
        means = [np.mean(windows, axis=0) for windows in logits]
        scores = np.concatenate(means) if self.head is Head.CHOICE else means[0]
        weights = np.exp(scores - scores.max())
        return dict(zip(decision.labels, (weights / weights.sum()).tolist(), strict=True))

    def decide(self, decision: Decision, probabilities: Mapping[str, float]) -> str:
        """The most probable label of a decision; of equal ones the first in the order of the task or of its candidates."""
        return max((label for label in decision.labels if label in probabilities), key=probabilities.__getitem__)


def whole_numbers(value: Any, *, at: str) -> Key:
    """A key of whole numbers, as most data have it: one, or a list of several.

    Raises:
        DataError: it is something else.
    """
    parts = value if isinstance(value, list) else [value]
    return tuple(integer(part, at=at, name="idx") for part in parts)


@dataclass(frozen=True)
class PublishedScores:
    """A row of published scores.

    Attributes:
        name: Model, as the table of the publication names it.
        metrics: Percent, by task and metric.
        average: Percent, as published.
    """

    name: str
    metrics: Mapping[str, Mapping[str, float]]
    average: float


@dataclass
class Verdict:
    """What is wrong with a submission.

    Attributes:
        errors: Each makes it worthless; with file and line.
        warnings: What does not make it invalid and may be a mistake.
    """

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class Submission(ABC):
    """Writer and validator of what a benchmark's grader takes: a zip with a file of every task at its top level."""

    @abstractmethod
    def file_name(self, task: Task) -> str:
        """Of a task's answers."""

    @abstractmethod
    def content(self, split: Split, answers: Answers) -> bytes:
        """A task's file.

        Args:
            split: The test split; the file has a line for each of its decisions.
            answers: By name, for every decision.
        """

    @abstractmethod
    def missing(self, name: str) -> str:
        """What `validate` says of a file that is not there."""

    @abstractmethod
    def validate(self, files: Mapping[str, bytes], release: "Release") -> Verdict:
        """Checks the files of a submission, ours or anyone's, against the test data.

        Args:
            files: By name.
            release: With the test splits of all tasks.
        """


@dataclass(frozen=True, eq=False, kw_only=True)
class Benchmark:
    """A set of tasks that are read from one place, reported in one table and submitted together.

    Attributes:
        name: As reports and help texts spell it.
        tasks: By name, in the order of its leaderboard; the diagnostics last.
        order: Names of the tasks that are trained, in the order in which one start trains them.
        intermediate: Tasks outside of it, with files of their own, from whose models others may start; each has one seed.
        command: What starts fine-tuning on it.
        data_help: What its data are, for the usage.
        submission: None where nothing is submitted.
        published: Scores of others, to stand beside ours.
        published_source: Where they are from.
    """

    name: str
    tasks: Mapping[str, Task]
    order: tuple[str, ...]
    intermediate: tuple[Task, ...] = ()
    command: str
    data_help: str
    submission: Submission | None = None
    published: tuple[PublishedScores, ...] = ()
    published_source: str = ""

    def __post_init__(self) -> None:
        assert sorted(self.order) == sorted(self.main_tasks)
        for task in self.tasks.values():
            assert all(other.answered_by == task.name and other.name in self.tasks for other in task.diagnostics)

    @property
    def main_tasks(self) -> tuple[str, ...]:
        """Names of the tasks that the overall score averages."""
        return tuple(name for name, task in self.tasks.items() if not task.is_diagnostic)

    @property
    def trainable(self) -> Mapping[str, Task]:
        """Tasks that can be trained, by name: its own in the order of training, then the intermediate ones."""
        return {task.name: task for task in (*(self.tasks[name] for name in self.order), *self.intermediate)}

    def overall(self, scores: Mapping[str, float]) -> tuple[float | None, str]:
        """The leaderboard's average, and how to say it.

        Args:
            scores: Task score by task name; diagnostics are left aside.

        Returns:
            (mean over the main tasks, text); (None, what is missing) where one is.
        """
        main = self.main_tasks
        missing = [name for name in main if name not in scores]
        if missing:
            return None, f"{len(main) - len(missing)} of {len(main)}, missing {', '.join(missing)}"
        mean = sum(scores[name] for name in main) / len(main)
        return mean, f"{mean:.1f}"

    def command_for(self, task: Task) -> str:
        """What makes the predictions of a task; the run of a task answers its diagnostics, too."""
        return f"{self.command} --task {task.answered_by or task.name} --data DIR --init CHECKPOINT"


class Release:
    """A benchmark's data as it is distributed: a folder, or a zip of one.

    Args:
        path: Folder or zip file.
        benchmark: Names the files that are looked for.

    Raises:
        DataError: it is neither.
    """

    def __init__(self, path: str | Path, benchmark: Benchmark) -> None:
        self.benchmark = benchmark
        names = {task.data_file(split) for task in benchmark.tasks.values() for split in task.splits}
        self._files = DataFiles(path, names=names, what=f"{benchmark.name} data")

    @property
    def path(self) -> Path:
        """Folder or zip file."""
        return self._files.path

    def has(self, task: Task, split: str) -> bool:
        """Whether it holds a split."""
        return split in task.splits and self._files.has(task.data_file(split))

    def tasks(self, split: str) -> list[Task]:
        """Tasks of which it holds a split, in the order of the leaderboard."""
        return [task for task in self.benchmark.tasks.values() if self.has(task, split)]

    def read(self, task: Task, split: str) -> Split:
        """Reads and checks a split.

        Raises:
            DataError: it is missing, or a line is not what it should be; the message has file and line.
        """
        if not self.has(task, split):
            raise DataError(f"{self._files.where(task.data_file(split))} is missing: {task.name} needs the split {split}")
        return task.read(self._files, split)


@dataclass(frozen=True)
class Features:
    """A split as ids, as fine-tuning reads it.

    Attributes:
        split: What it was made of.
        examples: One for each decision, in ascending order of keys: no order of a file decides what is trained.
        notes: What happened to long and odd rows, one line each.
    """

    split: Split
    examples: Sequence[Example]
    notes: Sequence[str]
    _tokenizer: Tokenizer
    _lengths: SequenceLengths

    def sequences(self, example: Example, choice: int) -> list[np.ndarray]:
        """Ids of one choice's windows, int32 [S] each; a classification has choice 0 alone."""
        lengths = self._lengths
        return sequences(
            self._tokenizer,
            example.first,
            example.seconds[choice],
            max_seq_length=lengths.max_seq_length,
            overlap=lengths.window_overlap,
            max_windows=lengths.max_windows,
        )


def encode_split(split: Split, tokenizer: Tokenizer, lengths: SequenceLengths) -> Features:
    """All decisions of a split as ids.

    Raises:
        DataError: a row cannot be put to the model; the task's message has file and line.
    """
    encoder = RowEncoder(split.decisions, tokenizer, lengths)
    examples = sorted(split.task.examples(split, encoder), key=lambda example: example.key)
    assert [example.key for example in examples] == sorted(split.decisions)
    notes = encoder.notes(f"{split.task.name} {split.name}", of=len(examples))
    return Features(split, examples, notes, tokenizer, lengths)
