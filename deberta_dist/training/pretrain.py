"""Masked language model pre-training: what every launcher's Python half calls.

    deepspeed launchers/pretrain_demo.sh [--section.key value ...] [--dry-run [--world-size N]]

reads the TOML beside the launcher, checks everything, and trains:
configuration -> plan -> inputs -> checkpoint to continue from -> process group -> mesh -> build -> steps,
evaluations, checkpoints -> weights -> result.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from deberta_dist.checkpoint.manifest import Manifest
from deberta_dist.checkpoint.reader import CheckpointReader
from deberta_dist.config import load_config, precision, smallest_world_size, write_resolved
from deberta_dist.data.loader import unused_rows
from deberta_dist.files.lock import RunLock
from deberta_dist.models.attention_dispatch import describe_attention
from deberta_dist.models.flops import device_peak_flops
from deberta_dist.models.layers import require_compiler
from deberta_dist.parallel.layout import DTYPES
from deberta_dist.parallel.mesh import Mesh, discover_launch, local_device, make_mesh, start_process_group
from deberta_dist.planning.dry_run import describe
from deberta_dist.planning.plan import Plan, check_plan
from deberta_dist.planning.reading import describe_reading
from deberta_dist.training.arguments import parse_arguments
from deberta_dist.training.build import TrainingComponents, build, mesh_shape, shards_of
from deberta_dist.training.entry import require_machine, start
from deberta_dist.training.evaluation import evaluate, rank_batch, write_result
from deberta_dist.training.export import gather_networks, keep_tokenizer, write_weights
from deberta_dist.training.hooks import CheckpointHook, EvaluationHook, FiniteGuard, MetricsHook, StopHook
from deberta_dist.training.inputs import InitialWeights, RunData, open_data, open_initial_weights
from deberta_dist.training.length import WEIGHTS_NAME, keep_earlier_weights, learning_rates, refuse_finished
from deberta_dist.training.loop import FinishedStep, Loop, Request, learning_rate
from deberta_dist.training.metrics import MetricsLog
from deberta_dist.training.preview import preview_start
from deberta_dist.training.resume import (
    ResumePoint,
    changed_settings,
    find_checkpoint,
    is_interrupted,
    load_state,
    read_shards,
    share_checkpoint,
)
from deberta_dist.training.saving import Checkpointing
from deberta_dist.training.step_batch import StepBatch
from deberta_dist.training.target_sizes import TargetSizes
from deberta_dist.training.trainer import EvaluationResult, NetworkResult, Trainer
from deberta_dist.training.vocabulary import resolve_vocabulary

# Skipped steps in a row after which the run ends: the weights are beyond repair by then.
MAX_SKIPPED_IN_A_ROW = 50


def main(launcher_file: str, arguments: Sequence[str] | None = None) -> None:
    """Entry point of a launcher: runs it and ends the process with the right exit code.

    Args:
        launcher_file: Path of the launcher; its TOML has the same stem.
        arguments: Command line; ``sys.argv[1:]`` by default.
    """
    start(
        _run,
        Path(launcher_file),
        arguments,
        help_text=f"{__doc__}\nKeys and their meaning: deberta_dist/config/schema.py",
        goes_on="from the last checkpoint",
    )


def _run(launcher: Path, arguments: Sequence[str]) -> None:
    parsed = parse_arguments(arguments)
    config = resolve_vocabulary(load_config(launcher.with_suffix(".toml"), parsed.rest))
    launch = discover_launch()
    if parsed.dry_run:
        if launch.rank == 0:
            _print_plan(check_plan(config, world_size=parsed.world_size or smallest_world_size(config)))
        return
    plan = check_plan(config, world_size=launch.world_size)
    refuse_finished(plan)
    device = local_device(launch)
    require_machine(plan.config, deepspeed=plan.deepspeed, model_config=plan.model_config, device=device)
    if plan.config.training.compile:
        require_compiler(device.type)
    data = open_data(plan)
    initial_weights = None
    if not is_interrupted(plan):
        initial_weights = open_initial_weights(plan, tokenizer_sha256=data.tokenizer.sha256, verify=launch.rank == 0)
    directory = Path(plan.config.run.directory)
    lock, found = None, ResumePoint(None)
    # Before the process group: an error then ends every rank by itself, and no rank waits for one that is gone.
    if launch.rank == 0:
        lock = RunLock(directory)
        found = find_checkpoint(plan, data=data, lock=lock)
        write_resolved(plan.config, plan.deepspeed, directory)
        keep_tokenizer(data.tokenizer.path, directory)

    start_process_group(timeout_minutes=plan.config.run.timeout_minutes)
    mesh = make_mesh(mesh_shape(plan.config), device=device, timeout_minutes=plan.config.run.timeout_minutes)
    checkpoint = share_checkpoint(found.reader, plan=plan, mesh=mesh)
    log = _open_log(plan, data=data, mesh=mesh)
    networks = make_parts(plan, data=data, mesh=mesh, log=log, checkpoint=checkpoint, initial_weights=initial_weights)
    manifest, damaged = None if checkpoint is None else checkpoint.manifest, found.damaged
    # They hold files open, and so the disk space of checkpoints that are removed meanwhile.
    del checkpoint, found, initial_weights
    trainer = Trainer(*networks, mesh=mesh, seed=plan.config.training.seed, objective=plan.objective)
    checkpointing = Checkpointing(plan, networks=networks, mesh=mesh, data=data, log=log, damaged=damaged)

    result = train(trainer, plan=plan, data=data, mesh=mesh, log=log, checkpointing=checkpointing, manifest=manifest)

    _write_weights(networks, plan=plan, data=data, mesh=mesh, log=log)
    # No rank closes its connections while rank 0 still receives or writes weights.
    dist.barrier()
    dist.destroy_process_group()
    if mesh.rank == 0:
        log.say(write_result(result, plan=plan, data=data, directory=directory))
    log.close()
    if lock is not None:
        lock.release()


def _print_plan(plan: Plan) -> None:
    """Prints what a start would do (dry run)."""
    print("\n".join([describe(plan), *preview_start(plan)]).rstrip("\n"))


def _open_log(plan: Plan, *, data: RunData, mesh: Mesh) -> MetricsLog:
    """Opens the run's log; its first lines on screen describe the run."""
    training, model_config = plan.config.training, plan.model_config
    log = MetricsLog(
        Path(plan.config.run.directory),
        is_writer=mesh.rank == 0,
        max_steps=training.max_steps,
        print_every=training.log_every_steps,
    )
    dtype = DTYPES[precision(plan.deepspeed)]
    log.say(headline(plan, mesh.device))
    log.say(describe_attention(training.attention, model_config, dtype=dtype, device=mesh.device))
    log.say(describe_reading(plan.config, data.train.mixture))
    if unused := unused_rows(data.tokenizer, model_config.vocab_size):
        log.say(f"warning: {unused}")
    return log


