"""Chooses the rows of each training step, divides them into micro-batches, and collates them into tensors.

A step's decisions are cut into micro-batches first and these dealt to the data-parallel ranks: order, micro-batches and
so dropout are the same however many ranks there are, and no number has to divide another.

Letters: N sequences, S tokens, D decisions, C labels or choices.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deberta_dist.data.pinned import PinnedTensors, to_device
from deberta_dist.data.sampler import Permutation
from deberta_dist.kernels.dropout import mix_key
from deberta_dist.tasks.base import Features, Head
from deberta_dist.tasks.encoding import Example

LENGTH_MULTIPLE = 8
"""Sequences are padded to it: tensor cores like it."""
_NO_CHOICE = -1e9  # a logit whose probability is exactly 0, and finite


@dataclass(frozen=True)
class TaskBatch:
    """Decisions of one micro-batch.

    Attributes:
        input_ids: int64 [N, S].
        attention_mask: int64 [N, S].
        token_type_ids: int64 [N, S]: 1 in a second segment.
        slots: int64 [N]: which number of [D, C] a sequence scores (choices), or which decision (classes).
        is_choice: bool [D, C]: false where a decision has fewer choices than another.
        gold: bool [D, C].
        has_choices: Whether a sequence scores one choice instead of all classes.
        pinned: Where all of them lie, for a GPU.
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor
    slots: Tensor
    is_choice: Tensor
    gold: Tensor
    has_choices: bool
    pinned: PinnedTensors | None = None

    def ahead_of(self, device: torch.device) -> "TaskBatch":
        """The same, ready to be copied to a device at once; called ahead of the step, in another thread."""
        if device.type == "cpu":
            return self
        pinned = PinnedTensors(self._tensors())
        return self._made_of(pinned.tensors, pinned)

    def to(self, device: torch.device) -> "TaskBatch":
        """The same on a device, by one copy; does not wait for it."""
        if device.type == "cpu":
            return self
        tensors = to_device(self._tensors(), device) if self.pinned is None else self.pinned.to(device)
        return self._made_of(tensors)

    def _made_of(self, tensors: Sequence[Tensor], pinned: PinnedTensors | None = None) -> "TaskBatch":
        ids, mask, types, slots, is_choice, gold = tensors
        return TaskBatch(ids, mask, types, slots, is_choice, gold, self.has_choices, pinned)

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.input_ids, self.attention_mask, self.token_type_ids, self.slots, self.is_choice, self.gold

    def decision_logits(self, logits: Tensor) -> Tensor:
        """Logits of sequences [N, outputs] -> float32 of decisions [D, C], the mean over windows."""
        decisions, width = self.is_choice.shape
        slots = decisions * width if self.has_choices else decisions
        # Not bincount, which waits for the device to know how many there are.
        counts = torch.zeros(slots, device=logits.device).index_add(0, self.slots, torch.ones_like(self.slots).float())
        counts = counts.clamp(min=1)
        sums = torch.zeros(slots, logits.shape[-1], device=logits.device).index_add(0, self.slots, logits.float())
        return (sums / counts[:, None]).view(decisions, width).masked_fill(~self.is_choice, _NO_CHOICE)


