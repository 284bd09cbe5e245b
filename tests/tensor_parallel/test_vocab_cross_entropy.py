"""Cross entropy over a split vocabulary against F.cross_entropy on the whole one."""

import os
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from deberta_dist.mesh import start_process_group
from deberta_dist.tensor_parallel.cross_entropy import VocabParallelCrossEntropy
from deberta_dist.tensor_parallel.plan import padded_vocabulary
from tests.harness import run_ranks

VOCABULARY = 150  # two ranks: 128 + 22 real rows; four ranks: 64, 64, 22 and a shard of only padding
TARGETS = 12
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
        logits[0, [10, 70, 140]] = 5.0  # over three shards of four ranks
        logits[1, [64, 65]] = 5.0  # the first rows of a shard
        logits[2, [149, 63]] = 5.0
        logits[3, [130, 128]] = 5.0
        labels[:8] = torch.tensor([10, 65, 63, 128, 0, 1, 149, 64])
    elif name == "bf16":
        logits = (logits * 4).bfloat16()
    elif name == "ends":  # first and last row of every shard
        labels = torch.tensor([0, 63, 64, 127, 128, 149, 0, 149, 63, 64, 127, 128])
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
    loss = VocabParallelCrossEntropy(first_row=rank * rows, vocab_size=VOCABULARY, group=group)
    loss_T, is_correct_T = loss(mine, labels)
    loss_T.backward(upstream)
    return {
        "loss": loss_T.detach().numpy(),
        "correct": is_correct_T.numpy(),
        "gradient": mine.grad.float().numpy(),
        "dtypes": (str(loss_T.dtype), str(is_correct_T.dtype), str(mine.grad.dtype)),
        "input_kept": torch.equal(before, mine.detach()),
    }


def all_cases() -> dict[str, dict[str, Any]]:
    start_process_group(timeout_minutes=1, init_method=f"file://{os.environ['MEETING_FILE']}")
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
    np.testing.assert_allclose(
        gradient[:, :VOCABULARY], whole.grad.numpy(), rtol=2**-8 if name == "bf16" else 2e-5, atol=1e-6
    )
    assert not gradient[:, VOCABULARY:].any(), "a padding row has a gradient"


@pytest.mark.parametrize("name", CASES)
def test_correct_means_argmax_over_the_whole_vocabulary(ranks: list[dict[str, dict[str, Any]]], name: str) -> None:
    logits, labels, _ = whole_case(name)
    # numpy's argmax promises the first of equals.
    expected = logits.double().numpy().argmax(axis=1) == labels.numpy() if len(labels) else np.zeros(0, dtype=bool)
    for rank in ranks:
        np.testing.assert_array_equal(rank[name]["correct"], expected)
    if name == "ties":
        # id 65 ties with 64 and loses; ids 10, 63 and 128 are the lowest of theirs; of all equal, 0 wins.
        assert expected[:8].tolist() == [True, False, True, True, True, False, False, False]


def test_no_targets_give_no_loss_and_no_gradient(ranks: list[dict[str, dict[str, Any]]]) -> None:
    for rank in ranks:
        assert rank["no_targets"]["loss"].shape == (0,)
        assert rank["no_targets"]["gradient"].shape[0] == 0
