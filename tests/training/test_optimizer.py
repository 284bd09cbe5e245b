"""Which weights decay, and which AdamW runs where."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from deberta_dist import DebertaForMaskedLM, preset
from deberta_dist.config import Optimizer
from deberta_dist.errors import ConfigError
from deberta_dist.parallel.network import is_decayed
from deberta_dist.training.optimizer import apex_fused_adam, make_optimizer


@pytest.mark.parametrize("name", ["tiny-v1", "tiny-v2"])
def test_only_biases_and_layer_norms_are_not_decayed(name: str) -> None:
    with torch.device("meta"):
        model = DebertaForMaskedLM(preset(name))
    norms = {module_name for module_name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    assert norms
    for parameter_name, _ in model.named_parameters():
        module, _, leaf = parameter_name.rpartition(".")
        assert is_decayed(parameter_name) == (leaf == "weight" and module not in norms), parameter_name


def two_flats() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))]


def settings(name: str = "auto") -> Optimizer:
    return Optimizer(name=name, learning_rate=0.25, betas=(0.8, 0.9), eps=1e-5, weight_decay=0.125)


class FusedAdam(torch.optim.AdamW):
    """Takes what NVIDIA apex's takes and remembers it."""

    def __init__(self, params: Any, *, lr: float, betas: Any, eps: float, adam_w_mode: bool, weight_decay: float = 0.0):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.adam_w_mode = adam_w_mode


@pytest.fixture
def no_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, and neither apex, even where one is installed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("amp_C", "apex", "apex.optimizers"):
        monkeypatch.setitem(sys.modules, name, None)


def install_real_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    apex, optimizers = ModuleType("apex"), ModuleType("apex.optimizers")
    optimizers.FusedAdam = FusedAdam
    apex.optimizers = optimizers
    for name, module in (("amp_C", ModuleType("amp_C")), ("apex", apex), ("apex.optimizers", optimizers)):
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("name", ["auto", "apex_fused_adam"])
def test_apex_is_used_where_it_can_run(monkeypatch: pytest.MonkeyPatch, no_apex: None, name: str) -> None:
    install_real_apex(monkeypatch)
    flats = two_flats()
    optimizer = make_optimizer(flats, settings=settings(name))
    assert type(optimizer) is FusedAdam and optimizer.adam_w_mode
    check_groups(optimizer, flats)


def check_groups(optimizer: torch.optim.Optimizer, flats: list[nn.Parameter]) -> None:
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.125, 0.0]
    for group, flat in zip(optimizer.param_groups, flats, strict=True):
        assert len(group["params"]) == 1 and group["params"][0] is flat
        assert (group["lr"], tuple(group["betas"]), group["eps"]) == (0.25, (0.8, 0.9), 1e-5)


def test_torch_is_used_when_asked_for(monkeypatch: pytest.MonkeyPatch, no_apex: None) -> None:
    install_real_apex(monkeypatch)
    assert type(make_optimizer(two_flats(), settings=settings("torch_adamw"))) is torch.optim.AdamW


def test_apex_is_not_used_without_a_gpu(monkeypatch: pytest.MonkeyPatch, no_apex: None) -> None:
    install_real_apex(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert apex_fused_adam() is None
    assert type(make_optimizer(two_flats(), settings=settings())) is torch.optim.AdamW


@pytest.mark.parametrize("extension", [False, True], ids=["alone", "with-an-amp_C"])
def test_the_unrelated_apex_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, no_apex: None, tmp_path: Path, extension: bool
) -> None:
    package = tmp_path / "apex"
    package.mkdir()
    # What the package of the index does on a machine without its web framework: any exception at all.
    (package / "__init__.py").write_text("raise AttributeError('no such web framework')\n")
    if extension:
        (tmp_path / "amp_C.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("amp_C", "apex", "apex.optimizers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    flats = two_flats()
    optimizer = make_optimizer(flats, settings=settings())
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"]
    check_groups(optimizer, flats)
    with pytest.raises(ConfigError):
        make_optimizer(two_flats(), settings=settings("apex_fused_adam"))
    sys.modules.pop("amp_C", None)


def test_apex_with_no_compiled_extension_is_not_used(monkeypatch: pytest.MonkeyPatch, no_apex: None) -> None:
    install_real_apex(monkeypatch)
    monkeypatch.setitem(sys.modules, "amp_C", None)
    assert apex_fused_adam() is None


def test_apex_asked_for_but_absent_is_refused(no_apex: None) -> None:
    with pytest.raises(ConfigError, match='optimizer.name = "apex_fused_adam".*not installed.*"auto"'):
        make_optimizer(two_flats(), settings=settings("apex_fused_adam"))
