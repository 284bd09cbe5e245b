"""The tensors of a conversion: full, by published name, each read only when it is written.

A conversion passes a table of these through renames and structural rules. What a rule computes is in memory one
tensor at a time; what is copied or rounded, in parts of a few megabytes.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deberta_dist.checkpoint.errors import CheckpointError
from deberta_dist.conversion.options import DTYPE_NAMES
from deberta_dist.errors import ConfigError, printable
from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.encoder import DebertaModel
from deberta_dist.models.initialisation import without_memory

POSITION_TABLE = "deberta.embeddings.position_embeddings.weight"
WORD_TABLE = "deberta.embeddings.word_embeddings.weight"
CHUNK_NUMBERS = 1 << 20
"""Numbers in one part of a tensor: small enough that a buffer for it is not asked of the system each time."""
DTYPES = {name: getattr(torch, name) for name in DTYPE_NAMES}


class ChunkedReader:
    """Reads a tensor, whole or in flat parts of at most ``CHUNK_NUMBERS`` numbers.

    Args:
        shape: Shape of the whole tensor.
        dtype: Number format of what is read.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype

    def parts(self) -> Iterator[Tensor]:
        """1-D parts in order; one is good until the next is asked for."""
        raise NotImplementedError

    def __call__(self) -> Tensor:
        result = torch.empty(self.shape, dtype=self.dtype)
        flat, begin = result.view(-1), 0
        for part in self.parts():
            flat[begin : begin + len(part)] = part
            begin += len(part)
        return result


@dataclass(frozen=True)
class Weight:
    """One tensor that has not been read yet.

    Attributes:
        dtype: As ``read`` returns it.
        read: Reads it; a `ChunkedReader` where it need not be in memory as a whole.
        origin: Keys of the source it is made of; empty where it is made of nothing.
        why: Reason for a key that is not the source's own; empty for a plain copy.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    origin: tuple[str, ...]
    why: str = ""

    @property
    def num_bytes(self) -> int:
        """Size in its own dtype."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def as_dtype(self, dtype: torch.dtype, *, name: str) -> "Weight":
        """Rounded to ``dtype`` when read; ``name`` is for the error.

        Raises (when read):
            CheckpointError: a finite value is outside the range of ``dtype``.
        """
        if dtype == self.dtype:
            return self
        return replace(self, dtype=dtype, read=_Rounded(self, dtype, name=name))

    def parts(self) -> Iterator[Tensor]:
        """The tensor in 1-D parts, in order; one is good until the next is asked for."""
        if isinstance(self.read, ChunkedReader):
            yield from self.read.parts()
        else:
            yield self.read().contiguous().flatten()


Weights = dict[str, Weight]


def in_one_dtype(weights: Weights) -> tuple[Weights, str]:
    """Weights in the narrowest number format that holds those of all, and a sentence where they had several."""
    formats = sorted({str(weight.dtype).removeprefix("torch.") for weight in weights.values()})
    if len(formats) < 2:
        return weights, ""
    dtype = functools.reduce(torch.promote_types, (weight.dtype for weight in weights.values()))
    few = min(formats, key=lambda name: sum(w.dtype == getattr(torch, name) for w in weights.values()))
    odd = [name for name, weight in weights.items() if weight.dtype == getattr(torch, few)]
    return {name: weight.as_dtype(dtype, name=name) for name, weight in weights.items()}, (
        f"the source has tensors of {' and '.join(formats)} ({few}: {shorten(odd)}): all become "
        f"{str(dtype).removeprefix('torch.')}, which holds every number"
    )


@dataclass(frozen=True)
class DroppedKey:
    """A key of the source that the result does not hold, and why that is right."""

    key: str
    why: str


