"""The process that `save` measures: ``python -m benchmarks.save_rank FOLDER PRESET ROUNDS``.

Started with a launcher's variables; leaves ``found.json`` in FOLDER.
"""

import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import save
from benchmarks.convert import AND_FSYNC, copy_and_hash
from benchmarks.random_checkpoints import make_manifest, random_tensor
from deberta_dist.checkpoint.find import step_name
from deberta_dist.checkpoint.writer import CheckpointWriter
from deberta_dist.config import Optimizer, Parallel
from deberta_dist.models.flops import forward_flops
from deberta_dist.models.presets import preset
from deberta_dist.operations.measure import Sample, interleaved, summary
from deberta_dist.parallel.flat_layout import ShardState
from deberta_dist.parallel.layout import Layout, flat_layouts, plan_layout
from deberta_dist.parallel.mesh import Mesh, MeshShape, make_mesh, start_process_group
from deberta_dist.parallel.zero import WeightStore
from deberta_dist.training.objectives.masked_lm import MaskedLMNetwork
from deberta_dist.training.optimizer import make_optimizer

SHAPE = MeshShape(pipeline=1, data=1, tensor=1)
_DEEPSPEED = {
    "train_batch_size": 1,
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 1_000_000},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


class State:
    """A store of a whole model with moments, and the ways to save it. Every way removes what it wrote before."""

    def __init__(self, layout: Layout, *, mesh: Mesh, folder: Path) -> None:
        (flats,) = flat_layouts(layout, data_parallel_size=1).values()
        shards = [ShardState(*(random_tensor((size,)) for _ in range(3))) for size in flats.sizes]
        self.store = WeightStore(
            [shard.weight for shard in shards],
            layout=flats,
            make_optimizer=partial(make_optimizer, settings=Optimizer(learning_rate=1e-3)),
            deepspeed_config=_DEEPSPEED,
            mesh=mesh,
            dtype=torch.float32,
        )
        self.store.load_moments(shards, optimizer_steps=1)
        self._layout, self._folder = layout, folder
        self._writer = CheckpointWriter(folder / "checkpoints", rank=0)
        self.pauses: list[Sample] = []
        self.step = 0

    def ours(self) -> Sample:
        """Copy, background write, commit; the copy alone goes to ``pauses``."""
        self.step += 1
        copied: list[ShardState] = []
        self.pauses.append(_timed(lambda: copied.extend(self.store.copy_shards())))

        def write() -> None:
            self._writer.begin(self.step, shards=copied, token="benchmark")
            state = self._writer.wait()
            assert state.status == "written", state.error
            self._writer.commit(make_manifest(self._layout, shape=SHAPE, step=self.step), keep_last=1)

        written, pause = _timed(write), self.pauses[-1]
        return Sample(
            wall_seconds=pause.wall_seconds + written.wall_seconds,
            cpu_seconds=pause.cpu_seconds + written.cpu_seconds,
            peak_bytes=written.peak_bytes,
        )

    @property
    def checkpoint(self) -> Path:
        """Directory of the checkpoint that ours wrote last."""
        return self._folder / "checkpoints" / step_name(self.step)

    def floor(self) -> Sample:
        """Copies and hashes the bytes of ours, and syncs them to disk."""
        return copy_and_hash(self.checkpoint, self._folder / "floor", fsync=True)

    def torch_save(self) -> Sample:
        """The state as it lies on the device, one file, forced to disk."""
        tensors = [[flat, state["exp_avg"], state["exp_avg_sq"]] for flat, state in self.store._flat_states()]
        with open(self._folder / "state.pt", "wb") as file:

            def write() -> None:
                torch.save(tensors, file)
                file.flush()
                os.fsync(file.fileno())

            return _timed(write)

    def deepspeed_save(self) -> Sample:
        """The engine's own."""
        target = self._folder / "deepspeed"
        shutil.rmtree(target, ignore_errors=True)
        return _timed(lambda: self.store._engine.save_checkpoint(str(target), tag="state"))

    def bytes_of(self, name: str) -> int:
        """On disk."""
        paths = {"torch.save + fsync": "state.pt", "DeepSpeed save_checkpoint": "deepspeed"}
        path = self._folder / paths[name] if name in paths else self.checkpoint
        files = path.rglob("*") if path.is_dir() else [path]
        return sum(file.stat().st_size for file in files if file.is_file())


def _on_a_quiet_disk(way: Callable[[], Sample]) -> Sample:
    """Who forces its bytes to disk must not wait for those that the one before has left."""
    os.sync()
    return way()


def _timed(work: Callable[[], Any]) -> Sample:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Sample(
        wall_seconds=time.perf_counter() - wall,
        cpu_seconds=time.process_time() - cpu,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def main(folder: Path, preset_name: str, rounds: int) -> None:
    """Saves in turn and writes what was found."""
    device = start_process_group(timeout_minutes=10, init_method=f"file://{folder}/meeting")
    mesh = make_mesh(SHAPE, device=device, timeout_minutes=10)
    flops = forward_flops(preset(preset_name), max_seq_length=128, micro_batch_size=1, mask_probability=0.15)
    layout = plan_layout(MaskedLMNetwork(config=preset(preset_name)), parallel=Parallel(data_parallel_size=1), flops=flops)
    state = State(layout, mesh=mesh, folder=folder)
    ways = {
        save.OURS: state.ours,
        AND_FSYNC: state.floor,
        "torch.save + fsync": state.torch_save,
        "DeepSpeed save_checkpoint": state.deepspeed_save,
    }
    contestants = {name: partial(_on_a_quiet_disk, way) for name, way in ways.items()}
    interleaved(contestants, rounds=1)  # files grow, memory is taken
    state.pauses.clear()
    samples = interleaved(contestants, rounds=rounds)
    figures = summary({save.PAUSE: state.pauses, **samples}, against=(save.OURS, AND_FSYNC))
    for name, row in figures.items():
        row["bytes"] = state.bytes_of(name)
    found = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "parameters": sum(torch.Size(shape).numel() for shape in layout.full_shapes.values()),
        "figures": figures,
    }
    (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # as in scale_rank: nothing waits for a group's end


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
