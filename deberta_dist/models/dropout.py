"""Dropout whose mask is a function of a key, so that nothing has to save a random state.

A mask depends on (key, site, shard) alone: recomputed activations, a resumed run and another cut of the
layers see the same masks. Callers pass the key down; every level derives its children's with `mix_key`.

Its numbers are drawn from a generator on a CPU, and are functions of row and column on a GPU (`kernels.rows`), where a
kernel makes them as it needs them. So the two kinds of device drop other elements.
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
    """`mix_key`, passing on the absence of a key."""
    return None if key is None else mix_key(key, *numbers)


class Dropout(nn.Module):
    """Inverted dropout: y = x * keep / (1 - p).

    Args:
        p: probability of dropping, in [0, 1).
        site: tells the dropouts apart that share a key.

    Attributes:
        shard: 0, or the part of the activation that this process holds where each part has a mask of its own.
        sequence_shard: (number, count) of the part that this process holds of an activation [B, S, ...] whose sequence
            is split; the mask is the part's of the whole activation's.
    """

    def __init__(self, p: float, *, site: int) -> None:
        super().__init__()
        self.p = p
        self.site = site
        self.shard = 0
        self.sequence_shard = (0, 1)

    @property
    def drops(self) -> bool:
        """Whether anything is dropped: in training mode alone."""
        return self.training and self.p > 0.0

    @property
    def limit(self) -> int:
        """What the 16-bit number of a dropped element is below."""
        return min(round(self.p * 65536), 65535) - 32768

    @property
    def scale(self) -> float:
        """1 / (1 - p) for the rate that 16 bits can express: of p itself the expectation would be off by up to 1e-5."""
        return 65536 / (32768 - self.limit)

    def forward(self, x: Tensor, key: int | None, *, width: int | None = None) -> Tensor:
        """Drops in training mode.

        Args:
            x: any shape; where the sequence is split or padded, [B, T, D].
            key: None draws from torch's global generator.
            width: rows of a sample that count, where some of T behind them are padding.
        """
        if not self.drops:
            return x
        if key is None:
            return F.dropout(x, self.p)
        if x.device.type == "cuda":
            return row_dropout(x, p=self.p, seed=self.seed(key), numbers=self.row_numbers(x, width))
        return (x * self.scale).masked_fill_(self.numbers(x, key, width=width) < self.limit, 0.0)

    plain_forward = forward

    def row_numbers(self, x: Tensor, width: int | None = None) -> RowNumbers:
        """What the rows of ``x``, flattened, are in the whole activation without padding."""
        shard, shards = self.sequence_shard
        if shards > 1:
            return RowNumbers(x.shape[1], shards * x.shape[1], shard * x.shape[1])
        return RowNumbers() if width is None or width == x.shape[1] else RowNumbers(x.shape[1], width, 0)

    def numbers(self, x: Tensor, key: int, *, width: int | None = None) -> Tensor:
        """A number of 16 bits for every element, drawn, int16 [as ``x``]."""
        (shard, shards), counted = self.sequence_shard, None
        if shards > 1:
            # Drawn for the whole activation, as every rank does where nothing is split: a generator cannot be entered in
            # its middle.
            counted = x.shape[1] * shards
        elif width is not None and width != x.shape[1]:
            counted = width
        count = x.numel() if counted is None else x.numel() // x.shape[1] * counted
        # Four per word: Bernoulli draws cost more than the product whose result they mask.
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
        """64 bits that decide this dropout's mask; ``key`` None draws them from torch's global generator.

        Raises:
            ValueError: a program is exported, whose masks would be the same in every call.
        """
        if torch.compiler.is_exporting():
            raise ValueError("a program with dropout cannot be exported: call model.eval() first")
        if key is None:
            return int(torch.randint(2**63 - 1, ()))
        return mix_key(key, self.site, self.shard)

    def extra_repr(self) -> str:
        return f"p={self.p}, site={self.site}, shard={self.shard}, sequence_shard={self.sequence_shard}"
