"""One task with one seed: train, evaluate while training, keep the best weights, predict."""

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from deberta_dist.config import precision, write_resolved
from deberta_dist.conversion.source import open_source
from deberta_dist.data.prefetch import Prefetcher
from deberta_dist.errors import DivergedError
from deberta_dist.finetuning.batches import TaskBatch, TrainingOrder, collate, dealt
from deberta_dist.finetuning.finetuner import FineTuner
from deberta_dist.finetuning.folder import EARLIER, IDENTITY, TaskFolder
from deberta_dist.finetuning.plan import TaskPlan
from deberta_dist.finetuning.starting_point import StartingPoint
from deberta_dist.finetuning.state import Earlier, write_state
from deberta_dist.models.attention_choice import describe_attention, set_attention
from deberta_dist.parallel.layout import DTYPES, Layout, meta_classifier
from deberta_dist.parallel.mesh import Mesh
from deberta_dist.tasks import metrics
from deberta_dist.tasks.base import Head
from deberta_dist.tasks.decisions import Probabilities
from deberta_dist.tasks.predictions import decide, read_predictions
from deberta_dist.training.build import build_sharded_model, own_flat_layout, shards_of
from deberta_dist.training.export import gather_full_weights, write_weights
from deberta_dist.training.lr_schedule import learning_rate
from deberta_dist.training.metrics import METRICS_NAME, MetricsLog, StepMetrics
from deberta_dist.training.resume import load_state

# Steps in a row that no rank could take before the run gives up.
MAX_SKIPPED_IN_A_ROW = 20
_BATCHES_AHEAD = 2


@dataclass
class Best:
    """The best evaluation so far.

    Attributes:
        step: After which it was.
        score: Task score, percent; below all before the first.
        metrics: Of the task, percent.
        probabilities: For the validation split.
        shards: This rank's weights then, float32 on the host; empty while it is that of an earlier run.
    """

    step: int = 0
    score: float = -1.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    probabilities: Probabilities = field(default_factory=dict)
    shards: list[torch.Tensor] = field(default_factory=list)


def identity(plan: TaskPlan, *, start: StartingPoint, through: str | None) -> dict[str, Any]:
    """What decides the numbers of a run: a folder with another one is not this run.

    Args:
        plan: The task.
        start: What the command line names.
        through: Task from whose model, trained in between, this one starts; None for the start itself.
    """
    settings = plan.config.model_dump(mode="json", exclude={"run", "parallel"})
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


