"""The head of a masked language model, under the published names.

Letters: T targets, D hidden, W width of the embeddings, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.fused_qkv import Linear, linear
from deberta_dist.models.layers import ACTIVATIONS


class MaskedLMHead(nn.Module):
    """LayerNorm(act(dense(x))) E^T + bias, E the word embeddings."""

    def __init__(self, config: DebertaConfig) -> None:
        super().__init__()
        width = config.embedding_width
        self.dense = Linear(config.hidden_size, width)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(width, config.layer_norm_eps)
        self.enter = nn.Identity()
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_TD: Tensor, *, word_embeddings_VW: Tensor) -> Tensor:
        """Logits [T, V]."""
        return F.linear(self.transform(hidden_TD), word_embeddings_VW, self.bias)

    def transform(self, hidden_TD: Tensor) -> Tensor:
        """LayerNorm(act(dense(x))), the factor of the word embeddings, [T, W]."""
        return self.enter(self.LayerNorm(self.activation(linear(hidden_TD, self.dense))))


class MaskedLMPredictions(nn.Module):
    """Holds the head under its published name, ``lm_predictions.lm_head``."""

    def __init__(self, config: DebertaConfig) -> None:
        super().__init__()
        self.lm_head = MaskedLMHead(config)
