"""Ways from hidden states to the loss of the targets, with the same weights: what `head` measures."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.cross_entropy import CrossEntropy
from deberta_dist.models.masked_lm_head import MaskedLMHead
from deberta_dist.models.presets import preset

IGNORED = -100


class HeadContestant:
    """One batch of hidden states, a head and a word table.

    Args:
        hidden_size: Width of hidden states and embeddings.
        vocab_size: V, rows of the word table.
        shape: (B, S), sequences and tokens.
        device: Where all contestants run.
        dtype: That of weights and hidden states.

    Attributes:
        num_targets: Number of tokens to predict, about 15% of all.
    """

    def __init__(
        self, *, hidden_size: int, vocab_size: int, shape: tuple[int, int], device: torch.device, dtype: torch.dtype
    ) -> None:
        config: DebertaConfig = preset("v3-base", hidden_size=hidden_size, vocab_size=vocab_size)
        generator = torch.Generator().manual_seed(1)
        labels = torch.randint(1, vocab_size, shape, generator=generator)
        is_target = torch.rand(shape, generator=generator) < 0.15
        is_target[:, 0] = True
        hidden = torch.randn(*shape, hidden_size, generator=generator)
        words = torch.randn(vocab_size, hidden_size, generator=generator) * config.initializer_range
        self._hidden = hidden.to(device, dtype).requires_grad_()
        self._words = words.to(device, dtype).requires_grad_()
        self._head = MaskedLMHead(config).to(device, dtype)
        self._cross_entropy = CrossEntropy()
        self._labels, self._is_target = torch.where(is_target, labels, IGNORED).to(device), is_target.to(device)
        self.num_targets = int(is_target.sum())

    def ours(self, *, num_chunks: int) -> Tensor:
        """As the model is trained."""
        losses, _ = self._cross_entropy.of_product(
            self._head.transform(self._of_targets()),
            self._words,
            self._head.bias,
            self._labels[self._is_target],
            num_chunks=num_chunks,
        )
        return losses.mean()

    def of_targets(self) -> Tensor:
        """The published way: logits of the targets, torch's cross entropy in float32."""
        logits = self._head(self._of_targets(), word_embeddings_VW=self._words)
        return F.cross_entropy(logits.float(), self._labels[self._is_target])

    def fused_by_torch(self) -> Tensor:
        """The same by torch's product and cross entropy in one."""
        transformed = self._head.transform(self._of_targets())
        labels = self._labels[self._is_target]
        return F.linear_cross_entropy(transformed, self._words, labels, linear_bias=self._head.bias)

    def of_all_tokens(self) -> Tensor:
        """Logits of every token, of which the loss ignores most."""
        logits = self._head(self._hidden, word_embeddings_VW=self._words)
        return F.cross_entropy(logits.flatten(0, 1).float(), self._labels.flatten(), ignore_index=IGNORED)

    def values(self, loss_of: Callable[[], Tensor]) -> list[Tensor]:
        """Loss and all gradients."""
        self.forget()
        loss = loss_of()
        loss.backward()
        return [loss.detach(), *(leaf.grad.clone() for leaf in self._leaves())]

    def forget(self) -> None:
        """Drops all gradients."""
        for leaf in self._leaves():
            leaf.grad = None

    def _leaves(self) -> list[Tensor]:
        return [self._hidden, self._words, *self._head.parameters()]

    def _of_targets(self) -> Tensor:
        return self._hidden[self._is_target]
