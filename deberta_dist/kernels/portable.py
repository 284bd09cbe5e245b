"""Fast attention in plain torch, on any device, as an autograd function.

What makes it faster and smaller than the formula under autograd:

- The scores of a few heads and samples at a time (a chunk) are computed and used while they are in cache. Nothing larger
  exists, except for the saved tensor.
- Position terms need no index where queries and keys are 0, 1, 2, ... (see `position_terms`).
- A single tensor of size Q x S is saved, in the values' dtype: the probabilities, negative where dropped. With ``recompute``
  none is saved; the backward pass recomputes the same chunks, to the same bits.
- A mask is one addend and one factor for all heads; products are scaled and added to the scores in the same call.
- GPUs multiply 16-bit operands directly and sum in float32; on a CPU float32 is faster.

It can be differentiated once.

Letters: B batch, N heads, Q queries, S keys, H head size, R rows of the relative table; in a chunk C heads, B samples.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from deberta_dist.kernels.dropout import drop_words_, keep_probability, mark_dropped_, row_words
from deberta_dist.kernels.inputs import (
    AttentionCall,
    as_factor,
    empty_token_gradients,
    product_into,
    refuse_second_derivative,
    score_dtype,
)
from deberta_dist.kernels.position_terms import Chunk, position_terms

# Bytes of a chunk's scores. On a CPU they fit into the last-level cache with the tensors beside them; on a GPU launching more
# kernels would cost more than memory traffic.
CHUNK_BYTES = {"cpu": 4 * 2**20}
DEFAULT_CHUNK_BYTES = 256 * 2**20
# Rows of a band's block: more rows waste more of each product, fewer make the products less efficient.
BLOCK = 64


def portable_attention(
    query_BNQH: Tensor,
    key_BNSH: Tensor,
    value_BNSH: Tensor,
    rel_key_NRH: Tensor | None,
    rel_query_NRH: Tensor | None,
    p2c_BNSR: Tensor | None,
    call: AttentionCall,
) -> Tensor:
    """Context; arguments as of `disentangled_attention`."""
    operands = query_BNQH, key_BNSH, value_BNSH, rel_key_NRH, rel_query_NRH, p2c_BNSR
    # Within an autograd function, grad mode is off: whether there will be a backward pass is only known here.
    needs_backward = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands)
    return _PortableAttention.apply(*operands, call, needs_backward)


class _PortableAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *operands, call, needs_backward = arguments
        query, value = operands[0], operands[2]
        batch, heads, num_queries, _ = query.shape
        saved_NBQS = None
        if needs_backward and not call.recompute:
            saved_NBQS = value.new_empty(heads, batch, num_queries, value.shape[2])
        context = value.new_empty(batch, num_queries, heads, value.shape[3]).transpose(1, 2)
        work = _Work(*operands, call=call)
        for chunk in work.chunks():
            saved = None if saved_NBQS is None else saved_NBQS[chunk.heads, chunk.samples]
            context[chunk.samples, chunk.heads] = work.forward(chunk, saved=saved).transpose(0, 1)
        if needs_backward:
            ctx.save_for_backward(*operands, saved_NBQS)
            ctx.call = call
        return context

    @staticmethod
    def backward(ctx: Any, gradient_BNQH: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("portable")
        *operands, saved_NBQS = ctx.saved_tensors
        work = _Work(*operands, call=ctx.call)
        gradients = empty_token_gradients(*operands[:3])
        for chunk in work.chunks():
            saved = None if saved_NBQS is None else saved_NBQS[chunk.heads, chunk.samples]
            results = work.backward(chunk, gradient_BNQH[chunk.samples, chunk.heads], saved=saved)
            for gradient, result in zip(gradients, results, strict=True):
                gradient[chunk.samples, chunk.heads] = result.transpose(0, 1)
        return *gradients, *work.position_gradients(), None, None


@dataclasses.dataclass(frozen=True)
class _Operands:
    """The inputs of one chunk as factors of products, heads first: [C, B, Q or S, H]."""

    query: Tensor
    key: Tensor
    value: Tensor


class _Work:
    """One pass, forward or backward, over all chunks."""

    def __init__(
        self,
        query_BNQH: Tensor,
        key_BNSH: Tensor,
        value_BNSH: Tensor,
        rel_key_NRH: Tensor | None,
        rel_query_NRH: Tensor | None,
        p2c_BNSR: Tensor | None,
        *,
        call: AttentionCall,
    ) -> None:
        self._query, self._key, self._value = query_BNQH, key_BNSH, value_BNSH
        self._rel_key, self._rel_query, self._p2c = rel_key_NRH, rel_query_NRH, p2c_BNSR
        self._call = call
        self._terms = position_terms(
            rel_key_NRH, rel_query_NRH, p2c_BNSR, call, batch=query_BNQH.shape[0], lengths=self._lengths, block=BLOCK
        )
        self._mask = (None, None) if call.mask is None else call.mask.arithmetic()
        self._inverse_keep = 1.0 / keep_probability(call.dropout_p)
        self._workspaces: dict[str, Tensor] = {}

    @property
    def _lengths(self) -> tuple[int, int]:
        return self._query.shape[2], self._key.shape[2]

    def chunks(self) -> Iterator[Chunk]:
        """All heads and samples in order: several heads with all samples each, or one head with some of the samples."""
        batch, heads = self._query.shape[:2]
        limit = CHUNK_BYTES.get(self._query.device.type, DEFAULT_CHUNK_BYTES)
        num_queries, num_keys = self._lengths
        matrices = max(1, limit // max(1, num_queries * num_keys * 4))
        num_heads, num_samples = max(1, matrices // max(1, batch)), min(matrices, batch)
        for head in range(0, heads, num_heads):
            for sample in range(0, batch, max(1, num_samples)):
                yield Chunk(slice(head, min(head + num_heads, heads)), slice(sample, min(sample + num_samples, batch)))

    def forward(self, chunk: Chunk, *, saved: Tensor | None) -> Tensor:
        """Context of a chunk [C, B, Q, H]; fills ``saved`` [C, B, Q, S] for the backward pass."""
        operands = self._operands(chunk)
        probabilities = self._signed_probabilities(chunk, operands, saved=saved)
        attended = self._attended(probabilities) if self._call.dropout_p > 0.0 else probabilities
        return _product(attended, operands.value, scale=self._inverse_keep)

    def backward(self, chunk: Chunk, gradient_BCQH: Tensor, *, saved: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value of a chunk, [C, B, Q or S, H]; adds to those of the relative tables.

        With P the probabilities, D = P / keep probability where not dropped and 0 elsewhere, G the context's gradient:
        dV = D^T G, T = D * (G V^T), dscores = T - P rowsum(T).
        """
        operands = self._operands(chunk)
        signed = self._signed_probabilities(chunk, operands, saved=None) if saved is None else saved.to(score_dtype(saved))
        gradient = as_factor(gradient_BCQH.transpose(0, 1)).contiguous()
        if self._call.dropout_p > 0.0:
            attended = self._attended(signed)
            d_value = _product(attended.transpose(2, 3), gradient, scale=self._inverse_keep)
            d_scores = self._d_probabilities(gradient, operands).mul_(attended)
            row_sums = d_scores.sum(-1, keepdim=True)
            d_scores.addcmul_(torch.abs(signed, out=attended), row_sums, value=-1)
        else:
            # The same as P * (G V^T - rowsum), which loses less precision where the two are close.
            d_value = _product(signed.transpose(2, 3), gradient)
            d_scores = self._d_probabilities(gradient, operands)
            d_scores = torch.ops.aten._softmax_backward_data(d_scores, signed, -1, signed.dtype)

        d_query = _product(d_scores, operands.key, scale=self._call.scale)
        d_key = _product(d_scores.transpose(2, 3), operands.query, scale=self._call.scale)
        c2p, p2c = self._terms
        if c2p is not None:
            c2p.backward(operands.query, d_scores, chunk, into_CBXH=d_query)
        if p2c is not None:
            p2c.backward(operands.key, d_scores, chunk, into_CBXH=d_key)
        return d_query, d_key, d_value

    def position_gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of rel_key, rel_query and p2c, in their dtypes."""
        c2p, p2c = self._terms
        d_rel_key = None if c2p is None or self._rel_key is None else c2p.operand_gradient().to(self._rel_key.dtype)
        if p2c is None:
            return d_rel_key, None, None
        gradient = p2c.operand_gradient()
        if self._p2c is not None:
            return d_rel_key, None, gradient
        assert self._rel_query is not None, "p2c is made of one of the two"
        return d_rel_key, gradient.to(self._rel_query.dtype), None

    def _operands(self, chunk: Chunk) -> _Operands:
        operands = (self._query, self._key, self._value)
        # Contiguous once here: each is in several products, every one of which would copy it.
        return _Operands(*(as_factor(x[chunk.samples, chunk.heads].transpose(0, 1)).contiguous() for x in operands))

    def _signed_probabilities(self, chunk: Chunk, operands: _Operands, *, saved: Tensor | None) -> Tensor:
        """Probabilities [C, B, Q, S] in the scores' precision, rounded to the values' dtype, negative where dropped."""
        query, key = operands.query, operands.key
        is_exact = score_dtype(query) == self._value.dtype
        shape = (*query.shape[:3], key.shape[2])
        # The workspace is still in cache from the chunk before; the saved tensor is written once, in order.
        scores = self._workspace("scores", shape, score_dtype(query))
        matrices = scores.view(-1, *shape[2:])
        is_empty = True
        # The term that is costlier to add (p2c, transposed) goes first: the first is written, not added.
        for term, content in zip(reversed(self._terms), (key, query), strict=True):
            if term is not None:
                term.add(content, scores, chunk, is_first=is_empty)
                is_empty = False
        query, key = query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2)
        product_into(matrices, query, key, scale=self._call.scale, adds=not is_empty)
        addend, factor = self._mask
        if addend is not None:
            scores.add_(addend[chunk.samples if addend.shape[0] > 1 else slice(None)])
        probabilities = saved if saved is not None and is_exact else scores
        torch.softmax(scores, dim=-1, out=probabilities)
        if factor is not None:
            probabilities.mul_(factor[chunk.samples if factor.shape[0] > 1 else slice(None)])
        if self._call.dropout_p > 0.0:
            self._mark_dropped(probabilities, chunk)
        if is_exact:
            return probabilities
        rounded = probabilities.to(self._value.dtype) if saved is None else saved.copy_(probabilities)
        return probabilities.copy_(rounded)

    def _attended(self, signed: Tensor) -> Tensor:
        return torch.clamp_min(signed, 0.0, out=self._workspace("attended", signed.shape, signed.dtype))

    def _d_probabilities(self, gradient: Tensor, operands: _Operands) -> Tensor:
        left, right = gradient.flatten(0, 1), operands.value.flatten(0, 1).transpose(1, 2)
        shape = (*gradient.shape[:3], operands.value.shape[2])
        result = self._workspace("d_scores", shape, score_dtype(left))
        product_into(result.view(-1, *shape[2:]), left, right, scale=self._inverse_keep)
        return result

    def _mark_dropped(self, probabilities: Tensor, chunk: Chunk) -> None:
        rows = row_words(
            self._call.dropout_seed,
            batch=chunk.samples,
            heads=chunk.heads,
            num_heads=self._query.shape[1],
            num_queries=self._query.shape[2],
            counted=self._call.counted_queries,
            device=probabilities.device,
        )
        words, spare = (self._workspace(name, probabilities.shape, torch.int32) for name in ("words", "spare"))
        mark_dropped_(probabilities, drop_words_(words, spare, rows, p=self._call.dropout_p))

    def _workspace(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Scratch memory called ``name``, reused by every chunk."""
        size = math.prod(shape)
        if name not in self._workspaces:
            self._workspaces[name] = torch.empty(size, dtype=dtype, device=self._query.device)
        return self._workspaces[name][:size].view(shape)


def _product(left: Tensor, right: Tensor, *, scale: float = 1.0) -> Tensor:
    """Batched matrix product of [C, B, ...], scaled."""
    result = torch.empty(*left.shape[:3], right.shape[3], dtype=score_dtype(right), device=right.device)
    product_into(result.flatten(0, 1), left.flatten(0, 1), right.flatten(0, 1), scale=scale)
    return result