def _write_weights(networks: Sequence[TrainingComponents], *, plan: Plan, data: RunData, mesh: Mesh, log: MetricsLog) -> None:
    """Writes ``weights/``, after renaming those of an earlier result. Collective."""
    weights, directory = gather_networks(networks, objective=plan.objective, mesh=mesh), plan.config.run.directory
    if mesh.rank == 0:
        if earlier := keep_earlier_weights(directory):
            log.say(f"the weights of the earlier result are now in {earlier}")
        # The run's result first: further networks lie in folders of their own within its folder.
        for network in sorted(plan.objective.networks, key=lambda network: network.name):
            write_weights(
                weights[network.name],
                config=network.config.to_dict(),
                tokenizer=data.tokenizer.path,
                directory=directory / WEIGHTS_NAME / network.name,
            )


def make_parts(
    plan: Plan,
    *,
    data: RunData,
    mesh: Mesh,
    log: MetricsLog,
    checkpoint: CheckpointReader | None,
    initial_weights: InitialWeights | None,
) -> list[TrainingComponents]:
    """This rank's parts of every network, from a checkpoint, from given weights, or with random ones. Collective."""
    make = partial(build, plan.config, deepspeed_config=plan.deepspeed, mesh=mesh)
    if checkpoint is not None:
        networks, manifest = [], checkpoint.manifest
        for layout in plan.layouts:
            shards = read_shards(checkpoint, layout=layout, mesh=mesh)
            parts = make(layout=layout, shards=[shard.weight for shard in shards])
            load_state(parts.sharded_model, shards, manifest=manifest, network=layout.network.name)
            networks.append(parts)
            del shards
        log.resumed(
            step=manifest.step,
            path=checkpoint.directory,
            changed=changed_settings(plan, data, manifest=manifest),
            position=data.position(manifest.consumed_samples),
            learning_rates=learning_rates(plan, manifest),
        )
        return networks
    log.starts_over()
    if initial_weights is not None:
        log.say("\n".join(initial_weights.notes))
    return [
        make(
            layout=layout,
            # training.init has weights for the model of [model]; other networks start with random ones.
            shards=None
            if initial_weights is None or layout.network.name
            else shards_of(layout, mesh=mesh, load=initial_weights.read),
        )
        for layout in plan.layouts
    ]


