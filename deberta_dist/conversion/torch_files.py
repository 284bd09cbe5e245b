"""``.bin`` files of torch.save, read and written one tensor at a time, and never executed.

Reading: the pickle inside is interpreted with ``weights_only`` alone, tensors stay in the mapped file. Writing: the
same archive that torch.save makes, but streamed, because torch.save wants all tensors in memory first. Every version
of torch since 1.6 reads it.
"""

import collections
import functools
import io
import math
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from deberta_dist.checkpoint.errors import CheckpointError
from deberta_dist.conversion.rules import allowed_by
from deberta_dist.conversion.safetensors_files import write_tensor
from deberta_dist.conversion.weights import Weight, Weights, shorten
from deberta_dist.conversion.wrappers import tensors_in
from deberta_dist.errors import printable
from deberta_dist.files.foreign import begins_like, format_name, head_of, refuse_foreign
from deberta_dist.files.strict_json import as_read

_REMAP_BYTES = 256 * 2**20
_ALIGNMENT = 64
_ASKED_FOR = re.compile(
    r"GLOBAL ([\w.]+)|safe_globals`,? but got <class '([\w.]+)'|unrecognized function (?:<[\w ]+? )?'?([\w.]+)"
)
_ADVICE = re.compile(r"weights_only|torch\.load|safe_globals|you trust|the source of the checkpoint", re.IGNORECASE)
# What torch's own quantised modules save instead of a weight.
_PACKED = re.compile(r"(.*\.)?_packed_params(\..*)?")
_STORAGES = {
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}


class TorchFile:
    """One ``.bin`` file.

    Attributes:
        weights: Tensors by key; the numbers are read from the file when they are asked for.
        config: The published code's ``config`` entry, if there is one; otherwise None.
        others: Entries beside the model in a training checkpoint, such as the optimizer's state.
        is_streamed: Whether tensors are read one by one. Files from before torch 1.6 are read whole.
    """

    def __init__(self, path: Path, *, allow_unmapped: Sequence[str] = ()) -> None:
        """Reads the table of contents.

        Args:
            path: Zip or old form of `torch.save`; nothing in it is executed.
            allow_unmapped: fnmatch patterns of entries that may be something else than tensors.

        Raises:
            CheckpointError: the file is damaged, not one of torch.save, or its pickle asks for anything but tensors.
        """
        self._path = path
        self._head = head_of(path)
        refuse_foreign(self._head, path, error=CheckpointError)
        self.is_streamed = zipfile.is_zipfile(path)
        self._state: dict[str, Any] | None = None
        self._bytes_read = 0
        self.config: dict[str, Any] | None = None
        self.weights: Weights = {}
        whole = self._mapped()
        self._way, state = tensors_in(whole, where=path)
        self.others = [key for key in whole if key not in (*self._way, "config")] if self._way else []
        if self._way and isinstance(whole.get("config"), dict):
            self.config = self._plain(whole["config"])
        if packed := [str(key) for key in state if _PACKED.fullmatch(str(key))]:
            raise CheckpointError(
                f"{path}: {len(packed)} entries are of modules that torch has quantised ({shorten(packed, most=1)}), which is not "
                "undone here: save the model as it was before quantize_dynamic or convert"
            )
        if self.is_streamed:
            self._require_records(state)
        for key, value in state.items():
            if key == "config" and isinstance(value, dict):
                self.config = self._plain(value)
            elif not isinstance(key, str) or not isinstance(value, Tensor):
                if allowed_by(str(key), allow_unmapped) is not None:
                    self.others.append(str(key))
                    continue
                raise CheckpointError(
                    f"{path}: {printable(str(key))} is {type(value).__name__}, not a named tensor; to leave it out, give "
                    "--allow-unmapped KEY"
                )
            else:
                self._require_dense(key, value)
                self.weights[key] = Weight(tuple(value.shape), value.dtype, functools.partial(self._read, key), (key,))

    def _require_records(self, state: Mapping[str, Any]) -> None:
        """Refuses storages that are not exactly one record each: the mapped reader takes bytes as they lie there.

        It would read compressed numbers, or on into the next record, without a word.
        """
        tensors = [value for value in state.values() if isinstance(value, Tensor) and value.layout == torch.strided]
        # By storage and not by tensor: tied tensors are two views of one record.
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        storages = {address: size for address, size in storages.items() if size}
        try:
            with zipfile.ZipFile(self._path) as archive:
                entries = [entry for entry in archive.infolist() if "/data/" in entry.filename]
                records = {_data_offset(archive, entry): entry.file_size for entry in entries}
        except (zipfile.BadZipFile, struct.error) as error:
            raise CheckpointError(f"{self._path} is refused: its table of contents is damaged ({error})") from error
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise CheckpointError(
                f"{self._path}: its tensors are compressed, which torch.save never does: load it with torch and save it again"
            )
        # The map begins at the one address from which every storage lies where a record of its length does.
        first = min(storages, default=0)
        starts = (first - offset for offset, size in records.items() if size == storages.get(first))
        if storages and not any(
            all(records.get(address - start) == size for address, size in storages.items()) for start in starts
        ):
            raise CheckpointError(f"{self._path}: its tensors are larger or smaller than what is stored of them")

    def _require_dense(self, key: str, value: Tensor) -> None:
        where = f"{self._path}: {printable(key)}"
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise CheckpointError(f"{where} is not a dense tensor in memory")
        # A view that repeats a few stored numbers could be of any size.
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise CheckpointError(f"{where} is {list(value.shape)}, more than the file stores of it")

    def _plain(self, config: dict[Any, Any]) -> dict[str, Any]:
        try:
            return as_read(config)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{self._path}: its config is not one that JSON could hold ({error})") from error

    def _mapped(self) -> dict[str, Any]:
        # What has been read of a map counts as memory of this process until it is unmapped.
        if self._state is None or (self.is_streamed and self._bytes_read > _REMAP_BYTES):
            self._state, self._bytes_read = None, 0
            try:
                with warnings.catch_warnings():
                    # About the version of the pickle: a refusal, if any, says more.
                    warnings.simplefilter("ignore")
                    # weights_only interprets the pickle by a list of allowed names: nothing in the file is executed.
                    self._state = torch.load(self._path, map_location="cpu", mmap=self.is_streamed, weights_only=True)
            except OSError as error:
                raise CheckpointError(f"{self._path} cannot be read ({error.strerror})") from error
            except MemoryError as error:
                raise CheckpointError(f"{self._path} asks for more memory than there is") from error
            # Damaged archives and hostile pickles fail in every part of the reader, each with an error of its own.
            except Exception as error:
                raise CheckpointError(f"{self._path} is refused: {_reason(error)}{self._like()}") from error
            if not isinstance(self._state, dict):
                raise CheckpointError(f"{self._path} holds {type(self._state).__name__}, not a state dictionary")
        return self._state

    def _like(self) -> str:
        is_torchs = "torch.save" in (format_name(self._head) or "")
        return "" if is_torchs else begins_like(self._head)

    def _read(self, key: str) -> Tensor:
        state = self._mapped()
        for entry in self._way:
            state = state[entry]
        value = state[key]
        self._bytes_read += value.numel() * value.element_size()
        # Contiguous, since writers take the bytes in order; a transposed tensor is stored with other strides.
        return value.detach().contiguous()


