"""The end of attention and feed-forward as one kernel, compiled or ours: the same numbers, and no batch compiled for again."""

import pytest
import torch

from deberta_dist import DebertaForMaskedLM
from deberta_dist.errors import ConfigError
from deberta_dist.kernels import rows
from deberta_dist.kernels.dropout import keep_probability, threshold
from deberta_dist.models import layers
from deberta_dist.models.layers import ResidualOutput, require_compiler
from deberta_dist.models.presets import preset


def outputs(module: ResidualOutput, batch: int, length: int, *, key: int | None) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(batch * 100 + length)
    x, rest = (torch.randn(batch, length, 64, generator=generator, requires_grad=True) for _ in range(2))
    module.zero_grad()
    y = module(x, rest, dropout_key=key)
    y.backward(torch.randn(y.shape, generator=generator))
    return [y.detach(), x.grad, rest.grad, *(parameter.grad.clone() for parameter in module.parameters())]


@pytest.mark.slow
def test_joined_gives_the_same_numbers_and_shapes_are_compiled_for_once() -> None:
    import torch._dynamo.utils as dynamo

    module = ResidualOutput(preset("tiny-v2"), input_size=64, site=3)
    compiled = []
    for training in (True, False):
        module.train(training)
        for batch, length in ((2, 9), (3, 7), (1, 30), (4, 11), (2, 2), (5, 8)):
            found = {}
            for module.joined in (False, True):
                found[module.joined] = outputs(module, batch, length, key=5)
            for one, other in zip(found[False], found[True], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
            compiled.append(dynamo.counters["stats"]["unique_graphs"])
    # A kernel for the first shape, and soon one for all others; the same again without dropout.
    assert compiled[2:6] == [compiled[2]] * 4 and compiled[8:] == [compiled[8]] * 4, compiled
    assert compiled[-1] <= 6


def test_our_kernel_in_the_whole_model_gives_the_numbers_of_torch(monkeypatch, gradients, relative_error) -> None:
    """In Triton's interpreter, without dropout: kernels and generators drop other elements."""
    config = preset("tiny-v2", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = DebertaForMaskedLM(config)
    ids = torch.randint(5, config.vocab_size, (2, 7), generator=torch.Generator().manual_seed(0))
    found = []
    for has_kernels in (False, True):
        monkeypatch.setattr(rows, "_has_kernels", lambda device: has_kernels)
        loss = model(ids, labels=ids, dropout_key=3).loss
        found.append((loss.detach(), gradients(model, loss)))
    (expected, expected_gradients), (actual, actual_gradients) = found
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    assert actual_gradients.keys() == expected_gradients.keys()
    total = sum(float(gradient.norm() ** 2) for gradient in expected_gradients.values()) ** 0.5
    for name, gradient in expected_gradients.items():
        if gradient.norm() > 1e-6 * total:  # less is rounding alone
            assert relative_error(actual_gradients[name], gradient) < 1e-5, name


def hashed_and_ours(monkeypatch, function) -> list[list[torch.Tensor]]:
    """Outputs and gradients of what is compiled on a GPU, and of our kernel, with one seed."""
    monkeypatch.setattr(rows, "_has_kernels", lambda device: True)
    p, seed, numbers, eps = 0.3, 77, rows.RowNumbers(3, 6, 3), 1e-7
    generator = torch.Generator().manual_seed(1)
    x, rest, outer = (torch.randn(2, 3, 48, generator=generator, requires_grad=True) for _ in range(3))
    bias, weight, norm_bias = (torch.randn(48, generator=generator, requires_grad=True) for _ in range(3))
    low, high = rows.row_words(6, seed=seed, numbers=numbers, device=torch.device("cpu"))
    limits = threshold(p), keep_probability(p)
    hashed = function((x + bias).flatten(0, 1), rest.flatten(0, 1), low, high, *limits, weight, norm_bias, eps)
    ours = rows.residual_norm(x, bias, rest, weight, norm_bias, eps=eps, dropout=rows.RowDropout(p, seed, numbers))
    leaves = [x, bias, rest, weight, norm_bias]
    return [[y.detach(), *torch.autograd.grad(y, leaves, outer.detach())] for y in (hashed.view(x.shape), ours)]


@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_is_compiled_on_a_gpu_drops_what_our_kernel_drops(monkeypatch, compiles: bool) -> None:
    function = layers._hashed_residual_norm
    for one, other in zip(*hashed_and_ours(monkeypatch, torch.compile(function) if compiles else function), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_without_a_compiler_it_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    require_compiler("cpu")
    monkeypatch.setattr(layers.shutil, "which", lambda _: None)
    with pytest.raises(ConfigError, match=r"training.compile = true needs a C\+\+ compiler"):
        require_compiler("cpu")
