"""Small parts of training: learning rate, optimizer, metrics, FLOPs, flat layout."""

import json
import re
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
from deberta_dist.flat_layout import ALIGNMENT, lay_out
from deberta_dist.training.flops import device_peak_flops, forward_flops
from deberta_dist.training.lr_schedule import learning_rate
from deberta_dist.training.metrics import MetricsLog, StepMetrics, format_seconds
from deberta_dist.training.optimizer import apex_fused_adam, is_decayed, make_optimizer

# --- learning rate


def test_learning_rate_climbs_to_the_peak_and_falls_to_nothing() -> None:
    rates = [learning_rate(step, peak=2.0, warmup_steps=4, max_steps=12) for step in range(13)]
    assert rates == [0.5, 1.0, 1.5, 2.0, 2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25, 0.0]


def test_learning_rate_without_warmup_starts_at_the_peak() -> None:
    assert [learning_rate(step, peak=1.0, warmup_steps=0, max_steps=4) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]


def test_learning_rate_of_nothing_but_warmup() -> None:
    assert [learning_rate(step, peak=1.0, warmup_steps=2, max_steps=2) for step in range(2)] == [0.5, 1.0]


# --- optimizer


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


# --- metrics


def one_step(step: int, **changes: Any) -> StepMetrics:
    values = {"step": step, "loss": 7.5, "grad_norm": 1.25, "lr": 1e-4, "tokens_per_second": 12345.6, "mfu": 0.4321,
              "consumed_samples": 8 * step}  # fmt: skip
    return StepMetrics(**(values | changes))


def open_log(directory: Path, **changes: Any) -> MetricsLog:
    return MetricsLog(directory, **({"is_writer": True, "max_steps": 100, "print_every": 10} | changes))


def test_every_step_is_on_disk_and_some_on_screen(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log = open_log(tmp_path)
    for step in range(1, 101):
        log.step(one_step(step))
    # Written line by line: what happened is there before the end.
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    log.close()
    assert [line["step"] for line in written] == list(range(1, 101))
    assert written[1] == {"step": 2, "loss": 7.5, "grad_norm": 1.25, "lr": 1e-4, "tokens_per_second": 12345.6,
                          "mfu": 0.4321, "consumed_samples": 16, "skipped": False}  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert [int(re.match(r"step +(\d+)/100 \| ", line)[1]) for line in lines] == [1, *range(10, 101, 10)]
    assert "loss  7.5000 | lr 1.00e-04 | grad norm    1.250 |    12,346 tokens/s | mfu 43.2% | left " in lines[1]
    assert lines[0].endswith("left ..."), "one step tells nothing of the others"
    assert lines[-1].endswith("left 00:00")


def test_unknown_utilisation_is_null_and_not_on_screen(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log = open_log(tmp_path)
    log.step(one_step(1, mfu=None))
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["mfu"] is None
    assert "mfu" not in capsys.readouterr().out


@pytest.mark.parametrize("step", [1, 7, 10, 100])
def test_a_skipped_step_is_always_told(tmp_path: Path, capsys: pytest.CaptureFixture, step: int) -> None:
    log = open_log(tmp_path)
    log.step(one_step(step, skipped=True, grad_norm=None))
    log.close()
    written = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert written["skipped"] is True and written["grad_norm"] is None
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"step {step}: skipped on every rank") and "weights unchanged" in line


def test_evaluation_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log = open_log(tmp_path)
    log.evaluation(step=20, loss=2.5, accuracy=0.125, num_targets=12345)
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 20, "valid_loss": 2.5, "valid_accuracy": 0.125, "valid_targets": 12345}  # fmt: skip
    assert capsys.readouterr().out == "step 20: held-out loss 2.5000, accuracy 12.50% over 12,345 masked tokens\n"


def test_other_ranks_write_and_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log = open_log(tmp_path, is_writer=False)
    log.step(one_step(1))
    log.step(one_step(2, skipped=True, grad_norm=None))
    log.evaluation(step=2, loss=1.0, accuracy=0.5, num_targets=3)
    log.say("anything")
    log.close()
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "00:00"), (59.6, "01:00"), (184, "03:04"), (7384, "02:03:04"), (93784, "1d 02:03:04"), (86400, "1d 00:00:00"),
     (86460, "1d 00:01:00")],
)  # fmt: skip
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


