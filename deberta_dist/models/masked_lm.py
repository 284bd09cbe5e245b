"""Masked language modelling with the enhanced mask decoder, whole or as one stage of several.

Letters: B batch, S sequence, D hidden, T targets of a sample and P of the batch (both padded), V vocabulary.

Source: arXiv 2006.03654 section 3.2; microsoft/DeBERTa DeBERTa/apps/models/masked_language_model.py@4d7fe0bd.
"""

import dataclasses
from collections.abc import Collection

import torch
from torch import Tensor, nn

from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.cross_entropy import CrossEntropy
from deberta_dist.models.dropout import child_key
from deberta_dist.models.encoder import CallInputs, ModelWithBackbone, call_with_recompute
from deberta_dist.models.fused_qkv import main_grad
from deberta_dist.models.initialisation import initialise_
from deberta_dist.models.masked_lm_head import MaskedLMPredictions
from deberta_dist.models.plain import is_own_table, whole_table
from deberta_dist.models.positions import within_documents
from deberta_dist.models.shared_table import SharedTable
from deberta_dist.models.targets import NOT_A_TARGET, Targets, find_targets, require_token_labels


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedLMOutput:
    """What a masked language model returns.

    Attributes:
        loss: mean over targets, float32; 0 if there are none; None without labels.
        logits: one row per target in row-major order, [P, V]; without labels one row per real token.
    """

    loss: Tensor | None
    logits: Tensor


torch.export.register_dataclass(MaskedLMOutput)


