"""A whole layer, forward and backward, beside the same layer without positions and beside other implementations.

What `layer --part whole` measures: attention and feed-forward with dropout, residuals and LayerNorms, and all gradients.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import peers, stopwatch
from benchmarks.device_models import join_residuals
from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.layers import AttentionMemory, DisentangledSelfAttention, Layer
from deberta_dist.models.positions import relative_positions
from deberta_dist.models.presets import preset

OURS, NO_POSITIONS = "ours", "ours, SDPA without positions"
HEAD_SIZE = 64


class WithoutPositions(DisentangledSelfAttention):
    """The same projections around torch's attention."""

    def _memory(self, key: Tensor, value: Tensor, **_: Any) -> AttentionMemory:
        return AttentionMemory(self._heads(key), self._heads(value), None, None)

    def attend(self, query_BNQH: Tensor, memory: AttentionMemory, **_: Any) -> tuple[Tensor, None]:
        """Context [B, Q, N * H]."""
        context = F.scaled_dot_product_attention(
            query_BNQH, memory.key_BNSH, memory.value_BNSH, dropout_p=self.dropout.p if self.training else 0.0
        )
        return context.transpose(1, 2).flatten(2), None


class WholeLayer:
    """Layers of several implementations with the same weights, on one batch of hidden states.

    Args:
        heads: Number of heads, each of size 64.
        shape: (B, S), sequences and tokens of the batch.
        dropout: Rate for hidden states and probabilities; the table has none (the peers would draw other masks anyway).
        device: Where all layers run.
        dtype: That of weights and hidden states.
    """

    def __init__(self, *, heads: int, shape: tuple[int, int], dropout: float, device: torch.device, dtype: torch.dtype) -> None:
        width = heads * HEAD_SIZE
        self.config: DebertaConfig = preset(
            "v3-base",
            num_attention_heads=heads,
            hidden_size=width,
            intermediate_size=4 * width,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        generator = torch.Generator().manual_seed(1)

        def normal(*sizes: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*sizes, generator=generator) * scale).to(device, dtype)

        self._device, self._dtype, self._shape = device, dtype, shape
        self._hidden = normal(*shape, width).requires_grad_()
        self._table = normal(self.config.num_position_rows, width).requires_grad_()
        self._gradient = normal(*shape, width)
        self._layers: dict[str, nn.Module] = {}
        ours = self._add(OURS, Layer(self.config))
        with torch.no_grad():
            for name, parameter in ours.named_parameters():
                parameter.copy_(normal(*parameter.shape, scale=0.04) + (1.0 if "LayerNorm.weight" in name else 0.0))

    @property
    def ours(self) -> nn.Module:
        """This package's layer."""
        return self._layers[OURS]

    def own_contestants(self) -> Mapping[str, Callable[[], Tensor]]:
        """Forward passes of ours, with and without positions."""
        without = self._add(NO_POSITIONS, Layer(self.config))
        without.attention.self.__class__ = WithoutPositions
        return {name: self._forward(name) for name in self._layers}

    def contestants(self, official: Path | None) -> Mapping[str, Callable[[], Tensor]]:
        """Those, and the peers'."""
        self.own_contestants()
        self._add(peers.HUGGING_FACE, peers.hugging_face_layer(self.config)())
        if official is not None:
            self._add(peers.PUBLISHED, peers.published_layer(official, self.config)())
        return {name: self._forward(name) for name in self._layers}

    def values(self, forward: Callable[[], Tensor]) -> list[Tensor]:
        """Output and gradients of hidden states and table, without dropout."""
        for layer in self._layers.values():
            layer.eval()
        self.clear()
        output = forward()
        output.backward(self._gradient)
        for layer in self._layers.values():
            layer.train()
        return [output.detach(), self._hidden.grad.clone(), self._table.grad.clone()]

    def contestant(self, forward: Callable[[], Tensor]) -> stopwatch.TimedPass:
        """With all gradients."""
        return stopwatch.TimedPass(forward, lambda output: output.backward(self._gradient), self.clear)

    def compile(self, *, joins: bool = True) -> None:
        """Trains ours as ``training.compile`` does, or no more."""
        for name in (OURS, NO_POSITIONS):
            join_residuals(self._layers[name], joins=joins)

    @property
    def leaves(self) -> list[Tensor]:
        """Tensors that are there anyway."""
        return [self._hidden, self._table, *(p for layer in self._layers.values() for p in layer.parameters())]

    def clear(self) -> None:
        """Drops all gradients."""
        for leaf in self.leaves:
            leaf.grad = None

    def _add(self, name: str, layer: nn.Module) -> nn.Module:
        if OURS in self._layers:
            layer.load_state_dict(self._layers[OURS].state_dict(), strict=True)
        self._layers[name] = layer.to(self._device, self._dtype).train()
        return layer

    def _forward(self, name: str) -> Callable[[], Tensor]:
        layer, config = self._layers[name], self.config
        if name in (OURS, NO_POSITIONS):
            positions = relative_positions(
                num_buckets=config.position_buckets, max_distance=config.max_relative_distance, device=self._device
            )
            return lambda: layer(self._hidden, rel_RD=self._table, positions=positions, mask=None, dropout_key=1)[0]
        batch, length = self._shape
        kind = torch.bool if name == peers.HUGGING_FACE else torch.uint8
        mask = torch.ones(batch, 1, length, length, dtype=kind, device=self._device)

        def forward() -> Tensor:
            output = layer(self._hidden, mask, rel_embeddings=self._table)
            return output[0] if isinstance(output, tuple) else output

        return forward
