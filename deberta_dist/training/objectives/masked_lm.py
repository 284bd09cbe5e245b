"""Masked language modelling: one network. The only place beside `models` that names its model."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from deberta_dist.config import RunConfig
from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.flops import ForwardFlops, forward_flops
from deberta_dist.models.masked_lm import DebertaForMaskedLM
from deberta_dist.parallel.pipeline import MicroBatches
from deberta_dist.training.objectives.base import Objective, TrainedNetwork, alone
from deberta_dist.training.step_batch import StepBatch

# What the cross entropy reduces over the tensor axis of each target, bytes: float32 largest logit, float32 sum and target
# logit, int64 winner.
CROSS_ENTROPY_MESSAGES = (4, 2 * 4, 8)


@dataclass(frozen=True, kw_only=True)
class MaskedLMNetwork(TrainedNetwork):
    """A masked language model.

    Attributes:
        mask_probability: Share of the tokens that are predicted: what its head costs.

    Raises:
        ConfigError: the enhanced mask decoder cannot be built (`DebertaConfig.require_masked_lm`).
    """

    mask_probability: float = 0.15

    def __post_init__(self) -> None:
        self.config.require_masked_lm()

    def make(self) -> DebertaForMaskedLM:
        """The model."""
        return DebertaForMaskedLM(self.config)

    @property
    def decoder_layer(self) -> int | None:
        """The last, where the enhanced mask decoder is."""
        return self.config.num_hidden_layers - 1 if self.config.uses_enhanced_mask_decoder else None

    @property
    def results(self) -> tuple[str, ...]:
        """The sums of `DebertaForMaskedLM.forward_stage`."""
        return "loss", "correct", "targets"

    @property
    def mean_over(self) -> str:
        """The masked tokens."""
        return "targets"

    def flops(self, *, length: int, micro_batch_size: int) -> ForwardFlops:
        """See `forward_flops`."""
        return forward_flops(
            self.config,
            max_seq_length=length,
            micro_batch_size=micro_batch_size,
            mask_probability=self.mask_probability,
        )

    def micro_batches(self, batch: StepBatch, *, dropout_keys: Sequence[int], handed: Tensor | None) -> MicroBatches:
        """Mask, documents, targets and dropout key of every micro-batch."""
        assert handed is None
        count = len(dropout_keys)
        masks = batch.attention_mask.chunk(count)
        documents = [None] * count if batch.document_ids is None else batch.document_ids.chunk(count)
        names = ("attention_mask", "document_ids", "targets", "dropout_key")
        values = zip(masks, documents, batch.targets, dropout_keys, strict=True)
        return MicroBatches(input_ids=batch.input_ids, fields=[dict(zip(names, found, strict=True)) for found in values])

    def head_loss(self, model: nn.Module, *, hidden: Tensor, targets: Tensor, num_chunks: int) -> object:
        """Cross entropy over the vocabulary, on the table that the embeddings share."""
        assert isinstance(model, DebertaForMaskedLM)
        words, head = model.deberta.embeddings.word_embeddings.weight, model.lm_predictions.lm_head
        entered = head.transform(hidden)
        return model.cross_entropy.of_product(entered, words, head.bias, targets, num_chunks=num_chunks)

    @property
    def head_rows(self) -> int:
        """The vocabulary."""
        return self.config.vocab_size

    def head_messages(self, *, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Bytes that the cross entropy reduces per target, and the gradient of the head's input."""
        return CROSS_ENTROPY_MESSAGES, (self.config.embedding_width * width,)


def masked_lm(config: RunConfig, model_config: DebertaConfig) -> Objective:
    """The objective of a run.

    Args:
        config: ``data.mask_probability`` is read.
        model_config: ``[model]`` resolved: preset, overrides and vocabulary size.

    Raises:
        ConfigError: see `MaskedLMNetwork`.
    """
    return alone(MaskedLMNetwork(config=model_config, mask_probability=config.data.mask_probability))
