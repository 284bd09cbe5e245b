"""Reads, writes and averages predictions: probabilities for every decision of a split, under the data's own idx.

A run with one seed is a folder with ``TASK/test.jsonl`` and ``TASK/val.jsonl``, one decision a line:

    {"idx": 7, "probabilities": {"true": 0.8, "false": 0.2}}
    {"idx": [0, 3, 12], "probabilities": {"0": 0.1, "1": 0.9}}          a key of several parts
    {"idx": 7, "probabilities": {"Jeff Flake": 0.7, "Trump": 0.3}}      candidates of its own

and ``TASK/run.json``: whatever the maker of that task's model wants to be known of it (checkpoint, seed, scores). The
diagnostics are answered by the model of another task and need none of their own.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deberta_dist.errors import DataError, printable
from deberta_dist.files.atomic import new_file
from deberta_dist.files.foreign import refuse_foreign
from deberta_dist.files.strict_json import json_integer
from deberta_dist.tasks.base import Benchmark, Split, Task, whole_numbers
from deberta_dist.tasks.data_files import json_lines
from deberta_dist.tasks.decisions import Key, Probabilities, shown

_TOLERANCE = 1e-3  # of a sum of probabilities that were rounded when they were written


def predictions_file(directory: Path, task: Task, split: str) -> Path:
    """Where a run's folder has the predictions for a split."""
    return directory / task.name / f"{split}.jsonl"


def prediction_folders(paths: Sequence[Path], benchmark: Benchmark) -> list[Path]:
    """Folders with predictions; one of ``seed-*`` folders, a whole run, stands for these in the order of their numbers.

    Raises:
        DataError: a path is no folder, holds seeds and predictions of its own, or leads to one that is there already.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise DataError(f"{path} is not a folder of predictions")
        seeds = [seed for seed in path.glob("seed-*") if seed.is_dir()]
        if seeds and any((path / name).is_dir() for name in benchmark.tasks):
            raise DataError(f"{path} holds seed-* folders and predictions of its own: name the folders that are meant")
        found += sorted(seeds, key=lambda seed: (len(seed.name), seed.name)) or [path]
    for number, path in enumerate(found):
        if any(path.resolve() == other.resolve() for other in found[:number]):
            raise DataError(f"{path} is given twice: it would count twice")
    return found


def run_file(directory: Path, task_name: str) -> Path:
    """Where a run's folder describes the model of a task."""
    return directory / task_name / "run.json"


def described(directory: Path, task: Task) -> Any:
    """What the maker of a task's predictions says of the model; of a diagnostic, if need be, the model of its task.

    Returns:
        Parsed JSON without NaN or infinity, which are passed on as text; None where nothing is said.

    Raises:
        DataError: the file cannot be read or is not JSON.
    """
    path = run_file(directory, task.name)
    if not path.is_file() and task.is_diagnostic:
        path = run_file(directory, task.answered_by)
    if not path.is_file():
        return None
    try:
        content = path.read_bytes()
        refuse_foreign(content, path)
        return json.loads(content.decode("utf-8"), parse_constant=str, parse_float=_finite, parse_int=json_integer)
    except DataError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error})") from error


def _finite(number: str) -> float | str:
    return float(number) if math.isfinite(float(number)) else number


