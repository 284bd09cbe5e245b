"""Which query sees which key, and at what distance, in forms that need no tensor of size queries x keys.

Callers describe positions and masks with these; each implementation expands what it needs.

Letters: B batch, Q queries, S keys, R rows of the relative table, M largest distance with a row of its own.
"""

import functools
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
