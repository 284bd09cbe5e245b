"""Finds files below directories and by patterns, strictly: a directory that cannot be read is an error.

``glob`` and ``os.walk`` pass over directories that cannot be read and links that lead nowhere, and follow links that
lead back for ever. ``inputs`` and ``benchmark_texts`` find files through this file alone.
"""

import fnmatch
import glob
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from deberta_dist.errors import DataError

_KINDS = {
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


def is_hidden(path: Path) -> bool:
    """Whether a name begins with a dot, as those of editors and version control do."""
    return path.name.startswith(".")


def require_regular(path: Path) -> os.stat_result:
    """The state of a file.

    Raises:
        DataError: it is missing, a link that leads nowhere or back to itself, a directory, a pipe, a socket or a device.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        if os.path.islink(path):
            target = os.readlink(path)
            is_annex = "annex/objects" in target
            advice = "run git annex get (or datalad get) in its repository" if is_annex else "fix or remove it"
            raise DataError(f"{path} is a link that leads nowhere, to {target}: {advice}") from error
        raise DataError(f"{path} cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for test, name in _KINDS.items() if test(status.st_mode)), "a directory")
        raise DataError(f"{path} is {kind} and not a regular file: write its output to a file first")
    return status


def entries_below(folder: Path, *, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Everything below a directory that is no directory, through links as well.

    Of hidden directories there is the directory itself, and nothing that is in it.

    Args:
        above: real paths of the directories on the way to it.

    Raises:
        DataError: a directory cannot be read, or links to one it lies in.
    """
    for path, is_directory in _entries(folder, above=above):
        if is_directory and not is_hidden(path):
            yield from entries_below(path, above=(*above, folder.resolve()))
        else:
            yield path


def fitting_entries(pattern: Path) -> Iterator[Path]:
    """Everything that fits a pattern, each once: files, directories and what is neither.

    ``*``, ``?`` and ``[]`` stand for what they do in ``fnmatch``, within one name; ``**`` for any number of directories,
    and at the end for every file below them. None fits a hidden name, unless the pattern has the dot.

    Raises:
        DataError: as ``entries_below``.
    """
    parts = pattern.parts
    start, parts = (Path(parts[0]), parts[1:]) if pattern.is_absolute() else (Path(), parts)
    seen: set[Path] = set()
    for path in _fitting(start, parts, above=()):
        if path not in seen:
            seen.add(path)
            yield path


def _fitting(folder: Path, parts: Sequence[str], *, above: tuple[Path, ...]) -> Iterator[Path]:
    part, rest = parts[0], parts[1:]
    if part == "**":
        if rest:
            yield from _fitting(folder, rest, above=())
        for path, is_directory in _entries(folder, above=above):
            if is_hidden(path):
                continue
            if is_directory:
                yield from _fitting(path, parts, above=(*above, folder.resolve()))
            elif not rest:
                yield path
    elif glob.has_magic(part):
        for path, is_directory in _entries(folder, above=()):
            if not fnmatch.fnmatch(path.name, part) or (is_hidden(path) and not part.startswith(".")):
                continue
            if not rest:
                yield path
            elif is_directory:
                yield from _fitting(path, rest, above=())
    elif rest:
        if (folder / part).is_dir():
            yield from _fitting(folder / part, rest, above=())
    elif os.path.lexists(folder / part):
        yield folder / part


def _entries(folder: Path, *, above: tuple[Path, ...]) -> list[tuple[Path, bool]]:
    """What is in a directory, in order of names, and whether it is a directory."""
    if folder.resolve() in above:
        raise DataError(f"{folder} is a link to a directory that it lies in: name what is below it instead")
    try:
        return sorted((folder / entry.name, _is_directory(entry)) for entry in os.scandir(folder))
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror})") from error


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
