"""Where the targets of a batch are, in the forms that the decoder and the head take.

All of it follows from the labels, but the shapes depend on their values: on a GPU the host would have to wait for them. So the
targets are found on the host, where the labels come from, and sent with the batch.

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
    """Targets of a batch in row-major order, padded by repeating the first.

    Attributes:
        ids_P: int64, what is to be predicted; ``NOT_A_TARGET`` in the padding.
        tokens_P: int64, index of each target into the flattened tokens of the batch, [B * S].
        positions_BT: int64, positions of each sample's targets, then of other tokens of it as padding.
        slots_P: int64, index of each target into the flattened ``positions_BT``.
        num_targets: number of targets without padding, at most P.
        width: most targets of a sample, at least 1 and at most T.
    """

    ids_P: Tensor
    tokens_P: Tensor
    positions_BT: Tensor
    slots_P: Tensor
    num_targets: int
    width: int

    @property
    def is_padded(self) -> bool:
        """Whether P is more than the number of targets."""
        return self.num_targets < len(self.ids_P)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The tensors that have to be on the model's device."""
        return self.ids_P, self.tokens_P, self.positions_BT, self.slots_P

    def to(self, device: torch.device) -> "Targets":
        """A copy on ``device``."""
        return self.made_of([tensor.to(device) for tensor in self.tensors()])

    def made_of(self, tensors: Sequence[Tensor]) -> "Targets":
        """The same numbers with other tensors, in the order of `tensors`."""
        ids, tokens, positions, slots = tensors
        return dataclasses.replace(self, ids_P=ids, tokens_P=tokens, positions_BT=positions, slots_P=slots)


def find_targets(is_target_BS: Tensor, labels_BS: Tensor | None = None, *, size: tuple[int, int] | None = None) -> Targets:
    """Finds the targets of a batch. It waits for the device of ``is_target_BS``, so give it tensors on the host.

    Args:
        is_target_BS: whether each token is to be predicted, bool.
        labels_BS: ids to predict, int64; None if not known: ``ids_P`` is then ``NOT_A_TARGET`` throughout.
        size: (T, P) to pad to; None for no padding.

    Raises:
        ValueError: ``size`` is too small for the targets, T is more than S, or the labels are not whole numbers [B, S].
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
    # A stable sort puts the targets first and keeps their order.
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
