"""Cross entropy over a split vocabulary against F.cross_entropy on the whole one."""

import os
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from deberta_dist.models.cross_entropy import CrossEntropy
from deberta_dist.parallel.mesh import start_process_group
from deberta_dist.parallel.tensor.collectives import JoinOverRanks
from deberta_dist.parallel.tensor.sharding_rules import padded_vocabulary
from tests.harness import run_ranks

VOCABULARY = 300  # two ranks: 256 + 44 real rows; four ranks: 128, 128, 44 and a shard of only padding
TARGETS, WIDTH = 12, 5
CASES = ("normal", "large", "very_negative", "ties", "no_targets", "bf16", "ends")


def whole_case(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Whole logits, labels and the gradient of every target's loss."""
    generator = torch.Generator().manual_seed(CASES.index(name))
    targets = 0 if name == "no_targets" else TARGETS
    logits = torch.randn(targets, VOCABULARY, generator=generator)
    labels = torch.randint(0, VOCABULARY, (targets,), generator=generator)
    upstream = torch.rand(targets, generator=generator) + 0.5
    if name == "large":  # exp of these is infinite in float32
        logits = logits * 3e3
    elif name == "very_negative":  # below every padding row that is zero
        logits = logits - 1e4
    elif name == "ties":
        logits.zero_()
        logits[:4] = -1.0
        logits[0, [10, 140, 280]] = 5.0  # over three shards of four ranks
        logits[1, [128, 129]] = 5.0  # the first rows of a shard
        logits[2, [299, 127]] = 5.0
        logits[3, [258, 256]] = 5.0
        labels[:8] = torch.tensor([10, 129, 127, 256, 0, 1, 299, 128])
    elif name == "bf16":
        logits = (logits * 4).bfloat16()
    elif name == "ends":  # first and last row of every shard
        labels = torch.tensor([0, 127, 128, 255, 256, 299, 0, 299, 127, 128, 255, 256])
    return logits, labels, upstream


def split_case(name: str) -> dict[str, Any]:
    """Loss, correctness and gradient of this rank's slice; padding columns are full of what must not matter."""
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    logits, labels, upstream = whole_case(name)
    padded = padded_vocabulary(VOCABULARY, tensor_parallel_size=size)
    rows = padded // size
    mine = F.pad(logits.float(), (0, padded - VOCABULARY), value=1e30)[:, rank * rows : (rank + 1) * rows]
    mine = mine.to(logits.dtype).contiguous().requires_grad_()
    before = mine.detach().clone()
    num_real_rows = min(max(VOCABULARY - rank * rows, 0), rows)
    loss = CrossEntropy(first_row=rank * rows, num_real_rows=num_real_rows, join=JoinOverRanks(group))
    loss_T, is_correct_T = loss(mine, labels)
    loss_T.backward(upstream)
    return {
        "products": {chunks: product_case(loss, labels, upstream, chunks=chunks, rows=rows) for chunks in (1, 3)},
        "loss": loss_T.detach().numpy(),
        "correct": is_correct_T.numpy(),
        "gradient": mine.grad.float().numpy(),
        "dtypes": (str(loss_T.dtype), str(is_correct_T.dtype), str(mine.grad.dtype)),
        "input_kept": torch.equal(before, mine.detach()),
    }


def product_of_whole(padded: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, word embeddings and bias, padded with what must not matter."""
    generator = torch.Generator().manual_seed(7)
    weight, bias = torch.randn(VOCABULARY, WIDTH, generator=generator), torch.randn(VOCABULARY, generator=generator)
    extra = padded - VOCABULARY
    hidden = torch.randn(TARGETS, WIDTH, generator=generator)
    return hidden, F.pad(weight, (0, 0, 0, extra), value=9.0), F.pad(bias, (0, extra), value=1e30)


def product_case(loss: CrossEntropy, labels: Tensor, upstream: Tensor, *, chunks: int, rows: int) -> dict[str, Any]:
    hidden, weight, bias = product_of_whole(rows * dist.get_world_size())
    hidden = hidden[: len(labels)].requires_grad_()
    mine = slice(loss.first_row, loss.first_row + rows)
    weight, bias = weight[mine].requires_grad_(), bias[mine].requires_grad_()
    loss_T, is_correct_T = loss.of_product(hidden, weight, bias, labels, num_chunks=chunks)
    loss_T.backward(upstream)
    dist.all_reduce(hidden.grad)  # what ``enter`` does
    return {
        "loss": loss_T.detach().numpy(),
        "correct": is_correct_T.numpy(),
        "gradients": [x.grad.numpy() for x in (hidden, weight, bias)],
    }


def all_cases() -> dict[str, dict[str, Any]]:
    start_process_group(timeout_minutes=1, init_method=f"file://{os.environ['RENDEZVOUS_FILE']}")
    return {name: split_case(name) for name in CASES}


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, dict[str, Any]]]:
    return run_ranks(request.param, all_cases)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_equal_the_whole(ranks: list[dict[str, dict[str, Any]]], name: str) -> None:
    logits, labels, upstream = whole_case(name)
    whole = logits.double().requires_grad_()
    expected = F.cross_entropy(whole, labels, reduction="none")
    expected.backward(upstream.double())
    found = [rank[name] for rank in ranks]

    for rank in found:
        np.testing.assert_allclose(rank["loss"], expected.detach().numpy(), rtol=2e-6, atol=2e-6)
        np.testing.assert_array_equal(rank["loss"], found[0]["loss"])
        assert rank["dtypes"] == ("torch.float32", "torch.bool", str(logits.dtype))
        assert rank["input_kept"], "the logits were written to"
    gradient = np.concatenate([rank["gradient"] for rank in found], axis=1)
    # bf16 keeps 8 bits of the gradient.
    np.testing.assert_allclose(gradient[:, :VOCABULARY], whole.grad.numpy(), rtol=2**-8 if name == "bf16" else 2e-5, atol=1e-6)
    assert not gradient[:, VOCABULARY:].any(), "a padding row has a gradient"


@pytest.mark.parametrize("name", CASES)
def test_correct_means_argmax_over_the_whole_vocabulary(ranks: list[dict[str, dict[str, Any]]], name: str) -> None:
    logits, labels, _ = whole_case(name)
    # numpy's argmax promises the first of equals.
    expected = logits.double().numpy().argmax(axis=1) == labels.numpy() if len(labels) else np.zeros(0, dtype=bool)
    for rank in ranks:
        np.testing.assert_array_equal(rank[name]["correct"], expected)
    if name == "ties":
        # id 129 ties with 128 and loses; ids 10, 127 and 256 are the lowest of theirs; of all equal, 0 wins.
        assert expected[:8].tolist() == [True, False, True, True, True, False, False, False]


def test_no_targets_give_no_loss_and_no_gradient(ranks: list[dict[str, dict[str, Any]]]) -> None:
    for rank in ranks:
        assert rank["no_targets"]["loss"].shape == (0,)
        assert rank["no_targets"]["gradient"].shape[0] == 0


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("name", ["ends", "no_targets"])
def test_of_a_product(ranks: list[dict[str, dict[str, Any]]], name: str, chunks: int) -> None:
    _, labels, upstream = whole_case(name)
    hidden, weight, bias = (x.double().requires_grad_() for x in product_of_whole(VOCABULARY))
    logits = F.linear(hidden[: len(labels)], weight, bias)
    expected = F.cross_entropy(logits, labels, reduction="none")
    wanted = torch.autograd.grad(expected, (hidden, weight, bias), upstream.double())
    found = [rank[name]["products"][chunks] for rank in ranks]
    for rank in found:
        np.testing.assert_allclose(rank["loss"], expected.detach().numpy(), rtol=2e-6, atol=2e-6)
        np.testing.assert_array_equal(rank["correct"], (logits.argmax(-1) == labels).numpy())
        np.testing.assert_allclose(rank["gradients"][0], wanted[0][: len(labels)].numpy(), rtol=1e-5, atol=1e-5)
    for index in (1, 2):
        gradient = np.concatenate([rank["gradients"][index] for rank in found])
        np.testing.assert_allclose(gradient[:VOCABULARY], wanted[index].numpy(), rtol=1e-5, atol=1e-6)
        assert not gradient[VOCABULARY:].any(), "a padding row has a gradient"
