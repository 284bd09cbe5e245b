"""Parameters of every preset, on the meta device, against the published totals."""

import pytest
import torch

import deberta_dist
from deberta_dist.models.presets import PRESETS

BACKBONE_WITHOUT_POSITIONS = {
    "v1-base": 138_601_728,
    "v1-large": 405_163_008,
    "v1-xlarge": 757_804_032,
    "v2-xlarge": 884_593_152,
    "v2-xxlarge": 1_564_549_632,
    "v3-xsmall": 70_682_112,
    "v3-small": 141_304_320,
    "v3-base": 183_831_552,
    "v3-large": 434_012_160,
}
"""Hugging Face's count: no absolute positions where they are not added at the input, and v1 without key biases."""


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", BACKBONE_WITHOUT_POSITIONS)
def test_preset(name):
    config = PRESETS[name]
    with torch.device("meta"):
        model = deberta_dist.DebertaForMaskedLM(config)
    positions = config.max_position_embeddings * config.hidden_size
    key_biases = 0 if config.share_att_key else 2 * config.hidden_size * config.num_hidden_layers
    head = config.hidden_size * (config.hidden_size + 3) + config.vocab_size
    assert count(model.deberta) == BACKBONE_WITHOUT_POSITIONS[name] + positions + key_biases
    assert count(model) == count(model.deberta) + head
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not list(model.buffers())


def test_masked_language_models_of_the_release():
    with torch.device("meta"):
        assert count(deberta_dist.DebertaForMaskedLM(PRESETS["v2-xxlarge"])) == 1_567_828_068
        assert count(deberta_dist.DebertaForMaskedLM(PRESETS["v2-xlarge"])) == 887_871_588


def test_parts_of_the_largest():
    with torch.device("meta"):
        model = deberta_dist.DebertaModel(PRESETS["v2-xxlarge"])
    assert count(model.embeddings.word_embeddings) == 196_761_600
    assert count(model.encoder.layer[0]) == 28_331_520
    assert count(model.encoder.conv) == 7_082_496
    assert count(model.encoder.rel_embeddings) == 786_432


@pytest.mark.parametrize(
    "head",
    [
        "DebertaForSequenceClassification",
        "DebertaForReplacedTokenDetection",
        "DebertaForTokenClassification",
        "DebertaForQuestionAnswering",
        "DebertaForMultipleChoice",
    ],
)
def test_heads_are_built_on_meta(head):
    with torch.device("meta"):
        model = getattr(deberta_dist, head)(PRESETS["v3-large"])
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not list(model.buffers())
