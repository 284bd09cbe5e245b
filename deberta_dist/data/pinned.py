"""Packs host tensors into one block of pinned memory, so that a single asynchronous copy moves them to a GPU.

A copy from pageable memory blocks the host even with ``non_blocking=True``, and each copy costs a launch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes; whatever begins at a multiple of it can be seen as any dtype


class PinnedTensors:
    """Copies of tensors, one behind the other in pinned memory.

    Args:
        tensors: on the host, of any shapes and number formats.

    Attributes:
        tensors: the copies, like the originals.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._likes = [(tensor.dtype, tensor.shape) for tensor in tensors]
        sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
        self._sizes = sizes
        # One pinned block and one copy for all tensors: each of them costs a fixed time, however small it is.
        self._whole = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
        self.tensors = self._views(self._whole)
        for copy, tensor in zip(self.tensors, tensors, strict=True):
            copy.copy_(tensor)

    def to(self, device: torch.device) -> list[Tensor]:
        """The same tensors on a device; the host does not wait for them."""
        return self._views(self._whole.to(device, non_blocking=True))

    def _views(self, whole: Tensor) -> list[Tensor]:
        pairs = zip(whole.split(self._sizes), self._likes, strict=True)
        return [flat[: shape.numel() * dtype.itemsize].view(dtype).view(shape) for flat, (dtype, shape) in pairs]


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of the host on a device, by one copy that the host does not wait for."""
    return list(tensors) if device.type == "cpu" else PinnedTensors(tensors).to(device)
