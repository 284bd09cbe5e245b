"""Saving while training goes on, and finding what to continue from.

The pause of a save is the copy to host memory. A thread per rank writes; between steps the ranks agree
whether all have written, and only then a thread of rank 0 makes the files a checkpoint and takes old ones away.
A disk that is full costs the checkpoint, not the run.
"""

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from deberta_dist.checkpoint.compatible import compatible
from deberta_dist.checkpoint.errors import CheckpointError
from deberta_dist.checkpoint.find import checkpoints, newest_complete, step_name
from deberta_dist.checkpoint.lock import RunLock
from deberta_dist.checkpoint.manifest import Manifest, TensorEntry, WrittenLayout
from deberta_dist.checkpoint.publish import sweep
from deberta_dist.checkpoint.reader import CheckpointReader
from deberta_dist.checkpoint.slices import tensor_table
from deberta_dist.checkpoint.writer import CheckpointWriter
from deberta_dist.errors import ConfigError
from deberta_dist.flat_layout import ShardState
from deberta_dist.mesh import Mesh
from deberta_dist.planning.layout import flat_layout
from deberta_dist.planning.plan import Plan
from deberta_dist.training.build import TrainingParts
from deberta_dist.training.metrics import MetricsLog


def checkpoint_directory(plan: Plan) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(plan.config.run.directory) / "checkpoints"


def is_interrupted(plan: Plan) -> bool:
    """Whether the run directory holds checkpoints that the run has to continue from. Any rank may ask."""
    return plan.config.checkpoint.resume != "never" and bool(checkpoints(checkpoint_directory(plan)))


def find_checkpoint(plan: Plan, *, tokenizer_sha256: str, lock: RunLock) -> CheckpointReader | None:
    """What the run continues from by ``checkpoint.resume``; None: it starts anew. For rank 0, before any group.

    Raises:
        ConfigError: the directory holds a finished run, a run that must not or cannot be continued, or the
            checkpoint is of another model or tokenizer.
        CheckpointError: there are checkpoints, and none is whole.
    """
    directory, resume = Path(plan.config.run.directory), plan.config.checkpoint.resume
    if (directory / "result.json").exists():
        raise ConfigError(
            f"run.directory = {directory} holds a finished run (result.json is there); nothing is overwritten: move it "
            "away or give another --run.directory"
        )
    if resume == "never":
        if (directory / "metrics.jsonl").exists():
            raise ConfigError(
                f"run.directory = {directory} holds a run already (metrics.jsonl is there) and checkpoint.resume is "
                '"never": move it away or give another --run.directory'
            )
        return None
    sweep(checkpoint_directory(plan), lock=lock, on_remove=_warn)
    reader = newest_complete(checkpoint_directory(plan), on_skip=_warn)
    if reader is None:
        if resume == "required":
            raise ConfigError(f'checkpoint.resume = "required", and there is no checkpoint in {checkpoint_directory(plan)}')
        return None
    compatible(reader.manifest, model_config=plan.model_config.to_dict(), tokenizer_sha256=tokenizer_sha256)
    if reader.manifest.step > plan.config.training.max_steps:
        raise ConfigError(
            f"training.max_steps = {plan.config.training.max_steps} is less than the {reader.manifest.step} steps of "
            f"{reader.directory}"
        )
    return reader


def share_checkpoint(reader: CheckpointReader | None, *, plan: Plan) -> CheckpointReader | None:
    """Rank 0's choice on every rank. Collective."""
    choice = [None if reader is None else reader.manifest.step]
    dist.broadcast_object_list(choice, src=0)
    if choice[0] is None or reader is not None:
        return reader
    return CheckpointReader(checkpoint_directory(plan) / step_name(choice[0]))


def read_shards(reader: CheckpointReader, *, plan: Plan, mesh: Mesh) -> list[ShardState]:
    """This rank's part of every flat parameter, and nothing else, from a checkpoint of any layout."""
    here, shape = mesh.coordinate, mesh.shape
    layout = flat_layout(
        plan.layout, pipeline_rank=here.pipeline, tensor_rank=here.tensor, data_parallel_size=shape.data
    )
    return reader.read_shards(layout, shape=shape, coordinate=here)


def load_state(parts: TrainingParts, shards: Sequence[ShardState], *, manifest: Manifest) -> None:
    """Sets moments, step count and loss scale; the weights were those of ``shards`` when the parts were built."""
    store = parts.sharded_model.store
    store.load_moments(shards, optimizer_steps=manifest.optimizer_steps)
    store.load_loss_scale_state(manifest.loss_scale)