def run_task(
    plan: TaskPlan,
    seed: int,
    *,
    start: StartingPoint,
    mesh: Mesh,
    folder: TaskFolder,
    made_from: Any,
    earlier: Earlier | None = None,
) -> None:
    """Fine-tunes and fills the folder. Collective.

    Args:
        plan: The task.
        seed: Of this run.
        start: The checkpoint.
        mesh: The grid.
        folder: Begun by rank 0.
        made_from: See ``identity``.
        earlier: A shorter run that this one continues.

    Raises:
        DivergedError: gradients stayed non-finite, or answers are.
    """
    done = (0, 0) if earlier is None else earlier.done
    order = plan.order(seed, done=done)
    is_writer = mesh.rank == 0
    if is_writer and earlier is not None:
        shutil.copyfile(earlier.folder / METRICS_NAME, folder.unfinished / METRICS_NAME)
    log = MetricsLog(
        folder.unfinished,
        is_writer=is_writer,
        max_steps=order.num_steps,
        print_every=plan.config.training.log_every_steps,
    )
    if earlier is None:
        log.say(f"{plan.task.name}, seed {seed}: {start.origin(plan.labels)}")
    attention, dtype = plan.config.training.attention, DTYPES[precision(plan.deepspeed)]
    log.say(describe_attention(attention, plan.model_config, dtype=dtype, device=mesh.device))
    if is_writer:
        write_resolved(plan.config, plan.deepspeed, folder.unfinished)
    layout = plan.layout
    model = meta_classifier(plan.model_config, num_outputs=plan.task.num_outputs)
    model.recompute = plan.config.training.recompute
    set_attention(model, attention)
    if earlier is None:
        load = start.reader(layout.full_shapes, labels=plan.labels, seed=seed)
        shards = shards_of(layout, mesh=mesh, load=load)
    else:
        states = earlier.reader.read_shards(own_flat_layout(layout, mesh=mesh), shape=mesh.shape, coordinate=mesh.coordinate)
        shards = [state.weight for state in states]
    sharded = build_sharded_model(
        model,
        layout=layout,
        optimizer=plan.config.optimizer,
        deepspeed_config=plan.deepspeed,
        mesh=mesh,
        shards=shards,
    )
    best = Best()
    if earlier is not None:
        load_state(sharded, states, manifest=earlier.reader.manifest)
        del states
        best = _best_of(earlier, plan)
        log.resumed(
            step=done[0],
            path=earlier.reader.directory,
            changed=[f"training.epochs: {earlier.epochs:g} -> {plan.config.training.epochs:g}"],
            position={},
            learning_rates=earlier.learning_rates(plan, num_steps=order.num_steps),
        )
    del shards
    tokenizer = start.tokenizer
    tuner = FineTuner(sharded, mesh=mesh, sift=plan.sift, seed=seed, pad_id=tokenizer.pad_id, sep_id=tokenizer.sep_id)
    started = time.monotonic()
    _train(tuner, best, plan=plan, order=order, done=done, mesh=mesh, log=log)
    train_seconds = time.monotonic() - started

    keeps_state = plan.config.run.keep_weights and plan.config.run.keep_state
    last = sharded.store.copy_shards() if keeps_state else []
    sharded.store.load_weights(best.shards or _weights_of(earlier, layout=layout, mesh=mesh))
    batch_size = plan.config.evaluation.batch_size
    predictions = {"val": best.probabilities}
    if "test" in plan.features:
        predictions["test"] = tuner.predict(plan.features["test"], batch_size=batch_size)
    diagnostics = {f.split.task.name: (f.split.task, tuner.predict(f, batch_size=batch_size)) for f in plan.diagnostics}
    if is_writer:
        for split, probabilities in predictions.items():
            folder.write_predictions(probabilities, split)
    if plan.config.run.keep_weights or plan.is_intermediate:  # others start from it
        full = gather_full_weights(sharded, layout=layout, mesh=mesh)
        if is_writer:
            config = {**plan.model_config.to_dict(), **_class_names(plan)}
            write_weights(full, config=config, tokenizer=tokenizer.path, directory=folder.unfinished / "weights")
        del full
    if keeps_state:
        problem = write_state(
            sharded,
            last,
            plan=plan,
            seed=seed,
            done=(order.num_steps, order.num_decisions),
            tokenizer_sha256=tokenizer.sha256,
            mesh=mesh,
            folder=folder,
        )
        if problem is not None:
            print(f"warning: rank {mesh.rank}: {problem}; a run of more epochs cannot continue from here", flush=True)
    del last
    log.close()
    if is_writer:
        run = {
            "task": plan.task.name,
            "seed": seed,
            "score": best.score,
            "metrics": dict(best.metrics),
            "best_step": best.step,
            "steps": order.num_steps,
            "train_seconds": round(train_seconds, 1),
            "recipe": str(plan.recipe),
            IDENTITY: made_from,
        }
        if earlier is not None:
            run[EARLIER] = earlier.told()
        folder.finish(run, diagnostics)
        print(f"{folder.final}: validation score {best.score:.2f} after step {best.step} of {order.num_steps}", flush=True)
    sharded.store.close()
    dist.barrier()


def _best_of(earlier: Earlier, plan: TaskPlan) -> Best:
    run = earlier.run
    probabilities = read_predictions(earlier.folder / "val.jsonl", parse_key=plan.task.parse_key)
    return Best(step=run["best_step"], score=run["score"], metrics=run["metrics"], probabilities=probabilities)


