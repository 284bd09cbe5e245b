"""safetensors files, read and written one tensor at a time.

The library maps whole files, and what has been touched of a map counts as memory of the process; a conversion reads
every byte once. So the header is parsed here (strictly: it may be hostile) and tensors are read at their offsets.

Format: eight bytes N little-endian, N bytes of JSON {name: {dtype, shape, data_offsets}}, then the tensors.
"""

import functools
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from deberta_dist.checkpoint import strict_json
from deberta_dist.checkpoint.errors import CheckpointError
from deberta_dist.checkpoint.formats.weights import Weight, Weights

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


def read_safetensors(path: Path) -> Weights:
    """The tensors of a file, unread.

    Raises:
        CheckpointError: the file is not sound: header longer than the file or absurd, not strict JSON, unknown dtype,
            offsets that leave the file, overlap or do not fit the shape.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8 or length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path} is no safetensors file: it has {size} bytes and claims a header of {length}"
                )
            header = strict_json.parse(file.read(length), file=f"{path}: header")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    header.pop("__metadata__", None)
    start, weights, ranges = 8 + length, {}, []
    for name, raw in header.items():
        where = f"{path}: {name[:200]}"
        raw = strict_json.fields(raw, keys=("dtype", "shape", "data_offsets"), where=where)
        dtype = _DTYPES.get(strict_json.string(raw["dtype"], where=where))
        if dtype is None:
            raise CheckpointError(f"{where}: dtype {raw['dtype'][:20]} is not understood")
        shape = tuple(strict_json.integer(n, where=where) for n in strict_json.sequence(raw["shape"], where=where))
        offsets = [strict_json.integer(n, where=where) for n in strict_json.sequence(raw["data_offsets"], where=where)]
        if len(offsets) != 2 or not offsets[0] <= offsets[1] <= size - start:
            raise CheckpointError(f"{where}: its bytes {offsets} lie outside the file")
        if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
            raise CheckpointError(f"{where}: {offsets[1] - offsets[0]} bytes are not {list(shape)} of {raw['dtype']}")
        ranges.append(offsets)
        weights[name] = Weight(shape, dtype, functools.partial(_read, path, start + offsets[0], shape, dtype), (name,))
    ranges.sort()
    if any(a[1] > b[0] for a, b in zip(ranges, ranges[1:], strict=False)):
        raise CheckpointError(f"{path}: tensors overlap")
    return weights


def header_bytes(weights: Mapping[str, Weight]) -> bytes:
    """Length and header of a file that holds ``weights`` in their order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, weight in weights.items():
        begin, end = end, end + weight.num_bytes
        header[name] = {"dtype": _NAMES[weight.dtype], "shape": list(weight.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    # Readers map the file: the first tensor must lie at a multiple of its element's size.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(file: BinaryIO, weights: Mapping[str, Weight]) -> None:
    """Writes a file, one tensor in memory at a time."""
    file.write(header_bytes(weights))
    for name, weight in weights.items():
        file.write(tensor_bytes(weight, name=name))


def tensor_bytes(weight: Weight, *, name: str) -> memoryview:
    """The bytes of one tensor, little-endian and in row-major order."""
    tensor = weight.read()
    assert tensor.shape == weight.shape and tensor.dtype == weight.dtype, name
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())


def _read(path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    buffer = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
    if buffer.numel():
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            view, done = memoryview(buffer.numpy()), 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise CheckpointError(f"{path} became shorter while it was read")
                done += count
    return buffer.view(dtype).reshape(shape)
