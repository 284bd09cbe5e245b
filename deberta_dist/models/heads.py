"""The heads of fine-tuning by name, one constructor for all: sequence, choice, token, span.

A head is a set of published names beside ``deberta.``; they, the dropouts and the numbers are those of Hugging Face's
classes. Regression and several labels at once are a sequence head with another loss. Conversion and planning build
heads from here.

Letters: B batch, C choices, S sequence, L labels.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from deberta_dist.errors import ConfigError
from deberta_dist.models import dropout as sites
from deberta_dist.models.classification import ClassificationOutput, DebertaForSequenceClassification, ModelWithBackbone
from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.dropout import Dropout, child_key
from deberta_dist.models.fused_qkv import Linear, linear
from deberta_dist.models.initialisation import initialise_
from deberta_dist.models.labels import known_cross_entropy


class DebertaForTokenClassification(ModelWithBackbone):
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

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        token_type_ids: Tensor | None = None,
        dropout_key: int | None = None,
    ) -> ClassificationOutput:
        """Logits [B, S, L], and with labels the mean loss over labelled tokens.

        Args:
            input_ids: int64 [B, S].
            attention_mask: see `DebertaModel.forward`.
            labels: int64 [B, S], negative where unknown or padding.
            token_type_ids: see `DebertaModel.forward`.
            dropout_key: see `DebertaModel.forward`.

        Raises:
            ValueError: labels of another shape, or no int64.
        """
        backbone = self.deberta(input_ids, attention_mask, token_type_ids=token_type_ids, dropout_key=dropout_key)
        head_key = child_key(dropout_key, self.config.num_hidden_layers + 1)
        logits = linear(self.dropout(backbone.last_hidden_state, head_key), self.classifier)
        loss = None if labels is None else class_loss(logits, labels, what="labels")
        return ClassificationOutput(loss=loss, logits=logits)


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

    Args:
        config: sizes and switches of encoder and pooler.
        seed: decides the initial parameters (see `initialisation`); without effect on the meta device.

    Source: huggingface/transformers v5.23.0, ``DebertaV2ForMultipleChoice``; v1 has no such class there.
    """

    def __init__(self, config: DebertaConfig, *, seed: int = 0) -> None:
        super().__init__(config, num_labels=1, seed=seed)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        token_type_ids: Tensor | None = None,
        dropout_key: int | None = None,
    ) -> ClassificationOutput:
        """Scores [B, C], and with labels the mean loss.

        Args:
            input_ids: int64 [B, C, S].
            attention_mask: [B, C, S]; absent: all tokens are seen.
            labels: int64 [B], number of the right choice, negative where unknown.
            token_type_ids: [B, C, S].
            dropout_key: see `DebertaModel.forward`.

        Raises:
            ValueError: ``input_ids`` have not three dimensions, or labels another shape, or no int64.
        """
        if input_ids.ndim != 3:
            raise ValueError(f"input_ids are {list(input_ids.shape)}, expected [batch, choices, tokens]")
        flat = [None if value is None else value.flatten(0, 1) for value in (input_ids, attention_mask, token_type_ids)]
        output = super().forward(flat[0], flat[1], token_type_ids=flat[2], dropout_key=dropout_key)
        logits_BC = output.logits.view(input_ids.shape[:2])
        loss = None if labels is None else class_loss(logits_BC, labels, what="labels")
        return ClassificationOutput(loss=loss, logits=logits_BC, hidden_BD=output.hidden_BD)


HEADS: Mapping[str, type[ModelWithBackbone]] = MappingProxyType(
    {
        "sequence": DebertaForSequenceClassification,
        "choice": DebertaForMultipleChoice,
        "token": DebertaForTokenClassification,
        "span": DebertaForQuestionAnswering,
    }
)
LABELLED = ("sequence", "token")
"""Heads with a row for every label; the others have as many rows as they need."""


def model_with_head(config: DebertaConfig, head: str, *, num_labels: int | None = None, seed: int = 0) -> ModelWithBackbone:
    """An encoder with a head of fine-tuning.

    Args:
        config: sizes and switches.
        head: a key of `HEADS`.
        num_labels: rows of a head in `LABELLED`, by default 2; without meaning for the others.
        seed: start of the parameters; without effect on the meta device.

    Raises:
        ConfigError: no such head, or less than one label.
    """
    if head not in HEADS:
        raise ConfigError(f"head {head!r} is none of {', '.join(HEADS)}")
    if head not in LABELLED:
        return HEADS[head](config, seed=seed)
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
