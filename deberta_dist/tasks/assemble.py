"""Assembles a submission from the predictions of one or several runs, and writes and reads its zip."""

import hashlib
import io
import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from deberta_dist.errors import DataError, printable
from deberta_dist.tasks.base import TEST, VALIDATION, Release, Task
from deberta_dist.tasks.predictions import (
    average,
    decide,
    described,
    prediction_folders,
    predictions_file,
    read_runs,
)
from deberta_dist.tasks.scores import read_scored_split, score_runs, scored_split

_MAX_FILE_BYTES = 64 * 2**20


@dataclass
class Assembly:
    """A submission before it is validated.

    Attributes:
        directories: The runs that it was made of.
        files: Content by file name, one for every task that has predictions.
        missing: Tasks without predictions.
        warnings: What does not make it invalid and may be a mistake.
        sources: By task: the prediction files with their checksums, what their makers say of them, validation scores.
    """

    directories: list[Path]
    files: dict[str, bytes] = field(default_factory=dict)
    missing: list[Task] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    sources: dict[str, Any] = field(default_factory=dict)


def assemble(directories: Sequence[Path], release: Release) -> Assembly:
    """Averages the runs that have predictions for a task, task by task, and writes its file.

    Args:
        directories: Runs, or folders of ``seed-*`` runs; each may have some of the tasks, several of one task are an
            ensemble.
        release: With the test splits, and validation splits where scores are wanted.

    Raises:
        DataError: a run is no folder, is there twice or has nothing; predictions are damaged, not for this data, or not
            for the same rows.
    """
    benchmark = release.benchmark
    submission, tasks = benchmark.submission, benchmark.tasks
    assert submission is not None, "tools ask before"
    result = Assembly(prediction_folders(directories, benchmark))
    for path in result.directories:
        if not any(predictions_file(path, task, TEST).is_file() for task in tasks.values()):
            raise DataError(f"{path} holds no predictions: TASK/test.jsonl of none of {', '.join(tasks)}")
    for task in tasks.values():
        own = [path for path in result.directories if predictions_file(path, task, TEST).is_file()]
        if not own:
            result.missing.append(task)
            continue
        split = release.read(task, TEST)
        files = [predictions_file(path, task, TEST) for path in own]
        name = submission.file_name(task)
        result.files[name] = submission.content(split, decide(split, average(read_runs(files, split), names=files)))
        scores = _validation_scores(own, task, release)
        result.sources[task.name] = {
            "predictions": [{"file": str(path), "sha256": _sha256(path)} for path in files],
            "runs": [described(path, task) for path in own],
            "validation": scores,
        }
        if scores is None and release.has(task, VALIDATION):
            result.warnings.append(f"{name}: not every run has predictions for the validation split: no score")
        if scores is not None and scores.get("constant_score", 0.0) > scores["score"]:
            result.warnings.append(
                f"{name}: {scores['score']:.1f} on the validation split is below the "
                f"{scores['constant_score']:.1f} of always answering {scores['constant']!r}"
            )
    return result


def _validation_scores(directories: Sequence[Path], task: Task, release: Release) -> dict[str, Any] | None:
    """Scores of the same ensemble on labelled rows: the validation split, or a diagnostic itself."""
    name = scored_split(task)
    if not release.has(task, name) or not all(predictions_file(path, task, name).is_file() for path in directories):
        return None
    split = read_scored_split(release, task)
    if split is None:
        return None
    found = score_runs(directories, split)
    result: dict[str, Any] = {"metrics": found.ensemble.metrics, "score": found.ensemble.task_score}
    if found.constant is not None:
        result["constant"], result["constant_score"] = found.constant
    return result


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def zip_bytes(files: Mapping[str, bytes]) -> bytes:
    """A zip with the files at its top level; equal files give equal bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name in sorted(files):
            # The earliest time a zip can hold: the real one would make equal submissions differ.
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, files[name])
    return buffer.getvalue()


def read_zip(path: Path, names: Collection[str]) -> tuple[dict[str, bytes], list[str]]:
    """(files by name, what is wrong with the zip itself). Nothing is unpacked to disk.

    Args:
        path: The zip; its members are not trusted.
        names: Files of a submission; what has another name is not unpacked.

    Raises:
        DataError: it is no zip file.
    """
    files, errors = {}, []
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                name = entry.filename
                parts = PurePosixPath(name).parts
                if name.startswith("/") or "\\" in name or ".." in parts:
                    errors.append(f"{printable(name)} leads out of the folder that it is unpacked in")
                elif not name or entry.is_dir() or name.startswith("__MACOSX/"):
                    continue
                elif len(parts) > 1:
                    errors.append(f"{printable(name)} lies in a folder: the files belong at the top level")
                elif name in files:
                    errors.append(f"{printable(name)} is there twice")
                elif name not in names:
                    files[name] = b""  # its name is the fault; what is in it need not be unpacked
                # The size is the archive's claim, and zipfile reads no more than that: a zip bomb ends here.
                elif entry.file_size > _MAX_FILE_BYTES:
                    errors.append(f"{printable(name)} has {entry.file_size:,} bytes")
                elif entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    errors.append(f"{printable(name)} is compressed in a way that not everyone can unpack: deflate it")
                else:
                    files[name] = archive.read(entry)
    # Hostile archives fail in every part of the reader, each with an error of its own.
    except Exception as error:
        raise DataError(f"{path} is not a readable zip file ({type(error).__name__}: {error})") from error
    return files, errors
