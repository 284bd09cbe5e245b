"""One transformer layer with disentangled attention, under the published parameter names.

The modules named ``enter`` compute nothing: they mark where an activation enters a tensor-parallel region, and are replaced
there. The number of heads is read from the projections' outputs, never from the configuration, because tensor parallelism may
have divided a projection. nn.LayerNorm computes its statistics in float32 for 16-bit inputs, and adds the published epsilon,
1e-7, there: fp16 would round it to 1.2e-7.

Each of a layer's two blocks ends with `ResidualOutput`, LayerNorm(dropout(dense(x)) + residual): after the product five passes
over memory, or one in a fused kernel. The kernel is our own on a GPU (`kernels.rows`), or `torch.compile`'s with
``training.compile``: compiled once for all layers, and a second time with a variable number of rows when a second shape comes.
All of them drop the same elements.

Letters: B batch, S sequence, Q queries, D hidden, N heads here, H head size, R rows of the relative table.

Source: microsoft/DeBERTa DeBERTa/deberta/{bert,disentangled_attention}.py@4d7fe0bd.
"""

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deberta_dist.errors import ConfigError
from deberta_dist.kernels import (
    AttentionMask,
    RelativePositions,
    attention_scale,
    disentangled_attention,
    position_scores,
    prefers_position_scores,
)
from deberta_dist.kernels.dropout import COLUMN, FIRST, SECOND, keep_probability, signed, threshold
from deberta_dist.kernels.fused.availability import compiler_reason
from deberta_dist.kernels.rows import RowDropout, fuses_rows, residual_norm, row_words
from deberta_dist.models import dropout as sites
from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.dropout import Dropout, child_key
from deberta_dist.models.fused_qkv import Linear, entered, join_, joint_linear, linear, without_bias
from deberta_dist.models.plain import is_plain, is_unchanged


class ResidualOutput(nn.Module):
    """LayerNorm(dropout(dense(x)) + residual): the end of the attention and of the feed-forward.

    Attributes:
        joined: Whether what follows the product is compiled into one kernel; results differ by rounding only.
    """

    def __init__(self, config: DebertaConfig, *, input_size: int, site: int) -> None:
        super().__init__()
        self.dense = Linear(input_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob, site=site)
        self.joined = False

    def forward(self, x: Tensor, residual: Tensor, *, dropout_key: int | None, width: int | None = None) -> Tensor:
        """[B, T, D]; for ``width`` see `Dropout.forward`."""
        norm, dropout = self.LayerNorm, self.dropout
        # A module that has been replaced or hooked has to be called; only plain ones can be fused.
        is_joined = is_plain(norm) and norm.bias is not None and is_unchanged(dropout)
        if self.joined and is_joined and not torch.compiler.is_exporting():
            return self._compiled(linear(x, self.dense), residual, dropout_key=dropout_key, width=width)
        draws = dropout.drops and dropout_key is None
        exporting = torch.compiler.is_exporting()
        if exporting or draws or not is_joined or not fuses_rows(x) or not is_plain(self.dense) or self.dense.bias is None:
            return norm(dropout(linear(x, self.dense), dropout_key, width=width) + residual)
        return residual_norm(
            without_bias(x, self.dense),
            self.dense.bias,
            residual,
            norm.weight,
            norm.bias,
            eps=norm.eps,
            dropout=RowDropout(
                dropout.p if dropout.drops else 0.0,
                dropout.seed(dropout_key) if dropout.drops else 0,
                dropout.row_numbers(residual, width),
            ),
        )

    def _compiled(self, x: Tensor, residual: Tensor, *, dropout_key: int | None, width: int | None) -> Tensor:
        norm, dropout = self.LayerNorm, self.dropout
        weight, bias = _NoLeaf.apply(norm.weight), _NoLeaf.apply(norm.bias)
        rows, of_residual = x.flatten(0, -2), residual.flatten(0, -2)
        if dropout.drops and dropout_key is not None and x.device.type == "cuda":
            numbers = dropout.row_numbers(x, width)
            low, high = row_words(len(rows), seed=dropout.seed(dropout_key), numbers=numbers, device=x.device)
            joined, limit = _joined(_hashed_residual_norm), (low, high, threshold(dropout.p), keep_probability(dropout.p))
            return joined(rows, of_residual, *limit, weight, bias, norm.eps).view(residual.shape)
        drawn = None
        if dropout_key is None:
            rows = dropout(rows, None)
        elif dropout.drops:
            drawn = dropout.numbers(x, dropout_key, width=width).flatten(0, -2)
        joined = _joined(_residual_norm)
        return joined(rows, of_residual, drawn, dropout.limit, dropout.scale, weight, bias, norm.eps).view(residual.shape)


