"""Small models of every generation with random weights, their files, and the tools, for the tests of conversion."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from deberta_dist.models.classification import DebertaForReplacedTokenDetection, DebertaForSequenceClassification
from deberta_dist.models.masked_lm import DebertaForMaskedLM
from deberta_dist.models.presets import preset
from deberta_dist.models.published_state import separate_projections

FOLDER = Path(__file__).parents[2]


@dataclass(frozen=True)
class Model:
    """One kind of model: preset, task, fields that differ."""

    preset: str
    kind: str
    fields: dict[str, Any] = field(default_factory=dict)
    has_key_biases: bool = True


_V3 = {"conv_kernel_size": 0, "num_hidden_layers": 2}
MODELS = {
    "v1": Model("tiny-v1", "mlm", has_key_biases=False),
    "v1_with_key_biases": Model("tiny-v1", "mlm"),
    "v1_classification": Model(
        "tiny-v1", "classification", {"position_biased_input": True, "cls_drop_out": 0.3}, has_key_biases=False
    ),
    "v2": Model("tiny-v2", "mlm"),
    "v2_classification": Model("tiny-v2", "classification", {"pooler_hidden_act": "tanh", "type_vocab_size": 2}),
    "v2_separate": Model("tiny-v2", "mlm", {"share_att_key": False}),
    "v3": Model("tiny-v2", "mlm", _V3),
    "v3_discriminator": Model("tiny-v2", "rtd", _V3),
}


def make_model(name: str, *, seed: int = 0) -> nn.Module:
    """A model whose every parameter is random, in evaluation mode."""
    wanted = MODELS[name]
    config = preset(wanted.preset, **wanted.fields)
    if wanted.kind == "mlm":
        model: nn.Module = DebertaForMaskedLM(config)
    elif wanted.kind == "rtd":
        model = DebertaForReplacedTokenDetection(config)
    else:
        model = DebertaForSequenceClassification(config, num_labels=3)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(1.0 if key.endswith("LayerNorm.weight") else 0.0, 0.2, generator=generator)
            if key.endswith("key_proj.bias") and not wanted.has_key_biases:
                parameter.zero_()
    return model.eval().requires_grad_(False)


def published_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Its parameters by published name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def write(tensors: Mapping[str, Tensor], directory: Path, *, config: Mapping[str, Any]) -> Path:
    """A directory as a run exports it."""
    directory.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def export(model: nn.Module, directory: Path) -> Path:
    """Likewise, of a model."""
    return write(published_tensors(model), directory, config=model.config.to_dict())


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two state dictionaries are bit for bit equal."""
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


def fuse(tensors: Mapping[str, Tensor], *, head_size: int) -> dict[str, Tensor]:
    """The fused form of v1, made independently of the program: row by row, and checked by cutting it again."""
    fused: dict[str, Tensor] = {}
    for name, value in tensors.items():
        stem, middle, leaf = name.rpartition("attention.self.")
        stem += middle
        if leaf == "query_proj.weight":
            parts = [tensors[stem + f"{part}_proj.weight"] for part in ("query", "key", "value")]
            heads = range(value.shape[0] // head_size)
            rows = [part[head * head_size : (head + 1) * head_size] for head in heads for part in parts]
            fused[stem + "in_proj.weight"] = torch.cat(rows)
        elif middle and leaf in ("query_proj.bias", "value_proj.bias"):
            fused[stem + leaf[0] + "_bias"] = value
        elif leaf == "pos_key_proj.weight":
            fused[stem + "pos_proj.weight"] = value
        elif leaf.startswith("pos_query_proj."):
            fused[stem + leaf.replace("pos_query_proj", "pos_q_proj")] = value
        elif not (middle and leaf.endswith(("key_proj.bias", "key_proj.weight", "value_proj.weight"))):
            fused[name] = value
    assert same(separate_projections(fused, head_size=head_size), dict(tensors))
    return fused
