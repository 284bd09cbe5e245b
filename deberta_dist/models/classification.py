"""Models with a small head on the last hidden states: sequence classification and replaced-token detection."""

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deberta_dist.errors import ConfigError
from deberta_dist.models import dropout as sites
from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.dropout import Dropout, child_key
from deberta_dist.models.encoder import ModelWithBackbone
from deberta_dist.models.fused_qkv import Linear, linear
from deberta_dist.models.initialisation import initialise_
from deberta_dist.models.layers import ACTIVATIONS
from deberta_dist.models.positions import visibility
from deberta_dist.models.targets import classification_loss, require_token_labels


class Pooler(nn.Module):
    """act(dense(dropout(first token)))."""

    def __init__(self, config: DebertaConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.dropout = Dropout(config.pooler_dropout, site=sites.POOLER_SITE)
        self.activation = ACTIVATIONS[config.pooler_hidden_act]

    def forward(self, hidden_BSD: Tensor, *, dropout_key: int | None) -> Tensor:
        return self.activation(linear(self.dropout(hidden_BSD[:, 0], dropout_key), self.dense))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassificationOutput:
    """What a model with a small head returns.

    Attributes:
        loss: mean over labelled samples or tokens, float32 (float64 if the logits are); None without labels.
        logits: [B, num_labels]; from the detector, [B, S].
        hidden_BD: pooled state [B, D]; None from the detector.
    """

    loss: Tensor | None
    logits: Tensor
    hidden_BD: Tensor | None = None


torch.export.register_dataclass(ClassificationOutput)


class LabelledModel(ModelWithBackbone):
    """A backbone with a head and a loss; subclasses define `head` and `loss`."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        token_type_ids: Tensor | None = None,
        dropout_key: int | None = None,
    ) -> ClassificationOutput:
        """Logits, and with labels the loss.

        Args:
            input_ids: int64 [B, S].
            attention_mask: see `DebertaModel.forward`.
            labels: shape and dtype depend on the head, see `loss`.
            token_type_ids: see `DebertaModel.forward`.
            dropout_key: see `DebertaModel.forward`.

        Raises:
            ValueError: labels of another shape or kind of number.
        """
        hidden_BSD = self.encode(input_ids, attention_mask, token_type_ids, dropout_key=dropout_key)
        head_key = child_key(dropout_key, self.config.num_hidden_layers + 1)
        logits, pooled_BD = self.head(hidden_BSD, dropout_key=head_key)
        loss = None if labels is None else self.loss(logits, labels)
        return ClassificationOutput(loss=loss, logits=logits, hidden_BD=pooled_BD)

    def encode(self, ids: Tensor, mask: Tensor | None, types: Tensor | None, *, dropout_key: int | None) -> Tensor:
        """Last hidden states [B, S, D]."""
        return self.deberta(ids, mask, token_type_ids=types, dropout_key=dropout_key).last_hidden_state

    def head(self, hidden_BSD: Tensor, *, dropout_key: int | None) -> tuple[Tensor, Tensor | None]:
        """Logits, and the pooled state [B, D], or None without a pooler."""
        raise NotImplementedError

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean loss over labelled samples or tokens.

        Raises:
            ValueError: labels of another shape or kind of number.
        """
        raise NotImplementedError


class DebertaForSequenceClassification(LabelledModel):
    """Classifier, or regressor with one label, on the first token.

    Args:
        config: sizes and switches of encoder and pooler; ``problem_type`` chooses the loss.
        num_labels: classes; 1 means regression.
        seed: decides the initial parameters (see `initialisation`); without effect on the meta device.

    Raises:
        ConfigError: ``config.problem_type`` is "single_label_classification" with one label.
    """

    def __init__(self, config: DebertaConfig, *, num_labels: int = 2, seed: int = 0) -> None:
        super().__init__(config)
        if config.problem_type == "single_label_classification" and num_labels == 1:
            raise ConfigError(
                'model configuration: problem_type = "single_label_classification" needs at least 2 labels, 1 given; '
                'one number is "regression"'
            )
        self.pooler = Pooler(config)
        rate = config.hidden_dropout_prob if config.cls_drop_out is None else config.cls_drop_out
        self.dropout = Dropout(rate, site=sites.CLASSIFIER_SITE)
        self.classifier = Linear(config.hidden_size, num_labels)
        initialise_(self, seed=seed, std=config.initializer_range)

    def head(self, hidden_BSD: Tensor, *, dropout_key: int | None) -> tuple[Tensor, Tensor]:
        """Logits [B, num_labels] of the pooled first token."""
        pooled_BD = self.pooler(hidden_BSD, dropout_key=dropout_key)
        return linear(self.dropout(pooled_BD, dropout_key), self.classifier), pooled_BD

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of ``config.problem_type``; see `classification_loss`."""
        return classification_loss(logits, labels, problem_type=self.config.problem_type)


class ReplacedTokenHead(nn.Module):
    """classifier(act(dense(LayerNorm(h + h_first)))): one logit per token."""

    def __init__(self, config: DebertaConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.classifier = Linear(config.hidden_size, 1)

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        x = self.LayerNorm(hidden_BSD + hidden_BSD[:, :1])
        return linear(self.activation(linear(x, self.dense)), self.classifier).squeeze(-1)


class DebertaForReplacedTokenDetection(ModelWithBackbone):
    """The discriminator of v3: which tokens did the generator replace?

    Args:
        config: sizes and switches of the discriminator's encoder.
        seed: decides the initial parameters (see `initialisation`); without effect on the meta device.

    Source: microsoft/DeBERTa DeBERTa/apps/models/replaced_token_detection_model.py@4d7fe0bd.
    """

    def __init__(self, config: DebertaConfig, *, seed: int = 0) -> None:
        super().__init__(config)
        self.mask_predictions = ReplacedTokenHead(config)
        initialise_(self, seed=seed, std=config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        dropout_key: int | None = None,
    ) -> ClassificationOutput:
        """Logits per token [B, S], positive for replaced; with labels the mean loss over real tokens.

        Args:
            input_ids: int64 [B, S], with the generator's tokens in place.
            attention_mask: see `DebertaModel.forward`.
            labels: original tokens where one was masked, 0 elsewhere; a token that the generator got right counts as
                original.
            dropout_key: see `DebertaModel.forward`.
        """
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        backbone = self.deberta(input_ids, attention_mask, dropout_key=dropout_key)
        logits = self.mask_predictions(backbone.last_hidden_state)
        if labels is None:
            return ClassificationOutput(loss=None, logits=logits)
        require_token_labels(labels, shape=input_ids.shape, vocab_size=self.config.vocab_size)
        is_replaced = (labels > 0) & (labels != input_ids)
        is_token = visibility(attention_mask).seen()
        loss = F.binary_cross_entropy_with_logits(logits[is_token].float(), is_replaced[is_token].float())
        return ClassificationOutput(loss=loss, logits=logits)
