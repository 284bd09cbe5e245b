"""Divides a plain model over the tensor ranks by the table of sharding rules.

Called by ``training/build.py`` on a model whose parameters are still on the meta device: modules are replaced by their
parallel counterparts under the same names. Nothing is computed or communicated.
"""

import re

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from deberta_dist.errors import ConfigError
from deberta_dist.parallel.tensor import sharding_rules
from deberta_dist.parallel.tensor.collectives import EnterTensorParallelRegion, JoinOverRanks
from deberta_dist.parallel.tensor.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    empty_parameter,
)
from deberta_dist.parallel.tensor.sequence import (
    EnterSequenceRegion,
    ExchangeHalo,
    JoinSequence,
    OwnTokens,
    ScatterSequence,
    SequenceRanks,
    SequenceRowLinear,
)


def check_tensor_parallel_sizes(*, num_attention_heads: int, intermediate_size: int, tensor_parallel_size: int) -> None:
    """Refuses sizes that do not divide evenly. Needs no process group.

    Raises:
        ConfigError: ``tensor_parallel_size`` does not divide the attention heads or the FFN columns.
    """
    size = tensor_parallel_size
    if num_attention_heads % size:
        fitting = [n for n in range(1, num_attention_heads + 1) if num_attention_heads % n == 0]
        raise ConfigError(
            f"parallel.tensor_parallel_size = {size} does not divide model.num_attention_heads = "
            f"{num_attention_heads}; sizes that do: {', '.join(map(str, fitting))}"
        )
    if intermediate_size % size:
        raise ConfigError(
            f"parallel.tensor_parallel_size = {size} does not divide model.intermediate_size = {intermediate_size}"
        )


def apply_sharding_rules(
    model: nn.Module,
    *,
    vocab_size: int,
    rank: int,
    size: int,
    group: dist.ProcessGroup,
    rules: sharding_rules.Rules = sharding_rules.SHARDING_RULES,
) -> None:
    """Replaces the modules of ``model`` that the rules divide by modules with this rank's slice.

    Args:
        model: A model with published names; layers of other stages may be absent.
        vocab_size: Rows of the real vocabulary, without padding (tokens).
        rank: Tensor rank of this process.
        size: Number of tensor ranks; with 1 the model stays as it is.
        group: Process group of the tensor ranks, for the collectives within the new modules.
        rules: Module name pattern -> kind.

    Raises:
        ConfigError: a Linear or Embedding to be divided is a subclass of torch's, or has hooks: both would be lost.
    """
    if size == 1:
        return
    padded_size = sharding_rules.padded_vocabulary(vocab_size, tensor_parallel_size=size)
    rows = padded_size // size
    for name, module in list(model.named_modules()):
        if re.fullmatch(sharding_rules.ENTER_PATTERN, name):
            _replace(model, name, EnterTensorParallelRegion(group))
            continue
        if re.fullmatch(sharding_rules.SPLIT_DROPOUT_PATTERN, name):
            module.shard = rank
            continue
        kind = sharding_rules.module_kind(name, rules)
        if kind in (sharding_rules.COLUMN, sharding_rules.ROW):
            _require_torchs_own(module, nn.Linear, name)
        elif kind == sharding_rules.VOCAB and name.endswith("_embeddings"):
            _require_torchs_own(module, nn.Embedding, name)
        if kind == sharding_rules.COLUMN:
            _replace(model, name, ColumnParallelLinear(module, size=size))
        elif kind == sharding_rules.ROW:
            _replace(model, name, RowParallelLinear(module, size=size, group=group))
        elif kind == sharding_rules.VOCAB and isinstance(module, nn.Embedding):
            _replace(
                model,
                name,
                VocabParallelEmbedding(module, padded_size=padded_size, rank=rank, size=size, group=group),
            )
        elif kind == sharding_rules.VOCAB:
            module.bias = empty_parameter(torch.Size((rows,)), module.bias)
    if (loss := getattr(model, "cross_entropy", None)) is not None:
        num_real_rows = min(max(vocab_size - rank * rows, 0), rows)
        model.cross_entropy = type(loss)(first_row=rank * rows, num_real_rows=num_real_rows, join=JoinOverRanks(group))


