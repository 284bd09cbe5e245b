"""Every fault that is planted is found at its line, and what is right is not reported.

Planted lines end with a comment that says so. All of them run in one process, each in a phase of its name.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deberta_dist.models.positions import document_positions
from tests.harness import run_ranks
from tests.pretend_device.device import PretendDevice
from tests.pretend_device.places import ROOT
from tests.pretend_device.planting import make_kernel, only, planted_line
from tests.pretend_device.record import Record

FILE = Path(__file__).relative_to(ROOT).as_posix()
CUDA = torch.device("cuda", 0)


# Host waits.


def item(x: Tensor) -> None:
    x.sum().item()  # planted


def truth(x: Tensor) -> None:
    if x.sum() > 0:  # planted
        pass


def to_list(x: Tensor) -> None:
    x.tolist()  # planted


def to_cpu(x: Tensor) -> None:
    x.cpu()  # planted


def to_cpu_pageable(x: Tensor) -> None:
    torch.empty(x.shape).copy_(x, non_blocking=True)  # planted


def nonzero(x: Tensor) -> None:
    x.nonzero()  # planted


def mask_index(x: Tensor) -> None:
    x[x > 0]  # planted


def mask_assignment(x: Tensor) -> None:
    x[x > 0] = torch.ones_like(x)  # planted


def masked_select(x: Tensor) -> None:
    x.masked_select(x > 0)  # planted


def unique(x: Tensor) -> None:
    x.unique()  # planted


def repeat_interleave(x: Tensor) -> None:
    x.repeat_interleave(torch.ones_like(x, dtype=torch.int64))  # planted


def bincount(x: Tensor) -> None:
    x.long().bincount()  # planted


def equal(x: Tensor) -> None:
    x.equal(x)  # planted


def synchronize(x: Tensor) -> None:
    torch.cuda.synchronize()  # planted


def event(x: Tensor) -> None:
    torch.cuda.Event().synchronize()  # planted


def stream(x: Tensor) -> None:
    torch.cuda.current_stream().synchronize()  # planted


def other_thread(x: Tensor) -> None:
    def read() -> None:
        x.cpu()  # planted

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()


def python_data(x: Tensor) -> None:
    torch.tensor([1.0, 2.0], device=CUDA)  # planted


def new_python_data(x: Tensor) -> None:
    x.new_tensor([1.0, 2.0])  # planted


def blocking_copy(x: Tensor) -> None:
    torch.ones(3).pin_memory().to(CUDA)  # planted


def host_index(x: Tensor) -> None:
    x[torch.tensor([0, 1])]  # planted


WAITS = {
    item: "item()",
    truth: "item()",
    to_list: "copy to the host",
    to_cpu: "copy to the host",
    to_cpu_pageable: "copy to the host",
    nonzero: "nonzero",
    mask_index: "index by a mask",
    mask_assignment: "index by a mask",
    masked_select: "masked_select",
    unique: "unique",
    repeat_interleave: "repeat_interleave",
    bincount: "bincount",
    equal: "equal",
    synchronize: "torch.cuda.synchronize",
    event: "Event.synchronize",
    stream: "Stream.synchronize",
    python_data: "copy to the device: from Python data",
    new_python_data: "copy to the device: from Python data",
    blocking_copy: "copy to the device",
    host_index: "copy to the device: aten::index.Tensor with indices on the host",
}


# Copies that the host does not wait for.


def unpinned_copy(x: Tensor) -> None:
    torch.ones(3).to(CUDA, non_blocking=True)  # planted


def pinned_copy(x: Tensor) -> None:
    torch.ones(3, pin_memory=True).to(CUDA, non_blocking=True)  # planted


def copy_of_a_pinned_view(x: Tensor) -> None:
    x[:2].copy_(torch.ones(2, 3).pin_memory()[1, 1:], non_blocking=True)  # planted


COPIES = {unpinned_copy: (12, False), pinned_copy: (12, True), copy_of_a_pinned_view: (8, True)}


# Faults.


def host_operand(x: Tensor) -> None:
    x + torch.ones(3)  # planted


def number_of_a_product(x: Tensor) -> None:
    torch.stack([x[0], torch.ones(())])  # planted


def triton_operand(x: Tensor) -> None:
    kernel = make_kernel()
    kernel[(1,)](x, torch.ones(3))  # planted


MISMATCHES = {host_operand: "aten::add.Tensor", number_of_a_product: "aten::stack", triton_operand: "triton double_kernel"}


# Launches.


def one_launch(x: Tensor) -> None:
    x.mul(2)  # planted


def one_kernel(x: Tensor) -> None:
    make_kernel()[(1,)](x, x)  # planted


def wide_product(x: Tensor) -> None:
    halves = x.new_ones(2, 2, dtype=torch.bfloat16)
    torch.mm(halves, halves, out_dtype=torch.float32)  # planted


LAUNCHES = {one_launch: ("aten::mul.Tensor", 1), one_kernel: ("triton double_kernel", 1), wide_product: ("aten::mm.dtype", 1)}


def clean(x: Tensor) -> None:
    """Nothing that a GPU would wait for, and three launches."""
    batch = torch.ones(4, 3, pin_memory=True)
    y = torch.empty(4, 3, device=CUDA)
    y.copy_(batch, non_blocking=True)
    z = (y @ y.t())[1:].view(-1).unsqueeze(0)
    x[x > 0] = 0.0
    torch.zeros(0, device=CUDA).add(1)  # no element, no kernel
    z.new_empty(3).requires_grad_().detach()
    x.to(CUDA).reshape(1, 3)[..., None].size()


def line_of_the_product(x: Tensor) -> None:
    document_positions(torch.ones(2, 5, dtype=torch.int64, device=CUDA))


PLANTED = (*WAITS, *COPIES, *MISMATCHES, *LAUNCHES, clean, other_thread, line_of_the_product)


def run_planted() -> Record:
    with PretendDevice() as device:
        x = torch.ones(3, device=CUDA)
        for function in PLANTED:
            with device.phase(function.__name__):
                function(x)
    return device.record


@pytest.fixture(scope="module")
def planted() -> Record:
    return run_ranks(1, run_planted)[0]


@pytest.mark.parametrize("function", WAITS, ids=lambda f: f.__name__)
def test_wait_is_found(planted: Record, function: Callable[..., Any]) -> None:
    found = only(planted.host_waits().where(within=function.__name__, name=WAITS[function]))
    assert found.site == planted_line(function)
    assert planted.mismatches().where(within=function.__name__).report().endswith(": 0")


@pytest.mark.parametrize("function", COPIES, ids=lambda f: f.__name__)
def test_copy_is_found(planted: Record, function: Callable[..., Any]) -> None:
    found = only(planted.copies_to_device().where(within=function.__name__))
    assert (found.site, found.num_bytes, found.is_pinned) == (planted_line(function), *COPIES[function])
    assert not found.blocks
    assert not planted.host_waits().where(within=function.__name__)


@pytest.mark.parametrize("function", MISMATCHES, ids=lambda f: f.__name__)
def test_mismatch_is_found(planted: Record, function: Callable[..., Any]) -> None:
    found = only(planted.mismatches().where(within=function.__name__))
    assert found.site == planted_line(function)
    assert found.name.startswith(MISMATCHES[function])


@pytest.mark.parametrize("function", LAUNCHES, ids=lambda f: f.__name__)
def test_launch_is_found(planted: Record, function: Callable[..., Any]) -> None:
    name, count = LAUNCHES[function]
    launches = planted.launches().where(within=function.__name__, name=name)
    assert len(launches) == count, launches.report()
    assert {event.site for event in launches} == {planted_line(function)}


def test_clean_function_is_not_reported(planted: Record) -> None:
    for events in (planted.host_waits(), planted.mismatches()):
        assert not events.where(within="clean"), events.where(within="clean").report()
    launches = planted.launches().where(within="clean")
    assert len(launches) == 3, launches.report()
    assert launches.counts().keys() > {"aten::mm", "aten::gt.Scalar"}  # versions of torch differ in the third
    assert only(planted.copies_to_device().where(within="clean")).is_pinned


def test_other_threads_are_recorded(planted: Record) -> None:
    found = only(planted.host_waits().where(site=planted_line(other_thread)))
    assert found.name == "copy to the host"


def test_the_innermost_line_of_the_product_is_named(planted: Record) -> None:
    launches = planted.launches().where(within="line_of_the_product")
    product = launches.where(site="models/positions.py:")
    assert len(product) >= 3, launches.report()
    assert {event.site.partition(":")[0] for event in launches} == {"models/positions.py", FILE}


def test_report_says_what_how_often_and_where(planted: Record) -> None:
    report = planted.host_waits().where(within=("item",)).report()
    assert report == f"host waits, item: 1\n     1 x item()  {planted_line(item)}  forward"
