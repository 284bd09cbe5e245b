"""Golden files of the published implementation, and small models and batches, for the tests of the models."""

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from deberta_dist.models.classification import DebertaForReplacedTokenDetection, DebertaForSequenceClassification
from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.masked_lm import DebertaForMaskedLM

GOLDEN = Path(__file__).parents[1] / "golden"


@dataclasses.dataclass(frozen=True)
class Golden:
    """One golden file: its configuration, and its tensors by kind and name."""

    kind: str
    config: DebertaConfig
    tensors: dict[str, Tensor]

    def group(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}

    def model(self) -> nn.Module:
        """The file's model with its weights, in evaluation mode."""
        if self.kind == "mlm":
            model = DebertaForMaskedLM(self.config)
        elif self.kind == "rtd":
            model = DebertaForReplacedTokenDetection(self.config)
        else:
            model = DebertaForSequenceClassification(self.config, num_labels=3)
        model.load_state_dict(self.group("weights."), strict=True)
        return model.eval()

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.tensors["in.input_ids"], self.tensors["in.attention_mask"], self.tensors["in.labels"]


@functools.lru_cache
def _load(name: str) -> Golden:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safetensors' files are no mappings)
    return Golden(metadata["kind"], DebertaConfig.from_dict(json.loads(metadata["config"])), tensors)


@pytest.fixture
def golden():
    """Loads a golden file by its stem."""
    return _load


@pytest.fixture
def relative_error():
    """Largest difference over the largest expected magnitude."""

    def error(actual: Tensor, expected: Tensor) -> float:
        assert actual.shape == expected.shape, f"{tuple(actual.shape)} instead of {tuple(expected.shape)}"
        return ((actual - expected).abs().max() / expected.abs().max()).item()

    return error


@pytest.fixture
def batch():
    """Two padded sequences with about a fifth of their tokens as targets: input_ids, attention_mask, labels."""

    def make(config: DebertaConfig, *, length: int = 20, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        input_ids = torch.randint(4, config.vocab_size, (2, length), generator=generator)
        attention_mask = torch.ones_like(input_ids)
        attention_mask[1, length - 5 :] = 0
        is_target = (torch.rand(2, length, generator=generator) < 0.2) & attention_mask.bool()
        is_target[0, 3] = is_target[0, 4] = True
        return input_ids * attention_mask, attention_mask, torch.where(is_target, input_ids, 0)

    return make


@pytest.fixture
def gradients():
    """Gradients of a scalar by parameter name; parameters without one are absent."""

    def compute(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    return compute


@pytest.fixture
def randomise():
    """Replaces every parameter by numbers large enough that attention is far from uniform, biases included."""

    def fill(model: nn.Module, *, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(1.0 if name.endswith("LayerNorm.weight") else 0.0, 0.2, generator=generator)
        return model

    return fill


@pytest.fixture
def fuse():
    """Makes the early v1 layout."""
    return _fuse


def _fuse(state: dict[str, Tensor], *, head_size: int) -> dict[str, Tensor]:
    """The early v1 layout of separate projections whose key biases are zero."""
    fused = {}
    for name, value in state.items():
        stem, _, leaf = name.rpartition("attention.self.")
        stem += "attention.self."
        if leaf == "query_proj.weight":
            parts = [state[stem + f"{part}_proj.weight"] for part in ("query", "key", "value")]
            parts = [part.unflatten(0, (-1, head_size)) for part in parts]
            fused[stem + "in_proj.weight"] = torch.stack(parts, dim=1).flatten(0, 2)
        elif leaf in ("query_proj.bias", "value_proj.bias"):
            fused[stem + leaf[0] + "_bias"] = value
        elif leaf.startswith("pos_query_proj."):
            fused[stem + leaf.replace("pos_query_proj", "pos_q_proj")] = value
        elif leaf == "pos_key_proj.weight":
            fused[stem + "pos_proj.weight"] = value
        elif not leaf.endswith(("key_proj.bias", "key_proj.weight", "value_proj.weight")):
            fused[name] = value
    return fused
