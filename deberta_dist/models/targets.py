"""Where the targets of a batch are, in the forms that the decoder and the head take.

All of it follows from the labels. Whoever has them on the host finds the targets there and sends the result along with
the batch: on a GPU the model would have to wait for its own numbers of targets.

Letters: B batch, S sequence, T targets of a sample (padded), P targets of the batch (padded).
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from deberta_dist.models.labels import WHOLE, require_tensor

NOT_A_TARGET = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Targets:
    """Targets of a batch, in row-major order, and unused places behind them that repeat the first.

    Attributes:
        ids_P: int64, what is to be predicted; ``NOT_A_TARGET`` in unused places.
        tokens_P: int64, place of each among the tokens of the batch, [B * S].
        positions_BT: int64, positions of the targets of each sample, then of others of its tokens.
        slots_P: int64, where each lies in the flattened ``positions_BT``.
        num_targets: how many there are; P or less.
        width: targets of the sample that has most, at least 1; T or less.
    """

    ids_P: Tensor
    tokens_P: Tensor
    positions_BT: Tensor
    slots_P: Tensor
    num_targets: int
    width: int

    @property
    def is_padded(self) -> bool:
        """Whether there are unused places."""
        return self.num_targets < len(self.ids_P)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What has to be where the model is."""
        return self.ids_P, self.tokens_P, self.positions_BT, self.slots_P

    def to(self, device: torch.device) -> "Targets":
        """The same on a device."""
        return self.made_of([tensor.to(device) for tensor in self.tensors()])

    def made_of(self, tensors: Sequence[Tensor]) -> "Targets":
        """The same numbers with other tensors, in the order of `tensors`."""
        ids, tokens, positions, slots = tensors
        return dataclasses.replace(self, ids_P=ids, tokens_P=tokens, positions_BT=positions, slots_P=slots)


def find_targets(is_target_BS: Tensor, labels_BS: Tensor | None = None, *, size: tuple[int, int] | None = None) -> Targets:
    """Targets as they lie in a batch. Waits for the device of ``is_target_BS``: give it tensors of the host.

    Args:
        is_target_BS: bool.
        labels_BS: their ids, int64; absent: none are known, and ``ids_P`` is ``NOT_A_TARGET`` throughout.
        size: (T, P) of the result; absent: as few as there are.

    Raises:
        ValueError: there are more targets than ``size`` has room for, T is more than S, or the labels are not whole numbers
            for every token.
    """
    if labels_BS is not None:
        require_tensor(labels_BS, name="labels", shapes=[is_target_BS.shape], kinds=[WHOLE], user="one for every token")
    counts = is_target_BS.sum(dim=1)
    num_targets, width = int(counts.sum()), max(int(counts.max()), 1)
    padded_width, padded_number = (width, num_targets) if size is None else size
    if padded_width < width or padded_number < num_targets or padded_width > is_target_BS.shape[1]:
        raise ValueError(
            f"{num_targets} targets, {width} of one sample of {is_target_BS.shape[1]} tokens, do not fit in {size}"
        )
    # Stable sort: targets first, in their order.
    positions = torch.argsort(is_target_BS.to(torch.int8), dim=1, descending=True, stable=True)[:, :padded_width].contiguous()
    is_used = torch.arange(padded_width, device=counts.device)[None, :] < counts[:, None]
    slots = is_used.flatten().nonzero().squeeze(1)
    tokens = is_target_BS.flatten().nonzero().squeeze(1)
    ids = torch.zeros_like(tokens) if labels_BS is None else labels_BS.flatten()[tokens].long()
    unused = padded_number - num_targets
    if unused > 0:
        first = (slots[:1], tokens[:1]) if num_targets else (slots.new_zeros(1), tokens.new_zeros(1))
        slots, tokens = (torch.cat([x, y.expand(unused)]) for x, y in zip((slots, tokens), first, strict=True))
        ids = torch.cat([ids, ids.new_full((unused,), NOT_A_TARGET)])
    return Targets(ids_P=ids, tokens_P=tokens, positions_BT=positions, slots_P=slots, num_targets=num_targets, width=width)
