"""Models by the name of their head, one constructor for all: sequence, choice, token, span, and those of pre-training.

A head is a set of published names beside ``deberta.``; of fine-tuning they, the dropouts and the numbers are those of
Hugging Face's classes. Regression and several labels at once are a sequence head with another loss. Conversion and
planning build models from here and name no class.

Letters: B batch, C choices, S sequence, L labels.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from deberta_dist.errors import ConfigError
from deberta_dist.models import dropout as sites
from deberta_dist.models.classification import (
    DebertaForReplacedTokenDetection,
    DebertaForSequenceClassification,
    LabelledModel,
)
from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.dropout import Dropout
from deberta_dist.models.encoder import ModelWithBackbone
from deberta_dist.models.fused_qkv import Linear, linear
from deberta_dist.models.initialisation import initialise_
from deberta_dist.models.masked_lm import DebertaForMaskedLM
from deberta_dist.models.targets import known_cross_entropy
from deberta_dist.values import HeadKind


class DebertaForTokenClassification(LabelledModel):
    """A class for every token: classifier(dropout(h)), no pooler.

    Args:
        config: sizes and switches of the encoder.
        num_labels: L, number of classes and rows of the classifier.
        seed: decides the initial parameters (see `initialisation`); without effect on the meta device.

    Source: huggingface/transformers v5.23.0, the classes of this name.
    """

    def __init__(self, config: DebertaConfig, *, num_labels: int = 2, seed: int = 0) -> None:
        super().__init__(config)
        # The layers' rate: Hugging Face applies ``cls_drop_out`` only to heads with a pooler.
        self.dropout = Dropout(config.hidden_dropout_prob, site=sites.CLASSIFIER_SITE)
        self.classifier = Linear(config.hidden_size, num_labels)
        initialise_(self, seed=seed, std=config.initializer_range)

    def head(self, hidden_BSD: Tensor, *, dropout_key: int | None) -> tuple[Tensor, None]:
        """Logits [B, S, L]."""
        return linear(self.dropout(hidden_BSD, dropout_key), self.classifier), None

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean over labelled tokens; ``labels`` int64 [B, S], negative where unknown or padding."""
        return class_loss(logits, labels, what="labels")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpanOutput:
    """Where an answer begins and ends.

    Attributes:
        loss: mean of the losses of both ends, float32; None without positions.
        start_logits: score of every token as the first of the answer, [B, S].
        end_logits: score of every token as the last of the answer, [B, S].
    """

    loss: Tensor | None
    start_logits: Tensor
    end_logits: Tensor


torch.export.register_dataclass(SpanOutput)


class DebertaForQuestionAnswering(ModelWithBackbone):
    """First and last token of an answer: qa_outputs(h), two numbers for every token; neither pooler nor dropout.

    Args:
        config: sizes and switches of the encoder.
        seed: decides the initial parameters (see `initialisation`); without effect on the meta device.

    Source: huggingface/transformers v5.23.0, the classes of this name.
    """

    def __init__(self, config: DebertaConfig, *, seed: int = 0) -> None:
        super().__init__(config)
        self.qa_outputs = Linear(config.hidden_size, 2)
        initialise_(self, seed=seed, std=config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        *,
        token_type_ids: Tensor | None = None,
        dropout_key: int | None = None,
    ) -> SpanOutput:
        """Logits of both ends for every token, and with positions the loss.

        Args:
            input_ids: int64 [B, S].
            attention_mask: see `DebertaModel.forward`.
            start_positions: first token of the answer, int64 [B]; negative or beyond the sequence if the answer is not in it.
            end_positions: last token of the answer, of the same form.
            token_type_ids: see `DebertaModel.forward`.
            dropout_key: see `DebertaModel.forward`.

        Raises:
            ValueError: one of both positions is missing, of another shape, or no int64.
        """
        if (start_positions is None) != (end_positions is None):
            raise ValueError("start_positions and end_positions belong together: give both or neither")
        backbone = self.deberta(input_ids, attention_mask, token_type_ids=token_type_ids, dropout_key=dropout_key)
        start_BS, end_BS = linear(backbone.last_hidden_state, self.qa_outputs).unbind(-1)
        if start_positions is None or end_positions is None:
            return SpanOutput(loss=None, start_logits=start_BS, end_logits=end_BS)
        losses = [
            class_loss(logits, torch.where(positions < logits.shape[1], positions, -1), what=what)
            for logits, positions, what in (
                (start_BS, start_positions, "start_positions"),
                (end_BS, end_positions, "end_positions"),
            )
        ]
        return SpanOutput(loss=(losses[0] + losses[1]) / 2, start_logits=start_BS, end_logits=end_BS)


