"""Losses of the small heads at their edges; their numbers are held by the golden files."""

import pytest
import torch
from torch.nn import functional as F

from deberta_dist.models.classification import DebertaForReplacedTokenDetection, DebertaForSequenceClassification
from deberta_dist.models.presets import preset


def test_unknown_labels_are_left_out(batch):
    config = preset("tiny-v2")
    model = DebertaForSequenceClassification(config, num_labels=3).eval()
    input_ids, attention_mask, _ = batch(config)
    output = model(input_ids, attention_mask, torch.tensor([2, -1]))
    assert torch.allclose(output.loss, F.cross_entropy(output.logits[:1], torch.tensor([2])))
    none = model(input_ids, attention_mask, torch.tensor([-1, -1])).loss
    none.backward()
    assert none == 0.0 and torch.all(model.classifier.weight.grad == 0)


def test_one_label_is_regression(batch):
    config = preset("tiny-v2")
    model = DebertaForSequenceClassification(config, num_labels=1).eval()
    input_ids, attention_mask, _ = batch(config)
    output = model(input_ids, attention_mask, torch.tensor([0.5, -2.0]))
    assert torch.allclose(output.loss, (output.logits[:, 0] - torch.tensor([0.5, -2.0])).square().mean())


def test_token_types_matter_where_the_model_has_them(batch):
    config = preset("tiny-v2", type_vocab_size=2)
    model = DebertaForSequenceClassification(config).eval()
    input_ids, attention_mask, _ = batch(config)
    types = torch.zeros_like(input_ids)
    plain = model(input_ids, attention_mask).logits
    assert torch.equal(plain, model(input_ids, attention_mask, token_type_ids=types).logits)
    assert not torch.equal(plain, model(input_ids, attention_mask, token_type_ids=types + 1).logits)


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_dropout_key_and_recomputation(batch, recompute):
    config = preset("tiny-v2", pooler_dropout=0.2)
    input_ids, attention_mask, _ = batch(config)
    model = DebertaForSequenceClassification(config)
    model.recompute = recompute
    first = model(input_ids, attention_mask, dropout_key=1).logits
    assert torch.equal(first, model(input_ids, attention_mask, dropout_key=1).logits)
    assert not torch.equal(first, model(input_ids, attention_mask, dropout_key=2).logits)


def test_detector_counts_a_right_guess_as_original(batch):
    config = preset("tiny-v2")
    model = DebertaForReplacedTokenDetection(config).eval()
    input_ids, attention_mask, labels = batch(config)
    guessed = model(input_ids, attention_mask, labels)
    assert torch.allclose(guessed.loss, F.softplus(guessed.logits[attention_mask.bool()]).mean())
    wrong = torch.where(labels > 0, labels % 500 + 5, 0)
    assert not torch.allclose(guessed.loss, model(input_ids, attention_mask, wrong).loss, rtol=1e-3)
