"""One task with one seed: train, evaluate while training, save the best weights, predict."""

import shutil
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from deberta_dist.config import precision, write_resolved
from deberta_dist.conversion.source import open_source
from deberta_dist.finetuning.finetuner import FineTuner
from deberta_dist.finetuning.folder import EARLIER, IDENTITY, TaskFolder
from deberta_dist.finetuning.plan import TaskPlan
from deberta_dist.finetuning.starting_point import StartingPoint
from deberta_dist.finetuning.state import Earlier, write_state
from deberta_dist.finetuning.steps import Best, train
from deberta_dist.models.attention_dispatch import describe_attention, set_attention
from deberta_dist.parallel.layout import DTYPES, Layout, meta_classifier
from deberta_dist.parallel.mesh import Mesh
from deberta_dist.parallel.sharded_model import ShardedModel
from deberta_dist.tasks.base import Head
from deberta_dist.tasks.predictions import read_predictions
from deberta_dist.training.build import build_sharded_model, own_flat_layout, shards_of
from deberta_dist.training.export import gather_full_weights, write_weights
from deberta_dist.training.metrics import METRICS_NAME, MetricsLog
from deberta_dist.training.resume import load_state


@dataclass(frozen=True)
class TaskRun:
    """A task with a seed that is left to do.

    Attributes:
        plan: The task with its settings and rows.
        seed: Of order, dropout, perturbations and the classifier's first weights.
        folder: Where its result goes; begun by rank 0.
        made_from: What decides the numbers, from `identity`.
        earlier: A shorter run that this one continues.
    """

    plan: TaskPlan
    seed: int
    folder: TaskFolder
    made_from: dict[str, Any]
    earlier: Earlier | None = None

    @property
    def done(self) -> tuple[int, int]:
        """Steps and decisions of the shorter run."""
        return (0, 0) if self.earlier is None else self.earlier.done


def identity(plan: TaskPlan, *, start: StartingPoint, through: str | None) -> dict[str, Any]:
    """What decides the numbers of a run: a folder with another one is not this run.

    Args:
        plan: The task with its settings and rows.
        start: The checkpoint that the command line names.
        through: Task from whose model, trained in between, this one starts; None for the start itself.
    """
    settings = plan.config.model_dump(mode="json", exclude={"run", "parallel"})
    # Keys that change no number of this folder: the seed is in its name, `through` says more than `start`.
    for key in ("seed", "seeds", "log_every_steps", "recompute", "attention", "start"):
        del settings["training"][key]
    del settings["evaluation"]["batch_size"]
    return {
        "init": str(start.path.resolve()),
        "checkpoint": start.description,
        "vectors_sha256": start.fingerprint,
        "through": through,
        "precision": precision(plan.deepspeed),
        "tokenizer_sha256": start.tokenizer.sha256,
        "data_sha256": {name: features.split.sha256 for name, features in plan.features.items()},
        "diagnostics_sha256": {f.split.task.name: f.split.sha256 for f in plan.diagnostics},
        "settings": settings,
    }


def run_task(run: TaskRun, *, start: StartingPoint, mesh: Mesh) -> None:
    """Fine-tunes and fills the folder. Collective.

    Args:
        run: The task, its seed and where its results go.
        start: Weights, model configuration and tokenizer to start from.
        mesh: All ranks take part.

    Raises:
        DivergedError: gradients stayed non-finite, or answers are.
    """
    plan, tokenizer = run.plan, start.tokenizer
    order = plan.order(run.seed, done=run.done)
    log = _open_log(run, start=start, mesh=mesh, num_steps=order.num_steps)
    sharded = _make_model(run, start=start, mesh=mesh)
    best = Best() if run.earlier is None else _best_of(run.earlier, plan)
    if run.earlier is not None:
        log.resumed(
            step=run.done[0],
            path=run.earlier.reader.directory,
            changed=[f"training.epochs: {run.earlier.epochs:g} -> {plan.config.training.epochs:g}"],
            position={},
            learning_rates=run.earlier.learning_rates(plan, num_steps=order.num_steps),
        )
    tuner = FineTuner(sharded, mesh=mesh, sift=plan.sift, seed=run.seed, pad_id=tokenizer.pad_id, sep_id=tokenizer.sep_id)
    started = time.monotonic()
    train(tuner, best, plan=plan, order=order, done=run.done, mesh=mesh, log=log)
    train_seconds = time.monotonic() - started

    keeps_state = plan.config.run.keep_weights and plan.config.run.keep_state
    # Copied first: the next line overwrites the last step's weights with the best ones.
    last = sharded.store.copy_shards() if keeps_state else []
    sharded.store.load_weights(best.shards or _weights_of(run.earlier, layout=plan.layout, mesh=mesh))
    diagnostics = _predict(run, tuner, best=best, mesh=mesh)
    if plan.config.run.keep_weights or plan.is_intermediate:  # others start from it
        _keep_weights(run, sharded, start=start, mesh=mesh)
    if keeps_state:
        problem = write_state(
            sharded,
            last,
            plan=plan,
            seed=run.seed,
            done=(order.num_steps, order.num_decisions),
            tokenizer_sha256=tokenizer.sha256,
            mesh=mesh,
            folder=run.folder,
        )
        if problem is not None:
            print(f"warning: rank {mesh.rank}: {problem}; a run of more epochs cannot continue from here", flush=True)
    del last  # host memory of three states, before the next task needs it
    log.close()
    if mesh.rank == 0:
        run.folder.finish(_result(run, best, num_steps=order.num_steps, train_seconds=train_seconds), diagnostics)
        print(f"{run.folder.final}: validation score {best.score:.2f} after step {best.step} of {order.num_steps}", flush=True)
    sharded.store.close()
    # The next task may start from this folder: no rank may look before rank 0 has given it its name.
    dist.barrier()


