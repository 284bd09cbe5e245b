"""What the model configuration reads, keeps and refuses."""

import json
import subprocess
import sys

import pytest

from deberta_dist.errors import ConfigError
from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.masked_lm import DebertaForMaskedLM
from deberta_dist.models.presets import PRESETS, preset

PUBLISHED_V2_XXLARGE = """{
  "model_type": "deberta-v2", "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
  "hidden_size": 1536, "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 512,
  "relative_attention": true, "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": true,
  "pos_att_type": "p2c|c2p", "layer_norm_eps": 1e-7, "conv_kernel_size": 3, "conv_act": "gelu",
  "max_relative_positions": -1, "position_biased_input": false, "num_attention_heads": 24, "attention_head_size": 64,
  "num_hidden_layers": 48, "type_vocab_size": 0, "vocab_size": 128100
}"""


def test_published_file_is_the_preset():
    assert DebertaConfig.from_dict(json.loads(PUBLISHED_V2_XXLARGE)) == PRESETS["v2-xxlarge"]


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip_through_json(name):
    config = PRESETS[name]
    assert DebertaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_position_terms_as_string_or_list():
    assert preset("tiny-v2", pos_att_type="c2p | P2C") == preset("tiny-v2", pos_att_type=["c2p", "p2c"])


def test_absent_fields_mean_what_published_code_assumes():
    config = DebertaConfig.from_dict({"vocab_size": 8, "relative_attention": True})
    assert config.position_biased_input and not config.share_att_key
    assert (config.conv_act, config.conv_kernel_size, config.pos_att_type) == ("tanh", 0, ("c2p",))
    assert (config.head_size, config.embedding_width, config.num_position_rows) == (64, 768, 1024)


def test_nested_pooling_and_synonyms():
    config = DebertaConfig.from_dict(
        {
            **PRESETS["tiny-v1"].to_dict(),
            "pooling": {"hidden_size": 64, "hidden_act": "tanh", "dropout": 0.2},
            "cls_dropout": 0.3,
            "id2label": {"0": "no"},
        }
    )
    assert (config.pooler_hidden_size, config.pooler_hidden_act, config.pooler_dropout) == (64, "tanh", 0.2)
    assert config.cls_drop_out == 0.3


def test_derived_sizes():
    config = preset("tiny-v2", attention_head_size=8, max_relative_positions=40)
    assert (config.head_size, config.all_head_size, config.max_relative_distance) == (8, 32, 40)
    assert config.num_position_rows == 32 and config.uses_enhanced_mask_decoder
    # What says the same as nothing is nothing: a run may be given it afterwards, and a copy may add positions at the input.
    assert preset("tiny-v2", decoder="emd") == preset("tiny-v2") and "decoder" not in config.to_dict()
    plain = preset("tiny-v2", decoder="plain")
    assert DebertaConfig.from_dict(plain.to_dict()) == plain and not plain.uses_enhanced_mask_decoder
    assert not plain.has_absolute_positions and preset("tiny-v2", position_biased_input=True).has_absolute_positions
    assert preset("tiny-v1", max_relative_positions=40).num_position_rows == 80


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"hiden_size": 64}, ["'hiden_size'", "'hidden_size'"]),
        ({"pos_att_type": "c2p|p2p"}, ["p2p", "cannot run"]),
        ({"pos_att_type": ""}, ["pos_att_type"]),
        ({"pos_att_type": "c2c"}, ["'c2c'"]),
        ({"num_attention_heads": 5}, ["num_attention_heads = 5", "hidden_size = 64"]),
        ({"attention_head_size": 0}, ["attention_head_size = 0"]),
        ({"relative_attention": False}, ["relative_attention"]),
        ({"position_buckets": 126}, ["position_buckets = 126"]),
        ({"conv_kernel_size": 4}, ["conv_kernel_size = 4"]),
        ({"conv_groups": 3}, ["conv_groups = 3"]),
        ({"hidden_act": "gelo"}, ["'gelo'"]),
        ({"norm_rel_ebd": "batch_norm"}, ["'batch_norm'"]),
        ({"hidden_dropout_prob": 1.0}, ["hidden_dropout_prob = 1.0"]),
        ({"hidden_size": "64"}, ["hidden_size = '64'", "int"]),
        ({"share_att_key": 1}, ["share_att_key = 1", "bool"]),
        ({"pooling": {"hiden_act": "tanh"}}, ["pooling.hiden_act"]),
        ({"pooler_hidden_size": 32}, ["pooler_hidden_size = 32"]),
        ({"padding_idx": 512}, ["padding_idx = 512"]),
    ],
)
def test_refusals_name_the_value(overrides, words):
    with pytest.raises(ConfigError) as refusal:
        preset("tiny-v2", **overrides)
    for word in words:
        assert word in str(refusal.value)


def test_vocabulary_size_is_required():
    with pytest.raises(ConfigError, match="vocab_size is missing"):
        DebertaConfig.from_dict({"relative_attention": True})


def test_unknown_preset_lists_the_known():
    with pytest.raises(ConfigError, match=r"'v4-base'.*v2-xxlarge"):
        preset("v4-base")


@pytest.mark.parametrize("overrides", [{"num_hidden_layers": 1}, {"embedding_size": 32}])
def test_enhanced_mask_decoder_refuses(overrides):
    with pytest.raises(ConfigError, match=next(iter(overrides))):
        DebertaForMaskedLM(preset("tiny-v2", **overrides))
    DebertaForMaskedLM(preset("tiny-v2", position_biased_input=True, **overrides))


def test_reading_a_configuration_does_not_import_torch():
    program = "import sys, deberta_dist; deberta_dist.preset('v2-xxlarge'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
