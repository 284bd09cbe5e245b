"""The zip of a submission: made so that equal files give equal bytes, and read without trust."""

import io
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

from deberta_dist.errors import DataError, printable

_MAX_FILE_BYTES = 64 * 2**20


def zip_bytes(files: Mapping[str, bytes]) -> bytes:
    """A zip with the files at its top level; equal files give equal bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, files[name])
    return buffer.getvalue()


def read_zip(path: Path, names: Collection[str]) -> tuple[dict[str, bytes], list[str]]:
    """(files by name, what is wrong with the zip itself). Nothing is unpacked to disk.

    Args:
        path: Anyone's zip.
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
                elif entry.file_size > _MAX_FILE_BYTES:
                    errors.append(f"{printable(name)} has {entry.file_size:,} bytes")
                elif entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    errors.append(f"{printable(name)} is compressed in a way that not everyone can unpack: deflate it")
                else:
                    files[name] = archive.read(entry)
    # Hostile archives fail in every part of the reader, each with an error of its own.
    except Exception as error:
        raise DataError(f"{path} is no zip file that can be read ({type(error).__name__}: {error})") from error
    return files, errors
