"""Every class of transformers' two DeBERTa modules, found by introspection: read, computed, written back."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.deberta import modeling_deberta
from transformers.models.deberta_v2 import modeling_deberta_v2

from deberta_dist.checkpoint.errors import CheckpointError
from deberta_dist.conversion.convert import convert
from deberta_dist.conversion.load import load_masked_lm, load_with_head
from deberta_dist.errors import ConfigError
from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.encoder import DebertaModel
from tests.conversion.small_models import call, export, make_model
from tests.corpus.test_tools import assert_one_line_error

CONVERT = "convert_checkpoint.py"
SIZES = {
    "vocab_size": 60,
    # Heads of 12: they divide scores by the root of 36, a number that float32, in which they keep it, has exactly.
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "relative_attention": True,
    "pos_att_type": "c2p|p2c",
}
NEWER = {"share_att_key": True, "norm_rel_ebd": "layer_norm", "position_buckets": 8, "conv_kernel_size": 3}


def classes() -> list[type]:
    """Those that compute something."""
    modules = (modeling_deberta, modeling_deberta_v2)
    found = [getattr(module, name) for module in modules for name in module.__all__]
    return [cls for cls in found if not cls.__name__.endswith("PreTrainedModel")]


CASES = [
    pytest.param(cls, biased, legacy, id=f"{cls.__name__}-{'biased' if biased else 'relative'}{'' if legacy else '-new'}")
    for cls in classes()
    for biased in (True, False)
    for legacy in ((True, False) if cls.__name__.endswith("MaskedLM") else (True,))
]


def make(cls: type, directory: Path, *, biased: bool = False, legacy: bool = True, **fields: object) -> nn.Module:
    """A small model with random weights, saved by transformers."""
    newer = NEWER if cls.__name__.startswith("DebertaV2") else {}
    names = {"id2label": {0: "x", 1: "y", 2: "z"}, "label2id": {"x": 0, "y": 1, "z": 2}}
    config = cls.config_class(**SIZES, **newer, position_biased_input=biased, legacy=legacy, **(({} if cls.__name__.endswith("QuestionAnswering") else names) | fields))
    torch.manual_seed(0)
    model = cls(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.normal_(1.0 if name.endswith("LayerNorm.weight") else 0.0, 0.3)
    model.save_pretrained(directory)
    return model


def batch(model: nn.Module) -> tuple[Tensor, Tensor]:
    shape = (2, 3, 12) if type(model).__name__.endswith("MultipleChoice") else (2, 12)
    input_ids = torch.randint(4, 60, shape, generator=torch.Generator().manual_seed(1))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, ..., 8:] = 0
    return input_ids * attention_mask, attention_mask


@torch.no_grad()
def theirs(model: nn.Module) -> list[Tensor]:
    """Outputs of real tokens, or of samples."""
    input_ids, attention_mask = batch(model)
    output = model(input_ids, attention_mask=attention_mask)
    named = [output[key] for key in ("logits", "start_logits", "end_logits", "last_hidden_state") if key in output]
    return [value[attention_mask.bool()] if value.shape[:2] == (2, 12) else value for value in named]


@torch.no_grad()
def ours(model: nn.Module, like: nn.Module) -> list[Tensor]:
    input_ids, attention_mask = batch(like)
    output = model(input_ids, attention_mask)
    named = [getattr(output, key, None) for key in ("logits", "start_logits", "end_logits", "last_hidden_state")]
    real = attention_mask.bool()
    return [v[real] if v.shape[:2] == (2, 12) else v for v in named if v is not None]


def load(directory: Path, name: str) -> nn.Module:
    """Our model of a converted directory."""
    if name.endswith("MaskedLM"):
        return load_masked_lm(directory)[0]
    if name.endswith("Model"):
        state = load_file(directory / "model.safetensors")
        model = DebertaModel(DebertaConfig.from_dict(json.loads((directory / "config.json").read_text())))
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert not unexpected and set(missing) <= {"embeddings.position_embeddings.weight"}
        return model.eval()
    return load_with_head(directory)[0]


@pytest.mark.parametrize(("cls", "biased", "legacy"), CASES)
def test_every_class_is_read_computed_and_written_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cls: type, biased: bool, legacy: bool
) -> None:
    name = cls.__name__
    model = make(cls, tmp_path / "source", biased=biased, legacy=legacy)
    decoder = "plain" if name.endswith("MaskedLM") and not biased else None
    convert(tmp_path / "source", tmp_path / "ours", to="deberta_dist", decoder=decoder)
    native = load(tmp_path / "ours", name)
    for mine, other in zip(ours(native, model), theirs(model), strict=True):
        assert mine.shape == other.shape and (mine - other).abs().max() < 1e-5
    convert(tmp_path / "ours", tmp_path / "back", to="huggingface")
    before, after = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("source", "back"))
    kept = ["architectures", "model_type", *(["legacy"] if name.endswith("MaskedLM") else [])]
    # A head without classes has no names of them.
    kept += ["id2label", "label2id"] if "id2label" in before and not name.endswith(("Model", "MaskedLM")) else []
    assert {key: after[key] for key in kept} == {key: before[key] for key in kept}
    first, second = (load_file(tmp_path / d / "model.safetensors") for d in ("source", "back"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    again, info = cls.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for mine, other in zip(theirs(again.eval()), theirs(model), strict=True):
        assert (mine - other).abs().max() < 1e-6
    # Their LayerNorm of v1 computes in float32 whatever it is given.
    monkeypatch.setattr(
        modeling_deberta.DebertaLayerNorm,
        "forward",
        lambda self, x: F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.variance_epsilon),
    )
    for mine, other in zip(ours(native.double(), model), theirs(model.double()), strict=True):
        assert (mine - other).abs().max() < 1e-10