class _NoLeaf(torch.autograd.Function):
    """Identity. torch.compile rejects a leaf, or a view of one, whose gradient has another dtype (float32) than itself."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        return parameter.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def require_compiler(device_type: str) -> None:
    """Checks beforehand what would otherwise fail within torch.compile in the first step.

    Raises:
        ConfigError: torch.compile finds no compiler for this kind of device.
    """
    if device_type == "cpu":
        compilers = os.environ.get("CXX", "g++"), "c++", "clang++"
        if not any(map(shutil.which, compilers)):
            raise ConfigError(f"training.compile = true needs a C++ compiler on a CPU; there is none of {', '.join(compilers)}")
    elif importlib.util.find_spec("triton") is None:
        raise ConfigError("training.compile = true needs Triton on this device: pip install triton")
    elif (reason := compiler_reason()) is not None:
        raise ConfigError(f"training.compile = true is not available: {reason}")


def _residual_norm(
    x: Tensor,
    residual: Tensor,
    numbers: Tensor | None,
    limit: int,
    scale: float,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Tensor:
    """With numbers drawn from a generator, int16 like ``x``; None if nothing is dropped here."""
    if numbers is not None:
        x = (x * scale).masked_fill(numbers < limit, 0.0)
    return F.layer_norm(x + residual, (x.shape[-1],), weight, bias, eps)


def _hashed_residual_norm(
    x: Tensor,
    residual: Tensor,
    low: Tensor,
    high: Tensor,
    limit: int,
    kept_share: float,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Tensor:
    """With numbers computed from the words of each row, [R, 1], and the column (`kernels.dropout`)."""
    words = low + torch.arange(x.shape[-1], dtype=torch.int32, device=x.device) * signed(COLUMN, bits=32)
    words = (words ^ (words >> 16)) * FIRST + high
    words = (words ^ (words >> 15)) * signed(SECOND, bits=32)
    x = (x / kept_share).masked_fill((words >> 1) < limit, 0.0)
    return F.layer_norm(x + residual, (x.shape[-1],), weight, bias, eps)


@functools.cache
def _joined(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    from torch._inductor import config

    # Inductor's pool of compiling processes would outlive a killed run, and a single kernel does not need it.
    config.compile_threads = 1
    return torch.compile(function, fullgraph=True)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "linear": torch.positive,
}


NUM_DECODER_PASSES = 2
"""Passes of the last layer in the enhanced mask decoder; the released heads were trained with two."""


class AttentionMemory(NamedTuple):
    """What queries attend to: content and, per position term, the projected relative table.

    Attributes:
        key_BNSH: projected hidden states, by heads.
        value_BNSH: projected hidden states, by heads.
        rel_key_NRH: for c2p; None without the term.
        rel_query_NRH: for p2c; None without the term, or with ``p2c_BNSR``.
        p2c_BNSR: products of the keys with ``rel_query_NRH``, in its place if several passes attend to this memory.
    """

    key_BNSH: Tensor
    value_BNSH: Tensor
    rel_key_NRH: Tensor | None
    rel_query_NRH: Tensor | None
    p2c_BNSR: Tensor | None = None


class DisentangledSelfAttention(nn.Module):
    """Projections around `kernels.disentangled_attention`.

    Attributes:
        implementation: one of `kernels.IMPLEMENTATIONS`; None for the fastest that is available.
    """

    def __init__(self, config: DebertaConfig) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.has_c2p = "c2p" in config.pos_att_type
        self.has_p2c = "p2c" in config.pos_att_type
        self.enter = nn.Identity()
        self.query_proj = Linear(config.hidden_size, config.all_head_size)
        self.key_proj = Linear(config.hidden_size, config.all_head_size)
        self.value_proj = Linear(config.hidden_size, config.all_head_size)
        self.share_att_key = config.share_att_key
        if not config.share_att_key:
            if self.has_c2p:
                self.pos_key_proj = Linear(config.hidden_size, config.all_head_size)
            if self.has_p2c:
                self.pos_query_proj = Linear(config.hidden_size, config.all_head_size)
        self.pos_dropout = Dropout(config.hidden_dropout_prob, site=sites.POSITION_SITE)
        self.dropout = Dropout(config.attention_probs_dropout_prob, site=sites.ATTENTION_SITE)
        self.implementation: str | None = None
        self._join_weights()

    def queries(self, hidden_BQD: Tensor) -> Tensor:
        """Queries of hidden states, [B, N, Q, H]."""
        return self._heads(linear(self.enter(hidden_BQD), self.query_proj))

    def memory(self, hidden_BSD: Tensor, *, rel_RD: Tensor, dropout_key: int | None) -> AttentionMemory:
        """Keys, values and projected relative table of hidden states."""
        key, value = joint_linear(entered(self.enter, hidden_BSD), [self.key_proj, self.value_proj])
        return self._memory(key, value, rel_RD=rel_RD, dropout_key=dropout_key)

    def queries_and_memory(
        self, hidden_BSD: Tensor, *, rel_RD: Tensor, dropout_key: int | None
    ) -> tuple[Tensor, AttentionMemory]:
        """`queries` and `memory` of the same hidden states, by one product."""
        projections = [self.query_proj, self.key_proj, self.value_proj]
        query, key, value = joint_linear(entered(self.enter, hidden_BSD), projections)
        return self._heads(query), self._memory(key, value, rel_RD=rel_RD, dropout_key=dropout_key)

    def _memory(self, key: Tensor, value: Tensor, *, rel_RD: Tensor, dropout_key: int | None) -> AttentionMemory:
        rel_RD = self.pos_dropout(rel_RD, dropout_key)
        # The table does not pass ``enter``: with tensor parallelism its gradient is a summand on each rank, and the sum is
        # taken once per optimizer step (a ``partial`` weight), not once per layer.
        projections = self._table_projections()
        tables = joint_linear(rel_RD, list(projections.values())) if projections else ()
        rel = {name: self._heads(table) for name, table in zip(projections, tables, strict=True)}
        return AttentionMemory(self._heads(key), self._heads(value), rel.get("key"), rel.get("query"))

    def with_position_scores(
        self, memory: AttentionMemory, *, positions: RelativePositions, mask: AttentionMask | None
    ) -> AttentionMemory:
        """``memory`` for several `attend`: where it helps, with the products of keys and relative table computed once."""
        if memory.rel_query_NRH is None:
            return memory
        asked = self.implementation
        if not prefers_position_scores(memory.key_BNSH, positions=positions, mask=mask, implementation=asked):
            return memory
        scale = attention_scale(self.head_size, has_c2p=self.has_c2p, has_p2c=True)
        p2c = position_scores(memory.key_BNSH, memory.rel_query_NRH, scale=scale)
        return memory._replace(rel_query_NRH=None, p2c_BNSR=p2c)

    def attend(
        self,
        query_BNQH: Tensor,
        memory: AttentionMemory,
        *,
        positions: RelativePositions,
        mask: AttentionMask | None,
        dropout_key: int | None,
        recompute_mode: str = "none",
        return_probabilities: bool = False,
        width: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Context [B, Q, N * H] of `queries`, of which the first ``width`` are real; and probabilities if asked for."""
        drops = self.training and self.dropout.p > 0.0
        context, probabilities = disentangled_attention(
            query_BNQH,
            memory.key_BNSH,
            memory.value_BNSH,
            positions=positions,
            rel_key_NRH=memory.rel_key_NRH,
            rel_query_NRH=memory.rel_query_NRH,
            p2c_BNSR=memory.p2c_BNSR,
            mask=mask,
            dropout_p=self.dropout.p if drops else 0.0,
            dropout_seed=self.dropout.seed(dropout_key) if drops else 0,
            counted_queries=width,
            recompute=recompute_mode == "selective" and self.training,
            return_probabilities=return_probabilities,
            implementation=self.implementation,
        )
        return context.transpose(1, 2).flatten(2), probabilities

    def _heads(self, x: Tensor) -> Tensor:
        """[..., S, N * H] -> [..., N, S, H]."""
        return x.unflatten(-1, (-1, self.head_size)).transpose(-3, -2)

    def _table_projections(self) -> dict[str, nn.Linear]:
        """The layers that project the relative table, "query" and "key", in the order in which their weights lie in memory."""
        if self.share_att_key:
            projections: dict[str, Any] = {"query": self.query_proj, "key": self.key_proj}
        else:
            projections = {name: getattr(self, f"pos_{name}_proj", None) for name in ("key", "query")}
        is_used = {"query": self.has_p2c, "key": self.has_c2p}
        return {name: projection for name, projection in projections.items() if is_used[name]}

    def _join_weights(self) -> None:
        join_([self.query_proj, self.key_proj, self.value_proj])
        if len(tables := self._table_projections()) > 1:
            join_(list(tables.values()))

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        # model.to(), .half() and the like give every parameter memory of its own: lay them side by side again.
        super()._apply(*args, **kwargs)
        self._join_weights()
        return self


