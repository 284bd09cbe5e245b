"""Two networks of one objective on one mesh: as one plain process, saved, resumed on another layout, and planned."""

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from deberta_dist.checkpoint.reader import open_checkpoint
from deberta_dist.parallel.mesh import make_mesh, start_process_group
from deberta_dist.planning.dry_run import rank_reports
from deberta_dist.planning.memory import rank_memory
from deberta_dist.planning.plan import Plan, plan_networks
from deberta_dist.training.build import mesh_shape
from deberta_dist.training.export import gather_networks
from deberta_dist.training.hooks import CheckpointHook, EvaluationHook, FiniteGuard, MetricsHook, StopHook
from deberta_dist.training.loop import FinishedStep, Loop, Request
from deberta_dist.training.metrics import METRICS_NAME, MetricsLog
from deberta_dist.training.pretrain import make_parts
from deberta_dist.training.saving import Checkpointing
from deberta_dist.training.step_batch import StepBatch
from deberta_dist.training.trainer import NetworkResult, Trainer
from tests.harness import run_ranks
from tests.integration.parallel_run import LEARNING_RATE, Case, deepspeed_settings, own_batch
from tests.two_networks import DRAFTER, DRAFTER_RATE, TABLE, train_plain, two_networks

STEPS, SAVED_AT = 4, 2
BASE = {"steps": STEPS, "num_layers": 4, "clipping": 0.3}
WHOLE = Case(tensor=2, pipeline=2, data=2, micro_batches=2, micro_batch_size=2, **BASE)
ONE = Case(micro_batches=2, micro_batch_size=4, **BASE)


def plan_of(case: Case, directory: str = "unused", **options: bool) -> Plan:
    config, model = case.run_config(), case.model_config()
    config = config.model_copy(update={"run": config.run.model_copy(update={"directory": Path(directory)})})
    objective = two_networks(config, model, **options)
    return plan_networks(config, deepspeed_settings(case), model_config=model, objective=objective)


class Texts:
    """What a checkpoint asks of a run's texts."""

    tokenizer = SimpleNamespace(sha256="0" * 64)

    def checksums(self) -> dict[str, str]:
        return {"train": "1" * 64, "validation": "2" * 64}

    def position(self, consumed: int) -> dict[str, int]:
        return {}


LOG = SimpleNamespace(say=print, checkpoint=lambda **_: None, resumed=lambda **_: None, starts_over=lambda: None)


class Steps:
    """The steps of the run, for the loop."""

    def __init__(self, trainer: Trainer, case: Case) -> None:
        self._trainer, self._case = trainer, case

    def make_batch(self, step: int) -> StepBatch:
        return self._trainer.pack(own_batch(self._case, step))

    def take(self, batch: StepBatch, *, step: int, learning_rate: float) -> Mapping[str, NetworkResult]:
        return self._trainer.step(batch, step=step, learning_rate=learning_rate).networks

    def consumed_samples(self, num_steps: int) -> int:
        return 8 * num_steps


class SaveOnce(CheckpointHook):
    """Asks for a checkpoint, and an evaluation before it, after one step of the run."""

    def after_step(self, step: FinishedStep) -> Request:
        return Request.EVALUATE | Request.SAVE if step.number == SAVED_AT else Request.NOTHING


def train(case: Case, directory: str, resume: bool, options: dict[str, bool]) -> dict[str, Any]:
    """Steps on this rank: all, saved in between, or those behind the checkpoint."""
    device = start_process_group(timeout_minutes=3, init_method=f"file://{os.environ['RENDEZVOUS_FILE']}")
    plan = plan_of(case, directory, **options)
    mesh = make_mesh(mesh_shape(plan.config), device=device, timeout_minutes=3)
    reader = open_checkpoint(Path(directory) / "checkpoints" / f"step-{SAVED_AT:08d}") if resume else None
    networks = make_parts(plan, data=Texts(), mesh=mesh, log=LOG, checkpoint=reader, initial_weights=None)
    trainer = Trainer(*networks, mesh=mesh, seed=7, objective=plan.objective)
    saving = Checkpointing(plan, networks=networks, mesh=mesh, data=Texts(), log=LOG)
    log = MetricsLog(Path(directory), is_writer=mesh.rank == 0, max_steps=case.steps, print_every=1)
    already = len(records_of(directory)) if mesh.rank == 0 else 0

    def evaluate(step: int) -> None:
        log.evaluation(step=step, networks=trainer.evaluate_networks([own_batch(case, 50), own_batch(case, 51)]))

    if resume:
        evaluate(SAVED_AT)
    Loop(
        Steps(trainer, case),
        hooks=[
            FiniteGuard(most_skipped=1),
            MetricsHook(log, more=lambda step, result: {}),
            EvaluationHook(evaluate, every=0),
            SaveOnce(saving),
            StopHook(case.steps, with_it=Request.NOTHING),
        ],
        first_step=SAVED_AT if resume else 0,
        max_steps=case.steps,
        learning_rate=lambda step, max_steps: LEARNING_RATE,
    ).run()
    log.close()
    place = {"pipeline_rank": mesh.mesh_rank.pipeline, "tensor_rank": mesh.mesh_rank.tensor}
    planned = [rank_memory(layout, config=plan.config, deepspeed_config=plan.deepspeed, **place) for layout in plan.layouts]
    resident = [parts.sharded_model.store.resident_bytes() for parts in networks]
    weights = gather_networks(networks, objective=plan.objective, mesh=mesh)
    dist.barrier()
    return {
        "records": records_of(directory)[already:] if mesh.rank == 0 else [],
        "weights": {name: {n: w.numpy() for n, w in found.items()} for name, found in weights.items()},
        "planned": [(one.weights, one.master_weights, one.moments) for one in planned],
        "resident": [(one["weights"], one["master_weights"], one["optimizer_states"]) for one in resident],
        "gathered": [one["gathered"] for one in resident],
    }


