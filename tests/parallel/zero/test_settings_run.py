"""What the check lets through runs: a weight store under the oddest JSON takes the same steps as under the plainest."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from deberta_dist.config import load_config, resolve
from deberta_dist.parallel.flat_layout import lay_out
from deberta_dist.parallel.mesh import MeshShape, make_mesh, start_process_group
from deberta_dist.parallel.zero import WeightStore
from deberta_dist.planning.deepspeed import checked_deepspeed
from tests.harness import run_ranks

DEMO = Path(__file__).resolve().parents[3] / "launchers" / "pretrain_demo.toml"
ODDEST = {
    "zero_optimization": {
        "stage": 3, "overlap_comm": "no", "contiguous_gradients": False, "reduce_scatter": 0, "reduce_bucket_size": "64",
        "allgather_bucket_size": 0, "sub_group_size": 0, "max_live_parameters": 0, "stage3_max_reuse_distance": 0.0,
        "stage3_prefetch_bucket_size": "auto", "stage3_model_persistence_threshold": 0, "elastic_checkpoint": True,
        "round_robin_gradients": True, "ignore_unused_parameters": False, "parameter_alignment": True,
        "pipeline_loading_checkpoint": True, "override_module_apply": False, "memory_efficient_linear": False,
        "log_trace_cache_warnings": True, "save_muon_momentum_buffer_in_memory": True, "allgather_partitions": False,
        "use_multi_rank_bucket_allreduce": False, "load_from_fp32_weights": False, "zero_hpz_partition_size": 0,
        "stage3_use_all_reduce_for_fetch_params": True, "stage3_gather_fp16_weights_on_model_save": True,
        "stage3_allgather_sequential": True, "cpu_offload_use_pin_memory": True, "leaf_module": None, "zenflow": None,
        "offload_optimizer": {
            "device": "cpu", "fast_init": True, "pipeline_read": True, "pipeline_write": True, "buffer_count": 0,
            "pin_memory": False, "cpuadam_cores_perc": 0, "nvme_path": "/nowhere",
        },
        "offload_param": {"device": "cpu", "pin_memory": False, "buffer_count": 0, "buffer_size": 0, "max_in_cpu": 0},
    },
    "bf16": {"enabled": False, "immediate_grad_update": True, "check_grad_overflow": False},
    "fp16": {"enabled": False, "loss_scale": 0, "hysteresis": "auto"},
    "wall_clock_breakdown": 1, "memory_breakdown": True, "dump_state": True, "disable_python_gc": True, "steps_per_print": 1e0,
    "comms_logger": {"enabled": True, "verbose": True, "debug": True, "prof_ops": ["all_gather"]},
    "flops_profiler": {"enabled": True, "profile_step": 1, "module_depth": 0},
    "communication_data_type": "FP32", "aio": {"block_size": 1}, "log_level": "ERROR", "csv_monitor": {"enabled": None},
}  # fmt: skip


def steps(jsons: list[dict[str, Any]]) -> list[dict[str, list[float]]]:
    """Weights after three steps under each JSON."""
    device = start_process_group(timeout_minutes=1, init_method=f"file://{os.environ['RENDEZVOUS_FILE']}")
    world = int(os.environ["WORLD_SIZE"])
    mesh = make_mesh(MeshShape(tensor=1, pipeline=1, data=world), device=device, timeout_minutes=1)
    layout = lay_out({"a": (40, 5), "b": (7,)}, groups=["a".__eq__, "b".__eq__], data_parallel_size=world)
    return [_steps(ds, layout, mesh) for ds in jsons]


def _steps(ds: dict[str, Any], layout: Any, mesh: Any) -> dict[str, list[float]]:
    draw = torch.Generator().manual_seed(0)
    here = mesh.mesh_rank.data
    store = WeightStore(
        [torch.randn(size, generator=draw).chunk(mesh.shape.data)[here] for size in layout.sizes],
        layout=layout,
        make_optimizer=lambda flats: torch.optim.AdamW([{"params": [flat]} for flat in flats], fused=True),
        deepspeed_config=ds,
        mesh=mesh,
        dtype=torch.float32,
    )
    for step in range(3):
        _, gradients = store.gather(with_gradients=True)
        for gradient in gradients.values():
            gradient.copy_(torch.randn(gradient.shape, generator=torch.Generator().manual_seed(10 * step + here)))
        store.apply(store.reduce(loss_scale=1.0).tolist(), learning_rate=1e-2)
    weights = {name: weight.flatten().tolist() for name, weight in store.master_weights().items()}
    assert [shard.exp_avg.numel() for shard in store.copy_shards()] == [size // mesh.shape.data for size in layout.sizes]
    store.close()
    return weights


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_oddest_json_takes_the_steps_of_the_plainest(world_size: int, tmp_path: Path) -> None:
    checked = []
    for number, ds in enumerate(({"zero_optimization": {"stage": 3}}, ODDEST)):
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps(ds))
        sizes = (
            "--parallel.tensor_parallel_size=1",
            "--parallel.pipeline_parallel_size=1",
            f"--parallel.data_parallel_size={world_size}",
        )
        config = resolve(load_config(DEMO, (f"--run.deepspeed={file}", *sizes)), world_size)
        checked.append(checked_deepspeed(config).values)
    for plain, odd in run_ranks(world_size, steps, checked, timeout=100):
        for name, weights in plain.items():
            assert odd[name] == pytest.approx(weights, rel=1e-6, abs=1e-7)