def split_sequence(
    model: nn.Module,
    *,
    ranks: SequenceRanks,
    decoder_layer: int | None,
    regathers: bool,
    rules: sharding_rules.Rules = sharding_rules.SHARDING_RULES,
) -> None:
    """Replaces modules after ``apply_sharding_rules`` so that activations in the sequence region are divided by tokens.

    Args:
        model: A model with published names; layers of other stages may be absent.
        ranks: Owners of the shards of a sequence; they communicate within the new modules.
        decoder_layer: See ``sharding_rules.in_sequence_region``.
        regathers: Whether column-parallel layers gather their input a second time in the backward pass. Pointless where whole
            layers are recomputed just before it.
        rules: Module name pattern -> kind, as given to ``apply_sharding_rules``.
    """
    for name, module in list(model.named_modules()):
        if re.fullmatch(sharding_rules.WHOLE_SEQUENCE_PATTERN, name):
            _replace(model, name, JoinSequence(ranks))
        if not sharding_rules.in_sequence_region(name, decoder_layer=decoder_layer):
            continue
        kind = sharding_rules.module_kind(name, rules)
        if re.fullmatch(sharding_rules.ENTER_PATTERN, name):
            _replace(model, name, EnterSequenceRegion(ranks, recomputes=regathers))
        elif re.fullmatch(sharding_rules.OWN_TOKENS_PATTERN, name):
            _replace(model, name, OwnTokens(ranks))
        elif re.fullmatch(sharding_rules.HALO_PATTERN, name):
            convolution = model.get_submodule(f"{name.rpartition('.')[0]}.conv")
            assert isinstance(convolution, nn.Conv1d) and isinstance(convolution.padding, tuple)
            _replace(model, name, ExchangeHalo(ranks, width=convolution.padding[0]))
        elif re.fullmatch(sharding_rules.SEQUENCE_DROPOUT_PATTERN, name):
            module.sequence_shard = (ranks.rank, ranks.size)
        elif kind == sharding_rules.ROW:
            _replace(model, name, SequenceRowLinear(module, ranks=ranks))
        elif kind == sharding_rules.VOCAB:
            module.reduce = ScatterSequence(ranks)


def cut_tensor(
    full: Tensor, name: str, *, rank: int, size: int, rules: sharding_rules.Rules = sharding_rules.SHARDING_RULES
) -> Tensor:
    """The slice of the full published tensor ``name`` that tensor rank ``rank`` of ``size`` holds (vocabulary zero-padded)."""
    sharding = sharding_rules.parameter_sharding(name, rules)
    if sharding.dim is None or size == 1:
        return full
    if sharding.kind == sharding_rules.VOCAB:
        padding = sharding_rules.padded_vocabulary(full.shape[0], tensor_parallel_size=size) - full.shape[0]
        full = F.pad(full, (0,) * (2 * (full.ndim - 1)) + (0, padding))
    local = sharding_rules.local_slice(full.shape[sharding.dim], rank=rank, size=size)
    return full.narrow(sharding.dim, local.start, local.stop - local.start)


def join_slices(
    slices: list[Tensor], name: str, *, full_shape: tuple[int, ...], rules: sharding_rules.Rules = sharding_rules.SHARDING_RULES
) -> Tensor:
    """The full published tensor from the slices of all tensor ranks in order: the inverse of ``cut_tensor``, unpadded."""
    dim = sharding_rules.parameter_sharding(name, rules).dim
    if dim is None or len(slices) == 1:
        return slices[0]
    return torch.cat(slices, dim=dim).narrow(dim, 0, full_shape[dim])


def _require_torchs_own(module: nn.Module, kind: type[nn.Module], name: str) -> None:
    is_hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    if type(module) is not kind or is_hooked or "forward" in vars(module):
        raise ConfigError(
            f"{name} is {type(module).__module__}.{type(module).__qualname__}{' with hooks' if is_hooked else ''}: tensor "
            f"parallelism divides only torch's own {kind.__name__}; merge adapters into the weights, and remove hooks and "
            "parametrisations"
        )


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
