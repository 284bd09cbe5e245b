"""Inputs of the fused attention, what the plain formula makes of them, and dropout's bits stated once more in numpy."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from deberta_dist.kernels import disentangled_attention
from deberta_dist.models.positions import position_row_of_distance

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_MULTIPLIERS, _KEY_STEPS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: tuple[np.ndarray, ...], seed: int) -> list[np.ndarray]:
    """Philox4x32-10 (Salmon et al. 2011): four 32-bit words for each four-word counter, as uint64."""
    c0, c1, c2, c3 = (np.asarray(word, dtype=np.uint64) for word in counter)
    key0, key1 = seed & 0xFFFFFFFF, seed >> 32
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        product0, product1 = c0 * np.uint64(_MULTIPLIERS[0]), c2 * np.uint64(_MULTIPLIERS[1])
        c0, c1, c2, c3 = (
            (product1 >> np.uint64(32)) ^ c1 ^ np.uint64(key0),
            product1 & low,
            (product0 >> np.uint64(32)) ^ c3 ^ np.uint64(key1),
            product0 & low,
        )
        key0, key1 = (key0 + _KEY_STEPS[0]) & 0xFFFFFFFF, (key1 + _KEY_STEPS[1]) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def kept_pairs(shape: tuple[int, int, int, int], *, p: float, seed: int) -> Tensor:
    """Which pairs dropout keeps, bool [B, N, Q, S]: number j % 8 of the words at counter (j // 8, query, B * N, 0)."""
    batch, heads, queries, keys = shape
    batch_head, query, byte = np.meshgrid(
        np.arange(batch * heads), np.arange(queries), np.arange(-(-keys // 8)), indexing="ij"
    )
    words = philox4x32((byte, query, batch_head, np.zeros_like(byte)), seed)
    numbers = np.stack([half for word in words for half in (word & np.uint64(0xFFFF), word >> np.uint64(16))], axis=-1)
    kept = torch.from_numpy(numbers.astype(np.int64) >= round(p * 65536))
    return kept.reshape(batch, heads, queries, -1)[..., :keys]


@dataclass
class Case:
    """One call; ``positions`` None means queries 0 .. Q - 1."""

    batch: int = 2
    heads: int = 2
    queries: int = 19
    keys: int = 19
    head_size: int = 32
    buckets: int = 8
    max_distance: int = 16
    c2p: bool = True
    p2c: bool = True
    key_mask: Tensor | None = None
    documents: Tensor | None = None
    positions: Tensor | None = None
    dropout_p: float = 0.0
    dropout_seed: int = 0x9E3779B97F4A7C15
    dtype: torch.dtype = torch.float32
    seed: int = 0
    operands: list[Tensor] = field(init=False)
    gradient: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.dtype).to(DEVICE)

        tokens = [normal(self.batch, self.heads, n, self.head_size) for n in (self.queries, self.keys, self.keys)]
        rows = 2 * (self.buckets if self.buckets > 0 else self.max_distance)
        self.operands = tokens + [normal(self.heads, rows, self.head_size) for _ in range(self.c2p + self.p2c)]
        self.gradient = normal(*tokens[0].shape)
        for name in ("key_mask", "documents", "positions"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else torch.as_tensor(value).to(DEVICE))

    @property
    def rows(self) -> tuple[int, ...]:
        return position_row_of_distance(self.buckets, self.max_distance)

    def fused(self, operands: list[Tensor] | None = None) -> Tensor:
        from deberta_dist.kernels.fused import fused_attention

        query, key, value, *tables = self.operands if operands is None else operands
        return fused_attention(
            query,
            key,
            value,
            row_of_distance=self.rows,
            max_distance=self.max_distance,
            query_positions_BQ=self.positions,
            rel_key_NRH=tables[0] if self.c2p else None,
            rel_query_NRH=tables[-1] if self.p2c else None,
            key_mask_BS=self.key_mask,
            document_ids_BS=self.documents,
            dropout_p=self.dropout_p,
            dropout_seed=self.dropout_seed,
        )

    def formula(self, operands: list[Tensor]) -> Tensor:
        query, key, value, *tables = operands
        places = torch.arange(self.queries, device=DEVICE).expand(self.batch, -1)
        if self.positions is not None:
            places = self.positions
        distance = places[:, :, None] - torch.arange(self.keys, device=DEVICE)
        distance = distance.clamp(-self.max_distance, self.max_distance)
        kept = kept_pairs((*query.shape[:3], self.keys), p=self.dropout_p, seed=self.dropout_seed).to(DEVICE)
        kept = kept * (65536 / (65536 - round(self.dropout_p * 65536)))
        return disentangled_attention(
            query,
            key,
            value,
            relative_index=torch.tensor(self.rows, device=DEVICE)[distance + self.max_distance],
            rel_key_NRH=tables[0] if self.c2p else None,
            rel_query_NRH=tables[-1] if self.p2c else None,
            mask=self._mask(places),
            dropout=lambda probabilities: probabilities * kept,
        )[0]

    def _mask(self, places: Tensor) -> Tensor | None:
        if self.key_mask is None and self.documents is None:
            return None
        ids = torch.ones(self.batch, self.keys, dtype=torch.int64, device=DEVICE)
        ids = ids if self.documents is None else self.documents
        ids = ids if self.key_mask is None else ids * self.key_mask
        return ((ids.gather(1, places)[:, :, None] == ids[:, None, :]) & (ids != 0)[:, None, :])[:, None]


def values_and_gradients(function, operands: list[Tensor], gradient: Tensor) -> list[Tensor]:
    """The function's value, then its gradient for each operand."""
    leaves = [operand.detach().clone().requires_grad_() for operand in operands]
    value = function(leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves, gradient.to(value.dtype))]


def random_case(seed: int) -> Case:
    """Any shape, terms, masks, positions and dropout."""
    generator = np.random.default_rng(seed)

    def chance() -> bool:
        return bool(generator.random() < 0.5)

    batch, queries, keys = int(generator.integers(1, 4)), int(generator.integers(1, 40)), int(generator.integers(1, 40))
    with_positions, with_mask, with_documents = chance(), chance(), chance()
    if with_mask or with_documents:
        queries = queries if with_positions else min(queries, keys)
    terms = int(generator.integers(1, 4))
    return Case(
        batch=batch,
        heads=int(generator.integers(1, 3)),
        queries=queries,
        keys=keys,
        buckets=int(generator.choice([0, 4, 8])),
        max_distance=int(generator.choice([8, 16, 64])),
        c2p=bool(terms & 1),
        p2c=bool(terms & 2),
        key_mask=torch.from_numpy(generator.random((batch, keys)) < 0.7) if with_mask else None,
        documents=torch.from_numpy(np.sort(generator.integers(0, 4, (batch, keys)))) if with_documents else None,
        positions=torch.from_numpy(generator.integers(0, keys, (batch, queries))) if with_positions else None,
        dropout_p=0.3 if chance() else 0.0,
        dropout_seed=int(generator.integers(0, 2**63)) * 2 + 1,
        seed=seed,
    )
