"""safetensors files, read and written one tensor at a time.

The library maps whole files, and what has been touched of a map counts as memory of the process; a conversion reads
every byte once. So the header is parsed here (strictly: it may be hostile) and tensors are read at their offsets.

Format: eight bytes N little-endian, N bytes of JSON {name: {dtype, shape, data_offsets}}, then the tensors.
"""

import io
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from deberta_dist.checkpoint.errors import CheckpointError, strict_json
from deberta_dist.conversion.weights import CHUNK_NUMBERS, ChunkedReader, Weight, Weights
from deberta_dist.errors import printable
from deberta_dist.files.foreign import HEAD_BYTES, begins_like, refuse_foreign

MAX_HEADER_BYTES = 100 * 2**20
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Writable(Protocol):
    """What tensors are written to."""

    def write(self, data: bytes | memoryview, /) -> int: ...


def read_safetensors(path: Path) -> Weights:
    """The tensors of a file, unread.

    Raises:
        CheckpointError: the file is not sound: header longer than the file or absurd, not strict JSON, unknown dtype,
            offsets that leave the file, overlap or do not fit the shape.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(HEAD_BYTES)
            refuse_foreign(head, path, error=CheckpointError)
            file.seek(8)
            length = int.from_bytes(head[:8], "little")
            if size < 8 or length > size - 8 or length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path} is not a safetensors file: it has {size} bytes and claims a header of {length}{begins_like(head)}"
                )
            header = strict_json.parse(file.read(length), file=f"{path}: header")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    header.pop("__metadata__", None)
    start, weights, ranges = 8 + length, {}, []
    for name, raw in header.items():
        where = f"{path}: {printable(name)}"
        raw = strict_json.fields(raw, keys=("dtype", "shape", "data_offsets"), where=where)
        dtype = _DTYPES.get(strict_json.string(raw["dtype"], where=where))
        if dtype is None:
            raise CheckpointError(
                f"{where}: dtype {printable(raw['dtype'][:20])} is not understood, only {', '.join(_DTYPES)} are: load the file with "
                "the library that made it, bring its tensors to float32 and save the result"
            )
        shape = tuple(strict_json.integer(n, where=where) for n in strict_json.sequence(raw["shape"], where=where))
        offsets = [strict_json.integer(n, where=where) for n in strict_json.sequence(raw["data_offsets"], where=where)]
        if len(offsets) != 2 or not offsets[0] <= offsets[1] <= size - start:
            raise CheckpointError(f"{where}: its bytes {offsets} lie outside the file")
        if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
            raise CheckpointError(f"{where}: {offsets[1] - offsets[0]} bytes are not {list(shape)} of {raw['dtype']}")
        ranges.append(offsets)
        weights[name] = Weight(shape, dtype, _InFile(shape, dtype, path=path, offset=start + offsets[0]), (name,))
    # No writer makes tensors that overlap; with them a small file could claim any amount of memory.
    ranges.sort()
    if any(a[1] > b[0] for a, b in zip(ranges, ranges[1:], strict=False)):
        raise CheckpointError(f"{path}: tensors overlap")
    return weights


def header_bytes(weights: Mapping[str, Weight]) -> bytes:
    """Length and header of a file that holds ``weights`` in their order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, weight in _in_order(weights):
        begin, end = end, end + weight.num_bytes
        header[name] = {"dtype": _NAMES[weight.dtype], "shape": list(weight.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    # Readers map the file: a tensor must lie at a multiple of its element's size.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _in_order(weights: Mapping[str, Weight]) -> list[tuple[str, Weight]]:
    """Wide numbers first, so that none lies across a boundary of its own size."""
    return sorted(weights.items(), key=lambda item: -item[1].dtype.itemsize)


def write_safetensors(file: Writable, weights: Mapping[str, Weight]) -> None:
    """Writes a file, tensor by tensor."""
    file.write(header_bytes(weights))
    for name, weight in _in_order(weights):
        write_tensor(file, weight, name=name)


def write_tensor(file: Writable, weight: Weight, *, name: str) -> None:
    """Writes the numbers of one tensor, little-endian and in row-major order."""
    num_bytes = 0
    for part in weight.parts():
        assert part.dtype == weight.dtype, name
        num_bytes += file.write(part.view(torch.uint8).numpy().data)
    assert num_bytes == weight.num_bytes, name


class _InFile(ChunkedReader):
    """A tensor whose bytes are contiguous in a file."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, *, path: Path, offset: int) -> None:
        super().__init__(shape, dtype)
        self._path, self._offset = path, offset

    def parts(self) -> Iterator[Tensor]:
        left = math.prod(self.shape)
        buffer = torch.empty(min(left, CHUNK_NUMBERS), dtype=self.dtype)
        with open(self._path, "rb", buffering=0) as file:
            file.seek(self._offset)
            while left:
                part = buffer[: min(left, CHUNK_NUMBERS)]
                self._fill(part.view(torch.uint8).numpy().data, file)
                yield part
                left -= len(part)

    def _fill(self, view: memoryview, file: io.FileIO) -> None:
        done = 0
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                raise CheckpointError(f"{self._path} became shorter while it was read")
            done += count
