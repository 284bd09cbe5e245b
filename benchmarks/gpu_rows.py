"""Dropout, residual and LayerNorm in one kernel on a device, beside their formula in float64: values and gradients.

Letters: B batch, S sequence, D columns.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu_attention import Agreement, agreement
from deberta_dist.kernels.dropout import drop_words_, keep_probability, words_of_rows
from deberta_dist.kernels.rows import RowNumbers, residual_norm

COMPARED = ("output", "x", "bias", "residual", "weight", "norm_bias")
_P, _SEED, _EPS = 0.1, 0x9E3779B97F4A7C15, 1e-7


class RowsProblem:
    """Tensors as at the end of a layer.

    Args:
        shape: (B, S, D), sequences, tokens and columns.
        dtype: That of all tensors.
        device: Where they are and the kernels run.
    """

    def __init__(self, shape: tuple[int, int, int], *, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        sizes = (shape, shape[-1:], shape, shape[-1:], shape[-1:])
        x, bias, residual, weight, norm_bias = (torch.randn(s, generator=generator, device=device) for s in sizes)
        self._operands = [t.to(dtype) for t in (x, bias, residual, weight + 1, norm_bias)]
        self._gradient = torch.randn(shape, generator=generator, device=device).to(dtype)
        # Two sequences of a whole that is longer: rows have numbers of their own.
        self._numbers = RowNumbers(length=shape[1], stride=2 * shape[1], offset=shape[1])

    def run(self) -> list[Tensor]:
        """Output and gradients by the kernels."""
        leaves = [x.detach().requires_grad_() for x in self._operands]
        for leaf in leaves:
            leaf.grad_dtype = None  # those of the vectors are float32
        output = residual_norm(*leaves, eps=_EPS, p=_P, seed=_SEED, numbers=self._numbers)
        output.backward(self._gradient)
        return [output.detach(), *(leaf.grad for leaf in leaves)]

    def exact(self) -> list[Tensor]:
        """The same by torch's operators in float64, with the words by which elements are dropped."""
        x, bias, residual, weight, norm_bias = leaves = [t.double().requires_grad_() for t in self._operands]
        rows, columns = x.shape[0] * x.shape[1], x.shape[2]
        words = torch.empty(rows, columns, dtype=torch.int32, device=x.device)
        of_rows = words_of_rows(self._numbers.of(rows, x.device), _SEED)
        is_dropped = (drop_words_(words, torch.empty_like(words), of_rows, p=_P) < 0).view(x.shape)
        attended = ((x + bias) / keep_probability(_P)).masked_fill(is_dropped, 0.0)
        output = F.layer_norm(attended + residual, x.shape[-1:], weight, norm_bias, _EPS)
        return [output.detach(), *torch.autograd.grad(output, leaves, self._gradient.double())]

    def agreement(self) -> Agreement:
        """How far the kernels are from that."""
        return agreement(self.run, dict(zip(COMPARED, self.exact(), strict=True)))
