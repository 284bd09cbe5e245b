"""Several documents in one sequence: each comes out as if it were alone, in every part of every generation."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from deberta_dist.kernels import AttentionMask, RelativePositions
from deberta_dist.kernels.fused import availability
from deberta_dist.models.layers import NUM_DECODER_PASSES
from deberta_dist.models.masked_lm import DebertaForMaskedLM
from deberta_dist.models.positions import document_positions, within_documents
from deberta_dist.models.presets import preset

CONFIGS = {
    "v1 decoder": preset("tiny-v1"),
    "v1 biased": preset("tiny-v1", position_biased_input=True),
    "v2 decoder, conv, buckets, shared keys": preset("tiny-v2"),
    "v2 biased, 5 grouped taps": preset("tiny-v2", position_biased_input=True, conv_kernel_size=5, conv_groups=4),
}
LENGTHS = ((9, 1, 22, 2), (17, 20), (35,))  # tokens per document; the longest sequence of them has one of padding
SEQUENCE_LENGTH = 38
ANY = pytest.mark.parametrize("name", CONFIGS)


def exact_model(config, randomise) -> DebertaForMaskedLM:
    """In float64, where only what is equal stays below the tolerance."""
    return randomise(DebertaForMaskedLM(config)).double().eval()


def documents(config) -> list[list[tuple[Tensor, Tensor]]]:
    """(ids, labels), int64 [1, tokens], of every document of every sequence; each has a target at both of its ends."""
    generator = torch.Generator().manual_seed(4)
    made = []
    for lengths in LENGTHS:
        made.append([])
        for length in lengths:
            ids = torch.randint(4, config.vocab_size, (1, length), generator=generator)
            is_target = torch.rand(1, length, generator=generator) < 0.2
            is_target[0, [0, -1]] = True
            made[-1].append((ids, torch.where(is_target, ids, 0)))
    return made


def packed(config) -> tuple[Tensor, Tensor, Tensor]:
    """The same as ids, labels and document ids, int64 [3, S]."""
    columns = []
    for sequence in documents(config):
        numbers = [torch.full_like(ids, number) for number, (ids, _) in enumerate(sequence, start=1)]
        parts = ([ids for ids, _ in sequence], [labels for _, labels in sequence], numbers)
        columns.append([F.pad(torch.cat(p, dim=1), (0, SEQUENCE_LENGTH - sum(q.shape[1] for q in p))) for p in parts])
    ids, labels, document_ids = (torch.cat(rows) for rows in zip(*columns, strict=True))
    return ids, labels, document_ids


def pairs(numbers: Tensor) -> Tensor:
    """Which token sees which, bool [B, S, S]."""
    return AttentionMask(key_segments_BS=numbers).visible()


def losses(logits_TV: Tensor, labels: Tensor) -> Tensor:
    """Per target, in the logits' own precision."""
    return F.cross_entropy(logits_TV, labels[labels > 0], reduction="none")


@ANY
def test_hidden_states_are_those_of_each_document_alone(randomise, relative_error, name):
    config = CONFIGS[name]
    model = exact_model(config, randomise).deberta
    ids, _, numbers = packed(config)
    hidden = model(ids, pairs(numbers), position_ids=document_positions(numbers)).last_hidden_state
    alone = torch.cat([model(own).last_hidden_state[0] for sequence in documents(config) for own, _ in sequence])
    assert relative_error(hidden[numbers > 0], alone) < 1e-12


@ANY
def test_logits_losses_and_gradients_are_those_of_each_document_alone(randomise, relative_error, gradients, name):
    config = CONFIGS[name]
    model = exact_model(config, randomise)
    ids, labels, numbers = packed(config)
    output = model(ids, None, labels, document_ids=numbers.int())
    alone = [model(own, None, own_labels).logits for sequence in documents(config) for own, own_labels in sequence]
    assert relative_error(output.logits, torch.cat(alone)) < 1e-12
    all_losses = losses(torch.cat(alone), labels)
    assert relative_error(losses(output.logits, labels), all_losses) < 1e-12
    assert output.loss.item() == pytest.approx(all_losses.mean().item(), rel=1e-6)  # computed in float32

    expected = gradients(model, all_losses.sum())
    actual = gradients(model, losses(model(ids, None, labels, document_ids=numbers).logits, labels).sum())
    assert actual.keys() == expected.keys()
    # Position key biases shift whole rows of scores: their gradient is rounding.
    scale = max(gradient.abs().max() for gradient in expected.values())
    for parameter, gradient in expected.items():
        if gradient.abs().max() > 1e-12 * scale:
            assert relative_error(actual[parameter], gradient) < 1e-10, parameter
        else:
            assert actual[parameter].abs().max() < 1e-12 * scale, parameter