class PretrainingSteps:
    """The steps of a run, for the loop.

    Args:
        trainer: Packs batches and takes steps.
        plan: Says how many sequences a step has, and its FLOPs.
        data: Its training text is read from the checkpoint's position on.
        mesh: Says which rows of a step are this rank's.
        manifest: The checkpoint's that the run resumes from; None for a new run.
        sizes: Sizes to pad targets to; None for no padding.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        plan: Plan,
        data: RunData,
        mesh: Mesh,
        manifest: Manifest | None,
        sizes: TargetSizes | None,
    ) -> None:
        self._trainer, self._plan, self._data, self._mesh, self._sizes = trainer, plan, data, mesh, sizes
        self.first_step = 0 if manifest is None else manifest.step
        self._consumed_before = 0 if manifest is None else data.resume_at(manifest.consumed_samples)
        device_name = torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else "cpu"
        self._peak_flops = device_peak_flops(device_name)

    def consumed_samples(self, num_steps: int) -> int:
        """Sequences that the run has read after ``num_steps`` steps."""
        return self._consumed_before + (num_steps - self.first_step) * self._plan.config.training.global_batch_size

    def make_batch(self, step: int) -> StepBatch:
        """This rank's micro-batches of a step."""
        batch = rank_batch(self._data.train, plan=self._plan, mesh=self._mesh, start=self.consumed_samples(step))
        return self._trainer.pack(batch, sizes=self._sizes)

    def take(self, batch: StepBatch, *, step: int, learning_rate: float) -> Mapping[str, NetworkResult]:
        """Takes a step."""
        return self._trainer.step(batch, step=step, learning_rate=learning_rate).networks

    def numbers(self, step: FinishedStep[StepBatch], result: NetworkResult) -> dict[str, Any]:
        """Further fields of a step's record: ``mfu``, epochs and, with dynamic batching, length and padding."""
        flops, mfu = self._plan.flops_of_bucket(step.batch.input_ids.shape[1]).training, None
        if self._peak_flops is not None:
            mfu = result.num_tokens / step.seconds * flops / (self._peak_flops * self._mesh.shape.world_size)
        return {
            "mfu": mfu,
            "epochs": self._data.epochs(step.consumed_samples),
            **bucket_metrics(step.batch, result, plan=self._plan),
        }


