"""A run's TOML and DeepSpeed JSON in a temporary folder, to be spoiled by the tests."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

TOML = """\
[model]
preset = "tiny-v2"
num_hidden_layers = 4

[data]
train = "train.tokens"
validation = "sub/valid.tokens"
tokenizer = "/abs/spm.model"

[training]
global_batch_size = 32
micro_batch_size = 4
max_steps = 100

[optimizer]
learning_rate = 1e-3
betas = [0.9, 0.98]
gradient_clipping = 1

[parallel]
tensor_parallel_size = 2
pipeline_parallel_size = 2

[run]
directory = "../runs/x"
deepspeed = "ds.json"
"""


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    """A valid TOML."""
    path = tmp_path / "conf" / "run.toml"
    path.parent.mkdir()
    path.write_text(TOML)
    return path


@pytest.fixture
def spoil(toml: Path) -> Callable[[str, str], Path]:
    """Replaces one text of the TOML by another."""

    def replace(old: str, new: str) -> Path:
        text = toml.read_text()
        assert old in text
        toml.write_text(text.replace(old, new, 1))
        return toml

    return replace


@pytest.fixture
def ds_json(toml: Path) -> Callable[..., Path]:
    """Writes ds.json beside the TOML: the smallest valid one, with keys added or replaced."""

    def write(**keys: object) -> Path:
        path = toml.with_name("ds.json")
        path.write_text(json.dumps({"zero_optimization": {"stage": 3}} | keys))
        return path

    return write
