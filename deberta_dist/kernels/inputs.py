"""What all implementations share: scale, precision of scores, products with the relative table, layout of gradients.

Letters: B batch, N heads here, Q queries, S keys, H head size, R rows of the relative table.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from deberta_dist.kernels.masks import AttentionMask, RelativePositions

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
