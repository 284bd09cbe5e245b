"""The directory that a conversion makes: complete under its name, or not there at all."""

import hashlib
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from tqdm import tqdm

from deberta_dist.checkpoint.errors import CheckpointError, CheckpointWriteError, strict_json
from deberta_dist.checkpoint.find import CHECKPOINTS_NAME
from deberta_dist.conversion.files import read_json
from deberta_dist.conversion.weights import shorten
from deberta_dist.errors import ConfigError
from deberta_dist.files.atomic import replace_directory
from deberta_dist.files.disk import may_be_alive, sync_directory, write_all

REPORT_NAME = "conversion_report.json"
EXPORTED = ("config.json", "model.safetensors", "spm.model")
"""What a run's export consists of."""
_SMALL_FILES_BYTES = 32 * 2**20
_PART_BYTES = 4 * 2**20
_MINE = r"\.{name}\.converting-{host}-(\d+)"


class OutputDirectory:
    """Files of one conversion, written beside their destination.

    Attributes:
        path: Where they are until they are published.
        files: Name -> bytes and SHA-256 of what was written so far.
    """

    def __init__(self, path: Path, *, progress: tqdm) -> None:
        self.path = path
        self.files: dict[str, dict[str, object]] = {}
        self._progress = progress

    def write(self, name: str, fill: Callable[["HashedFile"], object]) -> None:
        """Writes a file through ``fill`` and forces it to disk."""
        # "x": two files of one name would be a fault of ours, and the later one would win without a word.
        with open(self.path / name, "xb", buffering=0) as raw, ThreadPoolExecutor(max_workers=1) as hasher:
            file = HashedFile(raw, hasher=hasher, on_bytes=self._progress.update)
            fill(file)
            os.fsync(raw.fileno())
        self.files[name] = {"bytes": file.tell(), "sha256": file.sha256.hexdigest()}

    def write_text(self, name: str, text: str) -> None:
        """Writes a small file."""
        self.write(name, lambda file: file.write(text.encode("utf-8")))

    def adopt(self, name: str) -> None:
        """Takes up a file that somebody else has written into ``path``: hashed, and forced to disk."""
        with open(self.path / name, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
            self.files[name] = {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}

    def copy(self, source: Path, *, name: str) -> None:
        """Copies a small file byte for byte."""
        self.write(name, lambda file: file.write(source.read_bytes()))


class HashedFile:
    """A file that can only be appended to, hashed while it is written: what zipfile and the writers here need."""

    def __init__(self, file: IO[bytes], *, hasher: Executor, on_bytes: Callable[[int], None]) -> None:
        self.sha256 = hashlib.sha256()
        self._file, self._hasher, self._on_bytes, self._position = file, hasher, on_bytes, 0

    def write(self, data: bytes | memoryview) -> int:
        """Appends, in parts so that progress shows within a large tensor."""
        view = memoryview(data).cast("B")
        for begin in range(0, len(view), _PART_BYTES):
            part = view[begin : begin + _PART_BYTES]
            # Both let other threads run, and both are done before the caller may change the bytes.
            hashed = self._hasher.submit(self.sha256.update, part)
            write_all(self._file.write, part)
            hashed.result()
            self._on_bytes(len(part))
        self._position += len(view)
        return len(view)

    def tell(self) -> int:
        """Bytes so far."""
        return self._position

    def flush(self) -> None:
        """Nothing is kept back here."""


@contextmanager
def new_directory(target: Path, *, force: bool, num_bytes: int) -> Iterator[OutputDirectory]:
    """A directory that gets its name when the block ends without error; an error removes it.

    A killed conversion leaves ``.NAME.converting-HOST-PID``; the next one to the same target on the same host
    removes it (on Windows it stays). Killed between the two renames of ``force``, it leaves what was replaced under
    that name with ``.old`` at its end, which nothing removes.

    Args:
        target: Where the directory appears once the block has ended without an error.
        force: Replace what a conversion or export has made there.
        num_bytes: About what will be written; a terminal shows how far it is.

    Raises:
        ConfigError: something is there and ``force`` is not given, or it does not look like a converted checkpoint.
        CheckpointWriteError: no room, or it cannot be written.
    """
    target = Path(os.path.abspath(target))
    require_free(target, force=force)
    host = re.sub(r"[^A-Za-z0-9_.]", "_", socket.gethostname())
    temporary = target.with_name(f".{target.name}.converting-{host}-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target, host=host)
        # Before anything is written: a conversion of hundreds of gigabytes should not fail at its end.
        free = shutil.disk_usage(target.parent).free
        if free < num_bytes + _SMALL_FILES_BYTES:
            raise CheckpointWriteError(
                f"{target} needs {num_bytes / 1e9:.2f} GB, and {target.parent} has {free / 1e9:.2f} GB left"
            )
        temporary.mkdir()
    except OSError as error:
        raise CheckpointWriteError(f"{target} cannot be made ({error.strerror})") from error
    try:
        # None: a bar on a terminal, nothing in a file or a pipe.
        with tqdm(total=num_bytes, unit="B", unit_scale=True, disable=None, leave=False) as progress:
            yield OutputDirectory(temporary, progress=progress)
        sync_directory(temporary)
        _publish(temporary, target, force=force)
    except OSError as error:
        raise CheckpointWriteError(f"{target} is not written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_free(target: Path, *, force: bool) -> None:
    """Refuses a target that must not be replaced.

    Raises:
        ConfigError: see `new_directory`.
    """
    if not os.path.lexists(target):
        return
    if not force:
        raise ConfigError(f"{target} exists already and is not overwritten: name another target, or give --force")
    if target.is_symlink() or not target.is_dir():
        raise ConfigError(f"{target} is not a directory and is not replaced, --force or not: name another target")
    foreign = _foreign(target)
    if foreign:
        raise ConfigError(
            f"{target} is not replaced, --force or not: it holds {shorten(foreign)}, which no conversion has written"
        )


def _foreign(target: Path) -> list[str]:
    """What in a directory was not made by a conversion or by a run's export."""
    own = {REPORT_NAME, *EXPORTED}
    if (target / REPORT_NAME).is_file():
        with suppress(CheckpointError):
            own |= strict_json.mapping(read_json(target / REPORT_NAME).get("files"), where=REPORT_NAME).keys()
    return sorted(entry.name for entry in target.iterdir() if entry.name not in own or not entry.is_file())


def _publish(temporary: Path, target: Path, *, force: bool) -> None:
    # Once more: something may have appeared in the minutes that the conversion took.
    require_free(target, force=force)
    replace_directory(temporary, target, aside=temporary.with_name(temporary.name + ".old"))


def _sweep(target: Path, *, host: str) -> None:
    mine = re.compile(_MINE.format(name=re.escape(target.name), host=re.escape(host)))
    for path in target.parent.iterdir():
        match = mine.fullmatch(path.name)
        # Another conversion to the same target may be at work on this host; those of other hosts cannot be asked.
        if match and not may_be_alive(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def require_apart(source: Path, target: Path) -> None:
    """Refuses a target that is, holds, or lies in the source, or lies among a run's checkpoints.

    Raises:
        ConfigError: it does.
    """
    a, b = source.resolve(), target.resolve()
    if a.parent.name == CHECKPOINTS_NAME:
        a = a.parent
    if a == b or a in b.parents or b in a.parents:
        raise ConfigError(f"{target} and the source {source} contain one another: name a target elsewhere")


def hash_of(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
