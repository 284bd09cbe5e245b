"""Rows of the relative table by distance, and attention masks, from the arguments of a model's call.

Letters: B batch, Q queries, S keys.
"""

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from deberta_dist.kernels import AttentionMask, RelativePositions


@functools.lru_cache(maxsize=16)
def position_row_of_distance(num_buckets: int, max_distance: int) -> tuple[int, ...]:
    """Row of the relative table for each distance -max_distance .. max_distance (query minus key).

    row(d) = d + max_distance, at most 2 max_distance - 1, without buckets; with them, m = num_buckets / 2,
    d first clamped to +-(max_distance - 1):
    row(d) = num_buckets + (d if |d| <= m else sign(d) (ceil(ln(|d|/m) / ln((max_distance-1)/m) (m-1)) + m)).
    Clamping comes first: buckets of larger distances would be beyond the table, or rows that were never trained.

    Args:
        num_buckets: buckets per direction; below 1 means none.
        max_distance: tokens; the distance from which on all share a row.

    Source: microsoft/DeBERTa DeBERTa/deberta/da_utils.py@4d7fe0bd.
    """
    distances = range(-max_distance, max_distance + 1)
    if num_buckets < 1:
        return tuple(min(distance + max_distance, 2 * max_distance - 1) for distance in distances)
    middle, last = num_buckets // 2, max_distance - 1

    def row(distance: int) -> int:
        size = min(abs(distance), last)
        if size > middle:
            size = math.ceil(math.log(size / middle) / math.log(last / middle) * (middle - 1)) + middle
        return num_buckets + (size if distance > 0 else -size)

    return tuple(row(distance) for distance in distances)


def relative_positions(*, num_buckets: int, max_distance: int, device: torch.device) -> RelativePositions:
    """Rows of the relative table for queries and keys that are both counted from 0."""
    # Tensors made during an export are symbols of that program: they must not enter the cache.
    make = _relative_positions.__wrapped__ if torch.compiler.is_exporting() else _relative_positions
    return make(num_buckets, max_distance, device)


@functools.lru_cache(maxsize=32)
def _relative_positions(num_buckets: int, max_distance: int, device: torch.device) -> RelativePositions:
    # A tensor made in inference mode could not be used by the training step that finds it in the cache.
    with torch.inference_mode(False):
        rows = position_row_of_distance(num_buckets, max_distance)
        return RelativePositions(torch.tensor(rows, device=device), known_rows=rows)


def visibility(attention_mask: Tensor) -> AttentionMask:
    """Which token sees which; padding neither sees nor is seen.

    Args:
        attention_mask: 1 for real tokens, [B, S]; or [B, S, S] with row i saying which tokens token i sees.

    Raises:
        ValueError: the mask has neither two nor three dimensions.
    """
    mask = attention_mask.bool()
    if mask.dim() == 2:
        return AttentionMask(key_segments_BS=mask)
    if mask.dim() != 3:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; expected [batch, tokens] or [batch, tokens, tokens]")
    return AttentionMask(pairs_BQS=mask)


def document_positions(document_ids: Tensor) -> Tensor:
    """Absolute position of every token within its document, int64 [B, S]: 0 at each one's first token.

    Args:
        document_ids: int [B, S], tokens of a document next to each other. Padding is counted like a document.
    """
    in_sequence = torch.arange(document_ids.shape[1], device=document_ids.device).expand(document_ids.shape)
    continues = F.pad(document_ids[:, 1:] == document_ids[:, :-1], (1, 0))
    return in_sequence - in_sequence.masked_fill(continues, 0).cummax(dim=1).values


def within_documents(attention_mask: Tensor, document_ids: Tensor | None) -> tuple[AttentionMask, Tensor | None]:
    """Mask and absolute positions for sequences of several documents, which do not see each other.

    Args:
        attention_mask: 1 for real tokens, [B, S]; without ``document_ids`` anything that `visibility` takes.
        document_ids: int [B, S]: 0 for padding, otherwise the document's number. A token is real if both arguments say so.

    Returns:
        The mask, and the positions [B, S]; None without ``document_ids``.

    Raises:
        ValueError: the two are not of one shape, or see `visibility`.
    """
    if document_ids is None:
        return visibility(attention_mask), None
    if document_ids.dim() != 2 or document_ids.shape != attention_mask.shape:
        raise ValueError(
            f"document_ids has shape {tuple(document_ids.shape)} and attention_mask {tuple(attention_mask.shape)}; "
            "expected [batch, tokens] of both: the documents decide which token sees which"
        )
    segments = document_ids.masked_fill(~attention_mask.bool(), 0)
    return AttentionMask(key_segments_BS=segments), document_positions(document_ids)