def write_predictions(path: Path, probabilities: Probabilities) -> None:
    """Writes a file of predictions in ascending idx; nothing is replaced.

    Raises:
        DataError: the file exists, or cannot be written.
    """
    with new_file(path) as file:
        for key in sorted(probabilities):
            idx = key[0] if len(key) == 1 else list(key)
            line = {"idx": idx, "probabilities": dict(probabilities[key])}
            file.write((json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8"))


def read_predictions(path: Path, *, parse_key: Callable[..., Key] = whole_numbers) -> dict[Key, dict[str, float]]:
    """Reads a file of predictions.

    Args:
        parse_key: Of the task: (value, at=file and line) -> key.

    Raises:
        DataError: it is missing, or a line is not what it should be.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error
    found: dict[Key, dict[str, float]] = {}
    for line, value in json_lines(content, where=str(path)):
        at = f"{path}, line {line}"
        if value.keys() != {"idx", "probabilities"} or not isinstance(value["probabilities"], dict):
            raise DataError(f"{at}: an object with idx and probabilities is expected")
        key = parse_key(value["idx"], at=at)
        if key in found:
            raise DataError(f"{at}: idx {value['idx']} is there already")
        found[key] = _checked(value["probabilities"], at=at)
    return found


def read_runs(files: Sequence[Path], split: Split) -> list[dict[Key, dict[str, float]]]:
    """Reads the predictions of several runs for a split.

    Raises:
        DataError: one is missing, damaged or not for this split.
    """
    runs = []
    for path in files:
        runs.append(read_predictions(path, parse_key=split.task.parse_key))
        require_covering(runs[-1], split, where=path)
    return runs


def _checked(probabilities: Mapping[str, Any], *, at: str) -> dict[str, float]:
    for label, value in probabilities.items():
        if type(value) not in (int, float) or not 0.0 <= value <= 1.0 + _TOLERANCE:
            raise DataError(f"{at}: the probability of {label!r} is {printable(repr(value))}")
    if abs(math.fsum(probabilities.values()) - 1.0) > _TOLERANCE:
        raise DataError(f"{at}: the probabilities add up to {math.fsum(probabilities.values()):.4f}, not 1")
    return {label: float(value) for label, value in probabilities.items()}


def require_covering(probabilities: Probabilities, split: Split, *, where: object) -> None:
    """Checks that predictions are for a split: the same decisions, and for each its own labels.

    Raises:
        DataError: they are not; the message names the first that differ.
    """
    missing = [key for key in split.decisions if key not in probabilities]
    extra = [key for key in probabilities if key not in split.decisions]
    if missing or extra:
        some = ", ".join(map(shown, (missing or extra)[:5]))
        what = f"{len(missing)} of its idx have none" if missing else f"{len(extra)} idx are not in it"
        raise DataError(f"{where} is not for {split.where}: {what}, the first are {some}")
    for key, decision in split.decisions.items():
        found = probabilities[key].keys()
        if not split.task.labels:
            if odd := [label for label in found if label not in decision.labels]:
                raise DataError(f"{where}: idx {shown(key)}: {odd[0]!r} is no {split.task.candidate} in {split.where}")
            if not found:
                raise DataError(f"{where}: idx {shown(key)} has no candidates")
        elif found != set(decision.labels):
            raise DataError(
                f"{where}: idx {shown(key)} has labels {sorted(found)}, {split.task.name} has {sorted(decision.labels)}"
            )


def average(runs: Sequence[Probabilities], *, names: Sequence[object]) -> dict[Key, dict[str, float]]:
    """Mean of the probabilities of several runs: an ensemble.

    Args:
        runs: Probabilities of each run; all runs have the same decisions.
        names: What messages call the runs, in the same order.

    Raises:
        DataError: their decisions or labels differ.
    """
    first = runs[0]
    for run, name in zip(runs[1:], names[1:], strict=True):
        if run.keys() != first.keys():
            odd = sorted(run.keys() ^ first.keys())[0]
            raise DataError(f"{names[0]} and {name} are not predictions of the same rows: idx {shown(odd)} is in one alone")
        for key in first:
            if run[key].keys() != first[key].keys():
                raise DataError(f"{names[0]} and {name} have other labels for idx {shown(key)}")
    count = len(runs)
    # fsum rounds once: the order in which runs are named must not change the last bit, and so an answer.
    return {
        key: {label: math.fsum(run[key][label] for run in runs) / count for label in labels} for key, labels in first.items()
    }


def decide(split: Split, probabilities: Probabilities) -> dict[Key, str]:
    """The answer to every decision, as its task takes it of the probabilities."""
    return {key: split.task.decide(decision, probabilities[key]) for key, decision in split.decisions.items()}
