"""What all implementations are given and share: masks, positions, scale, products with the relative table.

Masks and positions say which query sees which key, and at what distance, in forms that need no tensor of size queries x keys;
each implementation expands what it needs.

Letters: B batch, N heads here, Q queries, S keys, H head size, R rows of the relative table, M largest distance with a row of
its own.
"""

import functools
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Form = TypeVar("Form")


class _Source:
    """An object from which implementations derive other forms, once per object: all layers of a pass share it."""

    @functools.cached_property
    def _derived(self) -> dict[Hashable, Any]:
        return {}

    def derived(self, name: Hashable, make: Callable[[], Form]) -> Form:
        """The form called ``name``; ``make`` is called only the first time."""
        if name not in self._derived:
            self._derived[name] = make()
        return self._derived[name]


@dataclass(frozen=True, eq=False)
class RelativePositions(_Source):
    """Row of the relative table for each pair of a query and a key, by their distance.

    Attributes:
        row_of_distance: int64 [2 M + 1], for distances -M .. M, query minus key; farther ones count as -M or M.
        query_positions_BQ: positions of the queries among the keys, int64, [B, Q]; None: the queries are 0 .. Q-1.
        known_rows: the same numbers on the host, so that reading them does not wait for a device; None if not known.
    """

    row_of_distance: Tensor
    query_positions_BQ: Tensor | None = None
    known_rows: tuple[int, ...] | None = None

    @functools.cached_property
    def host_rows(self) -> tuple[int, ...]:
        """``row_of_distance`` on the host; waits for the device if they are not known."""
        return tuple(self.row_of_distance.tolist()) if self.known_rows is None else self.known_rows

    def rows(self, distances: Tensor) -> Tensor:
        """Rows of the relative table for distances of any shape, int64; the result has the same shape."""
        largest = self.row_of_distance.numel() // 2
        return self.row_of_distance[distances.clamp(-largest, largest) + largest]

    def index(self, num_queries: int, num_keys: int) -> Tensor:
        """Row for every pair: int64 [Q, S], or [B, Q, S] with positions."""
        device = self.row_of_distance.device
        queries = self.query_positions_BQ
        if queries is None:
            queries = torch.arange(num_queries, device=device)
        return self.rows(queries.to(device).unsqueeze(-1) - torch.arange(num_keys, device=device))


@dataclass(frozen=True, eq=False)
class AttentionMask(_Source):
    """Which query sees which key: those of its own segment, or any pairs.

    Attributes:
        key_segments_BS: integers: 0 (padding) sees nothing and is not seen, equal others (documents) see each other. Bool
            where everything but padding is one segment.
        query_segments_BQ: the queries' segments; None if queries and keys are the same tokens.
        pairs_BQS: bool, instead of segments: whether a query sees a key; batch dimension 1 or B.
    """

    key_segments_BS: Tensor | None = None
    query_segments_BQ: Tensor | None = None
    pairs_BQS: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.key_segments_BS is None) == (self.pairs_BQS is None):
            raise ValueError("a mask is made of key_segments_BS or of pairs_BQS; give one of them")
        if self.pairs_BQS is not None and (self.pairs_BQS.dim() != 3 or self.pairs_BQS.dtype != torch.bool):
            raise ValueError(
                f"pairs_BQS has shape {tuple(self.pairs_BQS.shape)} and dtype {self.pairs_BQS.dtype}; "
                "expected bool [batch, queries, keys]"
            )

    @property
    def _segments_BS(self) -> Tensor:
        assert self.key_segments_BS is not None, "a mask of pairs has no segments"
        return self.key_segments_BS

    @property
    def is_of_padding(self) -> bool:
        """Whether only padding is hidden. Decided by the mask's dtype, so that nothing waits for a device."""
        return self.pairs_BQS is None and self._segments_BS.dtype == torch.bool

    def seen(self) -> Tensor:
        """Keys that are not padding, bool [B or 1, S]; with pairs, those that any query sees."""
        return self._segments_BS != 0 if self.pairs_BQS is None else self.pairs_BQS.any(dim=-2)

    def seen_at(self, offset: int) -> Tensor:
        """Whether each token sees the one ``offset`` tokens after it, for all tokens that have one.

        Bool [B or 1, S - |offset|]. Queries and keys are the same tokens; |offset| is below S.
        """
        if self.pairs_BQS is not None:
            # Cut to size before taking the main diagonal: for torch.export, the length of any other diagonal depends on which
            # of two symbolic sizes is smaller.
            length = self.pairs_BQS.shape[1] - abs(offset)
            rows = self.pairs_BQS.narrow(1, max(-offset, 0), length)
            return rows.narrow(2, max(offset, 0), length).diagonal(dim1=1, dim2=2)
        length = self._segments_BS.shape[1] - abs(offset)
        queries = self._segments_BS.narrow(1, max(-offset, 0), length)
        keys = self._segments_BS.narrow(1, max(offset, 0), length)
        return (queries == keys) & (keys != 0)

    def of_queries(self, queries_BT: Tensor) -> "AttentionMask":
        """The mask of some of the queries, given by their positions [B, T] among the tokens, and all keys."""
        if self.pairs_BQS is None:
            return AttentionMask(self._segments_BS, self._segments_BS.gather(1, queries_BT))
        rows = queries_BT[:, :, None].expand(-1, -1, self.pairs_BQS.shape[-1])
        return AttentionMask(pairs_BQS=self.pairs_BQS.gather(1, rows))

    def visible(self) -> Tensor:
        """Whether a query sees a key, for every pair, bool [B or 1, Q, S]."""
        if self.pairs_BQS is not None:
            return self.pairs_BQS
        keys = self._segments_BS
        queries = keys if self.query_segments_BQ is None else self.query_segments_BQ
        return (queries[:, :, None] == keys[:, None, :]) & (keys != 0)[:, None, :]

    def arithmetic(self) -> tuple[Tensor | None, Tensor | None]:
        """The mask as float32: an addend to scores [B or 1, Q, S] and a factor of rows [B or 1, Q, 1].

        The addend of an unseen pair is very low but finite, which keeps rows that see nothing finite; the factor makes those
        rows zero. On a CPU None stands for an addend of zeros and a factor of ones; on a GPU, checking would make the host
        wait.
        """
        visible = self.visible()
        can_look = visible.device.type == "cpu"
        if can_look and bool(visible.all()):
            return None, None
        sees_any = visible.any(dim=-1, keepdim=True)
        addend = visible.to(torch.float32).sub_(1.0).mul_(-torch.finfo(torch.float32).min / 2)
        return addend, None if can_look and bool(sees_any.all()) else sees_any.float()


