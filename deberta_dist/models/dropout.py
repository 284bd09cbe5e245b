"""Dropout whose mask is a function of a key, so that no random state has to be saved.

A mask depends on (key, site, shard) only: recomputed activations, a resumed run and any division into stages get the same
masks. Callers pass the key down; every level derives its children's with `mix_key`.

On a CPU the mask's numbers are drawn from a generator seeded by the key. On a GPU they are a function of row and column
(`kernels.rows`), computed within the kernel that uses them. So a CPU and a GPU drop different elements.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deberta_dist.kernels.dropout import mix_key
from deberta_dist.kernels.rows import RowNumbers, row_dropout

ATTENTION_SITE, POSITION_SITE, ATTENTION_OUTPUT_SITE, LAYER_OUTPUT_SITE = 0, 1, 2, 3
CONVOLUTION_SITE, EMBEDDING_SITE, POOLER_SITE, CLASSIFIER_SITE = 4, 5, 6, 7


def child_key(key: int | None, *numbers: int) -> int | None:
    """`mix_key`, or None without a key."""
    return None if key is None else mix_key(key, *numbers)


class Dropout(nn.Module):
    """Inverted dropout: y = x * keep / (1 - p).

    Args:
        p: probability of dropping, in [0, 1).
        site: distinguishes dropouts that get the same key.

    Attributes:
        shard: Mixed into the key where each tensor rank holds its own heads and needs a mask of its own; otherwise 0.
        sequence_shard: (number, count) of this rank's shard of an activation [B, S, ...] that is divided along the sequence.
            The mask is that shard of the whole activation's mask.
    """

    def __init__(self, p: float, *, site: int) -> None:
        super().__init__()
        self.p = p
        self.site = site
        self.shard = 0
        self.sequence_shard = (0, 1)

    @property
    def drops(self) -> bool:
        """Whether anything is dropped: only in training mode."""
        return self.training and self.p > 0.0

    @property
    def limit(self) -> int:
        """An element is dropped if its 16-bit number is below this."""
        return min(round(self.p * 65536), 65535) - 32768

    @property
    def scale(self) -> float:
        """1 / (1 - p) of p rounded to 16 bits, as `limit` has it. With p itself the expectation would be off by up to 1e-5."""
        return 65536 / (32768 - self.limit)

    def forward(self, x: Tensor, key: int | None, *, width: int | None = None) -> Tensor:
        """Drops in training mode.

        Args:
            x: any shape; [B, T, D] if the sequence is divided or padded.
            key: of this dropout's call; None draws from torch's global generator.
            width: number of real rows of each sample, if the last of T are padding.
        """
        if not self.drops:
            return x
        if key is None:
            return F.dropout(x, self.p)
        if x.device.type == "cuda":
            return row_dropout(x, p=self.p, seed=self.seed(key), numbers=self.row_numbers(x, width))
        # In place on the product, which nobody else has.
        return (x * self.scale).masked_fill_(self.numbers(x, key, width=width) < self.limit, 0.0)

    plain_forward = forward

    def row_numbers(self, x: Tensor, width: int | None = None) -> RowNumbers:
        """Numbers of the rows of ``x``, flattened, in the whole activation without padding."""
        shard, shards = self.sequence_shard
        if shards > 1:
            return RowNumbers(x.shape[1], shards * x.shape[1], shard * x.shape[1])
        return RowNumbers() if width is None or width == x.shape[1] else RowNumbers(x.shape[1], width, 0)

    def numbers(self, x: Tensor, key: int, *, width: int | None = None) -> Tensor:
        """A random 16-bit number for every element, int16, of the shape of ``x``."""
        (shard, shards), counted = self.sequence_shard, None
        if shards > 1:
            # Drawn for the whole sequence on every rank: a generator cannot start in the middle of its numbers.
            counted = x.shape[1] * shards
        elif width is not None and width != x.shape[1]:
            counted = width
        count = x.numel() if counted is None else x.numel() // x.shape[1] * counted
        # Four numbers per 64-bit word: torch's Bernoulli draws cost more than the product whose result they mask.
        words = self.draw_words(math.ceil(count / 4), key, device=x.device)
        numbers = words.view(torch.int16)[:count]
        if counted is None:
            return numbers.view(x.shape)
        numbers = numbers.view(x.shape[0], counted, *x.shape[2:])
        if shards > 1:
            return numbers.narrow(1, shard * x.shape[1], x.shape[1])
        return F.pad(numbers, (0, 0, 0, x.shape[1] - counted))

    def draw_words(self, count: int, key: int, *, device: torch.device) -> Tensor:
        """``count`` words of 64 random bits, int64."""
        generator = torch.Generator(device).manual_seed(self.seed(key))
        return torch.empty(count, dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)

    def seed(self, key: int | None) -> int:
        """64 bits that decide this dropout's mask; without a key, drawn from torch's global generator.

        Raises:
            ValueError: a program is being exported, whose masks would be the same in every call.
        """
        if torch.compiler.is_exporting():
            raise ValueError("a program with dropout cannot be exported: call model.eval() first")
        if key is None:
            return int(torch.randint(2**63 - 1, ()))
        return mix_key(key, self.site, self.shard)

    def extra_repr(self) -> str:
        return f"p={self.p}, site={self.site}, shard={self.shard}, sequence_shard={self.sequence_shard}"