def _weights_of(earlier: Earlier, *, layout: Layout, mesh: Mesh) -> list[torch.Tensor]:
    """This rank's part of an earlier run's best weights."""
    weights = open_source(earlier.folder / "weights", verify=False).weights
    return shards_of(layout, mesh=mesh, load=lambda name: weights[name].read().float())


def _train(
    tuner: FineTuner, best: Best, *, plan: TaskPlan, order: TrainingOrder, done: tuple[int, int], mesh: Mesh, log: MetricsLog
) -> None:
    """The steps that are left; ``best`` is replaced where they are better."""
    optimizer, train = plan.config.optimizer, plan.features["train"]
    every = max(1, round(order.steps_per_epoch / plan.config.evaluation.per_epoch))
    skipped_in_a_row, (first_step, consumed) = 0, done

    def make_batches(step: int) -> tuple[int, list[tuple[int, TaskBatch]]]:
        all_of_it = order.micro_batches(step)
        own = dealt(len(all_of_it), rank=mesh.coordinate.data, size=mesh.shape.data)
        ids = {"pad_id": tuner.pad_id, "sep_id": tuner.sep_id}
        batches = [(i, collate(train, all_of_it[i], **ids).ahead_of(mesh.device)) for i in own]
        return sum(map(len, all_of_it)), batches

    with Prefetcher(make_batches, start=first_step, depth=_BATCHES_AHEAD, stop=order.num_steps) as prefetched:
        for step, (count, batches) in enumerate(prefetched, start=first_step):
            started = time.monotonic()
            lr = learning_rate(
                step,
                peak=optimizer.learning_rate,
                warmup_steps=plan.config.schedule.warmup_steps,
                max_steps=order.num_steps,
            )
            result = tuner.step(batches, num_decisions=count, step=step, learning_rate=lr)
            consumed += count
            log.step(
                StepMetrics(
                    step=step + 1,
                    loss=result.loss,
                    grad_norm=result.grad_norm,
                    lr=lr,
                    tokens_per_second=result.num_tokens / (time.monotonic() - started),
                    mfu=None,
                    consumed_samples=consumed,
                    data_seconds=prefetched.waited_seconds,
                    skipped=result.grad_norm is None,
                ),
                sift_loss=result.sift_loss,
                accuracy=result.accuracy,
            )
            skipped_in_a_row = skipped_in_a_row + 1 if result.grad_norm is None else 0
            if skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
                raise DivergedError(
                    f"{plan.task.name}: {skipped_in_a_row} steps in a row had a non-finite gradient, the last one step "
                    f"{step + 1}; lower optimizer.learning_rate or look at the data"
                )
            if step + 1 == order.num_steps or (step + 1) % every == 0:
                _evaluate(tuner, best, plan=plan, mesh=mesh, log=log, step=step + 1)


def _evaluate(tuner: FineTuner, best: Best, *, plan: TaskPlan, mesh: Mesh, log: MetricsLog, step: int) -> None:
    """Scores the validation split and keeps probabilities and weights where they are the best so far."""
    features = plan.features["val"]
    probabilities = tuner.predict(features, batch_size=plan.config.evaluation.batch_size)
    scores = metrics.score(features.split, decide(features.split, probabilities))
    # One rank decides: a last bit that differs on another must not mix the weights of two steps.
    is_best = bool(mesh.broadcast_number(int(metrics.task_score(scores) > best.score)))
    if is_best:
        best.step, best.score, best.metrics = step, metrics.task_score(scores), scores
        best.probabilities, best.shards = probabilities, tuner.model.store.copy_weights()
    log.scores(step=step, scores=scores, is_best=is_best)


def _class_names(plan: TaskPlan) -> dict[str, Any]:
    """What the configuration file says of the classifier, so that it can be carried on by name."""
    if plan.task.head is Head.CHOICE:
        return {"architectures": ["DebertaV2ForMultipleChoice"]}
    return {
        "id2label": {str(number): label for number, label in enumerate(plan.labels)},
        "label2id": {label: number for number, label in enumerate(plan.labels)},
    }
