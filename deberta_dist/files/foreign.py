"""Recognises files that are not what their name says: Git LFS pointers, web pages, other formats.

Each reader would call such a file damaged, or take it for text. Every reader of files that users bring asks here, with
the first bytes of the file, before it judges them itself.
"""

import codecs
import re
from pathlib import Path

from deberta_dist.errors import DataError, DebertaDistError, printable

HEAD_BYTES = 1024
"""As many of the first bytes of a file are enough for every function here; a pointer is never longer."""

_LFS_POINTER = re.compile(rb"version https?://(?:git-lfs\.github\.com/spec|hawser\.github\.com/spec|git-media\.io)/")
_LFS_SIZE = re.compile(rb"^size (\d{1,18})\s*$", re.MULTILINE)
# The content of an unlocked file, and what git writes for a locked one where there are no links.
_ANNEX_POINTER = re.compile(rb"(?:(?:\.\./)*\.git)?/annex/objects/[^\n]+\n?")
_PAGE_STARTS = (b"<!doctype html", b"<html")
_ANSWERS = (b"Entry not found", b"404: Not Found", b"Not Found", b"Repository not found", b"Invalid username or password.")

_FORMATS = (
    (b"\x1f\x8b", "gzip data"),
    (b"\x28\xb5\x2f\xfd", "zstd data"),
    (b"\xfd7zXZ\x00", "xz data"),
    (b"BZh", "bzip2 data"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"PAR1", "a Parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"\x93NUMPY", "a NumPy array (.npy)"),
    (b"\x89HDF\r\n", "an HDF5 file"),
    (b"SQLite format 3\x00", "an SQLite database"),
    (b"Obj\x01", "an Avro file"),
    (b"GGUF", "a GGUF file"),
    (b"%PDF-", "a PDF file"),
    (b"\x88\xd8\x34\x01", "a token file of llm.c"),
    (b"MMIDIDX\x00\x00", "the index of a Megatron or fairseq dataset"),
    (b"TNTIDX\x00\x00", "an old index of fairseq"),
    (b"DDTOKENS", "a token file of this program"),
)


def head_of(path: Path) -> bytes:
    """The first ``HEAD_BYTES`` of a file; none of one that cannot be read: who reads it next says why."""
    try:
        with open(path, "rb") as file:
            return file.read(HEAD_BYTES)
    except OSError:
        return b""


def read_limited(path: Path, *, max_bytes: int, too_large: str, error: type[DebertaDistError]) -> bytes:
    """A file of limited size that is what its name says.

    Args:
        path: The file.
        max_bytes: More are not read.
        too_large: What to say of a larger one, behind its name.
        error: What to raise.

    Raises:
        DebertaDistError: as ``error``; it is unreadable, too large, or another kind of file (`refuse_foreign`).
    """
    try:
        with open(path, "rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as problem:
        raise error(f"{path} cannot be read ({problem.strerror})") from problem
    if len(content) > max_bytes:
        raise error(f"{path} {too_large}")
    refuse_foreign(content, path, error=error)
    return content


def stand_in(head: bytes) -> str | None:
    """What a file is that only says where the real one can be had, and what to do; None for any other.

    Args:
        head: the first ``HEAD_BYTES`` of the file, or all of a shorter one.
    """
    if _LFS_POINTER.match(head.removeprefix(codecs.BOM_UTF8)):
        size = _LFS_SIZE.search(head)
        real = f" ({int(size[1]):,} bytes)" if size else ""
        return f"a Git LFS pointer, not the file itself{real}: run git lfs pull in its repository"
    if len(head) < HEAD_BYTES and _ANNEX_POINTER.fullmatch(head):
        return "a git-annex pointer, not the file itself: run git annex get (or datalad get) in its repository"
    return None


def refuse_stand_in(head: bytes, path: object, *, error: type[DebertaDistError] = DataError) -> None:
    """For plain text: refuses a pointer.

    Args:
        head: as for ``stand_in``.
        path: As the message names it.
        error: Class of the error: each room refuses with its own.

    Raises:
        DebertaDistError: of that class, with the file and what to do.
    """
    if found := stand_in(head):
        raise error(f"{path} is {found}")


def refuse_foreign(head: bytes, path: object, *, error: type[DebertaDistError] = DataError) -> None:
    """For everything but plain text: refuses a pointer, and a server's answer saved in the file's place.

    Args:
        head: the first ``HEAD_BYTES`` of the file or more, or all of a shorter one.
        path, error: as for ``refuse_stand_in``.

    Raises:
        DebertaDistError: of that class, with the file and what to do.
    """
    head = head[:HEAD_BYTES]
    refuse_stand_in(head, path, error=error)
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()[:100]
    if start.lower().startswith(_PAGE_STARTS):
        what = "an HTML page saved in place of the file"
    elif start.startswith(b"<?xml"):
        what = "an XML document saved in place of the file, such as a server's error message"
    elif head.strip() in _ANSWERS:
        what = f"a server's answer saved in place of the file ({printable(head.strip().decode())})"
    else:
        return
    raise error(f"{path} is {what}: download it again, from the address of the file itself")


def format_name(head: bytes) -> str | None:
    """The format that a file begins like, as "a Parquet file"; None for text and for what is not known.

    Args:
        head: as for ``stand_in``.
    """
    if head.startswith(b"PK\x03\x04"):
        return "a file of torch.save" if b"/data.pkl" in head else "a zip archive"
    if head.startswith(b"\x80") and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a pickle, such as an old file of torch.save"
    if head.startswith(b"\xff\xff\xff\xff") and 0 < int.from_bytes(head[4:8], "little") < 1 << 24:
        return "an Arrow stream, such as a data set saved by the datasets library"
    if head[257:262] == b"ustar":
        return "a tar archive"
    if len(head) > 10 and head[8:10] == b'{"' and 0 < int.from_bytes(head[:8], "little") < 1 << 32:
        return "a safetensors file"
    return next((name for magic, name in _FORMATS if head.startswith(magic)), None)


def begins_like(head: bytes) -> str:
    """The end of a message about a file of the wrong format: "; it begins like a Parquet file", or ""."""
    found = format_name(head)
    return f"; it begins like {found}" if found else ""