def backbone_shapes(config: DebertaConfig) -> dict[str, tuple[int, ...]]:
    """Every published name of an encoder and its full shape, in model order.

    Raises:
        ConfigError: sizes that no tensor can have.
    """
    try:
        with without_memory():
            backbone = DebertaModel(config, seed=None)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ConfigError(f"model configuration: its sizes make no tensors ({str(error).splitlines()[0]})") from error
    return {f"deberta.{name}": tuple(p.shape) for name, p in backbone.named_parameters()}


def require_layers(config: DebertaConfig, keys: Iterable[str], *, where: object) -> None:
    """Refuses a number of layers that the weights do not have, before a model of that size is built.

    Raises:
        CheckpointError: the numbers differ.
    """
    prefix = "deberta.encoder.layer."
    found = {key.removeprefix(prefix).split(".")[0] for key in keys if key.startswith(prefix)}
    if len(found) != config.num_hidden_layers:
        raise CheckpointError(
            f"{where}: the configuration has num_hidden_layers = {config.num_hidden_layers}, the weights have "
            f"{len(found)} layers"
        )


def fit(weights: Weights, *, shapes: Mapping[str, tuple[int, ...]], may_lack: Iterable[str], where: object) -> Weights:
    """The weights in model order, after a check that names and shapes are those of the configuration.

    Args:
        weights: Published names; none that ``shapes`` lacks.
        shapes: See `backbone_shapes` and `heads.head_shapes`.
        may_lack: Names that may be absent.
        where: Prefix of messages: the source.

    Raises:
        CheckpointError: names are missing, shapes differ, or numbers are not floating point.
    """
    missing = [name for name in shapes if name not in weights and name not in set(may_lack)]
    if missing:
        raise CheckpointError(f"{where}: {len(missing)} tensors of this configuration are missing: {shorten(missing)}")
    wrong = [
        f"{name} is {list(weight.shape)}, expected {list(shapes[name])}"
        for name, weight in weights.items()
        if weight.shape != shapes[name]
    ]
    if wrong:
        raise CheckpointError(f"{where}: {len(wrong)} tensors do not fit the configuration: {shorten(wrong)}")
    odd = [f"{name} ({weight.dtype})" for name, weight in weights.items() if not weight.dtype.is_floating_point]
    if odd:
        raise CheckpointError(
            f"{where}: not floating point: {shorten(odd)}; where they are quantised, load the model with the library that "
            "made it, call dequantize() and save the result"
        )
    return {name: weights[name] for name in shapes if name in weights}


def require_square_output(config: DebertaConfig, *, target: str) -> None:
    """Refuses heads that are together not as wide as the hidden states: only this package computes them.

    Raises:
        ConfigError: they are not.
    """
    if config.all_head_size != config.hidden_size:
        raise ConfigError(
            f"num_attention_heads x attention_head_size = {config.all_head_size} differs from hidden_size = "
            f"{config.hidden_size}: the code that loads the target {target} cannot build this model"
        )


def shorten(items: Iterable[str], *, most: int = 4) -> str:
    """The first few of many, for messages."""
    items = list(items)
    return ", ".join(map(printable, items[:most])) + (f" and {len(items) - most} more" if len(items) > most else "")


class _Rounded(ChunkedReader):
    """A tensor in another number format, which none of its numbers may leave."""

    def __init__(self, weight: Weight, dtype: torch.dtype, *, name: str) -> None:
        super().__init__(weight.shape, dtype)
        self._weight, self._name = weight, name

    def parts(self) -> Iterator[Tensor]:
        for whole in self._weight.parts():
            for part in whole.split(CHUNK_NUMBERS):
                rounded = part.to(self.dtype)
                # Infinity and not-a-number of the source may stay what they are; a number may not become one.
                lost = torch.isfinite(part) & ~torch.isfinite(rounded)
                if lost.any():
                    raise CheckpointError(
                        f"{self._name} holds {part[lost].abs().max().item():.4g}, outside the range of "
                        f"{str(self.dtype).removeprefix('torch.')}: convert to bfloat16 or float32"
                    )
                yield rounded