class DebertaForMaskedLM(ModelWithBackbone):
    """Masked language model of every generation.

    With the enhanced mask decoder (``DebertaConfig.decoder``) the last layer decodes: two passes over queries = hidden
    state + absolute position, attending to the input of the last layer. Two savings, both exact: only targets are queries,
    gathered first; and the last layer's ordinary pass, on which the loss does not depend, is not run.

    Args:
        config: sizes and switches of the encoder and the decoder.
        seed: decides the initial parameters (see `initialisation`); without effect on the meta device.

    Attributes:
        vocabulary_chunks: `forward_stage` computes the logits in this many chunks of the vocabulary; see
            `CrossEntropy.of_product`.

    Raises:
        ConfigError: the enhanced mask decoder cannot be built (`DebertaConfig.require_masked_lm`).
    """

    def __init__(self, config: DebertaConfig, *, seed: int = 0) -> None:
        config.require_masked_lm()
        super().__init__(config)
        self.lm_predictions = MaskedLMPredictions(config)
        # With sequence parallelism this is replaced by a module that joins the shards of the sequence.
        self.whole_sequence = nn.Identity()
        self.cross_entropy = CrossEntropy()
        self.vocabulary_chunks = 1
        initialise_(self, seed=seed, std=config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        dropout_key: int | None = None,
    ) -> MaskedLMOutput:
        """Loss and logits of the targets; without labels, logits of every real token.

        An exported program decodes every token and selects rows at its end; it has no loss.

        Args:
            input_ids: int64 [B, S].
            attention_mask: 1 for real tokens, [B, S]; or [B, S, S] with row i saying which tokens token i sees. None: all
                tokens are real.
            labels: int64 [B, S], 0 where nothing is to be predicted.
            token_type_ids: see `DebertaModel.forward`.
            position_ids: absolute positions, int64 [B, S]. None: 0 .. S-1, or within each document of ``document_ids``.
            document_ids: int [B, S], number of the document that each token belongs to, ascending from 1, and 0 for
                padding. Documents do not see each other, and each has the absolute positions 0, 1, ...
            dropout_key: determines all dropout masks of the call. None: torch's random state does.

        Raises:
            ValueError: more tokens than absolute positions; ``document_ids`` and ``attention_mask`` of different shapes;
                ``labels`` that are not token ids [B, S]; or labels while a program is exported.
        """
        if labels is not None:
            require_token_labels(labels, shape=input_ids.shape, vocab_size=self.config.vocab_size)
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask, document_positions = within_documents(attention_mask, document_ids)
        exporting = torch.compiler.is_exporting()
        if exporting and labels is not None:
            raise ValueError("a masked language model is exported without labels: the program has logits and no loss")
        is_target_BS = mask.seen() if labels is None else labels > 0
        targets = None if exporting else find_targets(is_target_BS, labels)
        table = self._shared_table(input_ids.device)
        inputs = CallInputs(
            input_ids=input_ids,
            mask=mask,
            token_type_ids=token_type_ids,
            position_ids=document_positions if position_ids is None else position_ids,
            dropout_key=dropout_key,
            table=table,
        )
        hidden_PD = self._run(None, inputs, targets=targets)
        if exporting:
            hidden_PD = hidden_PD[is_target_BS]
        logits_PV = self.lm_predictions.lm_head(hidden_PD, word_embeddings_VW=table.weight_VW)
        if labels is None:
            return MaskedLMOutput(loss=None, logits=logits_PV)
        assert targets is not None, "labels are there"
        loss_P, _ = self.cross_entropy(logits_PV, targets.ids_P)
        return MaskedLMOutput(loss=loss_P.sum() / max(loss_P.numel(), 1), logits=logits_PV)

    def token_logits(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Logits of every token, padding included, [B, S, V], so that the shape depends on the inputs' shapes alone.

        For arguments and errors see `forward`.
        """
        mask, _ = within_documents(torch.ones_like(input_ids) if attention_mask is None else attention_mask, None)
        table = self._shared_table(input_ids.device)
        inputs = CallInputs(input_ids=input_ids, mask=mask, token_type_ids=token_type_ids, table=table)
        hidden_BSD = self._run(None, inputs)
        return self.lm_predictions.lm_head(hidden_BSD, word_embeddings_VW=table.weight_VW)

    def forward_stage(
        self,
        hidden_BSD: Tensor | None,
        *,
        input_ids: Tensor | None,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        targets: Targets | None = None,
        document_ids: Tensor | None = None,
        layers: range,
        dropout_key: int | None,
    ) -> Tensor:
        """One stage of the model; all stages in order compute what `forward` computes.

        Args:
            hidden_BSD: output of the layer before; ignored if ``layers`` begins with 0.
            input_ids: int64 [B, S]; None where ``layers`` does not begin with 0.
            attention_mask: [B, S] or [B, S, S], see `forward`; every stage needs it.
            labels: int64 [B, S]. Only a stage with the last layer reads them, and then waits for their device.
            targets: the labels' `find_targets`, found on the host beforehand; ``labels`` are then not read.
            document_ids: int [B, S], see `forward`; every stage needs them.
            layers: consecutive. Layer 0 includes embeddings and convolution, the last layer the head. An empty range
                returns ``hidden_BSD``.
            dropout_key: see `forward`; the same for all stages of a micro-batch.

        Returns:
            Without the last layer: hidden states [B, S, D]. With it: float32 [1, 3], the sum of the targets' losses,
            the number of correct targets, the number of targets; only the first has a gradient.

        Raises:
            ValueError: ``layers`` is not a contiguous range of this model's, hidden states are missing, or see `forward`.
        """
        num_layers = self.config.num_hidden_layers
        if layers.step != 1 or not 0 <= layers.start <= layers.stop <= num_layers:
            raise ValueError(f"layers = {layers} is not a contiguous range within 0..{num_layers}")
        if hidden_BSD is None and (layers.start > 0 or not layers):
            raise ValueError(f"layers = {layers} needs the hidden states of the layers before")
        if not layers:
            assert hidden_BSD is not None, "checked above"
            return hidden_BSD
        is_last = layers.stop == num_layers
        if is_last and targets is None:
            if labels is None:
                raise ValueError(f"layers = {layers} needs targets, or labels to find them in")
            require_token_labels(labels, shape=attention_mask.shape[:2], vocab_size=self.config.vocab_size)
            targets = find_targets(labels > 0, labels)
        mask, position_ids = within_documents(attention_mask, document_ids)
        table = self._shared_table(attention_mask.device) if self._shares_table(layers) else None
        inputs = CallInputs(input_ids=input_ids, mask=mask, position_ids=position_ids, dropout_key=dropout_key, table=table)
        hidden = self._run(hidden_BSD, inputs, targets=targets, layers=layers)
        if not is_last:
            return hidden
        assert targets is not None, "given or found"
        head = self.lm_predictions.lm_head
        loss_P, is_correct_P = self.cross_entropy.of_product(
            head.transform(hidden),
            self._word_table(hidden.device) if table is None else table.weight_VW,
            head.bias,
            targets.ids_P,
            num_chunks=self.vocabulary_chunks,
            main_grad=self._word_main_grad(),
        )
        if targets.is_padded:
            # Padding repeats the first target, so its losses are finite and only have to be left out of the sums.
            is_unused_P = targets.ids_P == NOT_A_TARGET
            loss_P = loss_P.masked_fill(is_unused_P, 0.0)
            is_correct_P = is_correct_P.masked_fill(is_unused_P, False)
        count = loss_P.new_full((), targets.num_targets)
        return torch.stack([loss_P.sum(), is_correct_P.sum().to(loss_P.dtype), count])[None]

    def keep_layers(self, layers: Collection[int]) -> None:
        """Sets the modules to None that a stage of these layers does not use; the others keep their published names.

        These stay: ``encoder.layer.N`` of ``layers``; rel_embeddings and encoder.LayerNorm always; the embeddings'
        LayerNorm, embed_proj and type embeddings, and the convolution, with layer 0; word_embeddings with layer 0 or the
        last; position_embeddings, if there are any, with layer 0 if position_biased_input, else with the last;
        lm_predictions with the last.
        """
        self.deberta.keep_layers(layers)
        if self.config.num_hidden_layers - 1 not in layers:
            self.lm_predictions = None  # type: ignore[assignment]  # of the last stage alone

    def _run(
        self, hidden_BSD: Tensor | None, inputs: CallInputs, *, targets: Targets | None = None, layers: range | None = None
    ) -> Tensor:
        """Hidden states [B, S, D] after ``layers``, by default all; if the last is among them, of ``targets`` alone, [P, D]."""
        layers = range(self.config.num_hidden_layers) if layers is None else layers
        is_last = layers.stop == self.config.num_hidden_layers
        decodes = is_last and self.config.uses_enhanced_mask_decoder
        hidden_BSD, rel_RD = self.deberta.run_stage(hidden_BSD, inputs, layers=layers[:-1] if decodes else layers)
        if is_last:
            hidden_BSD = self.whole_sequence(hidden_BSD)
        if decodes:
            return self._decode(hidden_BSD, rel_RD, inputs, targets=targets)
        if not is_last or targets is None:
            return hidden_BSD
        return hidden_BSD.flatten(0, 1).index_select(0, targets.tokens_P)

    def _decode(self, hidden_BSD: Tensor, rel_RD: Tensor, inputs: CallInputs, *, targets: Targets | None) -> Tensor:
        """The enhanced mask decoder: z = p + h; twice z = layer(queries z, keys and values h).

        Of the targets, [P, D]; without targets of every token, [B, S, D].
        """
        mask, position_ids, dropout_key = inputs.mask, inputs.position_ids, inputs.dropout_key
        length = hidden_BSD.shape[1]
        self.deberta.require_positions(length, added=True)
        encoder = self.deberta.encoder
        relative = encoder.relative_positions(hidden_BSD.device)
        if targets is None:
            absolute_BT = torch.arange(length, device=hidden_BSD.device)[None] if position_ids is None else position_ids
        else:
            positions_BT = targets.positions_BT
            absolute_BT = positions_BT if position_ids is None else position_ids.gather(1, positions_BT)
            relative = dataclasses.replace(relative, query_positions_BQ=positions_BT)
            mask = mask.of_queries(positions_BT)
        layer_key = child_key(dropout_key, encoder.num_layers)

        def decode(hidden_BSD: Tensor, table_RD: Tensor) -> Tensor:
            queries_BTD = hidden_BSD
            if targets is not None:
                queries_BTD = hidden_BSD.gather(1, positions_BT[:, :, None].expand(-1, -1, hidden_BSD.shape[-1]))
            queries_BTD = queries_BTD + self.deberta.embeddings.absolute_positions(absolute_BT)
            return encoder.layer[-1].decode(  # type: ignore[operator]  # a `Layer`
                queries_BTD,
                hidden_BSD=hidden_BSD,
                rel_RD=table_RD,
                positions=relative,
                mask=mask,
                dropout_key=layer_key,
                recompute_mode=self.recompute,
                width=None if targets is None else targets.width,
            )

        decoded_BTD = call_with_recompute(
            decode, hidden_BSD, rel_RD, recompute=self.recompute == "full", dropout_key=dropout_key, owner=self
        )
        return decoded_BTD if targets is None else decoded_BTD.flatten(0, 1).index_select(0, targets.slots_P)

    def _word_table(self, device: torch.device) -> Tensor:
        return whole_table(self.deberta.embeddings.word_embeddings, self.config.vocab_size, device=device)

    def _shared_table(self, device: torch.device) -> SharedTable:
        return SharedTable(self._word_table(device), main_grad=self._word_main_grad())

    def _word_main_grad(self) -> Tensor | None:
        """The sum that the word embeddings' gradient is added to; None where autograd has it."""
        words = self.deberta.embeddings.word_embeddings
        return main_grad(words) if is_own_table(words) else None

    def _shares_table(self, layers: range) -> bool:
        """Whether the look-up's gradient is added to an existing one: the head's, or the parameter's ``main_grad``."""
        if layers.start > 0:
            return False
        is_whole = layers.stop == self.config.num_hidden_layers
        return is_whole or self._word_main_grad() is not None
