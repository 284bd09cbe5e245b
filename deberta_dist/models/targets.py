"""Where the targets of a batch are, in the forms that the decoder and the head take.

All of it follows from the labels, but the shapes depend on their values: on a GPU the host would have to wait for them. So the
targets are found on the host, where the labels come from, and sent with the batch.

Labels are checked before a loss is computed from them: a wrong shape would be broadcast, a wrong dtype converted. Values are
checked on a CPU only.

Letters: B batch, C labels of a sample, S sequence, T targets of a sample (padded), P targets of the batch (padded).
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

WHOLE, REAL, BOOL = "whole numbers", "floating point", "bool"


def require_tensor(tensor: Tensor, *, name: str, shapes: Sequence[Sequence[int]], kinds: Sequence[str], user: str) -> None:
    """Refuses a tensor whose shape or kind of number does not fit.

    Args:
        tensor: the labels as the caller got them.
        name: what messages call it.
        shapes: accepted shapes.
        kinds: accepted kinds, of ``WHOLE``, ``REAL`` and ``BOOL``.
        user: what the labels are for, in messages.

    Raises:
        ValueError: its shape or kind is not among these.
    """
    if tuple(tensor.shape) in map(tuple, shapes) and kind_of(tensor) in kinds:
        return
    wanted = " or ".join(str(list(shape)) for shape in shapes)
    raise ValueError(
        f"{name}: shape {list(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')} given; {user} takes shape {wanted} of "
        f"{' or '.join(kinds)}"
    )


def kind_of(tensor: Tensor) -> str:
    """``WHOLE``, ``REAL``, ``BOOL`` or "complex"."""
    if tensor.dtype == torch.bool:
        return BOOL
    if tensor.is_complex():
        return "complex"
    return REAL if tensor.is_floating_point() else WHOLE


def require_token_labels(labels: Tensor, *, shape: torch.Size, vocab_size: int) -> None:
    """Refuses labels that are not token ids, one for every token of ``input_ids``, [B, S] of ``shape``; 0 or less: no target.

    Raises:
        ValueError: their shape or dtype does not fit, or, on a CPU, an id is beyond the vocabulary.
    """
    require_tensor(labels, name="labels", shapes=[shape], kinds=[WHOLE], user="one for every token of input_ids")
    require_below(labels, vocab_size, what="a token of a vocabulary")


def classification_loss(logits_BC: Tensor, labels: Tensor, *, problem_type: str | None) -> Tensor:
    """Mean loss of a classifier or regressor, float32 (float64 if given that), as Hugging Face's DeBERTa classes define it.

    ============================== ============================= ======================================================
    ``problem_type``               labels                        loss
    ============================== ============================= ======================================================
    "single_label_classification"  whole numbers [B] or [B, 1]   cross entropy; negative ones are left out
    "multi_label_classification"   0 to 1, [B, C]                binary cross entropy of every label
    "regression"                   numbers [B, C]; of C = 1 [B]  mean squared difference
    None, C = 1                    as of regression              as of regression
    None                           whole numbers [B] or [B, 1]   as of a single label
    None                           floating point [B, C]         cross entropy with probabilities of classes
    ============================== ============================= ======================================================

    If no label is known the loss is 0, where theirs is NaN.

    Args:
        logits_BC: the classifier's output.
        labels: of one of the forms in the table.
        problem_type: the configuration's field of that name; None leaves it to the labels.

    Raises:
        ValueError: labels whose shape or kind does not fit, or, on a CPU, values out of range.

    Source: huggingface/transformers models/deberta_v2/modeling_deberta_v2.py, 5.23.0.
    """
    batch, classes = logits_BC.shape
    logits_BC = logits_BC if logits_BC.dtype == torch.float64 else logits_BC.float()
    if problem_type is None:
        problem_type = _problem_type(labels, batch=batch, classes=classes)
    if problem_type == "regression":
        shapes = [(batch,), (batch, 1)] if classes == 1 else [(batch, classes)]
        _require(labels, shapes, (REAL, WHOLE), f"regression of {_numbers(classes)}")
        return F.mse_loss(logits_BC, labels.to(logits_BC.dtype).view_as(logits_BC))
    if problem_type == "single_label_classification":
        _require(labels, [(batch,), (batch, 1)], (WHOLE,), f"a classification in one of {classes} classes")
        labels = labels.flatten().long()
        require_below(labels, classes, what="a class of")
        return known_cross_entropy(logits_BC, labels)
    is_soft = problem_type == "probabilities"
    user = f"a classification with {'probabilities' if is_soft else 'any number'} of {classes} classes"
    _require(labels, [(batch, classes)], (REAL,) if is_soft else (REAL, WHOLE, BOOL), user)
    labels = labels.to(logits_BC.dtype)
    if _can_be_looked_at(labels) and not ((labels >= 0) & (labels <= 1)).all():
        raise ValueError(f"labels: values from {labels.min():g} to {labels.max():g} given; {user} takes 0 to 1")
    if is_soft:
        return -(F.log_softmax(logits_BC, -1) * labels).sum(-1).mean()
    return F.binary_cross_entropy_with_logits(logits_BC, labels)


def known_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of ``logits`` [N, C] over the labels, int64 [N], that are not negative; 0 if all are."""
    is_known = labels >= 0
    # Sum over count, not mean: a batch without a label has loss 0, not NaN.
    return F.cross_entropy(logits, labels.where(is_known, -100), reduction="sum") / is_known.sum().clamp(min=1)


def _problem_type(labels: Tensor, *, batch: int, classes: int) -> str:
    if classes == 1:
        return "regression"
    if tuple(labels.shape) != (batch, classes):
        return "single_label_classification"
    if kind_of(labels) != REAL:
        raise ValueError(
            f"labels: shape {list(labels.shape)} of {str(labels.dtype).removeprefix('torch.')} given, and no problem_type: "
            f'a classification in one of {classes} classes takes shape [{batch}], "multi_label_classification" this one; say '
            "which in the configuration's problem_type"
        )
    return "probabilities"


def _require(labels: Tensor, shapes: Sequence[Sequence[int]], kinds: Sequence[str], user: str) -> None:
    require_tensor(labels, name="labels", shapes=shapes, kinds=kinds, user=user)


def require_below(labels: Tensor, limit: int, *, what: str) -> None:
    """Refuses labels that are not below ``limit``, on a CPU; ``what`` names them in the message.

    Raises:
        ValueError: the largest label is not below it.
    """
    if _can_be_looked_at(labels) and labels.numel() and (largest := int(labels.max())) >= limit:
        raise ValueError(f"labels: {largest} is not {what} {limit}, which are counted from 0")


def _can_be_looked_at(labels: Tensor) -> bool:
    return labels.device.type == "cpu" and not torch.compiler.is_compiling()


def _numbers(count: int) -> str:
    return "one number" if count == 1 else f"{count} numbers"


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
        """A copy with other tensors, in the order of `tensors`, and the same two numbers."""
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
