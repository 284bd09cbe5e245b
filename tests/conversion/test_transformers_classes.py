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
from tests.conversion.small_models import export, make_model
from tests.preparation.test_tools import assert_one_line_error
from tests.tool_calls import call

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
    for biased in ((True, False) if cls.__name__.endswith(("MaskedLM", "Model")) else (False,))
    for legacy in ((True, False) if cls.__name__.endswith("MaskedLM") else (True,))
]


def make(cls: type, directory: Path, *, biased: bool = False, legacy: bool = True, **fields: object) -> nn.Module:
    """A small model with random weights, saved by transformers."""
    newer = NEWER if cls.__name__.startswith("DebertaV2") else {}
    names = {"id2label": {0: "x", 1: "y", 2: "z"}, "label2id": {"x": 0, "y": 1, "z": 2}}
    given = {**SIZES, **newer, **({} if cls.__name__.endswith("QuestionAnswering") else names), **fields}
    config = cls.config_class(position_biased_input=biased, legacy=legacy, **given)
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


def edit(source: Path, target: Path, *, add: dict[str, Tensor], drop: tuple[str, ...] = (), **config: object) -> Path:
    """A copy of a checkpoint with other weights."""
    tensors = load_file(source / "model.safetensors")
    target.mkdir()
    added = {key: value.clone() for key, value in add.items()}
    save_file({k: v for k, v in tensors.items() if k not in drop} | added, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | config))
    return target


