"""Bytes that one micro-batch on one stage saves for its backward pass, measured rather than estimated.

Every stage runs forward and backward once on the meta device, with one tensor rank's share of heads, FFN and vocabulary, while
the bytes of live storages are counted. Called by ``memory.py``.
"""

import dataclasses
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.cross_entropy import CrossEntropy
from deberta_dist.models.dropout import Dropout
from deberta_dist.models.shared_table import SharedTable
from deberta_dist.models.targets import find_targets
from deberta_dist.parallel.tensor.apply import split_sequence
from deberta_dist.parallel.tensor.sequence import SequenceRanks
from deberta_dist.parallel.tensor.sharding_rules import padded_vocabulary
from deberta_dist.training.objectives.base import TrainedNetwork
from deberta_dist.training.step_batch import StepBatch


@dataclass(frozen=True)
class StageActivations:
    """Bytes of one micro-batch on one stage.

    Attributes:
        saved: Saved from forward to backward, without the received input and without ``logits``.
        logits: Saved by the head on the last stage; 0 on the others.
        working: Beyond the saved bytes, at the peak of the forward and backward passes: temporaries, gradients of
            activations, recomputed activations.
    """

    saved: int
    logits: int
    working: int


@dataclass(frozen=True, kw_only=True)
class StageCase:
    """What is measured: one micro-batch on one stage.

    Attributes:
        layers: Numbers of the stage's layers.
        tensor_parallel_size: Number of ranks that every layer is divided over.
        batch_shape: (B, S), sequences and tokens of a micro-batch.
        targets_per_sequence: Number of tokens to predict in each sequence.
        dtype: Compute dtype, of weights and hidden states.
        recompute: ``training.recompute``: "none", "selective" or "full".
        document_boundaries: Whether batches have document ids.
        vocabulary_chunks: Chunks that the logits are computed in, ``training.vocabulary_chunks``.
        sequence_parallel: Whether the tensor ranks divide sequences as well.
    """

    layers: range
    tensor_parallel_size: int
    batch_shape: tuple[int, int]
    targets_per_sequence: int
    dtype: torch.dtype
    recompute: str
    document_boundaries: bool = False
    vocabulary_chunks: int = 1
    sequence_parallel: bool = False


def stage_activations(network: TrainedNetwork, case: StageCase) -> StageActivations:
    """Measures one micro-batch on one stage of a network.

    The position of a stage in the pipeline does not matter, except for being first or last, and all its inner layers are
    alike. So a long stage is measured with 3 and 4 layers, and each further layer counts as the fourth. A backward pass peaks
    either at its start, whatever the number of layers, or at its end in the embeddings, when the layers above hold nothing any
    more; in the second case a stage that is not the first shows the peak at the start.
    """
    config, layers = network.config, case.layers
    is_first, is_last = layers.start == 0, layers.stop == config.num_hidden_layers

    def measure(count: int, *, is_first: bool = is_first) -> StageActivations:
        start = 0 if is_first else 1
        shorter = dataclasses.replace(config, num_hidden_layers=start + count + (0 if is_last else 1))
        here = dataclasses.replace(case, layers=range(start, start + count))
        return _measure(dataclasses.replace(network, config=shorter), here)

    # A whole model on one stage holds more than its parts: the head's gradient of the shared table waits for the embeddings'.
    if len(layers) <= 4 or (is_first and is_last):
        return measure(len(layers))
    three, four = measure(3), measure(4)
    more = (len(layers) - 4) * (four.saved - three.saved)
    working = max(measure(4, is_first=False).working, four.working - more)
    return StageActivations(saved=four.saved + more, logits=four.logits, working=working)


@lru_cache(maxsize=1024)
def _measure(network: TrainedNetwork, case: StageCase) -> StageActivations:
    config, layers, (batch, length) = network.config, case.layers, case.batch_shape
    model = local_model(
        network, layers=layers, tensor_parallel_size=case.tensor_parallel_size, dtype=case.dtype, recompute=case.recompute,
        sequence_parallel=case.sequence_parallel,
    )  # fmt: skip
    if hasattr(model, "vocabulary_chunks"):
        model.vocabulary_chunks = case.vocabulary_chunks
    own_length = length // case.tensor_parallel_size if case.sequence_parallel else length
    is_last = layers.stop == config.num_hidden_layers
    # Targets are found on the host: their values decide shapes, and meta tensors have no values.
    labels = torch.zeros(batch, length, dtype=torch.int64)
    labels[:, : case.targets_per_sequence] = 1
    targets = find_targets(labels > 0, labels).to(torch.device("meta"))
    model.deberta.encoder.relative_positions(torch.device("meta"))  # cached for all micro-batches, so not counted in one
    with torch.device("meta"):
        tokens = [torch.empty(batch, length, dtype=torch.int64) for _ in range(4)]
        made = StepBatch(
            input_ids=tokens[0],
            attention_mask=tokens[1],
            document_ids=tokens[2] if case.document_boundaries else None,
            targets=(targets,),
            counts=torch.empty(2, dtype=torch.int64),
        )
        micro_batches = network.micro_batches(made, dropout_keys=[1], handed=tokens[3] if network.is_handed else None)
        inputs = {"input_ids": micro_batches.input_ids if layers.start == 0 else None, **micro_batches.fields[0]}
        hidden = None if layers.start == 0 else _hidden(batch, own_length, config.hidden_size, dtype=case.dtype)
    gradient = _hidden(batch, own_length, config.hidden_size, dtype=case.dtype).detach()  # arrives in a receive buffer
    with LiveBytes() as live:
        output = model.forward_stage(hidden, **inputs, layers=layers)
        saved = live.now
        if is_last:
            (output[0] if network.hands_on else output)[0, 0].backward()
        else:
            output.backward(gradient)
    logits = 0
    if is_last:
        rows = batch * case.targets_per_sequence
        with LiveBytes() as head:
            result = network.head_loss(
                model,
                hidden=_hidden(rows, config.hidden_size, dtype=case.dtype),
                targets=targets.ids_P,
                num_chunks=case.vocabulary_chunks,
            )
            logits = 0 if result is None else head.now
            del result
    return StageActivations(saved=saved - logits, logits=logits, working=live.peak - saved)


