"""The eight tasks and two diagnostics of SuperGLUE as one table: labels, their spelling, metrics, official sizes.

Labels have one name each here; how the data and a submission spell them is in the table, because it differs from task
to task and a wrong spelling scores zero without a word.

Source: Wang et al. 2019 (arXiv 1905.00537), sections 3.2 and 3.3; the benchmark authors' own writer,
nyu-mll/jiant-v1-legacy jiant/evaluate.py@8be1fade.
"""

from collections.abc import Mapping
from dataclasses import dataclass

JsonLabel = str | int | bool

CLASSIFICATION, PER_ANSWER, PER_CANDIDATE = "classification", "per answer", "per candidate"


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: Also of its folder and of its file in a submission.
        kind: One decision a row (``CLASSIFICATION``), a decision for every answer of every question (``PER_ANSWER``), or
            one of many candidates for every query (``PER_CANDIDATE``).
        fields: What a row must have beside ``idx``, and the type of each.
        labels: Their names, in the order in which ties are decided; empty where every query has candidates of its own.
        in_data: How the data spells them.
        in_submission: How a submission spells them, type included.
        metrics: Keys of `metrics.score`; their mean is the task's score.
        counts: Official number of decisions by split: rows, answers or queries.
        answered_by: Task whose model answers this one; empty for its own.
    """

    name: str
    kind: str
    fields: Mapping[str, type]
    labels: tuple[str, ...]
    in_data: Mapping[str, JsonLabel]
    in_submission: Mapping[str, JsonLabel]
    metrics: tuple[str, ...]
    counts: Mapping[str, int]
    answered_by: str = ""

    @property
    def file_name(self) -> str:
        """In a submission."""
        return f"{self.name}.jsonl"

    @property
    def is_diagnostic(self) -> bool:
        """Whether it is outside the eight that the overall score averages."""
        return bool(self.answered_by)

    def data_file(self, split: str) -> str:
        """Path of a split inside the release, e.g. BoolQ/train.jsonl."""
        return f"{self.name}/{self.name if self.is_diagnostic else split}.jsonl"


_BOOLEAN = {"true": True, "false": False}
_TWO_WAY = {"entailment": "entailment", "not_entailment": "not_entailment"}
_THREE_WAY = {name: name for name in ("entailment", "contradiction", "neutral")}
_INTEGERS: dict[str, JsonLabel] = {"0": 0, "1": 1}


def _task(name: str, in_data: Mapping[str, JsonLabel], counts: tuple[int, ...], **rest) -> Task:
    splits = ("train", "val", "test") if len(counts) == 3 else ("test",)
    rest.setdefault("kind", CLASSIFICATION)
    rest.setdefault("metrics", ("accuracy",))
    rest.setdefault("in_submission", in_data)
    return Task(name=name, labels=tuple(in_data), in_data=in_data, counts=dict(zip(splits, counts, strict=True)), **rest)


_ALL = (
    _task(
        "BoolQ",
        _BOOLEAN,
        (9427, 3270, 3245),
        fields={"question": str, "passage": str},
        in_submission={"true": "true", "false": "false"},
    ),
    _task("CB", _THREE_WAY, (250, 56, 250), fields={"premise": str, "hypothesis": str}, metrics=("macro_f1", "accuracy")),
    _task(
        "COPA",
        _INTEGERS,
        (400, 100, 500),
        fields={"premise": str, "choice1": str, "choice2": str, "question": str},
    ),
    _task("MultiRC", _INTEGERS, (27243, 4848, 9693), fields={"passage": dict}, kind=PER_ANSWER, metrics=("f1a", "em")),
    _task(
        "ReCoRD", {}, (100730, 10000, 10000), fields={"passage": dict, "qas": list}, kind=PER_CANDIDATE, metrics=("f1", "em")
    ),
    _task("RTE", _TWO_WAY, (2490, 277, 3000), fields={"premise": str, "hypothesis": str}),
    _task(
        "WiC",
        _BOOLEAN,
        (5428, 638, 1400),
        fields={
            "word": str,
            "sentence1": str,
            "sentence2": str,
            "start1": int,
            "end1": int,
            "start2": int,
            "end2": int,
        },
        in_submission={"true": "true", "false": "false"},
    ),
    _task(
        "WSC",
        _BOOLEAN,
        (554, 104, 146),
        fields={"text": str, "target": dict},
        # With a capital, unlike BoolQ and WiC.
        in_submission={"true": "True", "false": "False"},
    ),
    _task("AX-b", _TWO_WAY, (1104,), fields={"sentence1": str, "sentence2": str}, metrics=("matthews",), answered_by="RTE"),
    _task(
        "AX-g",
        _TWO_WAY,
        (356,),
        fields={"premise": str, "hypothesis": str},
        metrics=("gender_parity", "accuracy"),
        answered_by="RTE",
    ),
)
TASKS: Mapping[str, Task] = {task.name: task for task in _ALL}
"""By name, in the order of the leaderboard; the diagnostics last."""
MAIN_TASKS = tuple(task.name for task in _ALL if not task.is_diagnostic)