def changed_settings(plan: Plan, manifest: Manifest) -> list[str]:
    """What differs between the run that wrote a checkpoint and this one: ``section.key: old -> new``."""
    new, old = _flat(plan.config.model_dump(mode="json")), _flat(manifest.run_config)
    ignored = ("run.", "data.train", "data.validation", "data.tokenizer")
    return [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(ignored)
    ]


class Checkpointing:
    """One rank's side of saving a run.

    Args:
        plan: The run.
        parts: This rank's parts.
        mesh: The grid.
        tokenizer_sha256: Of the run's tokenizer.
        log: Where saves are told.
    """

    def __init__(
        self, plan: Plan, *, parts: TrainingParts, mesh: Mesh, tokenizer_sha256: str, log: MetricsLog
    ) -> None:
        self._plan, self._parts, self._mesh, self._log = plan, parts, mesh, log
        self._tokenizer_sha256 = tokenizer_sha256
        self._writer = CheckpointWriter(checkpoint_directory(plan), rank=mesh.rank)
        token = [f"{os.getpid():x}{time.time_ns():x}"]
        dist.broadcast_object_list(token, src=0)
        self._token: str = token[0]
        # Where every slice lies follows from the layout: once, not in the pause of every save.
        self._tensors = self._tensor_table()
        self._pending: Manifest | None = None
        self._committing: Future[dict[str, Any]] | None = None
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="commit")
        self._copy_seconds = self._started = 0.0

    def is_due(self, steps_done: int) -> bool:
        """Whether a checkpoint belongs after ``steps_done`` steps: every so many, and at the end."""
        every = self._plan.config.checkpoint.every_steps
        return steps_done == self._plan.config.training.max_steps or (every > 0 and steps_done % every == 0)

    def save(self, *, step: int, consumed_samples: int) -> None:
        """Copies this rank's state and starts writing it. Collective; the one before is finished first."""
        self.poll(wait=True)
        self._started = time.monotonic()
        store = self._parts.sharded_model.store
        shards = store.copy_shards()
        self._copy_seconds = time.monotonic() - self._started
        self._pending = self._manifest(step=step, consumed_samples=consumed_samples)
        self._writer.begin(step, shards=shards, token=self._token)

    def poll(self, *, wait: bool = False) -> None:
        """Finishes an outstanding checkpoint if every rank has written its part. Collective while one is outstanding.

        Args:
            wait: Return when it is finished: for the end of a run, and before the next checkpoint.
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
        counts = torch.tensor([state.status == "written", state.status == "failed"], device=self._mesh.device).int()
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
                "not write; older checkpoints are intact, the run goes on"
            )
        elif self._mesh.rank == 0:
            self._committing = self._pool.submit(self._commit, manifest)
        else:
            self._writer.hand_over()

    def _commit(self, manifest: Manifest) -> dict[str, Any]:
        """In a thread: what the log is to hold of the finished checkpoint."""
        settings = self._plan.config.checkpoint
        path = self._writer.commit(manifest, keep_last=settings.keep_last, keep_every=settings.keep_every)
        seconds = time.monotonic() - self._started
        return {
            "step": manifest.step,
            "path": path,
            "copy_seconds": self._copy_seconds,
            "write_seconds": seconds - self._copy_seconds,
        }

    def _report(self, committing: Future[dict[str, Any]]) -> None:
        try:
            self._log.checkpoint(**committing.result())
        except CheckpointError as error:
            self._log.say(f"warning: {error}; the run goes on")

    def _tensor_table(self) -> dict[str, TensorEntry]:
        shape, layout = self._mesh.shape, self._parts.layout
        layouts = {
            (p, t): flat_layout(layout, pipeline_rank=p, tensor_rank=t, data_parallel_size=shape.data)
            for p in range(shape.pipeline)
            for t in range(shape.tensor)
        }
        return tensor_table(layouts, shape=shape, full_shapes=layout.full_shapes)

    def _manifest(self, *, step: int, consumed_samples: int) -> Manifest:
        plan, shape = self._plan, self._mesh.shape
        store = self._parts.sharded_model.store
        return Manifest(
            step=step,
            consumed_samples=consumed_samples,
            optimizer_steps=store.optimizer_steps,
            seed=plan.config.training.seed,
            loss_scale=store.loss_scale_state(),
            run_config=plan.config.model_dump(mode="json"),
            model_config=plan.model_config.to_dict(),
            tokenizer_sha256=self._tokenizer_sha256,
            layout=WrittenLayout(
                tensor=shape.tensor,
                pipeline=shape.pipeline,
                data=shape.data,
                schedule=plan.config.parallel.schedule,
            ),
            tensors=self._tensors,
        )


def _warn(message: str) -> None:
    print(f"warning: {message}", flush=True)


def _flat(tables: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, table in tables.items() for key, value in table.items()}
