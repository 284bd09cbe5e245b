"""The last state of a finished task, from which a run of more epochs continues.

Beside the best weights a task's folder keeps ``state/``: weights and moments after the last step, in the form of a run's
checkpoint, which knows no layout.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from deberta_dist.checkpoint.compatible import same_tensors
from deberta_dist.checkpoint.errors import CheckpointError
from deberta_dist.checkpoint.find import newest_complete
from deberta_dist.checkpoint.manifest import Manifest, WrittenLayout
from deberta_dist.checkpoint.reader import CheckpointReader
from deberta_dist.checkpoint.slices import tensor_table
from deberta_dist.checkpoint.writer import CheckpointWriter
from deberta_dist.config import precision
from deberta_dist.errors import ConfigError
from deberta_dist.finetuning.folder import EARLIER, IDENTITY, STATE_NAME, TaskFolder
from deberta_dist.finetuning.plan import TaskPlan
from deberta_dist.parallel.flat_layout import ShardState
from deberta_dist.parallel.layout import flat_layouts
from deberta_dist.parallel.mesh import Mesh
from deberta_dist.parallel.sharded_model import ShardedModel
from deberta_dist.training.loop import learning_rate


@dataclass(frozen=True)
class Earlier:
    """A finished run of a task that is resumed for more epochs.

    Attributes:
        folder: Of its result, with metrics, predictions and weights.
        run: What its ``run.json`` holds.
        reader: Of the state after its last step: weights and moments.
    """

    folder: Path
    run: Mapping[str, Any]
    reader: CheckpointReader

    @property
    def done(self) -> tuple[int, int]:
        """Steps and decisions behind it."""
        return self.reader.manifest.step, self.reader.manifest.consumed_samples

    @property
    def epochs(self) -> float:
        """Its length."""
        return self.run[IDENTITY]["settings"]["training"]["epochs"]

    def learning_rates(self, plan: TaskPlan, *, num_steps: int) -> tuple[float, float] | None:
        """Of its last step and of the next; None where no step is left."""
        step = self.done[0]
        if step >= num_steps:
            return None
        schedule = {"peak": plan.config.optimizer.learning_rate, "warmup_steps": plan.config.schedule.warmup_steps}
        return learning_rate(step - 1, max_steps=step, **schedule), learning_rate(step, max_steps=num_steps, **schedule)

    def summary(self) -> list[dict[str, Any]]:
        """It and those before it, for ``run.json``, oldest first."""
        own = {key: value for key, value in self.run.items() if key not in (IDENTITY, EARLIER)}
        return [*self.run.get(EARLIER, []), {**own, "epochs": self.epochs}]


def open_earlier(folder: TaskFolder, identity: Mapping[str, Any], *, plan: TaskPlan, verify: bool) -> Earlier | None:
    """The finished run that a longer one continues; None where the folder holds none.

    Args:
        folder: Of the task; `TaskFolder.is_done` has found nothing wrong with it.
        identity: What the run would be made from.
        plan: The longer run; its tensors must be those of the state.
        verify: Compare every byte of the state with its checksums; one rank is enough.

    Raises:
        ConfigError: it has no state to continue from.
        CheckpointError: its state is damaged.
    """
    run = folder.shorter_run(identity)
    if run is None:
        return None
    problems: list[str] = []
    reader = newest_complete(folder.final / STATE_NAME, on_skip=problems.append, verify=verify)
    if reader is None or not (folder.weights / "model.safetensors").is_file():
        raise ConfigError(
            f"{folder.final} was made with training.epochs = {run[IDENTITY]['settings']['training']['epochs']:g} and keeps no "
            f"{STATE_NAME if reader is None else 'weights'}/ to continue from (run.keep_weights and run.keep_state): move it "
            "away or name another run.directory"
        )
    same_tensors(reader.manifest, plan.layout.full_shapes, where=reader.directory)
    return Earlier(folder.final, run, reader)


def write_state(
    model: ShardedModel,
    shards: Sequence[ShardState],
    *,
    plan: TaskPlan,
    seed: int,
    done: tuple[int, int],
    tokenizer_sha256: str,
    mesh: Mesh,
    folder: TaskFolder,
) -> str | None:
    """Writes a task's last state. Collective.

    Args:
        model: This rank's weights, whatever they are by now.
        shards: This rank's state after the last step.
        plan: Its settings go into the manifest.
        seed: Goes into the manifest, as the settings do.
        done: Steps and decisions behind the state.
        tokenizer_sha256: A run with another tokenizer is refused by it.
        mesh: Every rank writes its shards.
        folder: The unfinished one of the task, begun by rank 0.

    Returns:
        What went wrong, on the ranks that know: a full disk costs the state, not the task.
    """
    writer = CheckpointWriter(folder.unfinished / STATE_NAME, rank=mesh.rank)
    # Rank 0's process and clock, so that files of a killed run with the same step are never taken for this run's.
    token = f"{mesh.broadcast_number((os.getpid() << 40 ^ time.time_ns()) & (1 << 63) - 1):x}"
    writer.begin(done[0], shards=shards, token=token)
    state = writer.wait()
    failed = torch.tensor([state.status != "written"]).int()
    # All ranks or none: a state of which one file is missing must not get its name.
    dist.all_reduce(failed)
    if failed.item():
        writer.abandon()
        return state.error
    if mesh.rank != 0:
        writer.release()
        return None
    layouts = flat_layouts(plan.layout, data_parallel_size=mesh.shape.data)
    manifest = Manifest(
        step=done[0],
        consumed_samples=done[1],
        optimizer_steps=model.store.optimizer_steps,
        seed=seed,
        loss_scale=model.store.loss_scale_state(),
        run_config=plan.config.model_dump(mode="json"),
        model_config=plan.model_config.to_dict(),
        tokenizer_sha256=tokenizer_sha256,
        data_sha256={name: features.split.sha256 for name, features in plan.features.items()},
        precision=precision(plan.deepspeed),
        layout=WrittenLayout(
            tensor=mesh.shape.tensor, pipeline=1, data=mesh.shape.data, schedule=plan.config.parallel.schedule
        ),
        tensors=tensor_table(layouts, shape=mesh.shape, full_shapes=plan.layout.full_shapes),
    )
    try:
        writer.commit(manifest, keep_last=1)
    except CheckpointError as error:
        return str(error)
    return None