def local_config(config: DebertaConfig, *, tensor_parallel_size: int) -> DebertaConfig:
    """A configuration whose whole model has the shapes of one tensor rank's slices."""
    size = tensor_parallel_size
    return dataclasses.replace(
        config,
        num_attention_heads=config.num_attention_heads // size,
        attention_head_size=config.head_size,
        intermediate_size=config.intermediate_size // size,
        vocab_size=padded_vocabulary(config.vocab_size, tensor_parallel_size=size) // size,
    )


def local_model(
    network: TrainedNetwork,
    *,
    layers: range,
    tensor_parallel_size: int,
    dtype: torch.dtype,
    recompute: str = "none",
    sequence_parallel: bool = False,
) -> Any:
    """A model on the meta device with the shapes of one tensor rank, ready to run forward and backward.

    It lacks the copies made for all-reduces, which live only for a moment. Sequence parallelism is the real code, except that
    nothing is sent.
    """
    local = local_config(network.config, tensor_parallel_size=tensor_parallel_size)
    model = dataclasses.replace(network, config=local).meta_model().to(dtype)
    model.recompute = recompute
    model.keep_layers(layers)
    for module in model.modules():
        if isinstance(module, Dropout):
            module.__class__ = _DropoutOnMeta
    if sequence_parallel:
        if model.deberta.embeddings.word_embeddings is not None:
            model.deberta.embeddings.word_embeddings.__class__ = _ReducedEmbedding
        split_sequence(
            model,
            ranks=_RanksOnMeta(tensor_parallel_size),
            decoder_layer=network.decoder_layer,
            regathers=recompute != "full",
            rules=network.rules,
        )
    if hasattr(model, "cross_entropy"):
        model.cross_entropy = _CrossEntropyOnMeta()
    for parameter in model.parameters():
        parameter.grad_dtype = torch.float32
        parameter.grad = torch.empty_like(parameter, dtype=torch.float32)
    return model


def _hidden(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=True)


class LiveBytes(TorchDispatchMode):
    """Counts bytes of the storages created while it is entered: those alive ``now``, and the ``peak`` of that."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._known.setdefault(tensor.untyped_storage(), 0)
        output = func(*args, **kwargs)
        for tensor in _tensors(output):
            self._count(tensor)
        return output

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known[storage] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, num_bytes: int) -> None:
        self.now -= num_bytes


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested containers. Not torch's pytree: a search dispatches hundreds of thousands of operations here."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


class _DropoutOnMeta(Dropout):
    """Allocates and saves what Dropout does, without drawing: the meta device has no random generator."""

    plain_forward = Dropout.forward

    def draw_words(self, count: int, key: int, *, device: torch.device) -> Tensor:
        return torch.empty(count, dtype=torch.int64, device=device)


class _RanksOnMeta(SequenceRanks):
    """Tensor ranks that allocate the buffers of their messages and send nothing; seen from rank 1."""

    def __init__(self, size: int) -> None:
        self.rank, self.size = 1, size

    def all_gather(self, shards: Tensor, shard: Tensor) -> None:
        pass

    def reduce_scatter(self, shard: Tensor, shards: Tensor) -> None:
        pass


class _ReducedEmbedding(nn.Embedding):
    """An embedding with as many rows as a tensor rank has; ``split_sequence`` sets ``reduce``."""

    def forward(self, input_ids: Tensor, table: SharedTable | None = None) -> Tensor:
        found = super().forward(input_ids) if table is None else table.rows(input_ids, padding_idx=self.padding_idx)
        return self.reduce(found)

    plain_forward = forward


class _CrossEntropyOnMeta(CrossEntropy):
    def of_product(
        self, hidden_TW: Tensor, weight_VW: Tensor, bias_V: Tensor, labels_T: Tensor, **settings: Any
    ) -> tuple[Tensor, Tensor]:
        labels_T = labels_T.to(hidden_TW.device)
        return super().of_product(hidden_TW, weight_VW, bias_V, labels_T, **settings)
