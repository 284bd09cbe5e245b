"""The split computations of sequence parallelism against plain layers on the whole sequence, on real gloo ranks."""

import os
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from deberta_dist.models.fused_qkv import entered, joint_linear
from deberta_dist.parallel.mesh import start_process_group
from deberta_dist.parallel.tensor.apply import cut_tensor
from deberta_dist.parallel.tensor.layers import ColumnParallelLinear, RowParallelLinear
from deberta_dist.parallel.tensor.sequence import (
    EnterSequenceRegion,
    ExchangeHalo,
    JoinSequence,
    OwnTokens,
    ScatterSequence,
    SequenceRanks,
    SequenceRowLinear,
)
from tests.harness import run_ranks
from tests.parallel.tensor.test_parallel_layers import COLUMN, ROW

BATCH, LENGTH, WIDTH, HALO = 3, 8, 12, 2
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def tensors(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(BATCH, LENGTH, WIDTH, generator=generator, dtype=torch.float64) for _ in range(count)]


def layers() -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    generator = torch.Generator().manual_seed(5)
    found = tuple(nn.Linear(*sizes, dtype=torch.float64) for sizes in ((12, 16), (12, 16), (16, 12)))
    with torch.no_grad():
        for layer in found:
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return found


def computed(enter: Any, gate: Any, up: Any, down: Any, x: Tensor) -> Tensor:
    """Two layers on one entered activation, as attention has three, and one behind them."""
    gated, wide = joint_linear(entered(enter, x), [gate, up])
    return down(torch.tanh(gated) * wide)


def sendable(found: Any) -> Any:
    """Tensors as arrays: a process that has ended shares no memory."""
    return tree_map_only(Tensor, lambda tensor: tensor.numpy(), found)


def received(ranks: list[Any]) -> list[Any]:
    return tree_map_only(np.ndarray, torch.from_numpy, ranks)


def run_layers() -> dict[str, Any]:
    """What one rank computes with its slices and its tokens."""
    start_process_group(timeout_minutes=1, init_method=f"file://{os.environ['RENDEZVOUS_FILE']}")
    ranks = SequenceRanks(dist.group.WORLD)
    place = {"rank": ranks.rank, "size": ranks.size}
    gate, up, down = full = layers()
    cut = [
        *(ColumnParallelLinear(layer, size=ranks.size) for layer in (gate, up)),
        SequenceRowLinear(RowParallelLinear(down, size=ranks.size, group=ranks.group), ranks=ranks),
    ]
    with torch.no_grad():
        for mine, whole, name in zip(cut, full, (COLUMN, COLUMN, ROW), strict=True):
            for leaf, parameter in mine.named_parameters():
                parameter.copy_(cut_tensor(getattr(whole, leaf), f"{name}.{leaf}", **place))
    x, upstream = (ranks.own(tensor) for tensor in tensors(2))
    x = x.clone().requires_grad_()
    own_saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: own_saved.append(tuple(t.shape)) or t, lambda t: t):
        output = computed(EnterSequenceRegion(ranks, recomputes=True), *cut, x)
    output.backward(upstream)
    found = {
        "output": output.detach(),
        "input": x.grad,
        "gradients": [{leaf: parameter.grad for leaf, parameter in layer.named_parameters()} for layer in cut],
        "saved": own_saved,
    }
    return sendable(found)


@pytest.mark.parametrize("size", [2, 4])
def test_layers_equal_layers_of_the_whole_sequence(size: int) -> None:
    found = received(run_ranks(size, run_layers))
    full = layers()
    x, upstream = tensors(2)
    x.requires_grad_()
    expected = computed(lambda tensor: tensor, *full, x)
    expected.backward(upstream)
    torch.testing.assert_close(torch.cat([rank["output"] for rank in found], dim=1), expected.detach(), **CLOSE)
    torch.testing.assert_close(torch.cat([rank["input"] for rank in found], dim=1), x.grad, **CLOSE)
    for number, (layer, dim) in enumerate(zip(full, (0, 0, 1), strict=True)):
        gradients = [rank["gradients"][number] for rank in found]
        torch.testing.assert_close(torch.cat([g["weight"] for g in gradients], dim=dim), layer.weight.grad, **CLOSE)
        parts = [g["bias"] for g in gradients]
        # The row bias is added to the own tokens: its gradient is a part of a sum.
        joined = torch.cat(parts) if dim == 0 else torch.stack(parts).sum(dim=0)
        torch.testing.assert_close(joined, layer.bias.grad, **CLOSE)
    for rank in found:
        assert (BATCH, LENGTH, WIDTH) not in rank["saved"], "the gathered input is kept"
        assert (BATCH, LENGTH // size, WIDTH) in rank["saved"]


def run_exchanges() -> dict[str, Any]:
    start_process_group(timeout_minutes=1, init_method=f"file://{os.environ['RENDEZVOUS_FILE']}")
    ranks = SequenceRanks(dist.group.WORLD)
    x, upstream = tensors(2)
    found: dict[str, Any] = {"own": OwnTokens(ranks)(x)}

    part = ranks.own(x).clone().requires_grad_()
    joined = JoinSequence(ranks)(part)
    joined.backward(upstream)
    found["join"] = joined.detach(), part.grad

    whole = (x * (ranks.rank + 1)).requires_grad_()
    scattered = ScatterSequence(ranks)(whole)
    scattered.backward(ranks.own(upstream))
    found["scatter"] = scattered.detach(), whole.grad

    part = ranks.own(x).clone().requires_grad_()
    beside = ExchangeHalo(ranks, width=HALO)(part)
    weight = torch.arange(beside.numel(), dtype=torch.float64).view_as(beside) + ranks.rank
    (beside * weight).sum().backward()
    found["halo"] = beside.detach(), part.grad, weight
    return sendable(found)


@pytest.mark.parametrize("size", [2, 4])
def test_exchanges(size: int) -> None:
    found = received(run_ranks(size, run_exchanges))
    x, upstream = tensors(2)
    factor = sum(range(1, size + 1))
    length = LENGTH // size
    padded = F.pad(x, (0, 0, HALO, HALO)).requires_grad_()
    for rank, one in enumerate(found):
        own = slice(rank * length, (rank + 1) * length)
        assert torch.equal(one["own"], x[:, own])
        assert torch.equal(one["join"][0], x) and torch.equal(one["join"][1], upstream[:, own])
        torch.testing.assert_close(one["scatter"][0], factor * x[:, own], **CLOSE)
        assert torch.equal(one["scatter"][1], upstream)
        beside, _, weight = one["halo"]
        window = padded[:, rank * length : (rank + 1) * length + 2 * HALO]
        assert torch.equal(beside, window.detach())
        (window * weight).sum().backward()
    joined = torch.cat([one["halo"][1] for one in found], dim=1)
    torch.testing.assert_close(joined, padded.grad[:, HALO:-HALO], **CLOSE)