class DebertaForMultipleChoice(DebertaForSequenceClassification):
    """Which of several texts: one score for each by a sequence head of one row.

    Inputs are [B, C, S], C choices; logits are scores [B, C].

    Args:
        config: sizes and switches of encoder and pooler.
        seed: decides the initial parameters (see `initialisation`); without effect on the meta device.

    Source: huggingface/transformers v5.23.0, ``DebertaV2ForMultipleChoice``; v1 has no such class there.
    """

    def __init__(self, config: DebertaConfig, *, seed: int = 0) -> None:
        super().__init__(config, num_labels=1, seed=seed)

    def encode(self, ids: Tensor, mask: Tensor | None, types: Tensor | None, *, dropout_key: int | None) -> Tensor:
        """Last hidden states [B, C, S, D].

        Raises:
            ValueError: ``input_ids`` have not three dimensions.
        """
        if ids.ndim != 3:
            raise ValueError(f"input_ids are {list(ids.shape)}, expected [batch, choices, tokens]")
        mask, types = (None if value is None else value.flatten(0, 1) for value in (mask, types))
        encoded = super().encode(ids.flatten(0, 1), mask, types, dropout_key=dropout_key)
        return encoded.unflatten(0, ids.shape[:2])

    def head(self, hidden_BSD: Tensor, *, dropout_key: int | None) -> tuple[Tensor, Tensor]:
        """Scores [B, C] of hidden states [B, C, S, D], and the pooled states [B C, D]."""
        scores, pooled = super().head(hidden_BSD.flatten(0, 1), dropout_key=dropout_key)
        return scores.view(hidden_BSD.shape[:2]), pooled

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean over the samples; ``labels`` int64 [B], number of the right choice, negative where unknown."""
        return class_loss(logits, labels, what="labels")


HEADS: Mapping[str, Callable[..., ModelWithBackbone]] = MappingProxyType(
    {
        "sequence": DebertaForSequenceClassification,
        "choice": DebertaForMultipleChoice,
        "token": DebertaForTokenClassification,
        "span": DebertaForQuestionAnswering,
    }
)
"""Heads of fine-tuning."""
MASKED_LM, REPLACED_TOKENS = "masked language modelling", "replaced token detection"
PRETRAINED_HEADS: Mapping[str, Callable[..., ModelWithBackbone]] = MappingProxyType(
    {MASKED_LM: DebertaForMaskedLM, REPLACED_TOKENS: DebertaForReplacedTokenDetection}
)
"""Heads of pre-training."""
LABELLED: tuple[HeadKind, ...] = ("sequence", "token")
"""Heads with a row for every label; the others have as many rows as they need."""


def model_with_head(config: DebertaConfig, head: str, *, num_labels: int | None = None, seed: int = 0) -> ModelWithBackbone:
    """An encoder with a head.

    Args:
        config: sizes and switches.
        head: a key of `HEADS` or of `PRETRAINED_HEADS`.
        num_labels: rows of a head in `LABELLED`, by default 2; without meaning for the others.
        seed: start of the parameters; without effect on the meta device.

    Raises:
        ConfigError: no such head, less than one label, or a decoder that cannot be built
            (`DebertaConfig.require_masked_lm`).
    """
    known = {**HEADS, **PRETRAINED_HEADS}
    if head not in known:
        raise ConfigError(f"head {head!r} is none of {', '.join(known)}")
    if head not in LABELLED:
        return known[head](config, seed=seed)
    num_labels = 2 if num_labels is None else num_labels
    if num_labels < 1:
        raise ConfigError(f"a {head} head with {num_labels} labels: at least 1 is needed")
    return HEADS[head](config, num_labels=num_labels, seed=seed)


def class_loss(logits: Tensor, labels: Tensor, *, what: str) -> Tensor:
    """Mean cross-entropy in float32 over labels that are not negative; 0 where none is.

    Args:
        logits: unnormalised scores of L classes, [..., L].
        labels: number of the right class, int64 [...]; negative where unknown.
        what: what the labels are called in messages.

    Raises:
        ValueError: labels of another shape, or no int64.
    """
    if labels.shape != logits.shape[:-1] or labels.dtype != torch.int64:
        raise ValueError(
            f"{what} are {str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}, expected int64 "
            f"{list(logits.shape[:-1])}"
        )
    return known_cross_entropy(logits.flatten(0, -2).float(), labels.flatten())