def records_of(directory: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(directory) / METRICS_NAME).read_text().splitlines()]


def history(records: list[dict[str, Any]], *, joint: bool = False) -> list[list[float]]:
    """Losses and norms of every step as ``train_plain`` gives them: the drafter's, then the model's."""
    keys = (
        [f"{DRAFTER}.loss", "loss", "grad_norm"] if joint else [f"{DRAFTER}.loss", "loss", f"{DRAFTER}.grad_norm", "grad_norm"]
    )
    return [[record[key] for key in keys] for record in records if "loss" in record]


def held_out(records: list[dict[str, Any]]) -> dict[str, float]:
    (found,) = [record for record in records if "valid_loss" in record]
    assert found["step"] == SAVED_AT and found["valid_targets"] > found[f"{DRAFTER}.valid_targets"] > 0
    return {key: value for key, value in found.items() if key != "step"}


def ranks(case: Case, directory: Path, *, resume: bool = False, **options: bool) -> list[dict[str, Any]]:
    return run_ranks(case.world_size, train, case, str(directory), resume, options, timeout=200)


@functools.cache
def oracle(joint: bool) -> dict[str, Any]:
    return train_plain(ONE, joint=joint)


def require_equal(found: dict[str, Any], expected: dict[str, Any], *, first: int = 0, joint: bool = False) -> None:
    np.testing.assert_allclose(history(found["records"], joint=joint), expected["history"][first:], rtol=2e-5)
    for name, weights in expected["weights"].items():
        assert found["weights"][name].keys() == weights.keys()
        for parameter, weight in weights.items():
            if parameter.endswith("pos_key_proj.bias"):
                continue  # no gradient in exact arithmetic
            difference = np.linalg.norm(found["weights"][name][parameter] - np.asarray(weight))
            assert difference <= 2e-5 * max(float(np.linalg.norm(weight)), 0.05), (name, parameter, difference)


def test_eight_ranks_train_as_one_process_and_resume_as_one_rank(tmp_path: Path) -> None:
    found = ranks(WHOLE, tmp_path)
    require_equal(found[0], oracle(joint=False))
    for rank in found:
        assert rank["resident"] == rank["planned"]
        assert rank["gathered"] == [0, 0]  # nothing of either network is left over between steps
    manifest = open_checkpoint(tmp_path / "checkpoints" / f"step-{SAVED_AT:08d}").manifest
    assert f"{DRAFTER}.{TABLE}" in manifest.tensors and TABLE in manifest.tensors and list(manifest.networks) == [DRAFTER]
    (resumed,) = ranks(ONE, tmp_path, resume=True)
    require_equal(resumed, oracle(joint=False), first=SAVED_AT)
    expected = held_out(found[0]["records"])
    for key, value in held_out(resumed["records"]).items():
        np.testing.assert_allclose(value, expected[key], rtol=1e-5)
    # A record and a line have the numbers of both networks, each with the learning rate that it stepped with.
    steps = [record for record in found[0]["records"] if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    for record in steps:
        assert (record["lr"], record[f"{DRAFTER}.lr"]) == (LEARNING_RATE, DRAFTER_RATE * LEARNING_RATE)
        assert record["tokens_per_second"] > 0 and record["skipped"] is False


def test_a_resumed_run_is_bit_equal(tmp_path: Path) -> None:
    (whole,) = ranks(ONE, tmp_path)
    (resumed,) = ranks(ONE, tmp_path, resume=True)
    assert history(resumed["records"]) == history(whole["records"])[SAVED_AT:]
    assert held_out(resumed["records"]) == held_out(whole["records"])
    for name, weights in whole["weights"].items():
        for parameter, weight in weights.items():
            np.testing.assert_array_equal(resumed["weights"][name][parameter], weight)


def test_networks_that_step_together_have_one_norm(tmp_path: Path) -> None:
    case = Case(data=2, micro_batches=2, micro_batch_size=2, **BASE)
    require_equal(ranks(case, tmp_path, joint=True)[0], oracle(joint=True), joint=True)


def test_without_the_tie_it_is_another_training(tmp_path: Path) -> None:
    (found,) = ranks(ONE, tmp_path, folds=False)
    with pytest.raises(AssertionError):
        require_equal(found, oracle(joint=False))


def test_the_dry_run_counts_both_networks() -> None:
    plan = plan_of(WHOLE)
    for number, other in ((0, 1), (1, 0)):
        for pipeline_rank, report in enumerate(rank_reports(plan, number)):
            place = {"pipeline_rank": pipeline_rank, "config": plan.config, "deepspeed_config": plan.deepspeed}
            resting = [rank_memory(plan.layouts[other], tensor_rank=rank, **place).at_rest for rank in (0, 1)]
            assert report.memory.others_at_rest in resting and report.memory.others_at_rest > 0
            alone = [rank_memory(plan.layouts[number], tensor_rank=rank, **place).peak for rank in (0, 1)]
            assert report.memory.peak - report.memory.others_at_rest in alone
    assert plan.training_flops == sum(flops.training for flops in plan.network_flops)
    assert torch.Size(plan.full_shapes[f"{DRAFTER}.{TABLE}"]) == torch.Size(plan.full_shapes[TABLE])
