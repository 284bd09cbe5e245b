"""The process groups of eight real ranks: each axis holds whom the grid says."""

import os

import torch
import torch.distributed as dist

from deberta_dist.mesh import Coordinate, Mesh, MeshShape, make_mesh, start_process_group
from tests.harness import run_ranks

SHAPE = MeshShape(pipeline=2, data=2, tensor=2)
SUBGROUPS = [(1, 6), (0, 3, 5), (2,)]


def members(mesh: Mesh, group: dist.ProcessGroup) -> tuple[list[int], float]:
    """Global ranks of ``group``, and the sum of 10^rank over it as its members really add it up."""
    value = torch.tensor(10.0**mesh.rank, dtype=torch.float64)
    dist.all_reduce(value, group=group)
    return dist.get_process_group_ranks(group), value.item()


def look_around() -> dict[str, object]:
    device = start_process_group(timeout_minutes=1, init_method=f"file://{os.environ['MEETING_FILE']}")
    mesh = make_mesh(SHAPE, device=device)
    mesh.new_subgroups(SUBGROUPS)
    return {
        "rank": mesh.rank,
        "coordinate": mesh.coordinate,
        "groups": {axis: members(mesh, group) for axis, group in mesh.groups.items()},
        "subgroups": {ranks: members(mesh, group) for ranks, group in mesh.subgroups.items()},
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
        assert seen["coordinate"] == Coordinate(pipeline=rank // 4, data=rank // 2 % 2, tensor=rank % 2)
        assert seen["groups"].keys() == expected.keys()
        for axis, groups in expected.items():
            (mine,) = [group for group in groups if rank in group]
            assert seen["groups"][axis] == (mine, sum(10.0**r for r in mine)), axis
        # Only the subgroups a rank is in, in the order their first member has in the tuple.
        mine = {ranks: (list(ranks), sum(10.0**r for r in ranks)) for ranks in SUBGROUPS if rank in ranks}
        assert seen["subgroups"] == mine
