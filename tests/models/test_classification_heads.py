"""Losses of the small heads at their edges; their numbers are held by the golden files."""

import re
from typing import get_args

import pytest
import torch
import transformers
from torch.nn import functional as F

from deberta_dist.conversion.heads import SUFFIXES
from deberta_dist.errors import ConfigError
from deberta_dist.models.classification import DebertaForReplacedTokenDetection, DebertaForSequenceClassification
from deberta_dist.models.heads import HEADS, LABELLED, model_with_head
from deberta_dist.models.presets import preset
from deberta_dist.parallel.layout import classifier_layout
from deberta_dist.parallel.tensor import sharding_rules
from deberta_dist.tasks.base import Head
from deberta_dist.values import HeadKind


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


LABELS = {
    # head: (labels, the same as transformers wants them)
    "token": torch.tensor([[0, 2, -100, 1] * 3, [1, 1, 0, -100] * 3]),
    "span": (torch.tensor([3, 12]), torch.tensor([5, 2])),
    "choice": torch.tensor([2, 0]),
}
CLASSES = {"token": "TokenClassification", "span": "QuestionAnswering", "choice": "MultipleChoice"}


@pytest.mark.parametrize("head", CLASSES)
def test_losses_are_those_of_transformers(head, randomise):
    config = preset("tiny-v2", num_hidden_layers=1)
    ours = randomise(model_with_head(config, head, num_labels=3)).eval()
    fields = {key: value for key, value in config.to_dict().items() if key != "padding_idx"}
    labels = {} if head == "span" else {"num_labels": 3}
    theirs = getattr(transformers, f"DebertaV2For{CLASSES[head]}")(transformers.DebertaV2Config(**fields, **labels)).eval()
    state = {name: value for name, value in ours.state_dict().items() if "position_embeddings" not in name}
    theirs.load_state_dict(state, strict=True)
    shape = (2, 3, 12) if head == "choice" else (2, 12)
    input_ids = torch.randint(4, config.vocab_size, shape, generator=torch.Generator().manual_seed(1))
    given = LABELS[head] if head == "span" else (LABELS[head],)
    names = ("start_positions", "end_positions") if head == "span" else ("labels",)
    expected = theirs(input_ids, **dict(zip(names, given, strict=True))).loss
    # A position beyond the sequence counts for neither.
    found = ours(input_ids, torch.ones_like(input_ids), *given).loss
    assert found.dtype == torch.float32 and abs(found - expected) < 1e-5 * expected
    found.backward()
    expected.backward()
    for name, parameter in theirs.named_parameters():
        mine = ours.get_parameter(name).grad
        assert (mine - parameter.grad).abs().max() < 1e-4 * max(parameter.grad.abs().max(), 1e-3), name
    none = ours(input_ids, torch.ones_like(input_ids), *(torch.full_like(value, -1) for value in given)).loss
    assert none == 0.0
    for wrong in (given[0].float(), given[0][..., None], given[0][:1]):
        with pytest.raises(ValueError, match=rf"{names[0]} are .*expected int64 {re.escape(str(list(given[0].shape)))}"):
            ours(input_ids, torch.ones_like(input_ids), wrong, *given[1:])


@pytest.mark.parametrize("head", HEADS)
def test_a_head_is_whole_on_every_tensor_parallel_rank(head):
    config = preset("tiny-v2")
    layout = classifier_layout(config, num_outputs=3, tensor_parallel_size=2, head=head)
    model = model_with_head(config, head, num_labels=3)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters() if "position_embeddings" not in name}
    assert layout.full_shapes == expected
    of_head = [name for name in expected if not name.startswith("deberta.")]
    assert of_head and all(
        sharding_rules.parameter_sharding(name) == sharding_rules.Sharding("replicate", None) for name in of_head
    )
    assert all(layout.local_shape(name) == expected[name] for name in of_head)


def test_what_is_no_head_is_refused():
    for head, num_labels, words in (("tree", 2, "is none of sequence, choice, token, span"), ("token", 0, "at least 1")):
        with pytest.raises(ConfigError, match=words):
            model_with_head(preset("tiny-v2"), head, num_labels=num_labels)
    model = model_with_head(preset("tiny-v2"), "span")
    with pytest.raises(ValueError, match="give both or neither"):
        model(torch.ones(1, 4, dtype=torch.int64), None, torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"expected \[batch, choices, tokens\]"):
        model_with_head(preset("tiny-v2"), "choice")(torch.ones(1, 4, dtype=torch.int64))


def test_heads_are_the_same_in_every_room() -> None:
    kinds = set(get_args(HeadKind))
    assert set(HEADS) == set(SUFFIXES) == kinds
    assert {head.value for head in Head} <= kinds and set(LABELLED) <= kinds
