"""Lists the checkpoints of a run and finds the newest complete one.

A checkpoint is a directory with its final name; ``latest`` beside them is written last and only a hint. What
starts with a dot is unfinished or on its way out and never looked at.
"""

import re
from collections.abc import Callable
from pathlib import Path

from deberta_dist.checkpoint.errors import CheckpointError, CheckpointVersionError
from deberta_dist.checkpoint.reader import CheckpointReader, open_checkpoint

CHECKPOINTS_NAME = "checkpoints"
"""Directory of a run's checkpoints in its run directory."""
LATEST_NAME = "latest"
_STEP_NAME = re.compile(r"step-(\d{8,18})", re.ASCII)


def step_name(step: int) -> str:
    """Name of the checkpoint of a step: step-00000100."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """Step of a checkpoint directory; None where the name is not one."""
    match = _STEP_NAME.fullmatch(path.name)
    return int(match[1]) if match and step_name(int(match[1])) == path.name else None


def checkpoints(directory: str | Path) -> list[Path]:
    """All checkpoint directories, newest first, whole or not.

    Args:
        directory: ``<run>/checkpoints``; may be missing.
    """
    directory = Path(directory)
    if not directory.is_dir():
        return []
    found = [(step, path) for path in directory.iterdir() if (step := step_of(path)) is not None and path.is_dir()]
    return [path for _, path in sorted(found, reverse=True)]


def newest_complete(
    directory: str | Path,
    *,
    on_skip: Callable[[str], None],
    on_damaged: Callable[[Path], None] = lambda path: None,
    verify: bool = True,
) -> CheckpointReader | None:
    """The newest checkpoint whose every byte is as it was written. Reads all of it: for one rank of a run.

    Args:
        directory: ``<run>/checkpoints``.
        on_skip: Told of everything that is wrong on the way.
        on_damaged: Told of every checkpoint that is not used.
        verify: False looks at manifests and sizes alone.

    Returns:
        None where there is no checkpoint at all.

    Raises:
        CheckpointVersionError: the newest sound one has a newer format.
        CheckpointError: there are checkpoints, and none is whole; or ``latest`` names one and all are gone.
    """
    paths = checkpoints(directory)
    hint = _latest(Path(directory))
    problems = []
    if hint is not None and hint not in {path.name for path in paths}:
        problems.append(f"{Path(directory) / LATEST_NAME} names {hint}, which is missing")
        on_skip(problems[-1])
    for path in paths:
        try:
            reader = open_checkpoint(path, verify=verify)
            if not verify:
                reader.check_sizes()
            if reader.manifest.step != step_of(path):
                raise CheckpointError(f"{path} has another name than its step, {reader.manifest.step}")
            return reader
        except CheckpointVersionError:
            raise
        except CheckpointError as error:
            problems.append(str(error))
            on_skip(f"checkpoint {path.name} is not used: {error}")
            on_damaged(path)
    if problems:
        raise CheckpointError(
            f"no checkpoint in {directory} can be used: {'; '.join(problems)}. To start over, move the directory away"
        )
    return None


def _latest(directory: Path) -> str | None:
    try:
        text = (directory / LATEST_NAME).read_bytes()[:100].decode("utf-8", "replace").strip()
    except OSError:
        return None
    return text if step_of(Path(text)) is not None else None
