"""One transformer layer with disentangled attention, under the published parameter names.

The modules named ``enter`` compute nothing: they mark where an activation enters a tensor-parallel region, and are replaced
there. The number of heads is read from the projections' outputs, never from the configuration, because tensor parallelism may
have divided a projection. nn.LayerNorm computes its statistics in float32 for 16-bit inputs, and adds the published epsilon,
1e-7, there: fp16 would round it to 1.2e-7.

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
        num_passes: int,
        rel_RD: Tensor,
        positions: RelativePositions,
        mask: AttentionMask | None,
        dropout_key: int | None,
        recompute_mode: str = "none",
        width: int | None = None,
    ) -> Tensor:
        """``num_passes`` passes of this layer: each pass's output is the next one's queries; all attend to ``hidden_BSD``.

        Keys, values, projected table and the products of keys with it are computed once. So all passes share one dropout
        mask on the table, where the published code draws one each; all other masks differ between passes.

        The first ``width`` queries of each sample are real; dropout is as if the others, padding, were not there. For the
        other parameters see `forward`.
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
