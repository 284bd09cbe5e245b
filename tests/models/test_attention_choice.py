"""What a log says of the attention that a model will run with."""

import pytest
import torch

from deberta_dist.kernels.fused import availability
from deberta_dist.models.attention_choice import describe_attention
from deberta_dist.models.presets import preset

CPU = torch.device("cpu")


def test_without_a_gpu():
    assert describe_attention(preset("tiny-v2"), dtype=torch.float32, device=CPU) == (
        "attention: portable (the fused attention needs an NVIDIA GPU; the tensors are on cpu)"
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "attention: fused"),
        ({"dtype": torch.float64}, "attention: portable (the fused attention takes torch.bfloat16"),
    ],
)
def test_what_the_kernels_support(monkeypatch, options, expected):
    # As on a GPU with Triton.
    monkeypatch.setattr("deberta_dist.kernels.choice.unavailable_reason", availability.unsupported_reason)
    config = preset("tiny-v2", attention_head_size=32)
    assert describe_attention(config, **{"dtype": torch.bfloat16, "device": CPU, **options}).startswith(expected)
