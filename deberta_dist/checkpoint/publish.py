"""Renames finished checkpoint directories into place and prunes old ones; a crash at any point does no harm.

Names beside the checkpoints: ``.tmp-`` is being written, ``.old-`` stood where a new one was to go, ``.gone-``
is being deleted. Under the run's lock none of them belongs to anybody at the start of a run.
"""

import os
from collections.abc import Callable, Collection
from pathlib import Path

from deberta_dist.checkpoint.errors import CheckpointError
from deberta_dist.checkpoint.find import LATEST_NAME, checkpoints, step_name, step_of
from deberta_dist.checkpoint.reader import CheckpointReader
from deberta_dist.errors import ConfigError
from deberta_dist.files.atomic import remove, replace_directory, replace_file, restore
from deberta_dist.files.lock import RunLock

TEMPORARY, OLD, GONE = ".tmp-", ".old-", ".gone-"


def temporary_directory(directory: Path, *, step: int, token: str) -> Path:
    """Where the ranks write the checkpoint of a step."""
    return directory / f"{TEMPORARY}{step_name(step)}-{token}"


def put_in_place(temporary: Path, final: Path, *, token: str) -> None:
    """Gives a complete checkpoint its name; see `replace_directory`."""
    replace_directory(temporary, final, aside=final.parent / f"{OLD}{final.name}-{token}")


def point_latest(directory: Path, name: str) -> None:
    """Writes ``latest``, whole at any time. Raises OSError."""
    replace_file(directory / LATEST_NAME, f"{name}\n".encode(), temporary=directory / f"{TEMPORARY}{LATEST_NAME}")


def prune(directory: Path, *, keep_last: int, keep_every: int, written: Path, damaged: Collection[Path] = ()) -> None:
    """Removes checkpoints that are older than the newest ``keep_last`` complete ones.

    Complete means here: a sound manifest and every file in full length. Where there are fewer of them,
    nothing is removed.

    Args:
        directory: ``<run>/checkpoints``.
        keep_last: At least 1.
        keep_every: Steps that are multiples of it stay; 0 = none.
        written: The one just written, which stays in any case.
        damaged: Known not to be whole, whatever their sizes say: they do not count.

    Raises:
        OSError: a directory could not be renamed.
    """
    assert keep_last >= 1 and keep_every >= 0
    num_complete = 0
    for path in checkpoints(directory):
        step = step_of(path)
        assert step is not None
        if num_complete < keep_last:
            num_complete += path not in damaged and _is_complete(path)
        elif path != written and not (keep_every and step % keep_every == 0):
            # Renamed first: a half-deleted checkpoint must not look like one.
            gone = directory / f"{GONE}{path.name}"
            remove(gone)
            os.rename(path, gone)
            remove(gone)


def sweep(directory: str | Path, *, lock: RunLock, on_remove: Callable[[str], None] = lambda message: None) -> None:
    """Removes what dead writers left, at the start of a run and before looking for a checkpoint.

    Args:
        directory: ``<run>/checkpoints``; may be missing.
        lock: The run's, held: otherwise the writers might live.
        on_remove: Told of each directory.

    Raises:
        ConfigError: the directory cannot be changed.
    """
    assert lock.is_held
    directory = Path(directory)
    if not directory.is_dir():
        return
    try:
        _sweep(directory, on_remove=on_remove)
    except OSError as error:
        raise ConfigError(f"{directory} cannot be changed ({error.strerror}): checkpoints could not be written") from error


def is_being_replaced(directory: Path) -> bool:
    """Whether a checkpoint stands aside that the next sweep may put back."""
    return directory.is_dir() and any(path.name.startswith(OLD) for path in directory.iterdir())


def _sweep(directory: Path, *, on_remove: Callable[[str], None]) -> None:
    for path in sorted(directory.iterdir()):
        if path.name.startswith(OLD):
            name = path.name.removeprefix(OLD).rpartition("-")[0]
            if step_of(Path(name)) is not None and restore(path, directory / name):
                on_remove(f"{path} is {name} again: the run ended while it was being replaced")
                continue
        if path.name.startswith((TEMPORARY, OLD, GONE)):
            remove(path)
            on_remove(f"{path} is removed: an unfinished checkpoint of an earlier start")


def _is_complete(path: Path) -> bool:
    try:
        CheckpointReader(path).check_sizes()
    except CheckpointError:
        return False
    return True
