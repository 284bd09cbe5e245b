"""The device as a whole: building it, entering and leaving it, pauses, messages between several."""

import os
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.harness import run_ranks
from tests.pretend_device.build import build, find_compiler
from tests.pretend_device.device import PretendDevice
from tests.pretend_device.planting import make_kernel, only
from tests.pretend_device.record import Record

CUDA = torch.device("cuda", 0)


def replaceable() -> dict[str, object]:
    """What a device could leave behind."""
    modules = {"torch": torch, "torch.cuda": torch.cuda, "torch._C": torch._C, "dist": dist, "functional": nn.functional}
    return {f"{name}.{key}": id(value) for name, module in modules.items() for key, value in vars(module).items()}


def run_and_leave() -> None:
    before, run, environment = replaceable(), threading.Thread.run, dict(os.environ)
    model = nn.Linear(2, 2)
    with PretendDevice(count=2) as device:
        assert (torch.cuda.is_available(), torch.cuda.device_count()) == (True, 2)
        assert torch.cuda.get_device_capability() == (9, 0)
        assert torch.Generator("cuda").device.type == "cuda"
        device.mark(model, "model")
        kept = torch.ones(2, device="cuda:1")
        assert kept.device.index == 1
        pinned = torch.ones(2).pin_memory()
        assert pinned.is_pinned()
        with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
            kept.uniform_(generator=torch.Generator())
        with pytest.raises(RuntimeError, match="does not say how many kernels abs is"):
            torch.compile(abs)(kept)
        with pytest.raises(RuntimeError, match="a PretendDevice is entered already"), PretendDevice():
            pass
    assert replaceable() == before
    assert (threading.Thread.run, dict(os.environ)) == (run, environment)
    assert vars(model)["training"] is True and "forward" not in vars(model)
    count = len(device.record.events)
    torch.ones(2).add(1)
    assert len(device.record.events) == count
    assert not pinned.is_pinned()
    with pytest.raises((NotImplementedError, RuntimeError, AssertionError)):
        torch.ones(2, device="cuda")
    with PretendDevice() as again:
        assert torch.ones(2, device="cuda").sum().item() == 2
    assert len(again.record.host_waits()) == 1


def test_everything_is_undone() -> None:
    run_ranks(1, run_and_leave)


def enter_too_late() -> str:
    torch.ones(1, requires_grad=True).backward()
    with pytest.raises(RuntimeError) as caught, PretendDevice():
        pass
    assert not torch.cuda.is_available()
    return str(caught.value)


def test_entering_after_a_backward_pass_is_refused() -> None:
    (message,) = run_ranks(1, enter_too_late)
    assert message.startswith("autograd ran in this process before the device was there")


def pause() -> Record:
    with PretendDevice() as device, device.paused():
        x = torch.ones(3, device=CUDA, requires_grad=True)
        (x * 2).sum().backward()
        x.tolist()
        make_kernel()[(1,)](x)
        torch.cuda.synchronize()
    return device.record


def test_nothing_is_recorded_in_a_pause() -> None:
    assert run_ranks(1, pause)[0].events == []


def communicate(has_nccl_alone: bool) -> Record:
    rank, meeting = int(os.environ["RANK"]), os.environ["RENDEZVOUS_FILE"]
    backend = "nccl" if has_nccl_alone else "cpu:gloo,cuda:nccl"
    with PretendDevice(index=rank, count=2) as device:
        dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=2)
        here = device.device
        x = torch.full((4,), dist.get_rank() + 1.0, device=here)
        dist.all_reduce(x)
        assert x.tolist() == [3.0] * 4
        whole = x.new_empty(8)
        dist.all_gather_into_tensor(whole, x * (dist.get_rank() + 1))
        assert whole.tolist() == [3.0] * 4 + [6.0] * 4
        dist.reduce_scatter_tensor(x, whole)
        assert x.tolist() == [6.0 * (dist.get_rank() + 1)] * 4
        dist.broadcast(x, src=1)
        other = 1 - dist.get_rank()
        received = torch.empty_like(x)
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, x, other), dist.P2POp(dist.irecv, received, other)]):
            work.wait()
        assert received.tolist() == [12.0] * 4
        dist.reduce(x, dst=0)
        dist.barrier()
        dist.all_reduce(torch.ones(2))
    return device.record


@pytest.mark.parametrize("has_nccl_alone", [False, True])
def test_collectives_run_and_are_recorded(has_nccl_alone: bool) -> None:
    for record in run_ranks(2, communicate, has_nccl_alone):
        on_device = record.collectives().where(lambda event: not event.is_on_host)
        assert {event.name: event.num_bytes for event in on_device if event.name != "barrier"} == {
            "all_reduce": 16,
            "all_gather_into_tensor": 32,
            "reduce_scatter_tensor": 32,
            "broadcast": 16,
            "send": 16,
            "recv": 16,
            "reduce": 16,
        }, on_device.report()
        assert {event.group_size for event in on_device} == {2}
        on_host = only(record.collectives().where(lambda event: event.is_on_host))
        assert on_host.name == "all_reduce"
        faults = record.mismatches()
        assert [event.name for event in faults] == ["all_reduce of a tensor of the host over NCCL"] * has_nccl_alone


def test_missing_compiler_is_an_error_of_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeError, match=r"^tests/pretend_device needs a C\+\+ compiler; none of .* is on PATH$"):
        find_compiler()


def test_failing_compiler_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "bad-c++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && echo bad 1.0 && exit\necho no headers >&2; exit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(RuntimeError, match="failed:\nno headers"):
        build(tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["lock"]
