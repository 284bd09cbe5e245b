"""One attention on a device beside its formula in float64: values, gradients, repeatability, memory nobody wrote.

The correctness steps of ``gpu`` and the tests that need a GPU share it.

Letters: B batch, N heads, Q queries, S keys, H head size, R rows of the relative table.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deberta_dist.kernels import AttentionMask, RelativePositions, attention_scale, disentangled_attention
from deberta_dist.kernels.fused import fused_attention
from deberta_dist.kernels.inputs import AttentionCall
from deberta_dist.models.positions import position_row_of_distance

FEATURES = ("plain", "dropout", "documents", "decoder")
HEAD_SIZE = 64
COMPARED = ("context", "query", "key", "value", "rel_key", "rel_query")
"""Value and gradients, in the order of `Problem.run`."""
_DROPOUT_SEED = 0x9E3779B97F4A7C15
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


def tolerance(dtype: torch.dtype) -> float:
    """Most that `Agreement.norm_error` may be; single elements may be off by twice as much.

    16-bit operands: results, probabilities and gradients of scores are rounded once each, which is half of this; sums
    are float32. In float32 a sum over thousands of tokens is off by up to a tenth of this.
    """
    return 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps


class Poisoned(TorchDispatchMode):
    """Memory comes filled: NaN where it is for floats, else a number that is likely wrong."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in _ALLOCATIONS:
            made.fill_(float("nan") if made.is_floating_point() else 0x55)
        return made


class Problem:
    """Operands of one attention as a layer has them: the heads of a token lie side by side.

    Args:
        shape: (B, N, S), sequences, heads and tokens.
        feature: "plain"; "dropout"; "documents": several per sequence, and padding; "decoder": queries at positions of
            their own, documents and dropout.
        dtype: That of queries, keys, values and relative tables.
        device: Where they are and the implementations run.
        buckets: Position buckets of the relative table, per direction.
        max_distance: Distance from which on all share a row, tokens.
        seed: Decides all random values.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        feature: str,
        dtype: torch.dtype,
        device: torch.device,
        buckets: int = 256,
        max_distance: int = 512,
        seed: int = 0,
    ) -> None:
        assert feature in FEATURES
        batch, heads, length = shape
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator, device=device).to(dtype)

        positions = mask = None
        if feature in ("documents", "decoder"):
            documents = (torch.arange(length, device=device) // max(length // 5, 1) + 1).expand(batch, -1).clone()
            documents[:, length - length // 8 :] = 0
            mask = AttentionMask(key_segments_BS=documents)
        num_queries = length
        if feature == "decoder":
            num_queries = max(length * 15 // 100, 1)
            order = torch.rand(batch, length, generator=generator, device=device).argsort(dim=1)
            positions = order[:, :num_queries].contiguous()
            mask = mask.of_queries(positions)
        rows = position_row_of_distance(buckets, max_distance)
        row_of_distance = torch.tensor(rows, device=device)
        self.positions = RelativePositions(row_of_distance, query_positions_BQ=positions, known_rows=rows)
        self._mask, self._dropout = mask, 0.1 if feature in ("dropout", "decoder") else 0.0
        tokens = [normal(batch, count, heads, HEAD_SIZE).transpose(1, 2) for count in (num_queries, length, length)]
        tables = [normal(heads, 2 * buckets, HEAD_SIZE) for _ in range(2)]
        self.operands = [*tokens, *tables]
        self._gradient = normal(batch, num_queries, heads, HEAD_SIZE).transpose(1, 2)

    def context(self, implementation: str, operands: Sequence[Tensor]) -> Tensor:
        """Of one implementation, [B, N, Q, H]; "fused" on a CPU is Triton's interpreter."""
        query, key, value, rel_key, rel_query = operands
        if implementation == "fused" and query.device.type == "cpu":
            call = AttentionCall(
                scale=attention_scale(HEAD_SIZE, has_c2p=True, has_p2c=True),
                positions=self.positions,
                mask=self._mask,
                dropout_p=self._dropout,
                dropout_seed=_DROPOUT_SEED,
                recompute=False,
            )
            return fused_attention(query, key, value, rel_key, rel_query, call)
        return disentangled_attention(
            query,
            key,
            value,
            positions=self.positions,
            rel_key_NRH=rel_key,
            rel_query_NRH=rel_query,
            mask=self._mask,
            dropout_p=self._dropout,
            dropout_seed=_DROPOUT_SEED,
            implementation=implementation,
        )[0]

    def run(self, implementation: str, operands: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Context and the gradients of all operands."""
        leaves = [x.detach().requires_grad_() for x in (self.operands if operands is None else operands)]
        context = self.context(implementation, leaves)
        return [context.detach(), *torch.autograd.grad(context, leaves, self._gradient.to(context.dtype))]

    def passes(self, implementation: str) -> tuple[Callable[[], Tensor], Callable[[Tensor], None]]:
        """Forward pass and backward pass, for a stopwatch."""
        leaves = [x.detach().requires_grad_() for x in self.operands]
        return (
            lambda: self.context(implementation, leaves),
            lambda context: torch.autograd.grad(context, leaves, self._gradient),
        )

    def exact(self) -> list[Tensor]:
        """What the formula makes of the same numbers in float64."""
        return self.run("reference", [x.double() for x in self.operands])

    def agreement(self, implementation: str, exact: Sequence[Tensor]) -> "Agreement":
        """How far an implementation is from that."""
        return agreement(lambda: self.run(implementation), dict(zip(COMPARED, exact, strict=True)))


@dataclass(frozen=True)
class Agreement:
    """How far an implementation is from the formula.

    Attributes:
        norm_error: Norm of the difference over the norm of the exact result, of the worst tensor: finds a wrong tile.
        largest_error: Largest difference over the largest exact value, likewise: finds a wrong element.
        worst: Name of the tensor that the norm finds.
        repeats: Whether two more runs agree with each other in every bit, and with the one in poisoned memory.
    """

    norm_error: float
    largest_error: float
    worst: str
    repeats: bool


def agreement(run: Callable[[], list[Tensor]], exact: Mapping[str, Tensor]) -> Agreement:
    """Runs something three times, first in memory full of NaN, and compares what it returns, in order."""
    with Poisoned():
        found = run()
    again = [run() for _ in range(2)]
    norms, largest = {}, []
    for (name, theirs), ours in zip(exact.items(), found, strict=True):
        difference = ours.double() - theirs
        norms[name] = float(difference.norm() / theirs.norm())
        largest.append(float(difference.abs().max() / theirs.abs().max()))
    # NaN is larger than everything here, and max alone would lose it.
    worst = max(norms, key=lambda name: (norms[name] != norms[name], norms[name]))
    return Agreement(
        norm_error=norms[worst],
        largest_error=max(largest, key=lambda error: (error != error, error)),
        worst=worst,
        repeats=all(torch.equal(x, y) for other in again for x, y in zip(found, other, strict=True)),
    )
