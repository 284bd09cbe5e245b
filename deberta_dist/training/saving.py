"""Saves checkpoints while training continues.

Training pauses only for the copy to host memory. One thread per rank writes; between steps the ranks find out whether all
have finished, and only then a thread of rank 0 publishes the checkpoint and removes old ones. A full disk costs the
checkpoint, not the run.
"""

import os
import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from deberta_dist.checkpoint.errors import CheckpointError
from deberta_dist.checkpoint.manifest import Manifest, NetworkState, TensorEntry, WrittenLayout
from deberta_dist.checkpoint.slices import tensor_table
from deberta_dist.checkpoint.writer import CheckpointWriter
from deberta_dist.config import precision
from deberta_dist.parallel.layout import flat_layouts
from deberta_dist.parallel.mesh import Mesh
from deberta_dist.planning.plan import Plan
from deberta_dist.training.build import TrainingComponents
from deberta_dist.training.inputs import RunData
from deberta_dist.training.metrics import MetricsLog
from deberta_dist.training.resume import checkpoint_directory


@dataclass(frozen=True)
class SaveTimes:
    """Seconds that a save paused training, and when its copy was complete (monotonic clock)."""

    wait_seconds: float
    copy_seconds: float
    copied_at: float


class Checkpointing:
    """One rank's side of saving a run.

    Args:
        plan: Has the settings of ``[checkpoint]``, and the configuration for the manifest.
        networks: This rank's parts of every network, in the objective's order.
        mesh: Its ranks write together.
        data: Checksums and position of its texts go into the manifest and the log.
        log: Records every save.
        damaged: Incomplete checkpoints, which do not count towards ``checkpoint.keep_last``.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        networks: Sequence[TrainingComponents],
        mesh: Mesh,
        data: RunData,
        log: MetricsLog,
        damaged: Collection[Path] = (),
    ) -> None:
        self._plan, self._networks, self._mesh, self._log = plan, networks, mesh, log
        self._data, self._damaged = data, damaged
        self._writer = CheckpointWriter(checkpoint_directory(plan), rank=mesh.rank)
        # 63 bits of time and process id, the same on all ranks: it shows which ranks' files belong together. After a crash
        # and a restart, files of two attempts at the same step may lie side by side.
        self._token = f"{mesh.broadcast_number((os.getpid() << 40 ^ time.time_ns()) & (1 << 63) - 1):x}"
        # Depends only on the layout: computed once, not in the pause of every save.
        self._tensors = self._tensor_table()
        self._pending: Manifest | None = None
        self._committing: Future[dict[str, Any]] | None = None
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="commit")
        self._times = SaveTimes(0.0, 0.0, 0.0)

    def is_due(self, steps_done: int) -> bool:
        """Whether a checkpoint is due after ``steps_done`` steps: every ``checkpoint.every_steps``, and at the end."""
        every = self._plan.config.checkpoint.every_steps
        return steps_done == self._plan.config.training.max_steps or (every > 0 and steps_done % every == 0)

    def save(self, *, step: int, consumed_samples: int) -> None:
        """Copies this rank's state and starts writing it, after finishing the checkpoint before. Collective."""
        asked = time.monotonic()
        self.poll(wait=True)
        started = time.monotonic()
        shards = [shard for parts in self._networks for shard in parts.sharded_model.store.copy_shards()]
        copied = time.monotonic()
        self._times = SaveTimes(wait_seconds=started - asked, copy_seconds=copied - started, copied_at=copied)
        self._pending = self._manifest(step=step, consumed_samples=consumed_samples)
        self._writer.begin(step, shards=shards, token=self._token)

    def poll(self, *, wait: bool = False) -> None:
        """Finishes an outstanding checkpoint if every rank has written its files. Collective while one is outstanding.

        Args:
            wait: Wait until it is finished: at the end of a run, and before the next checkpoint.
        """
        self._agree(wait=wait)
        if self._committing is not None and (wait or self._committing.done()):
            self._report(self._committing)
            self._committing = None

    def _agree(self, *, wait: bool) -> None:
        """Commits or abandons the outstanding checkpoint once every rank has written or failed."""
        if self._pending is None:
            return
        state = self._writer.wait() if wait else self._writer.state
        # A tensor on the host goes over gloo: over NCCL it would wait behind the steps queued on the device.
        counts = torch.tensor([state.status == "written", state.status == "failed"]).int()
        dist.all_reduce(counts)
        written, failed = counts.tolist()
        if written + failed < self._mesh.shape.world_size:
            return
        manifest, self._pending = self._pending, None
        if failed:
            if state.status == "failed":
                print(f"warning: rank {self._mesh.rank}: {state.error}", flush=True)
            self._writer.abandon()
            self._log.say(
                f"warning: no checkpoint of step {manifest.step}: {failed} of {self._mesh.shape.world_size} ranks could "
                "not write; older checkpoints are intact, the run continues"
            )
        elif self._mesh.rank == 0:
            self._committing = self._pool.submit(self._commit, manifest, self._times)
        else:
            self._writer.release()

    def _commit(self, manifest: Manifest, times: SaveTimes) -> dict[str, Any]:
        """Publishes a checkpoint, in a thread; returns what the log records of it."""
        settings = self._plan.config.checkpoint
        path = self._writer.commit(
            manifest, keep_last=settings.keep_last, keep_every=settings.keep_every, damaged=self._damaged
        )
        return {
            "step": manifest.step,
            "path": path,
            "wait_seconds": times.wait_seconds,
            "copy_seconds": times.copy_seconds,
            "write_seconds": time.monotonic() - times.copied_at,
            "position": self._data.position(manifest.consumed_samples),
        }

    def _report(self, committing: Future[dict[str, Any]]) -> None:
        try:
            self._log.checkpoint(**committing.result())
        except CheckpointError as error:
            self._log.say(f"warning: {error}; the run continues")

    def _tensor_table(self) -> dict[str, TensorEntry]:
        shape, table, first_flat = self._mesh.shape, {}, 0
        for layout in (parts.layout for parts in self._networks):
            network = layout.network
            found = tensor_table(
                flat_layouts(layout, data_parallel_size=shape.data),
                shape=shape,
                full_shapes=layout.full_shapes,
                rules=network.rules,
                first_flat=first_flat,
            )
            table |= {network.saved_name(name): entry for name, entry in found.items()}
            first_flat += len(network.flat_groups)
        return table

    def _manifest(self, *, step: int, consumed_samples: int) -> Manifest:
        plan, shape = self._plan, self._mesh.shape
        states = {
            parts.layout.network.name: NetworkState(
                optimizer_steps=parts.sharded_model.store.optimizer_steps,
                loss_scale=parts.sharded_model.store.loss_scale_state(),
                model_config=parts.layout.network.config.to_dict(),
            )
            for parts in self._networks
        }
        main = states.pop("")
        return Manifest(
            step=step,
            consumed_samples=consumed_samples,
            optimizer_steps=main.optimizer_steps,
            seed=plan.config.training.seed,
            loss_scale=main.loss_scale,
            run_config=plan.config.model_dump(mode="json"),
            model_config=plan.model_config.to_dict(),
            tokenizer_sha256=self._data.tokenizer.sha256,
            data_sha256=self._data.checksums(),
            precision=precision(plan.deepspeed),
            layout=WrittenLayout(
                tensor=shape.tensor,
                pipeline=shape.pipeline,
                data=shape.data,
                schedule=plan.config.parallel.schedule,
            ),
            tensors=self._tensors,
            networks=states,
        )
