"""Two networks of one objective on one mesh: as one plain process, saved, resumed on another layout, and planned."""

import functools
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from deberta_dist.checkpoint.reader import open_checkpoint
from deberta_dist.parallel.layout import plan_layout
from deberta_dist.parallel.mesh import make_mesh, start_process_group
from deberta_dist.planning.dry_run import rank_reports
from deberta_dist.planning.memory import rank_memory
from deberta_dist.planning.plan import Plan, network_flops
from deberta_dist.training.build import mesh_shape
from deberta_dist.training.export import gather_networks
from deberta_dist.training.objectives.base import check_folds
from deberta_dist.training.pretrain import make_parts
from deberta_dist.training.saving import Checkpointing
from deberta_dist.training.trainer import Trainer
from tests.harness import run_ranks
from tests.integration.parallel_run import LEARNING_RATE, Case, deepspeed_settings, own_batch
from tests.two_networks import DRAFTER, TABLE, train_plain, two_networks

STEPS, SAVED_AT = 4, 2
BASE = {"steps": STEPS, "num_layers": 4, "clipping": 0.3}
WHOLE = Case(tensor=2, pipeline=2, data=2, micro_batches=2, micro_batch_size=2, **BASE)
ONE = Case(micro_batches=2, micro_batch_size=4, **BASE)


def plan_of(case: Case, directory: str = "unused", **objective: bool) -> Plan:
    config, model = case.run_config(), case.model_config()
    config = config.model_copy(update={"run": config.run.model_copy(update={"directory": Path(directory)})})
    made = two_networks(config, model, **objective)
    flops = tuple(network_flops(config, network) for network in made.networks)
    layouts = tuple(
        plan_layout(network, parallel=config.parallel, flops=cost) for network, cost in zip(made.networks, flops, strict=True)
    )
    check_folds(made, layouts)
    return Plan(config, deepspeed_settings(case), model, made, layouts, flops)


class Texts:
    """What a checkpoint asks of a run's texts."""

    tokenizer = SimpleNamespace(sha256="0" * 64)

    def checksums(self) -> dict[str, str]:
        return {"train": "1" * 64, "validation": "2" * 64}

    def position(self, consumed: int) -> dict[str, int]:
        return {}


LOG = SimpleNamespace(say=print, checkpoint=lambda **_: None, resumed=lambda **_: None, starts_over=lambda: None)


def train(case: Case, directory: str, resume: bool, options: dict[str, bool]) -> dict[str, Any]:
    """Steps on this rank: all, saved in between, or those behind the checkpoint."""
    device = start_process_group(timeout_minutes=3, init_method=f"file://{os.environ['RENDEZVOUS_FILE']}")
    plan = plan_of(case, directory, **options)
    mesh = make_mesh(mesh_shape(plan.config), device=device, timeout_minutes=3)
    reader = open_checkpoint(Path(directory) / "checkpoints" / f"step-{SAVED_AT:08d}") if resume else None
    networks = make_parts(plan, data=Texts(), mesh=mesh, log=LOG, checkpoint=reader, initial_weights=None)
    trainer = Trainer(*networks, mesh=mesh, seed=7, objective=plan.objective)
    saving = Checkpointing(plan, networks=networks, mesh=mesh, data=Texts(), log=LOG)
    history, held_out = [], {}
    for step in range(SAVED_AT if resume else 0, case.steps):
        if step == SAVED_AT:
            evaluated = trainer.evaluate_networks([own_batch(case, 50), own_batch(case, 51)])
            held_out = {name: (result.loss, result.accuracy, result.num_targets) for name, result in evaluated.items()}
        result = trainer.step(own_batch(case, step), step=step, learning_rate=LEARNING_RATE)
        both = [result.networks[name] for name in (DRAFTER, "")]
        norms = [result.grad_norm] if plan.objective.is_joint else [one.grad_norm for one in both]
        history.append([*(one.loss for one in both), *norms])
        if step + 1 == SAVED_AT and not resume:
            saving.save(step=step + 1, consumed_samples=8 * (step + 1))
    saving.poll(wait=True)
    place = {"pipeline_rank": mesh.mesh_rank.pipeline, "tensor_rank": mesh.mesh_rank.tensor}
    planned = [rank_memory(layout, config=plan.config, deepspeed_config=plan.deepspeed, **place) for layout in plan.layouts]
    resident = [parts.sharded_model.store.resident_bytes() for parts in networks]
    weights = gather_networks(networks, objective=plan.objective, mesh=mesh)
    dist.barrier()
    return {
        "history": history,
        "held_out": held_out,
        "weights": {name: {n: w.numpy() for n, w in found.items()} for name, found in weights.items()},
        "planned": [(one.weights, one.master_weights, one.moments) for one in planned],
        "resident": [(one["weights"], one["master_weights"], one["optimizer_states"]) for one in resident],
        "gathered": [one["gathered"] for one in resident],
    }


def ranks(case: Case, directory: Path, *, resume: bool = False, **options: bool) -> list[dict[str, Any]]:
    return run_ranks(case.world_size, train, case, str(directory), resume, options, timeout=200)


@functools.cache
def oracle(joint: bool) -> dict[str, Any]:
    return train_plain(ONE, joint=joint)


def require_equal(found: dict[str, Any], expected: dict[str, Any], *, first: int = 0) -> None:
    np.testing.assert_allclose(found["history"], expected["history"][first:], rtol=2e-5)
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
    for name, held_out in found[0]["held_out"].items():
        np.testing.assert_allclose(resumed["held_out"][name], held_out, rtol=1e-5)


def test_a_resumed_run_is_bit_equal(tmp_path: Path) -> None:
    (whole,) = ranks(ONE, tmp_path)
    (resumed,) = ranks(ONE, tmp_path, resume=True)
    assert resumed["history"] == whole["history"][SAVED_AT:] and resumed["held_out"] == whole["held_out"]
    for name, weights in whole["weights"].items():
        for parameter, weight in weights.items():
            np.testing.assert_array_equal(resumed["weights"][name][parameter], weight)


def test_networks_that_step_together_have_one_norm(tmp_path: Path) -> None:
    case = Case(data=2, micro_batches=2, micro_batch_size=2, **BASE)
    require_equal(ranks(case, tmp_path, joint=True)[0], oracle(joint=True))


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