# --- FLOPs


def training_flops(**changes: Any) -> float:
    options = {"max_seq_length": 512, "micro_batch_size": 4, "mask_probability": 0.15} | changes
    return forward_flops(preset("v2-xxlarge"), **options).training


@pytest.mark.parametrize(("micro_batch", "billions"), [(1, 10.53), (2, 9.85), (4, 9.51), (8, 9.34), (16, 9.26)])
def test_flops_of_the_largest_model(micro_batch: int, billions: float) -> None:
    assert training_flops(micro_batch_size=micro_batch) == pytest.approx(billions * 1e9, rel=1e-3)


def test_flops_of_one_layer_by_hand() -> None:
    units = forward_flops(preset("v2-xxlarge"), max_seq_length=512, micro_batch_size=4, mask_probability=0.15).units
    hidden, rows, length = 1536, 512, 512
    weights = 4 * hidden * hidden + 2 * hidden * 4 * hidden
    scores = 2 * length * hidden + 2 * rows * hidden  # QK and PV; c2p and p2c, each over the whole table
    table = 2 * rows * hidden * hidden / (4 * length)  # its two projections, shared by the micro-batch
    assert units[1] == pytest.approx(2 * (weights + scores + table), rel=1e-12)
    assert units[0] - units[1] == 2 * hidden * hidden * 3  # the convolution
    assert len(units) == 48 and len(set(units[1:-1])) == 1


def test_flops_count_products_of_the_real_model() -> None:
    """A plain model counted by torch itself, where both count the same: no decoder, one sequence, no bucket waste."""
    from torch.utils.flop_counter import FlopCounterMode

    config = preset("tiny-v1", position_biased_input=True, max_position_embeddings=64)
    model = DebertaForMaskedLM(config, seed=1).eval()
    ids = torch.randint(4, config.vocab_size, (1, 64))
    labels = torch.zeros_like(ids)
    labels[:, :16] = ids[:, :16]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, torch.ones_like(ids), labels)
    expected = forward_flops(config, max_seq_length=64, micro_batch_size=1, mask_probability=0.25).forward * 64
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_device_peaks() -> None:
    assert device_peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert device_peak_flops("NVIDIA A100-SXM4-40GB") == 312e12
    assert device_peak_flops("cpu") is None


# --- flat layout

GROUPS = (is_decayed, lambda name: not is_decayed(name))


@pytest.mark.parametrize("data_parallel_size", [1, 2, 3, 8])
def test_flat_places_are_aligned_and_do_not_overlap(data_parallel_size: int) -> None:
    shapes = {"a.weight": (3, 5), "a.bias": (65,), "b.weight": (64,), "c.LayerNorm.weight": (1,), "d.weight": (7, 2, 3)}
    layout = lay_out(shapes, groups=GROUPS, data_parallel_size=data_parallel_size)
    assert list(layout.places) == list(shapes)
    flats = [torch.zeros(size) for size in layout.sizes]
    for name, view in layout.views(flats).items():
        index, offset, shape = layout.places[name]
        assert shape == shapes[name] == tuple(view.shape)
        assert index == (0 if is_decayed(name) else 1)
        assert offset % ALIGNMENT == 0
        view += 1  # a view, not a copy
    assert [flat.max().item() for flat in flats] == [1.0, 1.0], "two tensors overlap"
    assert sum(flat.sum().item() for flat in flats) == sum(torch.Size(shape).numel() for shape in shapes.values())
    for size in layout.sizes:
        assert size % (ALIGNMENT * data_parallel_size) == 0, "a shard is not aligned"


def test_an_empty_group_is_one_row_of_padding() -> None:
    layout = lay_out({"a.weight": (2, 2)}, groups=GROUPS, data_parallel_size=4)
    assert layout.sizes == (ALIGNMENT * 4, ALIGNMENT * 4)
    assert lay_out({}, groups=GROUPS, data_parallel_size=2).sizes == (ALIGNMENT * 2,) * 2


def test_every_name_belongs_to_exactly_one_group() -> None:
    for groups in ((lambda name: False,), (lambda name: True, lambda name: True)):
        with pytest.raises(ValueError):
            lay_out({"a": (1,)}, groups=groups, data_parallel_size=1)