class HeldOutEvaluation:
    """Evaluates on the held-out text and remembers the last result.

    Args:
        trainer: Runs the forward passes.
        plan: Says how many sequences are read, ``evaluation.num_sequences``.
        data: Its held-out text is read, the same sequences every time.
        mesh: Says which of them are this rank's.
        log: Where results are recorded.
        sizes: To pad targets to; None: they are not padded.

    Attributes:
        result: Of the last evaluation, of the network whose weights are the run's result; None before the first.
    """

    def __init__(
        self, trainer: Trainer, *, plan: Plan, data: RunData, mesh: Mesh, log: MetricsLog, sizes: TargetSizes | None
    ) -> None:
        self._evaluate = partial(evaluate, trainer, plan=plan, validation=data.validation, mesh=mesh, sizes=sizes)
        self._log = log
        self.result: EvaluationResult | None = None

    def run(self, step: int) -> EvaluationResult:
        """Evaluates after ``step`` steps. Collective."""
        found = self._evaluate()
        self._log.evaluation(step=step, networks=found)
        self.result = found[""]
        return self.result


def train(
    trainer: Trainer,
    *,
    plan: Plan,
    data: RunData,
    mesh: Mesh,
    log: MetricsLog,
    checkpointing: Checkpointing,
    manifest: Manifest | None,
) -> EvaluationResult:
    """Runs the remaining steps of a run, with evaluations and checkpoints; returns the last evaluation. Collective.

    Raises:
        DivergedError: too many steps in a row had a non-finite gradient.
    """
    max_steps, optimizer = plan.config.training.max_steps, plan.config.optimizer
    sizes = held_out_sizes = None
    if mesh.device.type == "cuda":
        sizes, held_out_sizes = data.target_sizes(plan.config.micro_batch_shapes)
        log.say(f"targets: {sizes.padded_share():.1%} padding, so that a shape of micro-batches has few sizes of them")
    steps = PretrainingSteps(trainer, plan=plan, data=data, mesh=mesh, manifest=manifest, sizes=sizes)
    held_out = HeldOutEvaluation(trainer, plan=plan, data=data, mesh=mesh, log=log, sizes=held_out_sizes)
    hooks = [
        FiniteGuard(most_skipped=MAX_SKIPPED_IN_A_ROW),
        MetricsHook(log, more=steps.numbers),
        EvaluationHook(held_out.run, every=plan.config.evaluation.every_steps),
        CheckpointHook(checkpointing),
        StopHook(max_steps, with_it=Request.EVALUATE | Request.SAVE),
    ]
    loop = Loop(
        steps,
        hooks=hooks,
        first_step=steps.first_step,
        max_steps=max_steps,
        learning_rate=partial(learning_rate, peak=optimizer.learning_rate, warmup_steps=plan.config.schedule.warmup_steps),
    )
    loop.run()
    # A run that was interrupted after its last step takes no step here, and has no evaluation yet.
    return held_out.result or held_out.run(steps.first_step)


def bucket_metrics(batch: StepBatch, outcome: NetworkResult, *, plan: Plan) -> dict[str, float]:
    """With dynamic batching, the length of a step's sequences and the share of its tokens that is padding."""
    if plan.config.data.bucket_lengths is None:
        return {}
    tokens = plan.config.training.global_batch_size * plan.config.data.max_seq_length
    return {"sequence_length": batch.input_ids.shape[1], "padding": 1 - outcome.num_tokens / tokens}


def headline(plan: Plan, device: torch.device) -> str:
    """One line for the log: parameters, layout, steps and batch."""
    parallel, training = plan.config.parallel, plan.config.training
    count = sum(torch.Size(shape).numel() for shape in plan.full_shapes.values())
    return (
        f"{count:,} parameters on {mesh_shape(plan.config).world_size} x {device.type}: "
        f"tensor {parallel.tensor_parallel_size} x pipeline {parallel.pipeline_parallel_size} x "
        f"data {parallel.data_parallel_size}{', sequence parallel' if parallel.sequence_parallel else ''}; "
        f"{training.max_steps} steps of {training.global_batch_size} sequences "
        f"({training.num_micro_batches} micro-batches of {training.micro_batch_size}"
        f"{')' if plan.config.data.bucket_lengths is None else ', or as many tokens in shorter ones)'}"
    )
