"""DeBERTa's masked language models with the enhanced mask decoder, which transformers' own classes do not have.

This file lies beside the weights that it is for and needs nothing but torch and transformers (5.x: >= 5, < 6):

    AutoModelForMaskedLM.from_pretrained(DIRECTORY, trust_remote_code=True)

With h the input of the last layer and p the absolute positions, z = h + p, and twice z = layer(queries z, keys and values
h). The logits are those of the last z. A configuration that does not say "masked_lm_decoder": "emd" gives transformers'
own model, unchanged.

Letters: B batch, S sequence, D hidden.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import MaskedLMOutput
from transformers.models.deberta import modeling_deberta as v1
from transformers.models.deberta_v2 import modeling_deberta_v2 as v2

NUM_PASSES = 2


class _Encoder(v2.DebertaV2Encoder):
    """The relative table's rows as DeBERTa chooses them: distances are limited before they are put into buckets."""

    def get_rel_pos(self, hidden_states, query_states=None, relative_pos=None):
        if relative_pos is not None or self.position_buckets <= 0:
            return super().get_rel_pos(hidden_states, query_states, relative_pos)
        middle, last = self.position_buckets // 2, self.max_relative_positions - 1
        buckets = list(range(min(middle, last) + 1))
        for size in range(middle + 1, last + 1):
            buckets.append(math.ceil(math.log(size / middle) / math.log(last / middle) * (middle - 1)) + middle)
        places = torch.arange(hidden_states.shape[-2], device=hidden_states.device)
        distances = places[:, None] - places[None, :]
        rows = torch.tensor(buckets, device=places.device)[distances.abs().clamp(max=last)]
        return (rows * distances.sign())[None]


class _EnhancedMaskDecoder:
    """What both classes have in common, beside one of transformers'."""

    # So that `save_pretrained` writes this file along; not every 5.x notes it where it has a class of the same name.
    _auto_class = "AutoModelForMaskedLM"

    def __init__(self, config):
        super().__init__(config)
        self.decodes = getattr(config, "masked_lm_decoder", None) == "emd"
        if self.decodes:
            self._add_decoder(config)
            # Some 5.x tie a weight of this head that does not exist.
            self._tied_weights_keys = {}
            self.post_init()

    def _add_decoder(self, config):
        self.deberta.embeddings.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def get_output_embeddings(self):
        # The logits are products with the input embeddings: there are no others.
        return None if self.decodes else super().get_output_embeddings()

    def resize_token_embeddings(self, *args, **kwargs):
        table = super().resize_token_embeddings(*args, **kwargs)
        head = self.lm_predictions.lm_head if self.decodes else None
        if head is not None and len(head.bias) != table.num_embeddings:
            bias = head.bias.new_zeros(table.num_embeddings)
            kept = min(len(bias), len(head.bias))
            bias[:kept] = head.bias.detach()[:kept]
            head.bias = nn.Parameter(bias)
        return table

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        num_items_in_batch=None,
        **kwargs,
    ):
        """As of transformers' class: labels are -100 where nothing is to be predicted."""
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "output_attentions": output_attentions,
        }
        if not self.decodes:
            return super().forward(**inputs, labels=labels, output_hidden_states=output_hidden_states, return_dict=return_dict)
        shape = (input_ids if input_ids is not None else inputs_embeds).shape[:2]
        if attention_mask is None:
            inputs["attention_mask"] = attention_mask = torch.ones(shape, dtype=torch.long, device=self.device)
        if position_ids is None:
            position_ids = torch.arange(shape[1], device=self.device)[None]
        outputs = self.deberta(**inputs, output_hidden_states=True, return_dict=True)
        hidden = outputs.hidden_states[-2]
        queries = hidden + self.deberta.embeddings.position_embeddings(position_ids)
        encoder = self.deberta.encoder
        arguments = encoder.get_attention_mask(attention_mask), encoder.get_rel_pos(hidden), encoder.get_rel_embedding()
        for _ in range(NUM_PASSES):
            queries = self._decode(encoder.layer[-1], queries, hidden, *arguments)
        logits = self.lm_predictions(queries, self.deberta.embeddings.word_embeddings)
        loss = None
        if labels is not None:
            labels = labels.to(logits.device)
            count = (labels != -100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            loss = F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), reduction="sum") / count
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        result = MaskedLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states if output_hidden_states else None,
            attentions=outputs.attentions,
        )
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return result if wants_dict else result.to_tuple()


class DebertaV2ForMaskedLM(_EnhancedMaskDecoder, v2.DebertaV2ForMaskedLM):
    """v2 and v3; v1 with projections apart."""

    def _add_decoder(self, config):
        super()._add_decoder(config)
        self.deberta.encoder = _Encoder(config)

    def _decode(self, layer, queries, hidden, mask, relative, table):
        # By position: what gradient checkpointing is given by name has no gradient.
        return layer(hidden, mask, queries, relative, table)[0]


class DebertaForMaskedLM(_EnhancedMaskDecoder, v1.DebertaForMaskedLM):
    """v1 with fused projections."""

    def _add_decoder(self, config):
        super()._add_decoder(config)
        for layer in self.deberta.encoder.layer:
            attention = layer.attention.self
            # Made as float32 whatever the others are; the sums with them then fit no product.
            for name in ("q_bias", "v_bias"):
                bias = getattr(attention, name).to(attention.in_proj.weight.dtype)
                setattr(attention, name, nn.Parameter(bias.detach()))

    def _decode(self, layer, queries, hidden, mask, relative, table):
        # This layer cannot take queries apart from keys. So both are one sequence, in which the first half sees the
        # second and nobody sees the first.
        length = hidden.shape[1]
        both_BSD = torch.cat([queries, hidden], dim=1)
        mask = F.pad(mask, (length, 0, 0, length))
        return layer(both_BSD, mask, None, relative.repeat(1, 2, 2), table)[0][:, :length]
