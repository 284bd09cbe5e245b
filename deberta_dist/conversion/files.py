"""Reads files of checkpoints from elsewhere: only inside their directory, and only up to a size limit.

An index or a link in a downloaded checkpoint must not be able to name a file of the machine it is converted on.
"""

import os
from pathlib import Path
from typing import Any

from deberta_dist.checkpoint.errors import CheckpointError, strict_json
from deberta_dist.files.foreign import head_of, read_limited, refuse_stand_in

MAX_JSON_BYTES = 64 * 2**20


def inside(directory: Path, name: object) -> Path:
    """The file ``name`` of a directory.

    Args:
        directory: Named by the user, hence trusted; it may itself be a link.
        name: From an index, hence not.

    Raises:
        CheckpointError: ``name`` is not a plain file name, leads out of the directory, or is no file. Links into the
            ``blobs`` of a Hugging Face cache are the one exception: there every file is such a link.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\\0"):
        raise CheckpointError(f"{directory}: {str(name)[:200]!r} is not the plain name of a file in this directory")
    path = directory / name
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(directory))
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if real.parent not in allowed:
        raise CheckpointError(f"{path} is a link that leads out of its directory, to {real}: copy the file there instead")
    if not real.is_file():
        raise CheckpointError(f"{path} is missing, or is no file")
    refuse_stand_in(head_of(path), path, error=CheckpointError)
    return path


def has(directory: Path, name: str) -> bool:
    """Whether there is an entry of this name, be it a dangling link."""
    return os.path.lexists(directory / name)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of limited size.

    Raises:
        CheckpointError: unreadable, too large, or not an object of strict JSON.
    """
    too_large = f"is larger than {MAX_JSON_BYTES >> 20} MiB: no configuration or index is"
    text = read_limited(path, max_bytes=MAX_JSON_BYTES, too_large=too_large, error=CheckpointError)
    return strict_json.parse(text, file=path)


def indexed_files(index: Path) -> dict[str, list[str]]:
    """File name -> keys it holds, from a Hugging Face index; every file is `inside`.

    Raises:
        CheckpointError: not an index, or a name in it leads elsewhere.
    """
    table = strict_json.mapping(read_json(index).get("weight_map"), where=f"{index}: weight_map")
    found: dict[str, list[str]] = {}
    for key, name in table.items():
        if not isinstance(name, str) or name not in found:
            inside(index.parent, name)
        found.setdefault(name, []).append(key)
    return found
