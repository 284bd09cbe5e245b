"""Backward passes: numbers, threads, and whose an event of autograd is."""

import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.harness import run_ranks
from tests.pretend_device.device import PretendDevice
from tests.pretend_device.planting import only, planted_line


class Waiting(torch.autograd.Function):
    """Twice its input, with a fault in each backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, threads: set[int]) -> Tensor:
        ctx.threads = threads
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.threads.add(threading.get_ident())
        gradient.sum().item()  # planted
        return gradient * 2, None


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.backward_threads: set[int] = set()

    def forward(self, x: Tensor, *, recompute: bool = False) -> Tensor:
        x = checkpoint(self.begin, x, use_reentrant=False) if recompute else self.begin(x)
        return Waiting.apply(self.second(x), self.backward_threads)

    def begin(self, x: Tensor) -> Tensor:
        x = self.first(x)  # planted
        return x.relu()


def run_autograd() -> dict[str, Any]:
    """Two steps of two micro-batches on the device and, in the same words, on the CPU; the second step recomputes."""
    results: dict[str, Any] = {}
    with PretendDevice() as device:
        for where in ("cpu", "cuda"):
            torch.manual_seed(3)
            model = Model().to(where)
            if where == "cuda":
                device.mark(model.first, "first")
                device.mark(model.second, "second")
                device.mark(model, "micro-batch {}")
            for step in range(2):
                x = torch.linspace(0, 1, 12).view(3, 4).to(where)
                with device.phase(f"step {step}"):
                    for number in range(2):
                        loss = model(x + number, recompute=step == 1).square().sum()
                        loss.backward()
            numbers = [loss, *(p.grad for p in model.parameters())]
            results[where] = [tensor.detach().cpu().numpy() for tensor in numbers]
            results[f"{where} threads"] = len(model.backward_threads - {threading.get_ident()})
    return {**results, "record": device.record}


@pytest.fixture(scope="module")
def autograd() -> dict[str, Any]:
    return run_ranks(1, run_autograd)[0]


def test_numbers_are_those_of_a_cpu(autograd: dict[str, Any]) -> None:
    assert len(autograd["cuda"]) == 5
    for expected, found in zip(autograd["cpu"], autograd["cuda"], strict=True):
        assert np.array_equal(expected, found)


def test_backward_pass_runs_in_the_thread_of_the_device(autograd: dict[str, Any]) -> None:
    assert (autograd["cpu threads"], autograd["cuda threads"]) == (0, 1)


def test_fault_in_a_backward_pass_is_found(autograd: dict[str, Any]) -> None:
    waits = autograd["record"].host_waits().where(direction="backward")
    assert len(waits) == 4, waits.report()
    assert {event.site for event in waits} == {planted_line(Waiting)}
    for step in range(2):
        for number in range(2):
            only(waits.where(within=(f"step {step}", f"micro-batch {number}")))


def test_backward_launches_belong_to_the_layer_and_line_of_the_forward_pass(autograd: dict[str, Any]) -> None:
    launches = autograd["record"].launches().where(within=("step 0", "micro-batch 1"))
    first, second = (launches.where(within=name, direction="backward") for name in ("first", "second"))
    # The weight's gradient and the bias's, and their additions to those of micro-batch 0; of the second the input's, too.
    expected = {"aten::mm": 1, "aten::sum.dim_IntList": 1, "aten::add_.Tensor": 2}
    assert first.counts() == expected, first.report()
    assert second.counts() == {**expected, "aten::mm": 2}, second.report()
    assert {event.site for event in first} == {planted_line(Model.begin)}


def test_recomputed_launches_are_told_from_the_others(autograd: dict[str, Any]) -> None:
    launches = autograd["record"].launches()
    assert not launches.where(within="step 0", direction="recompute")
    again = launches.where(within=("step 1", "micro-batch 0"), direction="recompute")
    assert again.counts() == {"aten::addmm": 1, "aten::relu": 1}, again.report()
    assert only(again.where(within="first")).name == "aten::addmm"
