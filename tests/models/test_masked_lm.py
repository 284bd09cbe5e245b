"""The masked language model: the decoder on targets alone, no targets, packed documents, dtypes, sizes."""

import pytest
import torch
from torch.nn import functional as F

from deberta_dist.errors import ConfigError
from deberta_dist.models import layers
from deberta_dist.models.dropout import Dropout
from deberta_dist.models.encoder import DebertaModel
from deberta_dist.models.masked_lm import DebertaForMaskedLM
from deberta_dist.models.presets import preset

VARIANTS = {
    "v1": preset("tiny-v1"),
    "v2": preset("tiny-v2"),
    "c2p": preset("tiny-v1", pos_att_type="c2p"),
    "p2c": preset("tiny-v1", pos_att_type="p2c"),
    "shared p2c": preset("tiny-v2", pos_att_type="p2c"),
    "odd heads": preset("tiny-v2", attention_head_size=24, num_attention_heads=3),
    "plain": preset("tiny-v2", decoder="plain", embedding_size=32),
    "biased": preset("tiny-v2", position_biased_input=True, embedding_size=32, type_vocab_size=2, conv_act="tanh"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_targets_alone_equal_all_positions(batch, randomise, relative_error, gradients, name):
    config = VARIANTS[name]
    model = randomise(DebertaForMaskedLM(config)).eval()
    input_ids, attention_mask, labels = batch(config)
    gathered = model(input_ids, attention_mask, labels)
    full = model(input_ids, attention_mask)
    assert full.loss is None and full.logits.shape == (int(attention_mask.sum()), config.vocab_size)
    of_targets = full.logits[(labels > 0)[attention_mask.bool()]]
    assert relative_error(gathered.logits, of_targets) < 1e-5
    loss = F.cross_entropy(of_targets, labels[labels > 0])
    assert relative_error(gathered.loss, loss) < 1e-5
    expected = gradients(model, loss)
    actual = gradients(model, gathered.loss)
    # Position key biases, and key biases of c2p alone, shift whole rows of scores: their gradient is rounding.
    scale = max(gradient.abs().max() for gradient in expected.values())
    assert actual.keys() == expected.keys()
    for parameter, gradient in expected.items():
        if gradient.abs().max() > 1e-6 * scale:
            assert relative_error(actual[parameter], gradient) < 1e-5, parameter
        else:
            assert actual[parameter].abs().max() < 1e-6 * scale, parameter


@pytest.mark.parametrize("name", ["v2", "biased"])
def test_no_target_gives_zero_loss_and_zero_gradients(batch, gradients, name):
    config = VARIANTS[name]
    model = DebertaForMaskedLM(config)
    input_ids, attention_mask, labels = batch(config)
    output = model(input_ids, attention_mask, torch.zeros_like(labels), dropout_key=1)
    assert output.loss == 0.0 and output.logits.shape == (0, config.vocab_size)
    assert all(torch.all(gradient == 0) for gradient in gradients(model, output.loss).values())
    stage = model.forward_stage(
        None,
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=torch.zeros_like(labels),
        layers=range(4),
        dropout_key=1,
    )
    assert stage.tolist() == [[0.0, 0.0, 0.0]] and stage.requires_grad


def test_a_sample_without_targets_does_not_disturb_the_other(batch, relative_error):
    config = VARIANTS["v2"]
    model = DebertaForMaskedLM(config).eval()
    input_ids, attention_mask, labels = batch(config)
    labels[1] = 0
    both = model(input_ids, attention_mask, labels)
    alone = model(input_ids[:1], attention_mask[:1], labels[:1])
    assert relative_error(both.logits, alone.logits) < 1e-5


def test_absent_mask_means_all_tokens(batch):
    config = VARIANTS["v2"]
    model = DebertaForMaskedLM(config).eval()
    input_ids, _, labels = batch(config)
    assert torch.equal(model(input_ids, labels=labels).logits, model(input_ids, torch.ones_like(labels), labels).logits)


def test_padding_has_no_influence(batch, relative_error):
    config = VARIANTS["v2"]
    model = DebertaForMaskedLM(config).eval()
    input_ids, attention_mask, labels = batch(config)
    padded = model(input_ids, attention_mask, labels).logits
    other = torch.where(attention_mask.bool(), input_ids, 77)
    assert torch.equal(padded, model(other, attention_mask, labels).logits)
    cut = model(input_ids[1:, :15], attention_mask[1:, :15], labels[1:, :15]).logits
    assert relative_error(padded[-len(cut) :], cut) < 1e-5


def test_documents_packed_in_one_sequence_are_blind_to_each_other(randomise, relative_error):
    config = preset("tiny-v2", conv_kernel_size=0)
    model = randomise(DebertaModel(config)).eval()
    generator = torch.Generator().manual_seed(2)
    first, second = (torch.randint(4, 512, (1, length), generator=generator) for length in (9, 13))
    mask = torch.block_diag(torch.ones(9, 9), torch.ones(13, 13), torch.zeros(2, 2)).long()[None]
    packed = torch.cat([first, second, torch.zeros(1, 2, dtype=torch.long)], dim=1)
    hidden = model(packed, mask).last_hidden_state
    assert relative_error(hidden[:, :9], model(first).last_hidden_state) < 1e-5
    assert relative_error(hidden[:, 9:22], model(second).last_hidden_state) < 1e-5


def test_packed_documents_in_the_decoder():
    config = preset("tiny-v2", conv_kernel_size=0)
    model = DebertaForMaskedLM(config).eval()
    generator = torch.Generator().manual_seed(2)
    packed = torch.randint(4, 512, (1, 20), generator=generator)
    mask = torch.block_diag(torch.ones(9, 9), torch.ones(11, 11)).long()[None]
    labels = torch.zeros_like(packed)
    labels[0, [2, 5]] = 7
    changed = packed.clone()
    changed[0, 9:] = 11
    assert torch.equal(model(packed, mask, labels).logits, model(changed, mask, labels).logits)
    assert not torch.equal(model(packed, None, labels).logits, model(changed, None, labels).logits)


def test_products_of_keys_and_table_may_be_made_by_every_pass(batch, monkeypatch, gradients):
    model = DebertaForMaskedLM(preset("tiny-v2"))
    inputs, made, plain = batch(model.config), [], layers.position_scores
    monkeypatch.setattr(layers, "position_scores", lambda *x, **scale: made.append(1) or plain(*x, **scale))
    expected = gradients(model, model(*inputs, dropout_key=1).loss)
    monkeypatch.setattr(layers, "prefers_position_scores", lambda *_, **__: False)
    actual = gradients(model, model(*inputs, dropout_key=1).loss)
    assert len(made) == 1
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert all((actual[name] - gradient).abs().max() < 1e-5 * largest for name, gradient in expected.items())


@pytest.mark.parametrize("name", ["v1", "v2", "biased"])
def test_pure_bfloat16(batch, gradients, name):
    config = VARIANTS[name]
    model = DebertaForMaskedLM(config)
    input_ids, attention_mask, labels = batch(config)
    expected = model(input_ids, attention_mask, labels, dropout_key=1)
    output = model.bfloat16()(input_ids, attention_mask, labels, dropout_key=1)
    assert output.logits.dtype == torch.bfloat16 and output.loss.dtype == torch.float32
    assert abs(output.loss - expected.loss) < 0.02 * expected.loss
    for parameter, gradient in gradients(model, output.loss).items():
        assert gradient.dtype == torch.bfloat16 and torch.isfinite(gradient).all(), parameter


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layer_norm_keeps_its_epsilon_in_half_precision(dtype):
    layer_norm = DebertaModel(VARIANTS["v1"]).embeddings.LayerNorm
    x = (torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * 3e-4).to(dtype)
    exact = layer_norm(x.float())
    assert torch.equal(layer_norm.to(dtype)(x), exact.to(dtype))


@pytest.mark.parametrize("length", [65, 100])
def test_longer_than_the_absolute_positions(batch, length):
    config = VARIANTS["v2"]
    model = DebertaForMaskedLM(config).eval()
    input_ids, attention_mask, labels = batch(config, length=length)
    with pytest.raises(ValueError, match="max_position_embeddings = 64"):
        model(input_ids, attention_mask, labels)
    assert torch.isfinite(model.deberta(input_ids, attention_mask).last_hidden_state).all()


def test_dropout_key_decides_everything(batch):
    config = VARIANTS["v2"]
    model = DebertaForMaskedLM(config).train()
    inputs = batch(config)
    first = model(*inputs, dropout_key=3).loss
    assert torch.equal(first, model(*inputs, dropout_key=3).loss)
    assert not torch.equal(first, model(*inputs, dropout_key=4).loss)
    assert not torch.equal(first, model(*inputs).loss)
    assert torch.equal(model.eval()(*inputs, dropout_key=3).loss, model(*inputs).loss)


def test_every_dropout_of_a_step_has_a_mask_of_its_own(batch, monkeypatch):
    config = VARIANTS["v2"]
    model = DebertaForMaskedLM(config).train()
    called = []
    seed = Dropout.seed

    def record(self, key):
        called.append(seed(self, key))
        return called[-1]

    monkeypatch.setattr(Dropout, "seed", record)
    model(*batch(config), dropout_key=9)
    # Embeddings 1, convolution 1, three ordinary layers of 4, the decoder: table once, two passes of 3.
    assert len(called) == len(set(called)) == 1 + 1 + 3 * 4 + 1 + 2 * 3


def test_unknown_recompute_mode_is_refused():
    with pytest.raises(ConfigError, match=r"'some'.*none, full, selective"):
        DebertaForMaskedLM(VARIANTS["v1"]).recompute = "some"