def _open_log(run: TaskRun, *, start: StartingPoint, mesh: Mesh, num_steps: int) -> MetricsLog:
    """The metrics, behind those of a shorter run; with the settings beside them and what runs on screen."""
    plan, is_writer = run.plan, mesh.rank == 0
    if is_writer and run.earlier is not None:
        shutil.copyfile(run.earlier.folder / METRICS_NAME, run.folder.unfinished / METRICS_NAME)
    log = MetricsLog(
        run.folder.unfinished,
        is_writer=is_writer,
        max_steps=num_steps,
        print_every=plan.config.training.log_every_steps,
    )
    if run.earlier is None:
        log.say(f"{plan.task.name}, seed {run.seed}: {start.origin(plan.labels)}")
    attention, dtype = plan.config.training.attention, DTYPES[precision(plan.deepspeed)]
    log.say(describe_attention(attention, plan.model_config, dtype=dtype, device=mesh.device))
    if is_writer:
        write_resolved(plan.config, plan.deepspeed, run.folder.unfinished)
    return log


def _make_model(run: TaskRun, *, start: StartingPoint, mesh: Mesh) -> ShardedModel:
    """This rank's weights: the starting point's, or with moments those of the shorter run. Collective."""
    plan, layout = run.plan, run.plan.layout
    model = meta_classifier(plan.model_config, num_outputs=plan.task.num_outputs)
    model.recompute = plan.config.training.recompute
    set_attention(model, plan.config.training.attention)
    if run.earlier is None:
        load = start.reader(layout.full_shapes, labels=plan.labels, seed=run.seed)
        states, shards = [], shards_of(layout, mesh=mesh, load=load)
    else:
        flats = own_flat_layout(layout, mesh=mesh)
        states = run.earlier.reader.read_shards(flats, shape=mesh.shape, mesh_rank=mesh.mesh_rank)
        shards = [state.weight for state in states]
    sharded = build_sharded_model(
        model,
        layout=layout,
        optimizer=plan.config.optimizer,
        deepspeed_config=plan.deepspeed,
        mesh=mesh,
        shards=shards,
    )
    if run.earlier is not None:
        load_state(sharded, states, manifest=run.earlier.reader.manifest)
    return sharded


def _predict(run: TaskRun, tuner: FineTuner, *, best: Best, mesh: Mesh) -> dict[str, Any]:
    """Writes the answers of the weights that are loaded; returns those to the diagnostics, with their tasks. Collective."""
    plan, batch_size = run.plan, run.plan.config.evaluation.batch_size
    predictions = {"val": best.probabilities}
    if "test" in plan.features:
        predictions["test"] = tuner.predict(plan.features["test"], batch_size=batch_size)
    diagnostics = {f.split.task.name: (f.split.task, tuner.predict(f, batch_size=batch_size)) for f in plan.diagnostics}
    if mesh.rank == 0:
        for split, probabilities in predictions.items():
            run.folder.write_predictions(probabilities, split)
    return diagnostics


def _keep_weights(run: TaskRun, model: ShardedModel, *, start: StartingPoint, mesh: Mesh) -> None:
    """Writes ``weights/``. Collective."""
    full = gather_full_weights(model, layout=run.plan.layout, mesh=mesh)
    if mesh.rank == 0:
        config = {**run.plan.model_config.to_dict(), **_class_names(run.plan)}
        write_weights(full, config=config, tokenizer=start.tokenizer.path, directory=run.folder.unfinished / "weights")


def _result(run: TaskRun, best: Best, *, num_steps: int, train_seconds: float) -> dict[str, Any]:
    """What ``run.json`` holds."""
    result = {
        "task": run.plan.task.name,
        "seed": run.seed,
        "score": best.score,
        "metrics": dict(best.metrics),
        "best_step": best.step,
        "steps": num_steps,
        "train_seconds": round(train_seconds, 1),
        "recipe": str(run.plan.recipe),
        IDENTITY: run.made_from,
    }
    return result if run.earlier is None else {**result, EARLIER: run.earlier.summary()}


def _best_of(earlier: Earlier, plan: TaskPlan) -> Best:
    run = earlier.run
    probabilities = read_predictions(earlier.folder / "val.jsonl", parse_key=plan.task.parse_key)
    return Best(step=run["best_step"], score=run["score"], metrics=run["metrics"], probabilities=probabilities)


def _weights_of(earlier: Earlier, *, layout: Layout, mesh: Mesh) -> list[torch.Tensor]:
    """This rank's part of an earlier run's best weights."""
    weights = open_source(earlier.folder / "weights", verify=False).weights
    return shards_of(layout, mesh=mesh, load=lambda name: weights[name].read().float())


def _class_names(plan: TaskPlan) -> dict[str, Any]:
    """What the configuration file says of the classifier, so that it can be carried on by name."""
    if plan.task.head is Head.CHOICE:
        return {"architectures": ["DebertaV2ForMultipleChoice"]}
    return {
        "id2label": {str(number): label for number, label in enumerate(plan.labels)},
        "label2id": {label: number for number, label in enumerate(plan.labels)},
    }
