"""The process groups of eight real ranks: each axis holds whom the grid says."""

import os

import pytest
import torch
import torch.distributed as dist

from deberta_dist.parallel.mesh import Mesh, MeshRank, MeshShape, disjoint_rounds, make_mesh, start_process_group
from tests.harness import run_ranks

SHAPE = MeshShape(pipeline=2, data=2, tensor=2)
SUBGROUPS = [(1, 6), (0, 3, 5), (2,)]


def members(mesh: Mesh, group: dist.ProcessGroup) -> tuple[list[int], float]:
    """Global ranks of ``group``, and the sum of 10^rank over it as its members really add it up."""
    value = torch.tensor(10.0**mesh.rank, dtype=torch.float64)
    dist.all_reduce(value, group=group)
    return dist.get_process_group_ranks(group), value.item()


def look_around() -> dict[str, object]:
    device = start_process_group(timeout_minutes=1, init_method=f"file://{os.environ['RENDEZVOUS_FILE']}")
    mesh = make_mesh(SHAPE, device=device, timeout_minutes=1)
    mesh.new_subgroups(SUBGROUPS)
    mesh.warm_up()
    return {
        "rank": mesh.rank,
        "number of rank 0": mesh.broadcast_number((1 << 62) + 1 if mesh.rank == 0 else mesh.rank),
        "coordinate": mesh.mesh_rank,
        "groups": {axis: members(mesh, group) for axis, group in mesh.groups.items()},
        "subgroups": {ranks: members(mesh, group) for ranks, group in mesh.subgroups.items()},
        "timeouts": {
            group._get_backend(device).options._timeout.total_seconds()
            for group in (dist.group.WORLD, *mesh.groups.values(), *mesh.subgroups.values())
        },
    }


def test_groups_of_eight_ranks() -> None:
    found = run_ranks(8, look_around)
    # [pipeline, data, tensor], tensor innermost, written out.
    expected = {
        "tensor": [[0, 1], [2, 3], [4, 5], [6, 7]],
        "data": [[0, 2], [1, 3], [4, 6], [5, 7]],
        "pipeline": [[0, 4], [1, 5], [2, 6], [3, 7]],
        "model": [[0, 1, 4, 5], [2, 3, 6, 7]],
    }
    for rank, seen in enumerate(found):
        assert seen["rank"] == rank
        assert seen["number of rank 0"] == (1 << 62) + 1
        assert seen["coordinate"] == MeshRank(pipeline=rank // 4, data=rank // 2 % 2, tensor=rank % 2)
        assert seen["timeouts"] == {60.0}
        assert seen["groups"].keys() == expected.keys()
        for axis, groups in expected.items():
            (mine,) = [group for group in groups if rank in group]
            assert seen["groups"][axis] == (mine, sum(10.0**r for r in mine)), axis
        # Only the subgroups a rank is in, in the order their first member has in the tuple.
        mine = {ranks: (list(ranks), sum(10.0**r for r in ranks)) for ranks in SUBGROUPS if rank in ranks}
        assert seen["subgroups"] == mine


@pytest.mark.parametrize("shape", [SHAPE, MeshShape(pipeline=4, data=8, tensor=2)])
def test_a_gpu_splits_the_world_once_for_each_kind_of_group(monkeypatch: pytest.MonkeyPatch, shape: MeshShape) -> None:
    """Recorded: NCCL alone can do it before torch 2.15."""
    from deberta_dist.parallel import mesh as module

    splits: list[list[list[int]]] = []
    monkeypatch.setattr(module.dist, "split_group", lambda split_ranks, timeout: splits.append(split_ranks) or object())
    monkeypatch.setattr(module.dist, "get_world_size", lambda: shape.world_size)
    monkeypatch.setattr(module.dist, "get_rank", lambda: 0)
    mesh = make_mesh(shape, device=torch.device("cuda", 0), timeout_minutes=1)
    assert [{len(ranks) for ranks in split} for split in splits] == [
        {shape.pipeline}, {shape.data}, {shape.tensor}, {shape.pipeline * shape.tensor}
    ]  # fmt: skip
    splits.clear()

    def ranks(places: list[tuple[int, int]], data: int) -> tuple[int, ...]:
        return tuple(shape.rank(MeshRank(pipeline=p, data=data, tensor=t)) for p, t in places)

    last, tensors = shape.pipeline - 1, range(shape.tensor)
    everywhere = [[(p, t) for p in range(shape.pipeline) for t in tensors]]
    ends = [[(0, t), (last, t)] for t in tensors]
    stages = [[(p, t) for t in tensors] for p in range(shape.pipeline)]
    kinds = [everywhere, ends, stages]
    mesh.new_subgroups([ranks(places, data) for kind in kinds for places in kind for data in range(shape.data)])
    assert len(splits) == len(kinds)
    for split in splits:
        members = [rank for group in split for rank in group]
        assert len(members) == len(set(members)), "a rank twice in one split"
    assert sum(map(len, splits)) == sum(map(len, kinds)) * shape.data
    assert set(mesh.subgroups) == {ranks(places, 0) for places in (everywhere[0], ends[0], stages[0])}
    mesh.new_subgroups([ranks(ends[0], 0)])
    assert len(splits) == len(kinds), "made before"


def test_rounds_have_no_rank_twice_and_keep_the_order() -> None:
    assert disjoint_rounds([(0, 1), (2, 3), (1, 2), (4, 5), (0, 3)]) == [[(0, 1), (2, 3), (4, 5)], [(1, 2), (0, 3)]]
    assert disjoint_rounds([]) == []
