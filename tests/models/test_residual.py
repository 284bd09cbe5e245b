"""The end of attention and feed-forward as one compiled kernel: the same numbers, and no batch compiled for again."""

import pytest
import torch

from deberta_dist.errors import ConfigError
from deberta_dist.models import residual
from deberta_dist.models.presets import preset
from deberta_dist.models.residual import ResidualOutput, require_compiler


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


def test_without_a_compiler_it_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    require_compiler("cpu")
    monkeypatch.setattr(residual.shutil, "which", lambda _: None)
    with pytest.raises(ConfigError, match=r"training.compile = true needs a C\+\+ compiler"):
        require_compiler("cpu")
