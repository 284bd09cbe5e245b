"""Masked language model pre-training: what every launcher's Python half calls.

    deepspeed launchers/pretrain_demo.sh [--section.key value ...] [--dry-run [--world-size N]]

reads the TOML beside the launcher, checks everything, and trains:
configuration -> plan -> inputs -> checkpoint to continue from -> process group -> mesh -> build -> steps,
evaluations, checkpoints -> weights -> result.
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import monotonic

import torch
import torch.distributed as dist

from deberta_dist.checkpoint.manifest import Manifest
from deberta_dist.checkpoint.reader import CheckpointReader
from deberta_dist.config import load_config, precision, smallest_world_size, write_resolved
from deberta_dist.data.loader import unused_rows
from deberta_dist.data.prefetch import Prefetcher
from deberta_dist.errors import ConfigError, DivergedError
from deberta_dist.files.lock import RunLock
from deberta_dist.models.attention_choice import describe_attention, require_attention
from deberta_dist.models.flops import device_peak_flops
from deberta_dist.models.residual import require_compiler
from deberta_dist.parallel.layout import DTYPES
from deberta_dist.parallel.mesh import Mesh, discover_launch, local_device, make_mesh, start_process_group
from deberta_dist.planning.dry_run import describe
from deberta_dist.planning.plan import Plan, check_plan
from deberta_dist.planning.reading import describe_reading
from deberta_dist.training.build import TrainingParts, build, mesh_shape, shards_of
from deberta_dist.training.entry import parse_arguments, start
from deberta_dist.training.evaluation import evaluate, own_rows, write_result
from deberta_dist.training.export import gather_networks, keep_tokenizer, write_weights
from deberta_dist.training.inputs import InitialWeights, RunData, open_data, open_initial_weights
from deberta_dist.training.length import WEIGHTS_NAME, keep_earlier_weights, learning_rates, refuse_finished
from deberta_dist.training.lr_schedule import learning_rate
from deberta_dist.training.metrics import MetricsLog, StepMetrics
from deberta_dist.training.preview import preview_start
from deberta_dist.training.resume import (
    Found,
    changed_settings,
    find_checkpoint,
    is_interrupted,
    load_state,
    read_shards,
    share_checkpoint,
)
from deberta_dist.training.saving import Checkpointing
from deberta_dist.training.step_batch import StepBatch
from deberta_dist.training.trainer import EvaluationResult, StepResult, Trainer
from deberta_dist.training.vocabulary import resolve_vocabulary

# Steps in a row that no rank could take before the run gives up: the weights are beyond repair by then.
MAX_SKIPPED_IN_A_ROW = 50
BATCHES_AHEAD = 2


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
    config = resolve_vocabulary(load_config(launcher.with_suffix(".toml"), parsed.overrides))
    launch = discover_launch()
    if parsed.dry_run:
        if launch.rank == 0:
            plan = check_plan(config, world_size=parsed.world_size or smallest_world_size(config))
            start_lines = preview_start(plan)
            print("\n".join([describe(plan), *start_lines] if start_lines else [describe(plan)]).rstrip("\n"))
        return
    plan = check_plan(config, world_size=launch.world_size)
    refuse_finished(plan)
    if precision(plan.deepspeed) == "fp16" and not torch.cuda.is_available():
        raise ConfigError(
            f"run.deepspeed = {plan.config.run.deepspeed} asks for fp16, which needs a GPU; bf16 and fp32 run here"
        )
    training, device = plan.config.training, local_device(launch)
    attention = {"dtype": DTYPES[precision(plan.deepspeed)], "device": device}
    require_attention(training.attention, plan.model_config, **attention, where=f"{plan.config.source}: training.attention")
    if training.compile:
        require_compiler(device.type)
    data = open_data(plan)
    initial_weights = None
    if not is_interrupted(plan):
        initial_weights = open_initial_weights(plan, tokenizer_sha256=data.tokenizer.sha256, verify=launch.rank == 0)
    directory = Path(plan.config.run.directory)
    lock, found = None, Found(None)
    if launch.rank == 0:
        lock = RunLock(directory)
        found = find_checkpoint(plan, data=data, lock=lock)
        write_resolved(plan.config, plan.deepspeed, directory)
        keep_tokenizer(data.tokenizer.path, directory)

    start_process_group(timeout_minutes=plan.config.run.timeout_minutes)
    mesh = make_mesh(mesh_shape(plan.config), device=device, timeout_minutes=plan.config.run.timeout_minutes)
    checkpoint = share_checkpoint(found.reader, plan=plan, mesh=mesh)
    log = MetricsLog(
        directory,
        is_writer=mesh.rank == 0,
        max_steps=training.max_steps,
        print_every=training.log_every_steps,
    )
    log.say(headline(plan, device))
    log.say(describe_attention(training.attention, plan.model_config, **attention))
    log.say(describe_reading(plan.config, data.train.mixture))
    if unused := unused_rows(data.tokenizer, plan.model_config.vocab_size):
        log.say(f"warning: {unused}")
    networks = make_parts(plan, data=data, mesh=mesh, log=log, checkpoint=checkpoint, initial_weights=initial_weights)
    manifest, damaged = None if checkpoint is None else checkpoint.manifest, found.damaged
    # They keep files open, and with them the space of checkpoints that are removed meanwhile.
    del checkpoint, found, initial_weights
    trainer = Trainer(*networks, mesh=mesh, seed=training.seed, objective=plan.objective)
    checkpointing = Checkpointing(plan, networks=networks, mesh=mesh, data=data, log=log, damaged=damaged)

    result = train(trainer, plan=plan, data=data, mesh=mesh, log=log, checkpointing=checkpointing, manifest=manifest)

    weights = gather_networks(networks, objective=plan.objective, mesh=mesh)
    if mesh.rank == 0:
        if earlier := keep_earlier_weights(directory):
            log.say(f"the weights of the earlier result are kept in {earlier}")
        # The run's result first: further networks lie in folders of their own within its folder.
        for network in sorted(plan.objective.networks, key=lambda network: network.name):
            write_weights(
                weights[network.name],
                config=network.config.to_dict(),
                tokenizer=data.tokenizer.path,
                directory=directory / WEIGHTS_NAME / network.name,
            )
    dist.barrier()
    dist.destroy_process_group()
    if mesh.rank == 0:
        log.say(write_result(result, plan=plan, data=data, directory=directory))
    log.close()
    if lock is not None:
        lock.release()


def make_parts(
    plan: Plan,
    *,
    data: RunData,
    mesh: Mesh,
    log: MetricsLog,
    checkpoint: CheckpointReader | None,
    initial_weights: InitialWeights | None,
) -> list[TrainingParts]:
    """This rank's parts of every network, where a checkpoint left them, with given weights, or anew. Collective."""
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
            # training.init is of the model of [model]; further networks start at random.
            shards=None
            if initial_weights is None or layout.network.name
            else shards_of(layout, mesh=mesh, load=initial_weights.read),
        )
        for layout in plan.layouts
    ]


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
    """All optimizer steps that are left, evaluations and checkpoints of a run; returns the last evaluation.

    Raises:
        DivergedError: too many steps in a row had a non-finite gradient.
    """
    training, optimizer = plan.config.training, plan.config.optimizer
    device_name = torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else "cpu"
    peak = device_peak_flops(device_name)
    skipped_in_a_row = 0
    result: EvaluationResult | None = None
    first_step = 0 if manifest is None else manifest.step
    consumed_before = 0 if manifest is None else data.resume_at(manifest.consumed_samples)

    def consumed(step: int) -> int:
        return consumed_before + (step - first_step) * training.global_batch_size

    sizes = held_out_sizes = None
    if mesh.device.type == "cuda":
        sizes, held_out_sizes = data.target_sizes(plan.config.micro_batch_shapes)
        log.say(f"targets: {sizes.padded_share():.1%} padding, so that a shape of micro-batches has few sizes of them")

    def make_batch(step: int) -> StepBatch:
        return trainer.pack(own_rows(data.train, plan=plan, mesh=mesh, start=consumed(step)), sizes=sizes)

    def held_out() -> EvaluationResult:
        return evaluate(trainer, plan=plan, validation=data.validation, mesh=mesh, sizes=held_out_sizes)

    with Prefetcher(make_batch, start=first_step, depth=BATCHES_AHEAD, stop=training.max_steps) as batches:
        for step, batch in enumerate(batches, start=first_step):
            started = monotonic()
            lr = learning_rate(
                step,
                peak=optimizer.learning_rate,
                warmup_steps=plan.config.schedule.warmup_steps,
                max_steps=training.max_steps,
            )
            outcome = trainer.step(batch, step=step, learning_rate=lr)
            per_second = outcome.num_tokens / (monotonic() - started)
            flops = plan.flops_of_bucket(batch.input_ids.shape[1]).training
            log.step(
                StepMetrics(
                    step=step + 1,
                    loss=outcome.loss,
                    grad_norm=outcome.grad_norm,
                    lr=lr,
                    tokens_per_second=per_second,
                    mfu=None if peak is None else per_second * flops / (peak * mesh.shape.world_size),
                    consumed_samples=consumed(step + 1),
                    data_seconds=batches.waited_seconds,
                    skipped=outcome.skipped,
                ),
                epochs=data.epochs(consumed(step + 1)),
                **bucket_metrics(batch, outcome, plan=plan),
            )
            skipped_in_a_row = skipped_in_a_row + 1 if outcome.skipped else 0
            if skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
                raise DivergedError(
                    f"{skipped_in_a_row} steps in a row had a non-finite gradient, the last one step {step + 1}; "
                    "lower optimizer.learning_rate or look at the data"
                )
            every, is_last = plan.config.evaluation.every_steps, step + 1 == training.max_steps
            if is_last or (every and (step + 1) % every == 0):
                result = held_out()
                log.evaluation(step=step + 1, **asdict(result))
            checkpointing.poll()
            if checkpointing.is_due(step + 1):
                checkpointing.save(step=step + 1, consumed_samples=consumed(step + 1))
    checkpointing.poll(wait=True)
    if result is None:  # a run that was stopped after its last step has only this left
        result = held_out()
        log.evaluation(step=first_step, **asdict(result))
    return result


def bucket_metrics(batch: StepBatch, outcome: StepResult, *, plan: Plan) -> dict[str, float]:
    """With dynamic batching, the length of a step's sequences and the share of its tokens that is padding."""
    if plan.config.data.bucket_lengths is None:
        return {}
    tokens = plan.config.training.global_batch_size * plan.config.data.max_seq_length
    return {"sequence_length": batch.input_ids.shape[1], "padding": 1 - outcome.num_tokens / tokens}


def headline(plan: Plan, device: torch.device) -> str:
    """One line on what is about to run."""
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
