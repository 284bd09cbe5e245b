"""The split layers against nn.Linear and nn.Embedding on real gloo ranks."""

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from deberta_dist.parallel.mesh import start_process_group
from deberta_dist.parallel.tensor.apply import cut_tensor
from deberta_dist.parallel.tensor.collectives import EnterTensorParallelRegion
from deberta_dist.parallel.tensor.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from deberta_dist.parallel.tensor.sharding_rules import padded_vocabulary
from tests.harness import run_ranks

COLUMN = "deberta.encoder.layer.0.intermediate.dense"
ROW = "deberta.encoder.layer.0.output.dense"
WORDS = "deberta.embeddings.word_embeddings.weight"
VOCABULARY = 140  # two ranks: 128 + 12 real rows; four ranks: two shards of nothing but padding
PADDING_ID = 3


def whole_layers() -> tuple[nn.Linear, nn.Linear, Tensor, Tensor]:
    """Two float64 layers, their input and the gradient of their output."""
    generator = torch.Generator().manual_seed(3)
    up, down = nn.Linear(12, 16, dtype=torch.float64), nn.Linear(16, 12, dtype=torch.float64)
    with torch.no_grad():
        for parameter in (*up.parameters(), *down.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    # Two axes before the features, as in the model.
    x, upstream = (torch.randn(2, 5, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    return up, down, x, upstream


def whole_table(padding_idx: int | None) -> nn.Embedding:
    table = nn.Embedding(VOCABULARY, 6, padding_idx=padding_idx, dtype=torch.float64)
    with torch.no_grad():
        table.weight.copy_(torch.randn(VOCABULARY, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64))
    return table


def embedded_ids() -> Tensor:
    """Ids of every shard, several times, the padding id and the last real row among them."""
    ids = torch.randint(0, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(5))
    ids[0, :3], ids[1, 0], ids[2, :2] = PADDING_ID, VOCABULARY - 1, 129
    return ids


def run_split_layers(bias: bool) -> dict[str, Any]:
    """What one rank computes with its slices."""
    start_process_group(timeout_minutes=1, init_method=f"file://{os.environ['RENDEZVOUS_FILE']}")
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    up, down, x, upstream = whole_layers()
    if not bias:
        up.bias = down.bias = None
    enter = EnterTensorParallelRegion(group)
    column, row = ColumnParallelLinear(up, size=size), RowParallelLinear(down, size=size, group=group)
    with torch.no_grad():
        for mine, full, name in ((column, up, COLUMN), (row, down, ROW)):
            for leaf, parameter in mine.named_parameters():
                parameter.copy_(cut_tensor(getattr(full, leaf), f"{name}.{leaf}", rank=rank, size=size))
    x.requires_grad_()
    output = row(torch.tanh(column(enter(x))))
    output.backward(upstream)

    tables: dict[Any, Any] = {}
    for padding_idx in (None, PADDING_ID, VOCABULARY - 1):
        full_table = whole_table(padding_idx)
        padded = padded_vocabulary(VOCABULARY, tensor_parallel_size=size)
        table = VocabParallelEmbedding(full_table, padded_size=padded, rank=rank, size=size, group=group)
        with torch.no_grad():
            table.weight.copy_(cut_tensor(full_table.weight, WORDS, rank=rank, size=size))
        embedded = table(embedded_ids())
        weights = torch.arange(embedded.numel(), dtype=torch.float64).view_as(embedded) + 1
        (embedded * weights).sum().backward()
        tables[padding_idx] = (embedded.detach().numpy(), table.weight.grad.numpy(), table.padding_idx)
    named = dict(nn.ModuleDict({"up": column, "down": row}).named_parameters())
    return {
        "output": output.detach().numpy(),
        "input": x.grad.numpy(),
        "gradients": {name: parameter.grad.numpy() for name, parameter in named.items()},
        "shapes": {name: tuple(parameter.shape) for name, parameter in named.items()},
        "tables": tables,
    }


@pytest.fixture(scope="module", params=[(2, True), (4, True), (2, False)], ids=["2", "4", "2-without-bias"])
def ranks(request: pytest.FixtureRequest) -> tuple[bool, list[dict[str, Any]]]:
    size, bias = request.param
    return bias, run_ranks(size, run_split_layers, bias)


def test_column_then_row_equals_two_linear_layers(ranks: tuple[bool, list[dict[str, Any]]]) -> None:
    bias, found = ranks
    up, down, x, upstream = whole_layers()
    if not bias:
        up.bias = down.bias = None
    x.requires_grad_()
    expected = down(torch.tanh(up(x)))
    expected.backward(upstream)

    close = {"rtol": 1e-12, "atol": 1e-12}
    for rank in found:
        # Output and input gradient are whole on every rank, and the same bits on all.
        torch.testing.assert_close(torch.from_numpy(rank["output"]), expected.detach(), **close)
        torch.testing.assert_close(torch.from_numpy(rank["input"]), x.grad, **close)
        assert (rank["output"] == found[0]["output"]).all() and (rank["input"] == found[0]["input"]).all()
    for name, whole, dim in (("up.weight", up.weight, 0), ("up.bias", up.bias, 0), ("down.weight", down.weight, 1)):
        if whole is None:
            assert all(name not in rank["gradients"] for rank in found)
            continue
        joined = torch.cat([torch.from_numpy(rank["gradients"][name]) for rank in found], dim=dim)
        assert found[0]["shapes"][name][dim] == whole.shape[dim] // len(found)
        torch.testing.assert_close(joined, whole.grad, **close)
    if bias:
        for rank in found:  # the row bias is added once, after the sum: its gradient is whole, not 1/p of it
            torch.testing.assert_close(torch.from_numpy(rank["gradients"]["down.bias"]), down.bias.grad, **close)


@pytest.mark.parametrize("padding_idx", [None, PADDING_ID, VOCABULARY - 1])
def test_embedding_equals_the_whole_table(ranks: tuple[bool, list[dict[str, Any]]], padding_idx: int | None) -> None:
    found = [rank["tables"][padding_idx] for rank in ranks[1]]
    table = whole_table(padding_idx)
    expected = table(embedded_ids())
    weights = torch.arange(expected.numel(), dtype=torch.float64).view_as(expected) + 1
    (expected * weights).sum().backward()

    for output, _, _ in found:
        # One rank gives the row and the others zeros: the sum is exact.
        assert torch.equal(torch.from_numpy(output), expected.detach())
    gradient = torch.cat([torch.from_numpy(part) for _, part, _ in found])
    torch.testing.assert_close(gradient[:VOCABULARY], table.weight.grad, rtol=1e-12, atol=0)
    assert gradient.shape[0] == padded_vocabulary(VOCABULARY, tensor_parallel_size=len(found))
    assert not gradient[VOCABULARY:].any(), "a padded row has a gradient"
    if padding_idx is not None:
        assert not gradient[padding_idx].any(), "the padding id has a gradient"
        rows = gradient.shape[0] // len(found)
        local = [index for _, _, index in found]
        assert local == [padding_idx % rows if padding_idx // rows == rank else None for rank in range(len(found))]


def test_foreign_ids_touch_no_row() -> None:
    # Local row 0 stands in for a foreign id in the lookup; it must not get that id's gradient.
    gradient = torch.from_numpy(run_ranks(2, only_foreign_ids)[1])
    assert not gradient.any()


def only_foreign_ids() -> Any:
    """Gradient of this rank's slice where all ids are of rank 0."""
    start_process_group(timeout_minutes=1, init_method=f"file://{os.environ['RENDEZVOUS_FILE']}")
    table = VocabParallelEmbedding(whole_table(None), padded_size=128, rank=dist.get_rank(), size=2, group=dist.group.WORLD)
    table(torch.tensor([0, 1, 63])).sum().backward()
    return table.weight.grad.numpy()
