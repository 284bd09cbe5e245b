"""One rank's file of a checkpoint: its shard of every flat parameter in three states, as safetensors.

Written by ourselves in one pass, hashed on the way and forced to disk; read as memory maps after the header
has been found to describe exactly such a file. The library reads these files too.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deberta_dist.checkpoint.errors import CheckpointError, strict_json
from deberta_dist.checkpoint.manifest import FileEntry
from deberta_dist.files.disk import open_file, write_all
from deberta_dist.parallel.flat_layout import ShardState

STATES = ("weight", "exp_avg", "exp_avg_sq")
MAX_HEADER_BYTES = 2**20
CHUNK_BYTES = 8 * 2**20
_FLOAT32 = np.dtype("<f4")

ShardMaps = dict[tuple[int, str], np.ndarray]
"""(flat parameter, state) -> the shard, mapped from its file."""


def tensor_name(flat: int, state: str) -> str:
    """Name of a tensor in the file."""
    return f"flat.{flat}.{state}"


def file_header(shards: Sequence[ShardState]) -> bytes:
    """The file up to its first number."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for flat, shard in enumerate(shards):
        for state in STATES:
            begin, end = end, end + 4 * getattr(shard, state).numel()
            entries[tensor_name(flat, state)] = {
                "dtype": "F32",
                "shape": [(end - begin) // 4],
                "data_offsets": [begin, end],
            }
    text = json.dumps(entries, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)  # numbers begin on a multiple of 8
    return len(text).to_bytes(8, "little") + text


def file_bytes(shards: Sequence[ShardState]) -> int:
    """Size of the file."""
    return len(file_header(shards)) + sum(4 * getattr(shard, state).numel() for shard in shards for state in STATES)


def write_shard_file(path: Path, shards: Sequence[ShardState]) -> FileEntry:
    """Writes a rank's shards and forces them to disk.

    Args:
        path: The file; a file of that name is overwritten.
        shards: Float32 on the host, 1-D, in the order of the flat parameters; the three states equally long.

    Returns:
        Its size and the checksum of what was handed to the disk.

    Raises:
        OSError: it cannot be written. What was written stays.
    """
    digest, size = hashlib.sha256(), 0
    file = open_file(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        buffers = [file_header(shards)]
        for shard in shards:
            values = [getattr(shard, state) for state in STATES]
            assert len({value.shape for value in values}) == 1 and values[0].ndim == 1
            buffers += [value.numpy().astype(_FLOAT32, casting="equiv", copy=False).data.cast("B") for value in values]
        for buffer in buffers:
            # In chunks, so that each is hashed while it is still in the processor's cache.
            for start in range(0, len(buffer), CHUNK_BYTES):
                chunk = memoryview(buffer)[start : start + CHUNK_BYTES]
                digest.update(chunk)
                size += len(chunk)
                write_all(lambda rest: os.write(file, rest), chunk)
        os.fsync(file)
    finally:
        os.close(file)
    return FileEntry(bytes=size, sha256=digest.hexdigest())


def map_shard_file(path: Path) -> ShardMaps:
    """Maps a rank's shards; reads the header only.

    Raises:
        CheckpointError: missing, truncated, or not such a file.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            # The length comes from the file: a damaged one must not make us read gigabytes.
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{path}: a header of {length} bytes in a file of {size}: damaged, or not a shard file")
            lengths = _shard_lengths(file.read(length), path=path, data_bytes=size - 8 - length)
            # One mapping for all shards of the file: systems limit the number of mappings of a process.
            mapped = np.memmap(file, dtype=np.uint8, mode="r")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    maps: ShardMaps = {}
    begin = 8 + length
    for flat, count in enumerate(lengths):
        for state in STATES:
            maps[flat, state] = np.asarray(mapped[begin : begin + 4 * count]).view(_FLOAT32)
            begin += 4 * count
    return maps


def hash_file(path: Path) -> str:
    """SHA-256 of a file, hex. Other threads run meanwhile.

    Raises:
        OSError: it cannot be read.
    """
    digest, buffer = hashlib.sha256(), bytearray(CHUNK_BYTES)
    # Unbuffered: readinto fills our buffer at once, without a copy through Python's.
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def _shard_lengths(text: bytes, *, path: Path, data_bytes: int) -> list[int]:
    """Elements of every flat parameter's shard, from a header that has to be the one we would write."""
    # Stricter than safetensors: any other order or gap would be a file of another writer, and be read wrongly.
    header = strict_json.parse(text, file=f"{path}: header")
    header.pop("__metadata__", None)
    lengths: list[int] = []
    end = 0
    for number, (name, entry) in enumerate(header.items()):
        flat, state = divmod(number, len(STATES))
        where = f"{path}: {tensor_name(flat, STATES[state])}"
        if name != tensor_name(flat, STATES[state]):
            raise CheckpointError(f"{where} is expected, {name[:100]!r} found")
        entry = strict_json.fields(entry, keys=("dtype", "shape", "data_offsets"), where=where)
        shape = strict_json.sequence(entry["shape"], where=where)
        if state == 0:
            lengths.append(strict_json.integer(shape[0] if shape else None, where=where, minimum=1))
        count = lengths[flat]
        begin, end = end, end + 4 * count
        if entry["dtype"] != "F32" or shape != [count] or entry["data_offsets"] != [begin, end]:
            raise CheckpointError(f"{where}: not a float32 shard of {count} numbers at byte {begin}")
    if not header or len(header) % len(STATES):
        raise CheckpointError(f"{path}: it has {len(header)} tensors, not {len(STATES)} for every flat parameter")
    if end != data_bytes:
        raise CheckpointError(f"{path}: {data_bytes} bytes of numbers where its header describes {end}: truncated or damaged")
    return lengths