ZEROS = torch.zeros(24, 24)
UNKNOWN = {
    # case: (class whose file it is, added, dropped, words of the error, patterns that leave the backbone)
    "other keys": ("Model", {"classifier.dense.weight": ZEROS, "classifier.out_proj.weight": ZEROS}, (),
                   "2 keys .* classifier.dense.weight, classifier.out_proj.weight; .*--allow-unmapped", ("classifier.*",)),
    "a published head without a class": ("ForTokenClassification", {"proj.weight": ZEROS, "proj.bias": ZEROS[0]}, (),
                                         "4 keys .*classifier.bias.*--allow-unmapped", ("proj.*", "classifier.*")),
    "other shape": ("ForTokenClassification", {"classifier.weight": torch.zeros(3, 24, 2)}, (),
                    r"classifier.weight is \[3, 24, 2\].*--allow-unmapped 'classifier.\*'", ("*",)),
    "half a head": ("ForSequenceClassification", {}, ("pooler.dense.weight", "pooler.dense.bias"),
                    r"pooler.dense.weight is missing.*--allow-unmapped 'classifier.\*'", ("classifier.*",)),
    "many": ("Model", {f"my.{i}.weight": torch.zeros(1) for i in range(9)}, (),
             "9 keys .* my.0.weight, .* and 5 more; .*--allow-unmapped", ("my.*",)),
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_of_an_unknown_head_the_backbone_converts(tmp_path: Path, name: str) -> None:
    suffix, add, drop, words, patterns = UNKNOWN[name]
    make(getattr(modeling_deberta_v2, f"DebertaV2{suffix}"), tmp_path / "plain")
    source = edit(tmp_path / "plain", tmp_path / "source", add=add, drop=drop, architectures=[f"DebertaV2{suffix}"])
    with pytest.raises(CheckpointError, match=words):
        convert(source, tmp_path / "no", to="deberta_dist")
    if len(patterns) > 1:  # what is left of a head is not taken for another
        with pytest.raises(CheckpointError, match="not explained"):
            convert(source, tmp_path / "no", to="deberta_dist", allow_unmapped=patterns[:1])
    assert not (tmp_path / "no").exists()
    report = convert(source, tmp_path / "yes", to="deberta_dist", allow_unmapped=patterns)
    found, given = load_file(tmp_path / "yes/model.safetensors"), load_file(source / "model.safetensors")
    assert all(key.startswith("deberta.") for key in found)
    backbone = [key for key in given if key.startswith(("deberta.", "embeddings.", "encoder."))]
    assert len(found) == len(backbone) == len(given) - len(report["dropped"])


def test_patterns_name_every_key(tmp_path: Path) -> None:
    """Two keys of one name, keys beside a head that stays, and never what a model needs."""
    make(modeling_deberta_v2.DebertaV2ForTokenClassification, tmp_path / "plain")
    added = {"module.classifier.weight": torch.zeros(3, 24), "crf.transitions": torch.zeros(3, 3)}
    source = edit(tmp_path / "plain", tmp_path / "source", add=added)
    with pytest.raises(CheckpointError, match="are both classifier.weight; .*--allow-unmapped"):
        convert(source, tmp_path / "no", to="huggingface")
    report = convert(source, tmp_path / "yes", to="huggingface", allow_unmapped=["module.*", "crf.*"])
    assert {item["key"] for item in report["dropped"]} == set(added)
    assert "crf.transitions left out beside the token head" in "".join(report["warnings"])
    report = convert(tmp_path / "plain", tmp_path / "all", to="huggingface", allow_unmapped=["*"])
    assert not report["dropped"] and report["target"]["format"] == "huggingface (DebertaV2ForTokenClassification)"


def test_heads_that_a_target_has_no_place_for(tmp_path: Path) -> None:
    for cls in (modeling_deberta_v2.DebertaV2ForTokenClassification, modeling_deberta_v2.DebertaV2ForQuestionAnswering):
        make(cls, tmp_path / cls.__name__)
        with pytest.raises(ConfigError, match="the published code has no model with this head"):
            convert(tmp_path / cls.__name__, tmp_path / "no", to="official")
    # One that the published code has: the class survives the way there and back, of v1 in their v2 classes.
    make(modeling_deberta_v2.DebertaV2ForMultipleChoice, tmp_path / "choice", share_att_key=False, position_buckets=-1,
         conv_kernel_size=0, norm_rel_ebd="none")  # fmt: skip
    convert(tmp_path / "choice", tmp_path / "official", to="official")
    report = convert(tmp_path / "official", tmp_path / "back", to="huggingface")
    assert report["target"]["format"] == "huggingface (DebertaV2ForMultipleChoice)"
    with pytest.raises(ConfigError, match="no ForMultipleChoice"):
        convert(tmp_path / "official", tmp_path / "no", to="huggingface", is_fused=True)
    three = edit(tmp_path / "DebertaV2ForQuestionAnswering", tmp_path / "three",
                 add={"qa_outputs.weight": torch.zeros(3, 24), "qa_outputs.bias": torch.zeros(3)})  # fmt: skip
    with pytest.raises((ConfigError, CheckpointError), match=r"qa_outputs.weight (has 3 rows|is \[3, 24\])"):
        convert(three, tmp_path / "no", to="deberta_dist")


def test_a_masked_language_model_that_does_not_say_how_it_decodes(tmp_path: Path) -> None:
    """Asked for where it matters, kept open where it does not, told by a flag, and never asserted."""
    make(modeling_deberta_v2.DebertaV2ForMaskedLM, tmp_path / "source")
    for to in ("deberta_dist", "official"):
        result = call(CONVERT, "source", "no", "--to", to, cwd=tmp_path)
        assert_one_line_error(result, code=2, words="give --decoder plain if with Hugging Face's classes")
    with pytest.raises(ConfigError, match="does not say how its masked language model was trained"):
        load_masked_lm(tmp_path / "source")
    assert load_masked_lm(tmp_path / "source", decoder="plain")[0].config.decoder == "plain"
    convert(tmp_path / "source", tmp_path / "open", to="huggingface")
    card = (tmp_path / "open/README.md").read_text()
    assert "does not say whether it was trained by Hugging Face's classes" in card and "It was trained" not in card
    assert "masked_lm_decoder" not in json.loads((tmp_path / "open/config.json").read_text())

    assert call(CONVERT, "source", "plain", "--to", "deberta_dist", "--decoder", "plain", cwd=tmp_path).returncode == 0
    assert json.loads((tmp_path / "plain/config.json").read_text())["decoder"] == "plain"
    convert(tmp_path / "plain", tmp_path / "known", to="huggingface")
    assert "trained without an enhanced mask decoder" in (tmp_path / "known/README.md").read_text()
    # Their configuration class keeps the key, so that a save by transformers does not lose what is known.
    again = transformers.DebertaV2ForMaskedLM.from_pretrained(tmp_path / "known")
    again.save_pretrained(tmp_path / "saved")
    assert load_masked_lm(tmp_path / "saved")[0].config.decoder == "plain"
    with pytest.raises(ConfigError, match="trained without it: convert to huggingface or deberta_dist"):
        convert(tmp_path / "plain", tmp_path / "no", to="official")
    for name, decoder, words in (("plain", "emd", "contradicts the checkpoint"), ("biased", "emd", "contradicts position"),
                                 ("base", "plain", "this is none")):  # fmt: skip
        if name == "biased":
            make(modeling_deberta.DebertaForMaskedLM, tmp_path / name, biased=True)
        if name == "base":
            make(modeling_deberta_v2.DebertaV2Model, tmp_path / name)
        with pytest.raises(ConfigError, match=words):
            convert(tmp_path / name, tmp_path / "no", to="deberta_dist", decoder=decoder)
    # With a position table nobody has to ask: only the enhanced mask decoder has one.
    convert(export(make_model("v2"), tmp_path / "run"), tmp_path / "emd", to="huggingface")
    assert json.loads((tmp_path / "emd/config.json").read_text())["masked_lm_decoder"] == "emd"
    assert load_masked_lm(tmp_path / "emd")[0].config.uses_enhanced_mask_decoder
    report = convert(tmp_path / "emd", tmp_path / "forced", to="deberta_dist", decoder="plain")
    assert any("although config.json says emd" in warning for warning in report["warnings"])
    assert load_masked_lm(tmp_path / "forced")[0].config.decoder == "plain"
