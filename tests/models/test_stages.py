"""Parts of the model in order equal the whole, keep what they need, and recompute without a trace."""

import pytest
import torch

from deberta_dist.models.masked_lm import DebertaForMaskedLM
from deberta_dist.models.presets import preset

CONFIGS = {
    "v1": preset("tiny-v1"),
    "v2": preset("tiny-v2"),
    "plain": preset("tiny-v2", decoder="plain"),
    "biased": preset("tiny-v2", position_biased_input=True, embedding_size=32, type_vocab_size=2),
}
CUTS = [range(1), range(1, 3), range(3, 4)]


def run_stages(models, batch, *, dropout_key: int) -> torch.Tensor:
    input_ids, attention_mask, labels = batch
    hidden = None
    for model, layers in zip(models, CUTS, strict=True):
        hidden = model.forward_stage(
            hidden,
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=labels,
            layers=layers,
            dropout_key=dropout_key,
        )
    return hidden


@pytest.mark.parametrize("name", CONFIGS)
def test_stages_equal_the_whole(batch, gradients, relative_error, name):
    config = CONFIGS[name]
    model = DebertaForMaskedLM(config)
    inputs = batch(config)
    output = model(*inputs, dropout_key=5)
    expected = gradients(model, output.loss)
    result = run_stages([model] * 3, inputs, dropout_key=5)
    num_targets = int((inputs[2] > 0).sum())
    num_correct = int((output.logits.argmax(-1) == inputs[2][inputs[2] > 0]).sum())
    assert result.shape == (1, 3) and result.dtype == torch.float32
    assert result[0, 1:].tolist() == [num_correct, num_targets]
    assert torch.equal(result[0, 0] / num_targets, output.loss)
    actual = gradients(model, result[0, 0] / num_targets)
    assert actual.keys() == expected.keys()
    for parameter, gradient in expected.items():
        if any(word in parameter for word in (".rel_embeddings.", ".encoder.LayerNorm.", ".word_embeddings.")):
            # Several stages use these: their gradients are summed in another order.
            assert relative_error(actual[parameter], gradient) < 1e-6, parameter
        else:
            assert torch.equal(actual[parameter], gradient), parameter


def test_counts_have_no_gradient(batch):
    config = CONFIGS["v2"]
    model = DebertaForMaskedLM(config)
    result = run_stages([model] * 3, batch(config), dropout_key=5)
    result[0, 1:].sum().backward()
    assert all(p.grad is None or torch.all(p.grad == 0) for p in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_kept_parts_suffice_and_keep_their_names(batch, name):
    config = CONFIGS[name]
    whole = DebertaForMaskedLM(config, seed=3)
    stages = []
    for layers in CUTS:
        stage = DebertaForMaskedLM(config, seed=3)
        stage.keep_layers(layers)
        stages.append(stage)
    inputs = batch(config)
    expected = run_stages([whole] * 3, inputs, dropout_key=5)
    assert torch.equal(run_stages(stages, inputs, dropout_key=5), expected)

    every = set(whole.state_dict())
    shared = {key for key in every if key.startswith(("deberta.encoder.rel_", "deberta.encoder.LayerNorm"))}
    words = {"deberta.embeddings.word_embeddings.weight"}
    positions = {"deberta.embeddings.position_embeddings.weight"}
    embeddings = {key for key in every if key.startswith("deberta.embeddings.")}
    first = embeddings - positions | {key for key in every if ".conv." in key}
    last = words | {key for key in every if key.startswith("lm_predictions.")}
    if config.position_biased_input:
        first |= positions
    elif config.uses_enhanced_mask_decoder:
        last |= positions
    for stage, layers, extra in zip(stages, CUTS, (first, set(), last), strict=True):
        own = {key for key in every for n in layers if key.startswith(f"deberta.encoder.layer.{n}.")}
        assert set(stage.state_dict()) == own | shared | extra
    assert set().union(*(stage.state_dict() for stage in stages)) == every


def test_one_stage_of_everything_keeps_everything():
    model = DebertaForMaskedLM(CONFIGS["v2"])
    before = list(model.state_dict())
    model.keep_layers(range(4))
    assert list(model.state_dict()) == before


def test_keeping_layers_on_meta():
    with torch.device("meta"):
        model = DebertaForMaskedLM(preset("v2-xxlarge"))
    model.keep_layers(range(12, 24))
    assert sum(p.numel() for p in model.parameters()) == 12 * 28_331_520 + 786_432 + 3_072


def test_ranges_that_are_not_a_stage(batch):
    config = CONFIGS["v2"]
    model = DebertaForMaskedLM(config)
    input_ids, attention_mask, labels = batch(config)

    def run(hidden, layers):
        return model.forward_stage(
            hidden,
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=labels,
            layers=layers,
            dropout_key=None,
        )

    hidden = torch.randn(2, 20, 64)
    assert run(hidden, range(2, 2)) is hidden
    for layers in (range(0, 4, 2), range(3, 5), range(-1, 2)):
        with pytest.raises(ValueError, match="not a contiguous range"):
            run(hidden, layers)
    with pytest.raises(ValueError, match="needs the hidden states"):
        run(None, range(1, 2))


@pytest.mark.parametrize("dropout_key", [11, None])
@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("name", CONFIGS)
def test_recomputation_changes_no_bit(batch, gradients, name, mode, dropout_key):
    config = CONFIGS[name]
    model = DebertaForMaskedLM(config)
    inputs = batch(config)
    results = []
    for recompute in ("none", mode):
        model.recompute = recompute
        torch.manual_seed(1)
        loss = model(*inputs, dropout_key=dropout_key).loss
        results.append((loss, gradients(model, loss)))
    (loss, expected), (again, actual) = results
    assert torch.equal(loss, again)
    assert actual.keys() == expected.keys()
    for parameter, gradient in expected.items():
        assert torch.equal(actual[parameter], gradient), parameter


def test_recomputation_saves_activations(batch):
    config = CONFIGS["v2"]
    model = DebertaForMaskedLM(config)
    inputs = batch(config, length=60)

    def saved_bytes(recompute: str) -> int:
        model.recompute = recompute
        storages: dict[int, int] = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(*inputs, dropout_key=1)
        return sum(storages.values())

    everything = saved_bytes("none")
    assert saved_bytes("full") < 0.7 * everything
    # Three ordinary layers and two passes of the decoder keep nothing of queries x keys.
    num_targets = int((inputs[2] > 0).sum(dim=1).max())
    probabilities = 2 * config.num_attention_heads * 60 * (3 * 60 + 2 * num_targets) * 4
    assert everything - saved_bytes("selective") == probabilities