def _data_offset(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> int:
    """Where the bytes of an entry begin in the file: behind its local header, which has lengths of its own."""
    assert archive.fp is not None
    archive.fp.seek(entry.header_offset + 26)
    name, extra = struct.unpack("<2H", archive.fp.read(4))
    return entry.header_offset + 30 + name + extra


def _reason(error: Exception) -> str:
    """Why torch did not read a file, without its advice to read it unsafely."""
    text = str(error)
    if "TorchScript" in text:
        return "it is a program of TorchScript (torch.jit.save): save the state_dict() of the model instead"
    if asked := _ASKED_FOR.search(text):
        return (
            f"its pickle asks for code to be run ({printable(asked[asked.lastindex or 0])}), which this program never does: where "
            "the file is trusted, load it with the code that made it and save the state_dict() alone"
        )
    # Sentences of advice stand around the reason; the reason alone says what was found.
    found = (text.partition("WeightsUnpickler error:")[2] or text).replace("Weights only load failed.", "")
    lines = [line.strip() for line in found.splitlines() if line.strip() and not _ADVICE.search(line)]
    if any("DTensor" in line for line in lines):
        return (
            "its tensors are parts of a distributed run (DTensor): save the full state dictionary, for example "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True"
        )
    return f"it is damaged or not a file of torch.save ({printable(lines[0]) if lines else type(error).__name__})"


def write_torch_file(file: BinaryIO, weights: Mapping[str, Weight]) -> None:
    """Writes a state dictionary as torch.save would, one tensor in memory at a time."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_entry("data.pkl"), _state_pickle(weights))
        archive.writestr(_entry("byteorder"), b"little")
        for number, (name, weight) in enumerate(weights.items()):
            entry = _entry(f"data/{number}")
            # Tensors are mapped in place by readers, so their bytes begin on a boundary, as torch.save has it:
            # 30 bytes of header, the name, 20 bytes of large-file field, and this padding with 4 bytes of its own.
            begin = file.tell() + 30 + len(entry.filename) + 20 + 4
            padding = -begin % _ALIGNMENT
            entry.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
            entry.file_size = weight.num_bytes
            # Always the 64-bit form, small tensors as well: the 20 bytes counted above are its field.
            with archive.open(entry, "w", force_zip64=True) as record:
                write_tensor(record, weight, name=name)
        archive.writestr(_entry("version"), b"3\n")


def _entry(name: str) -> zipfile.ZipInfo:
    # A fixed time, so that equal weights give equal files.
    return zipfile.ZipInfo(f"archive/{name}", date_time=(1980, 1, 1, 0, 0, 0))


class _Storage:
    """Stands for the bytes of one tensor in the pickle."""

    def __init__(self, number: int, weight: Weight) -> None:
        self.reference = ("storage", _STORAGES[weight.dtype], str(number), "cpu", math.prod(weight.shape))


class _Stub:
    """Pickles as the tensor that torch will rebuild."""

    def __init__(self, number: int, weight: Weight) -> None:
        strides = [math.prod(weight.shape[i + 1 :]) for i in range(len(weight.shape))]
        self._parts = (_Storage(number, weight), 0, weight.shape, tuple(strides), False, collections.OrderedDict())

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, self._parts


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> tuple[Any, ...] | None:
        return obj.reference if isinstance(obj, _Storage) else None


def _state_pickle(weights: Mapping[str, Weight]) -> bytes:
    buffer = io.BytesIO()
    state = collections.OrderedDict((name, _Stub(i, weight)) for i, (name, weight) in enumerate(weights.items()))
    # Protocol 2 is torch.save's own default, and the one that its readers without Python implement.
    _Pickler(buffer, protocol=2).dump(state)
    return buffer.getvalue()
