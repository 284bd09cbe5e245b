"""Weights under every name they were published with, and initial values by name."""

import pytest
import torch
from torch import Tensor

from deberta_dist.models.classification import DebertaForReplacedTokenDetection, DebertaForSequenceClassification
from deberta_dist.models.encoder import DebertaModel
from deberta_dist.models.initialisation import initial_tensor
from deberta_dist.models.masked_lm import DebertaForMaskedLM
from deberta_dist.models.presets import preset
from deberta_dist.models.published_state import separate_projections


@pytest.fixture
def v1(randomise):
    """A v1 model with zero key biases, as the fused layout has them."""
    model = randomise(DebertaForMaskedLM(preset("tiny-v1", attention_head_size=8)))
    for name, parameter in model.named_parameters():
        if name.endswith("key_proj.bias"):
            torch.nn.init.zeros_(parameter)
    return model


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_fused_layout_loads_bit_exactly_over_dirty_biases(v1, fuse, randomise):
    published = fuse(v1.state_dict(), head_size=8)
    assert any("in_proj" in name for name in published) and not any("query_proj" in name for name in published)
    names = list(published)
    other = randomise(DebertaForMaskedLM(v1.config), seed=9)
    other.load_state_dict(published, strict=True)
    assert list(published) == names
    assert same(dict(other.state_dict()), dict(v1.state_dict()))
    assert same(fuse(separate_projections(published, head_size=8), head_size=8), published)


def test_old_prefix_and_stray_position_ids(v1):
    published = {name.replace("deberta.", "bert."): value for name, value in v1.state_dict().items()}
    published["bert.embeddings.position_ids"] = torch.arange(64)[None]
    other = DebertaForMaskedLM(v1.config)
    other.load_state_dict(published, strict=True)
    assert same(dict(other.state_dict()), dict(v1.state_dict()))
    assert "bert.embeddings.position_ids" in published


@pytest.mark.parametrize("prefix", ["", "deberta.", "bert."])
def test_backbone_alone_accepts_any_prefix(v1, prefix):
    published = {prefix + name: value for name, value in v1.deberta.state_dict().items()}
    other = DebertaModel(v1.config)
    other.load_state_dict(published, strict=True)
    assert same(dict(other.state_dict()), dict(v1.deberta.state_dict()))


def test_what_is_missing_or_unknown_is_still_refused(v1):
    published = dict(v1.state_dict())
    published["deberta.encoder.layer.0.extra.weight"] = published.pop("lm_predictions.lm_head.bias")
    with pytest.raises(RuntimeError, match=r"(?s)lm_head.bias.*layer.0.extra"):
        DebertaForMaskedLM(v1.config).load_state_dict(published, strict=True)


@pytest.mark.parametrize(
    "model_class", [DebertaForMaskedLM, DebertaForSequenceClassification, DebertaForReplacedTokenDetection]
)
def test_start_is_a_function_of_seed_and_name(model_class):
    config = preset("tiny-v2")
    model = model_class(config, seed=4)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, initial_tensor(name, parameter.shape, seed=4, std=0.02)), name
    backbone = DebertaModel(config, seed=4)
    assert same(dict(backbone.state_dict()), dict(model.deberta.state_dict()))
    assert not same(dict(DebertaModel(config, seed=5).state_dict()), dict(backbone.state_dict()))


def test_initial_values():
    table = initial_tensor("deberta.embeddings.word_embeddings.weight", (1000, 64), seed=0, std=0.02)
    assert table.dtype == torch.float32 and abs(table.std() - 0.02) < 1e-4 and abs(table.mean()) < 1e-3
    same_table = initial_tensor("deberta.embeddings.word_embeddings.weight", (1000, 64), seed=0, std=0.02)
    assert torch.equal(table, same_table)
    other = initial_tensor("deberta.encoder.rel_embeddings.weight", (1000, 64), seed=0, std=0.02)
    assert not torch.equal(table, other)
    assert torch.all(initial_tensor("deberta.encoder.LayerNorm.weight", (4,), seed=0, std=0.02) == 1)
    assert torch.all(initial_tensor("lm_predictions.lm_head.bias", (4,), seed=0, std=0.02) == 0)
