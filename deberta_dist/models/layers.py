"""One transformer layer with disentangled attention, part by part, under the published parameter names.

The modules named ``enter`` compute nothing: they mark where an activation enters computation that is split over
tensor-parallel ranks, and are replaced there. Heads are counted from the projections'
outputs, never from the configuration, because a projection may have been split. nn.LayerNorm keeps its
statistics and the published epsilon, 1e-7, in float32 for half-precision inputs.

Letters: B batch, S sequence, Q queries, D hidden, N heads here, H head size, R rows of the relative table.

Source: microsoft/DeBERTa DeBERTa/deberta/{bert,disentangled_attention}.py@4d7fe0bd.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deberta_dist.kernels import (
    AttentionMask,
    RelativePositions,
    attention_scale,
    disentangled_attention,
    position_scores,
    prefers_position_scores,
)
from deberta_dist.models import dropout as sites
from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.dropout import Dropout, child_key
from deberta_dist.models.fused_qkv import Linear, entered, join_, joint_linear, linear
from deberta_dist.models.residual import ResidualOutput

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "linear": torch.positive,
}


class AttentionMemory(NamedTuple):
    """What queries attend to: content and, per position term, the projected relative table.

    Attributes:
        p2c_BNSR: products of the keys with ``rel_query_NRH``; set instead of it where attended to twice.
    """

    key_BNSH: Tensor
    value_BNSH: Tensor
    rel_key_NRH: Tensor | None
    rel_query_NRH: Tensor | None
    p2c_BNSR: Tensor | None = None


class DisentangledSelfAttention(nn.Module):
    """Projections around `kernels.disentangled_attention`.

    Attributes:
        implementation: who computes it, one of `kernels.IMPLEMENTATIONS`; None: the fastest that can.
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
        """Of hidden states, [B, N, Q, H]."""
        return self._heads(linear(self.enter(hidden_BQD), self.query_proj))

    def memory(self, hidden_BSD: Tensor, *, rel_RD: Tensor, dropout_key: int | None) -> AttentionMemory:
        """Keys, values and projected relative table of hidden states."""
        key, value = joint_linear(entered(self.enter, hidden_BSD), [self.key_proj, self.value_proj])
        return self._memory(key, value, rel_RD=rel_RD, dropout_key=dropout_key)

    def queries_and_memory(
        self, hidden_BSD: Tensor, *, rel_RD: Tensor, dropout_key: int | None
    ) -> tuple[Tensor, AttentionMemory]:
        """`queries` and `memory` of the same states."""
        projections = [self.query_proj, self.key_proj, self.value_proj]
        query, key, value = joint_linear(entered(self.enter, hidden_BSD), projections)
        return self._heads(query), self._memory(key, value, rel_RD=rel_RD, dropout_key=dropout_key)

    def _memory(self, key: Tensor, value: Tensor, *, rel_RD: Tensor, dropout_key: int | None) -> AttentionMemory:
        rel_RD = self.pos_dropout(rel_RD, dropout_key)
        # The table does not pass ``enter``: split over heads, its gradient is a partial sum that is completed once
        # per optimizer step instead of once per layer.
        projections = self._table_projections()
        tables = joint_linear(rel_RD, list(projections.values())) if projections else ()
        rel = {name: self._heads(table) for name, table in zip(projections, tables, strict=True)}
        return AttentionMemory(self._heads(key), self._heads(value), rel.get("key"), rel.get("query"))

    def with_position_scores(
        self, memory: AttentionMemory, *, positions: RelativePositions, mask: AttentionMask | None
    ) -> AttentionMemory:
        """``memory`` for repeated `attend`: where it helps, the products of keys and relative table are made once."""
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
        """Context [B, Q, N * H] of `queries`, of which ``width`` count; probabilities if asked for."""
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
        """What makes "query" and "key" of the relative table, in the order of their weights."""
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
        # nn.Module's conversions move every parameter to memory of its own.
        super()._apply(*args, **kwargs)
        self._join_weights()
        return self


class Attention(nn.Module):
    """Self-attention and its output; a holder of published names."""

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
        """The ordinary pass: every position attends to every position.

        Args:
            hidden_BSD: input.
            rel_RD: relative table, normalised, before dropout.
            positions: see `kernels.disentangled_attention`.
            mask: likewise.
            dropout_key: key of this layer, micro-batch and step, or None.
            recompute_mode: only "selective" matters here.
            return_probabilities: also return the attention probabilities.
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
        num_passes: int,
        rel_RD: Tensor,
        positions: RelativePositions,
        mask: AttentionMask | None,
        dropout_key: int | None,
        recompute_mode: str = "none",
        width: int | None = None,
    ) -> Tensor:
        """Passes of this layer over queries of their own, each the next one's queries, all attending to ``hidden_BSD``.

        Keys, values, projected table and the products of keys with it are made once. So all passes share one dropout
        mask on the table, where the published code draws one each; all other masks differ between passes.

        ``width`` queries of each sample count; masks are as if there were no others behind them.
        """
        attention = self.attention.self
        memory = attention.memory(hidden_BSD, rel_RD=rel_RD, dropout_key=dropout_key)
        memory = attention.with_position_scores(memory, positions=positions, mask=mask)
        for number in range(num_passes):
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
