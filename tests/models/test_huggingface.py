"""Hidden states of Hugging Face's two classes, on real tokens and at distances where they are not defective."""

import pytest
import torch
import transformers

from deberta_dist.models.encoder import DebertaModel
from deberta_dist.models.presets import preset


def hugging_face(config, **extra):
    fields = {key: value for key, value in config.to_dict().items() if key != "padding_idx"}
    return {**fields, "pad_token_id": config.padding_idx, "attn_implementation": "eager", **extra}


@pytest.mark.parametrize("overrides", [{}, {"conv_kernel_size": 0, "share_att_key": False}, {"pos_att_type": "p2c"}])
def test_deberta_v2(batch, randomise, relative_error, overrides):
    config = preset("tiny-v2", **overrides)
    ours = randomise(DebertaModel(config)).eval()
    theirs = transformers.DebertaV2Model(transformers.DebertaV2Config(**hugging_face(config))).eval()
    state = {name: value for name, value in ours.state_dict().items() if "position_embeddings" not in name}
    theirs.load_state_dict(state, strict=True)
    _compare(ours, theirs, batch(config, length=60), relative_error)


@pytest.mark.parametrize("overrides", [{}, {"position_biased_input": True}, {"pos_att_type": "c2p"}])
def test_deberta_v1(batch, fuse, randomise, relative_error, overrides):
    config = preset("tiny-v1", **overrides)
    ours = randomise(DebertaModel(config)).eval()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name.endswith("key_proj.bias"):
                parameter.zero_()
    theirs = transformers.DebertaModel(transformers.DebertaConfig(**hugging_face(config))).eval()
    state = fuse(ours.state_dict(), head_size=config.head_size)
    if not config.position_biased_input:
        state.pop("embeddings.position_embeddings.weight")
    theirs.load_state_dict(state, strict=True)
    _compare(ours, theirs, batch(config, length=60), relative_error)


@torch.no_grad()
def _compare(ours, theirs, inputs, relative_error) -> None:
    input_ids, attention_mask, _ = inputs
    is_real = attention_mask.bool()
    expected = theirs(input_ids, attention_mask=attention_mask, output_hidden_states=True).hidden_states
    actual = ours(input_ids, attention_mask, output_hidden_states=True).hidden_states
    assert len(actual) == len(expected)
    for mine, other in zip(actual, expected, strict=True):
        assert relative_error(mine[is_real], other[is_real]) < 1e-5
