"""What a user may ask for of the attention, and what a log says of the one that a model will run with."""

import pytest
import torch

from deberta_dist import DebertaForMaskedLM
from deberta_dist.errors import ConfigError
from deberta_dist.kernels.fused import availability
from deberta_dist.models.attention_dispatch import describe_attention, require_attention, set_attention
from deberta_dist.models.layers import DisentangledSelfAttention
from deberta_dist.models.presets import preset

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """As on a GPU with a Triton of this version; tensors stay on the CPU."""

    def pretend(triton: str | None) -> None:
        monkeypatch.setattr(availability, "triton_version", lambda: triton)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *size, device=None, **options: empty(*size, device="meta", **options))
        monkeypatch.setattr(torch.Tensor, "device", property(lambda self: GPU))
        monkeypatch.setattr("deberta_dist.models.attention_dispatch.relative_positions", _positions)

    return pretend


def _positions(**options):
    from deberta_dist.models.positions import relative_positions

    return relative_positions(**{**options, "device": CPU})


def describe(wish="auto", *, config=None, **options):
    return describe_attention(wish, config or preset("tiny-v2"), **{"dtype": torch.float32, "device": CPU, **options})


def test_without_a_gpu():
    assert describe() == "attention: portable (the fused attention needs an NVIDIA GPU; the tensors are on cpu)"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "attention: fused"),
        ({"dtype": torch.float64}, "attention: portable (the fused attention takes torch.bfloat16"),
    ],
)
def test_what_the_kernels_support(monkeypatch, options, expected):
    # As on a GPU with Triton.
    monkeypatch.setattr("deberta_dist.models.attention_dispatch.unavailable_reason", availability.unsupported_reason)
    config = preset("tiny-v2", attention_head_size=32)
    assert describe(config=config, **{"dtype": torch.bfloat16, **options}).startswith(expected)


@pytest.mark.parametrize(
    ("triton", "head_size", "expected"),
    [
        ("3.6.0", 32, "attention: fused"),
        ("3.5.1", 32, "warning: attention: portable, which is slower than fused: the fused attention needs Triton 3.6"),
        (None, 32, "warning: attention: portable, which is slower than fused: the fused attention needs Triton: pip"),
        ("3.9.0", 48, "warning: attention: portable, which is slower than fused: the fused attention takes heads of"),
    ],
)
def test_a_gpu_that_does_without_is_a_warning(gpu, triton, head_size, expected):
    gpu(triton)
    config = preset("tiny-v2", attention_head_size=head_size)
    assert describe(config=config, dtype=torch.bfloat16, device=GPU).startswith(expected)


def test_a_wish_is_a_must(gpu):
    options = {"dtype": torch.bfloat16, "where": "run.toml: training.attention"}
    for wish in ("auto", "portable", "reference"):
        require_attention(wish, preset("tiny-v2"), device=CPU, **options)
    with pytest.raises(ConfigError, match='run.toml: training.attention = "fused" is not available: .* needs an NVIDIA GPU'):
        require_attention("fused", preset("tiny-v2"), device=CPU, **options)
    gpu("3.6.0")
    require_attention("fused", preset("tiny-v2", attention_head_size=64), device=GPU, **options)


def test_what_was_asked_for_is_no_warning():
    assert describe("portable") == "attention: portable, as asked for"


@pytest.mark.parametrize("wish", ["portable", "reference"])
def test_every_layer_does_what_was_asked(wish):
    torch.manual_seed(0)
    config = preset("tiny-v2", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = DebertaForMaskedLM(config).double()
    ids = torch.randint(5, 90, (2, 12))
    expected = model(ids, labels=ids).loss
    set_attention(model, wish)
    layers = [module for module in model.modules() if isinstance(module, DisentangledSelfAttention)]
    assert {layer.implementation for layer in layers} == {wish} and len(layers) == config.num_hidden_layers
    torch.testing.assert_close(model(ids, labels=ids).loss, expected, rtol=1e-12, atol=0)
    set_attention(model, "auto")
    assert {layer.implementation for layer in layers} == {None}


def test_what_cannot_be_had_is_not_replaced():
    model = DebertaForMaskedLM(preset("tiny-v2"))
    set_attention(model, "fused")
    with pytest.raises(ValueError, match="implementation = 'fused' is not available"):
        model(torch.ones(1, 4, dtype=torch.int64))
