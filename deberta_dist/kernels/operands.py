"""What all implementations share: scale, precision of scores, products with the relative table.

Letters: B batch, N heads here, S sequence, H head size, R rows of the relative table.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from deberta_dist.kernels.places import AttentionMask, RelativePositions


@dataclass(frozen=True)
class AttentionCall:
    """Everything but the operands that `disentangled_attention` is called with.

    Attributes:
        scale: of all scores.
        positions, mask, dropout_p, dropout_seed, recompute: see there.
    """

    scale: float
    positions: RelativePositions
    mask: AttentionMask | None
    dropout_p: float
    dropout_seed: int
    recompute: bool


def attention_scale(head_size: int, *, has_c2p: bool, has_p2c: bool) -> float:
    """1 / sqrt(H (1 + [c2p] + [p2c])): the scores' variance stays that of one term."""
    return 1.0 / math.sqrt(head_size * (1 + has_c2p + has_p2c))


def widened(x: Tensor) -> Tensor:
    """``x`` in the precision of scores: float64 as it is, else float32."""
    return x if x.dtype == torch.float64 else x.float()


def refuse_second_derivative(implementation: str) -> None:
    """For backward passes that cannot be differentiated themselves.

    Not `once_differentiable`: it overlooks gradients of gradients that begin with a constant.

    Raises:
        RuntimeError: a derivative of this backward pass is prepared.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"the {implementation} attention was differentiated with create_graph=True and has no second derivative; "
            "give disentangled_attention implementation='reference'"
        )


def position_scores(content_BNSH: Tensor, table_NRH: Tensor, *, scale: float) -> Tensor:
    """Products of every token with every row of the relative table, scaled; float32 (float64 of float64) [B, N, S, R].

    The batch is folded into the rows of one product per head, so the table is not repeated over it.
    """
    batch, heads, length, head_size = content_BNSH.shape
    content = widened(content_BNSH).transpose(0, 1).reshape(heads, batch * length, head_size)
    scores = torch.bmm(content, (widened(table_NRH) * scale).transpose(1, 2))
    return scores.view(heads, batch, length, -1).transpose(0, 1)