def pad(sequences: Sequence[np.ndarray], *, pad_id: int, sep_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences side by side: input_ids, attention_mask and token_type_ids, int64 [N, S] each."""
    longest = max(len(sequence) for sequence in sequences)
    length = -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    ids = np.full((len(sequences), length), pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    separators = (ids == sep_id).cumsum(axis=1) - (ids == sep_id)
    return torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(separators.clip(max=1) * mask)


def collate(features: Features, picks: Sequence[tuple[Example, Sequence[int]]], *, pad_id: int, sep_id: int) -> TaskBatch:
    """Decisions as tensors.

    Args:
        features: Where they come from.
        picks: Each with the choices to compare; a classification has choice 0 alone.
        pad_id: Id that fills shorter sequences; its positions are masked.
        sep_id: Id after the first segment; token types are 1 behind it.
    """
    choices = features.split.task.head is Head.CHOICE
    # At least two: with a single number SiFT would take a decision for a regression.
    width = max(2, *(len(chosen) for _, chosen in picks)) if choices else len(features.split.task.labels)
    is_choice = np.zeros((len(picks), width), dtype=bool)
    gold = np.zeros_like(is_choice)
    rows: list[np.ndarray] = []
    slots: list[int] = []
    for number, (example, chosen) in enumerate(picks):
        is_choice[number, : len(chosen) if choices else width] = True
        gold[number, [chosen.index(i) for i in example.gold if i in chosen] if choices else list(example.gold)] = True
        for position, choice in enumerate(chosen):
            windows = features.sequences(example, choice)
            rows += windows
            slots += [number * width + position if choices else number] * len(windows)
    ids, mask, types = pad(rows, pad_id=pad_id, sep_id=sep_id)
    return TaskBatch(ids, mask, types, torch.tensor(slots), torch.from_numpy(is_choice), torch.from_numpy(gold), choices)


class TrainingOrder:
    """The decisions of every step.

    Args:
        features: Encoded sequences of the training split.
        epochs: Passes, the last may be a part of one.
        global_batch_size: Decisions per step.
        micro_batch_size: Decisions that one rank's forward pass takes; each may be several sequences.
        max_choices: Choices per decision that training compares.
        seed: Decides order and candidates.
        done: Steps and decisions of a shorter run that is resumed. Its last step may have been a part of one: the next begins
            behind it, so that no row is left out or read twice.
    """

    def __init__(
        self,
        features: Features,
        *,
        epochs: float,
        global_batch_size: int,
        micro_batch_size: int,
        max_choices: int,
        seed: int,
        done: tuple[int, int] = (0, 0),
    ) -> None:
        # A decision whose right answer is none of its choices has nothing to learn from.
        self._examples = [example for example in features.examples if example.gold]
        self._batch, self._micro_batch = global_batch_size, micro_batch_size
        self._max_choices, self._seed = max_choices, seed
        self.num_decisions = max(1, round(epochs * len(self._examples)))
        self._first_step, self._first_decision = done
        self.num_steps = self._first_step + max(0, math.ceil((self.num_decisions - self._first_decision) / global_batch_size))
        self.steps_per_epoch = math.ceil(len(self._examples) / global_batch_size)

    def micro_batches(self, step: int) -> list[list[tuple[Example, Sequence[int]]]]:
        """All micro-batches of a step that is not done yet, each decision with the choices to compare."""
        begin = self._first_decision + (step - self._first_step) * self._batch
        positions = range(begin, min(begin + self._batch, self.num_decisions))
        picks = [self._pick(position) for position in positions]
        return [picks[start : start + self._micro_batch] for start in range(0, len(picks), self._micro_batch)]

    def _pick(self, position: int) -> tuple[Example, Sequence[int]]:
        epoch, index = divmod(position, len(self._examples))
        number = _permutation(len(self._examples), self._seed, epoch)(index)
        example = self._examples[number]
        count = len(example.seconds)
        if count <= self._max_choices:
            return example, range(count)
        draw = np.random.default_rng([self._seed, epoch, number])
        right = int(draw.choice(example.gold))
        wrong = [i for i in range(count) if i not in example.gold]
        others = draw.choice(wrong, min(self._max_choices - 1, len(wrong)), replace=False)
        return example, sorted([right, *map(int, others)])


@functools.lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> Permutation:
    return Permutation(size, seed=seed, epoch=epoch)


def dealt(count: int, *, rank: int, size: int) -> range:
    """Numbers of the micro-batches that a data-parallel rank computes, of ``count``."""
    return range(rank * count // size, (rank + 1) * count // size)


def batch_key(seed: int, step: int, number: int) -> int:
    """Dropout key of a micro-batch: of its number in the step, not of the rank that computes it."""
    return mix_key(seed, step, number) >> 1