class Attention(nn.Module):
    """Self-attention and its output. It only holds published names: `Layer` calls both itself."""

    def __init__(self, config: DebertaConfig) -> None:
        super().__init__()
        self.self = DisentangledSelfAttention(config)
        self.output = ResidualOutput(config, input_size=config.all_head_size, site=sites.ATTENTION_OUTPUT_SITE)


class Intermediate(nn.Module):
    """act(dense(x)): the first half of the feed-forward."""

    def __init__(self, config: DebertaConfig) -> None:
        super().__init__()
        self.enter = nn.Identity()
        self.dense = Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        (wide,) = joint_linear(entered(self.enter, x), [self.dense])
        return self.activation(wide)


class Layer(nn.Module):
    """Attention and feed-forward, normalised after each residual sum."""

    def __init__(self, config: DebertaConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = ResidualOutput(config, input_size=config.intermediate_size, site=sites.LAYER_OUTPUT_SITE)

    def forward(
        self,
        hidden_BSD: Tensor,
        *,
        rel_RD: Tensor,
        positions: RelativePositions,
        mask: AttentionMask | None,
        dropout_key: int | None,
        recompute_mode: str = "none",
        return_probabilities: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The ordinary pass: every token attends to every token that the mask lets it see.

        Args:
            hidden_BSD: output of the layer before, or the embeddings.
            rel_RD: relative table, normalised, before dropout.
            positions: row of the relative table for each pair of query and key.
            mask: which query sees which key; None: all see all.
            dropout_key: key of this layer, micro-batch and step; None for torch's random state.
            recompute_mode: only "selective" matters here; "full" is done around the layer.
            return_probabilities: also return the attention probabilities [B, N, S, S], before dropout.
        """
        attention = self.attention.self
        query_BNSH, memory = attention.queries_and_memory(hidden_BSD, rel_RD=rel_RD, dropout_key=dropout_key)
        context, probabilities = attention.attend(
            query_BNSH,
            memory,
            positions=positions,
            mask=mask,
            dropout_key=dropout_key,
            recompute_mode=recompute_mode,
            return_probabilities=return_probabilities,
        )
        return self._after_attention(context, hidden_BSD, dropout_key=dropout_key), probabilities

    def decode(
        self,
        query_BQD: Tensor,
        *,
        hidden_BSD: Tensor,
        rel_RD: Tensor,
        positions: RelativePositions,
        mask: AttentionMask | None,
        dropout_key: int | None,
        recompute_mode: str = "none",
        width: int | None = None,
    ) -> Tensor:
        """`NUM_DECODER_PASSES` passes of this layer: each pass's output is the next one's queries; all attend to ``hidden_BSD``.

        Keys, values, projected table and the products of keys with it are computed once. So all passes share one dropout
        mask on the table, where the published code draws one each; all other masks differ between passes.

        The first ``width`` queries of each sample are real; dropout is as if the others, padding, were not there. For the
        other parameters see `forward`.
        """
        attention = self.attention.self
        memory = attention.memory(hidden_BSD, rel_RD=rel_RD, dropout_key=dropout_key)
        memory = attention.with_position_scores(memory, positions=positions, mask=mask)
        for number in range(NUM_DECODER_PASSES):
            pass_key = child_key(dropout_key, number + 1)
            context, _ = attention.attend(
                attention.queries(query_BQD),
                memory,
                positions=positions,
                mask=mask,
                dropout_key=pass_key,
                recompute_mode=recompute_mode,
                width=width,
            )
            query_BQD = self._after_attention(context, query_BQD, dropout_key=pass_key, width=width)
        return query_BQD

    def _after_attention(
        self, context_BQD: Tensor, residual_BQD: Tensor, *, dropout_key: int | None, width: int | None = None
    ) -> Tensor:
        attended = self.attention.output(context_BQD, residual_BQD, dropout_key=dropout_key, width=width)
        return self.output(self.intermediate(attended), attended, dropout_key=dropout_key, width=width)
