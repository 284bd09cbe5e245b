"""Truncates encoded text without losing the tokens that a label depends on.

Letters: F tokens of a first segment, S of a sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deberta_dist.data.tokenizer import Tokenizer

NOT_CUT, CONTEXT_CUT, KEPT_CUT = "not cut", "context cut", "kept part cut"


@dataclass(frozen=True)
class TextPart:
    """Some text of a segment.

    Attributes:
        text: Its words; parts are joined by spaces.
        is_kept: Whether the label depends on just these words.
    """

    text: str
    is_kept: bool = False


def encode_spans(tokenizer: Tokenizer, parts: Sequence[TextPart], *, limit: int) -> tuple[np.ndarray, str]:
    """Ids of a segment of at most ``limit`` tokens.

    Where it is longer, the tokens nearest to a kept part stay, in their order; without a kept part the first ones do.

    Returns:
        (ids, int32; what that took: ``NOT_CUT``, ``CONTEXT_CUT`` or ``KEPT_CUT``).
    """
    encoded = [tokenizer.encode(part.text) for part in parts]
    ids = np.array([i for text_ids in encoded for i in text_ids], dtype=np.int32)
    if len(ids) <= limit:
        return ids, NOT_CUT
    is_kept = np.repeat([part.is_kept for part in parts], [len(text_ids) for text_ids in encoded])
    return ids[_nearest(is_kept, limit=limit)], KEPT_CUT if is_kept.sum() > limit else CONTEXT_CUT


def _nearest(is_kept: np.ndarray, *, limit: int) -> np.ndarray:
    """Positions of the ``limit`` tokens nearest to a kept one, ascending."""
    positions = np.arange(len(is_kept))
    kept = positions[is_kept]
    if not len(kept):
        return positions[:limit]
    after = np.searchsorted(kept, positions).clip(max=len(kept) - 1)
    before = (after - 1).clip(min=0)
    distance = np.minimum(abs(kept[after] - positions), abs(kept[before] - positions))
    return np.sort(np.argsort(distance, kind="stable")[:limit])


def window_starts(length: int, *, room: int, overlap: int, most: int) -> np.ndarray:
    """Where the windows over a first segment begin.

    Neighbours share at least ``overlap`` tokens and every window is full; where more than ``most`` would be needed,
    so many are spread evenly and may leave gaps.

    Args:
        length: Tokens of the whole segment.
        room: Tokens of a window, more than ``overlap``.
        overlap: Tokens that neighbouring windows share; less than a window has.
        most: Windows at most, from 1.
    """
    if length <= room:
        return np.zeros(1, dtype=np.int64)
    needed = 1 + -(-(length - room) // (room - overlap))
    return np.linspace(0, length - room, num=min(needed, most)).astype(np.int64)


def sequences(
    tokenizer: Tokenizer, first: np.ndarray, second: np.ndarray, *, max_seq_length: int, overlap: int, max_windows: int
) -> list[np.ndarray]:
    """``[CLS] window of first [SEP] second [SEP]`` for every window; without a second segment ``[CLS] window [SEP]``.

    Returns:
        int32 ids of at most ``max_seq_length`` tokens each.
    """
    cls, sep = [tokenizer.cls_id], [tokenizer.sep_id]
    tail = np.concatenate([sep, second, sep] if len(second) else [sep]).astype(np.int32)
    room = max_seq_length - 1 - len(tail)
    starts = window_starts(len(first), room=room, overlap=overlap, most=max_windows)
    return [np.concatenate([cls, first[start : start + room], tail]).astype(np.int32) for start in starts]