@ANY
def test_mask_and_positions_given_apart_are_the_same(randomise, name):
    config = CONFIGS[name]
    model = exact_model(config, randomise)
    ids, labels, numbers = packed(config)
    apart = model(ids, pairs(numbers), labels, position_ids=document_positions(numbers))
    assert torch.equal(apart.logits, model(ids, None, labels, document_ids=numbers).logits)


def test_padding_of_the_mask_belongs_to_no_document(randomise, relative_error):
    model = exact_model(preset("tiny-v2"), randomise)
    ids, labels, numbers = packed(model.config)
    mask = torch.ones_like(ids)
    mask[:, 30:] = 0
    found = model(ids, mask, labels * mask, document_ids=numbers).logits
    assert torch.equal(found, model(ids, None, labels * mask, document_ids=numbers * mask).logits)


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
@ANY
def test_stages_equal_the_whole(gradients, relative_error, name, recompute):
    config = CONFIGS[name]
    model = DebertaForMaskedLM(config)
    ids, labels, numbers = packed(config)
    whole = model(ids, None, labels, document_ids=numbers, dropout_key=5).loss
    expected = gradients(model, whole)
    model.recompute, hidden = recompute, None
    for layers in (range(1), range(1, 3), range(3, 4)):
        hidden = model.forward_stage(
            hidden,
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            labels=labels,
            document_ids=numbers,
            layers=layers,
            dropout_key=5,
        )
    loss = hidden[0, 0] / hidden[0, 2]
    assert torch.equal(loss, whole)
    actual = gradients(model, loss)
    assert actual.keys() == expected.keys()
    for parameter, gradient in expected.items():
        # Several stages use these: their gradients are summed in another order.
        exact = not any(word in parameter for word in (".rel_embeddings.", ".encoder.LayerNorm.", ".word_embeddings."))
        assert relative_error(actual[parameter], gradient) <= (0 if exact else 1e-6), parameter


def test_mask_and_positions_of_documents():
    numbers = torch.tensor([[1, 1, 2, 3, 3, 3, 0, 0]])
    assert document_positions(numbers).tolist() == [[0, 1, 0, 0, 1, 2, 0, 1]]
    blocks = torch.block_diag(torch.ones(2, 2), torch.ones(1, 1), torch.ones(3, 3), torch.zeros(2, 2))
    mask, positions = within_documents(torch.ones(1, 8), numbers)
    assert torch.equal(mask.visible(), blocks.bool()[None])
    assert torch.equal(positions, document_positions(numbers))


@pytest.mark.usefixtures("no_overflow_checks")
@pytest.mark.parametrize("name", ["v1 decoder", "v2 decoder, conv, buckets, shared keys"])
def test_the_fused_attention_takes_every_pass(randomise, relative_error, gradients, monkeypatch, name):
    pytest.importorskip("triton", reason="Triton is not installed: pip install 'deberta_dist[triton]'")
    from deberta_dist.kernels.fused import autograd

    config = dataclasses.replace(CONFIGS[name], attention_head_size=32, num_hidden_layers=2)
    model = randomise(DebertaForMaskedLM(config))
    ids, labels, numbers = (x[:1] for x in packed(config))

    def loss_and_gradients() -> tuple[Tensor, dict[str, Tensor]]:
        loss = model(ids, None, labels, document_ids=numbers, dropout_key=5).loss
        return loss.detach(), gradients(model, loss)

    expected_loss, expected = loss_and_gradients()
    calls, plain = [], autograd.FusedAttention.apply
    monkeypatch.setattr(autograd.FusedAttention, "apply", lambda *operands: calls.append(1) or plain(*operands))
    # As on a GPU with Triton.
    monkeypatch.setattr("deberta_dist.kernels.attention.unavailable_reason", support)
    loss, actual = loss_and_gradients()
    assert len(calls) == config.num_hidden_layers - 1 + NUM_DECODER_PASSES
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    for parameter, gradient in expected.items():
        scale = gradient.abs().max().clamp_min(1e-3)
        assert (actual[parameter] - gradient).abs().max() <= 1e-4 * scale, parameter


def support(key_BNSH: Tensor, *, positions: RelativePositions, mask: AttentionMask | None, **_: bool) -> str | None:
    return availability.unsupported_reason(key_BNSH, positions=positions, mask=mask)


@pytest.mark.parametrize("shape", [(3, 38, 38), (3, 37)])
def test_a_mask_that_does_not_fit_the_documents(shape):
    model = DebertaForMaskedLM(CONFIGS["v1 decoder"])
    ids, labels, numbers = packed(model.config)
    with pytest.raises(ValueError, match=r"document_ids has shape \(3, 38\) and attention_mask"):
        model(ids, torch.ones(shape), labels, document_ids=numbers)
