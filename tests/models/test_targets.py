"""Targets are found in the order of the batch, and unused places change nothing."""

import pytest
import torch

from deberta_dist import DebertaForMaskedLM
from deberta_dist.models.presets import preset
from deberta_dist.models.targets import NOT_A_TARGET, find_targets

LABELS = torch.tensor([[0, 7, 0, 9, 0], [0, 0, 5, 0, 0], [0] * 5])


def test_targets_are_in_row_major_order_and_padded_to_the_largest_count():
    targets = find_targets(LABELS > 0, LABELS)
    assert targets.ids_P.tolist() == [7, 9, 5] and targets.tokens_P.tolist() == [1, 3, 7]
    assert targets.positions_BT.shape == (3, 2) and (targets.num_targets, targets.width) == (3, 2)
    rows = torch.arange(3)[:, None].expand(3, 2).flatten()[targets.slots_P]
    chosen = torch.stack([rows, targets.positions_BT.flatten()[targets.slots_P]], dim=1)
    assert torch.equal(chosen, (LABELS > 0).nonzero())
    assert not targets.is_padded


def test_unused_places_repeat_the_first_target_and_have_no_id():
    targets = find_targets(LABELS > 0, LABELS, size=(4, 6))
    exact = find_targets(LABELS > 0, LABELS)
    assert targets.is_padded and (targets.num_targets, targets.width) == (3, 2)
    assert targets.ids_P.tolist() == [7, 9, 5] + [NOT_A_TARGET] * 3
    assert targets.tokens_P.tolist() == [1, 3, 7, 1, 1, 1]
    assert targets.positions_BT.shape == (3, 4) and torch.equal(targets.positions_BT[:, :2], exact.positions_BT)
    # Other tokens of the same sample, each once.
    assert all(len(set(row)) == 4 for row in targets.positions_BT.tolist())
    assert targets.slots_P.tolist() == [0, 1, 4, 0, 0, 0]


def test_no_target_leaves_one_position_and_selects_none():
    targets = find_targets(torch.zeros(2, 4, dtype=torch.bool))
    assert targets.positions_BT.shape == (2, 1) and targets.slots_P.shape == targets.tokens_P.shape == (0,)
    padded = find_targets(torch.zeros(2, 4, dtype=torch.bool), size=(2, 3))
    assert padded.slots_P.tolist() == padded.tokens_P.tolist() == padded.ids_P.tolist() == [0, 0, 0]


@pytest.mark.parametrize("size", [(1, 3), (2, 2), (6, 6)])
def test_too_small_a_size_is_refused(size):
    with pytest.raises(ValueError, match="3 targets, 2 of one sample of 5 tokens, do not fit"):
        find_targets(LABELS > 0, LABELS, size=size)


@pytest.mark.parametrize("name", ["tiny-v1", "tiny-v2", "biased"])
@pytest.mark.parametrize(("chunks", "dropout_key"), [(1, None), (3, None), (1, 7)])
def test_padded_targets_have_the_losses_and_gradients_of_exact_ones(gradients, relative_error, name, chunks, dropout_key):
    config = preset("tiny-v2" if name == "biased" else name, **({"position_biased_input": True} if name == "biased" else {}))
    model = DebertaForMaskedLM(config).double()
    model.vocabulary_chunks = chunks
    torch.manual_seed(3)
    ids = torch.randint(5, config.vocab_size, (3, 9))
    labels = torch.where(torch.rand(3, 9) < 0.3, ids, 0)
    layers = range(config.num_hidden_layers)

    def run(size):
        targets = find_targets(labels > 0, labels, size=size)
        output = model.forward_stage(
            None,
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            targets=targets,
            layers=layers,
            dropout_key=dropout_key,
        )
        return output, gradients(model, output[0, 0])

    model.train(dropout_key is not None)
    (expected, expected_gradients), (actual, actual_gradients) = run(None), run((7, 21))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    assert actual_gradients.keys() == expected_gradients.keys()
    for parameter, gradient in expected_gradients.items():
        assert relative_error(actual_gradients[parameter], gradient) < 1e-10, parameter