# Least compute capability whose tensor cores multiply the dtype.
_LEAST_CAPABILITY = {torch.float16: (7, 0), torch.bfloat16: (8, 0)}


@dataclass(frozen=True)
class AttentionCall:
    """Arguments of `disentangled_attention` other than tensors with gradients, and the scale that follows from them."""

    scale: float
    positions: RelativePositions
    mask: AttentionMask | None
    dropout_p: float
    dropout_seed: int
    recompute: bool
    counted_queries: int | None = None


def attention_scale(head_size: int, *, has_c2p: bool, has_p2c: bool) -> float:
    """1 / sqrt(H (1 + [c2p] + [p2c])): the scores' variance stays that of one term."""
    return 1.0 / math.sqrt(head_size * (1 + has_c2p + has_p2c))


def widened(x: Tensor) -> Tensor:
    """``x`` in the precision of scores: float64 as it is, else float32."""
    return x if x.dtype == torch.float64 else x.float()


def score_dtype(x: Tensor) -> torch.dtype:
    """Dtype of scores and of sums of products: float64 if ``x`` is, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def multiplies_halves(x: Tensor) -> bool:
    """Whether 16-bit factors on this device are multiplied as they are, with float32 sums.

    Only on NVIDIA GPUs with tensor cores for the dtype; on CPUs without matrix units it is slower than float32.
    """
    if x.device.type != "cuda" or torch.version.hip is not None or x.dtype not in _LEAST_CAPABILITY:
        return False
    return torch.cuda.get_device_capability(x.device) >= _LEAST_CAPABILITY[x.dtype]


def as_factor(x: Tensor) -> Tensor:
    """``x`` as a factor of `product_into`: as it is where that is fast, else in the precision of scores."""
    return x if multiplies_halves(x) else widened(x)


def product_into(out: Tensor, left: Tensor, right: Tensor, *, scale: float = 1.0, adds: bool = False) -> Tensor:
    """out = scale left right, plus what it was if ``adds``; batches of matrices, sums in ``out``'s precision.

    A left factor in ``out``'s precision beside a 16-bit right one is rounded to it, as the fused kernels do with
    probabilities and the scores' gradient.
    """
    beta = 1.0 if adds else 0.0
    if multiplies_halves(right) and left.dtype in (right.dtype, out.dtype):
        return half_product_into(out, left.to(right.dtype), right, alpha=scale, beta=beta)
    return torch.baddbmm(out, left.to(out.dtype), right.to(out.dtype), beta=beta, alpha=scale, out=out)


def half_product_into(out: Tensor, left: Tensor, right: Tensor, *, alpha: float, beta: float) -> Tensor:
    """As `product_into`, for two 16-bit factors on a GPU: tensor cores multiply them and sum in float32."""
    return torch.baddbmm(out, left, right, torch.float32, beta=beta, alpha=alpha, out=out)


def refuse_second_derivative(implementation: str) -> None:
    """Called by backward passes that cannot be differentiated themselves.

    torch's `once_differentiable` would not do: it raises no error if the incoming gradient is a constant.

    Raises:
        RuntimeError: autograd is recording this backward pass, to differentiate it.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"the {implementation} attention was differentiated with create_graph=True and has no second derivative; "
            "give disentangled_attention implementation='reference'"
        )


def empty_token_gradients(query_BNQH: Tensor, key_BNSH: Tensor, value_BNSH: Tensor) -> list[Tensor]:
    """Uninitialised gradients laid out like the projections' outputs, [B, S, N, H], so that nothing has to copy them.

    Those with the keys' shape and dtype are slices of one tensor, as are the outputs of the fused QKV product.
    """
    operands = query_BNQH, key_BNSH, value_BNSH
    is_like_keys = [(x.shape, x.dtype) == (key_BNSH.shape, key_BNSH.dtype) for x in operands]
    batch, heads, length, head_size = key_BNSH.shape
    slices = iter(key_BNSH.new_empty(batch, length, sum(is_like_keys), heads, head_size).unbind(2))
    gradients = [
        next(slices) if is_slice else x.new_empty(x.transpose(1, 2).shape)
        for x, is_slice in zip(operands, is_like_keys, strict=True)
    ]
    return [gradient.transpose(1, 2) for gradient in gradients]


def position_scores(content_BNSH: Tensor, table_NRH: Tensor, *, scale: float) -> Tensor:
    """Products of every token with every row of the relative table, scaled; float32 (float64 of float64) [B, N, S, R].

    The batch is folded into the rows of one product per head, so the table is not repeated over it.
    """
    batch, heads, length, head_size = content_BNSH.shape
    content = widened(content_BNSH).transpose(0, 1).reshape(heads, batch * length, head_size)
    scores = torch.bmm(content, (widened(table_NRH) * scale).transpose(1, 2))
    return scores.view(heads, batch, length, -1).transpose(0, 1)
