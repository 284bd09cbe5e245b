"""Properties of the weight store that equal losses alone would not show."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.harness import run_ranks
from tests.integration.parallel_run import LEARNING_RATE, Case, make_trainer, own_batch
from tests.parallel.zero.resident import resident_bytes

# DeepSpeed's gathers and our broadcasts, by the functions that carry them; torch 2.11 and 2.12 lack the "single" names.
COUNTED = (
    "all_gather_single",
    "all_gather_into_tensor",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
    "broadcast",
    "reduce",
)


def count_collectives(case: Case) -> dict[str, list[int]]:
    """Element counts of the collectives of one optimizer step, by kind (the third; the first ones also set up)."""
    counts: dict[str, list[int]] = {}
    depth = [0]
    originals = {name: getattr(dist, name) for name in COUNTED if hasattr(dist, name)}

    def counting(name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            # One function may be written on top of another: the outermost call is the message.
            if depth[0] == 0:
                tensor = next(a for a in [*arguments, *options.values()] if torch.is_tensor(a))
                counts.setdefault(name.replace("into_tensor", "single").replace("_tensor", "_single"), []).append(
                    tensor.numel()
                )
            depth[0] += 1
            try:
                return originals[name](*arguments, **options)
            finally:
                depth[0] -= 1

        return call

    for name in originals:  # before DeepSpeed looks them up
        setattr(dist, name, counting(name))
    trainer = make_trainer(case)
    for step in range(3):
        counts.clear()
        trainer.step(own_batch(case, step), step=step, learning_rate=LEARNING_RATE)
    return dict(counts)


def test_weights_and_gradients_travel_once_per_step_whatever_the_micro_batches() -> None:
    few = run_ranks(8, count_collectives, Case(tensor=2, pipeline=2, data=2, micro_batches=1))
    many = run_ranks(8, count_collectives, Case(tensor=2, pipeline=2, data=2, micro_batches=6))
    assert few == many
    for counts in few:
        # One per flat parameter (decayed, not decayed); DeepSpeed reduces both in one message.
        assert len(counts["all_gather_single"]) == 2
        assert len(counts["reduce_scatter_single"]) == 1


def resident(case: Case) -> dict[str, int]:
    trainer = make_trainer(case)
    for step in range(2):
        trainer.step(own_batch(case, step), step=step, learning_rate=LEARNING_RATE)
    model = trainer.parts.sharded_model
    model_bytes = sum(p.numel() for p in model.model.parameters())
    return {**resident_bytes(model.store), "parameters": model_bytes, "flat": sum(model.store.layout.sizes)}


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_each_rank_holds_its_share_between_steps(precision: str) -> None:
    width = {"fp32": 4, "bf16": 2}[precision]
    for case in (Case(data=4, precision=precision), Case(tensor=2, pipeline=2, data=2, precision=precision)):
        for rank in run_ranks(case.world_size, resident, case):
            share = rank["flat"] // case.data
            assert rank["parameters"] == 0, "the model's own parameters are empty between steps"
            assert rank["gathered"] == 0
            assert rank["weights"] == width * share
            assert rank["master_weights"] == 4 * share
            assert rank["optimizer_states"] == 2 * 4 * share


def poisoned(case: Case, poisoned_rank: int) -> dict[str, Any]:
    """Three steps, the second with a NaN in one gradient element of one rank."""
    trainer = make_trainer(case)
    model, runner = trainer.parts.sharded_model, trainer.parts.runner
    run = runner.forward_backward
    weights, results = [], []
    for step in range(3):

        def run_and_poison(*arguments: Any, **options: Any) -> torch.Tensor:
            output = run(*arguments, **options)
            if step == 1 and dist.get_rank() == poisoned_rank:
                next(p for p in model.model.parameters() if p.grad is not None).grad.view(-1)[0] = float("nan")
            return output

        runner.forward_backward = run_and_poison
        results.append(trainer.step(own_batch(case, step), step=step, learning_rate=LEARNING_RATE))
        weights.append({n: w.numpy().copy() for n, w in model.store.master_weights().items()})
    return {
        "skipped": [r.skipped for r in results],
        "losses": [r.loss for r in results],
        "weights": weights,
        "declined": model.store.skipped_steps,
    }


@pytest.mark.parametrize("poisoned_rank", [0, pytest.param(3, marks=pytest.mark.slow), pytest.param(6, marks=pytest.mark.slow)])
def test_one_rank_with_nan_stops_every_rank_for_one_step(poisoned_rank: int) -> None:
    for rank in run_ranks(8, poisoned, Case(tensor=2, pipeline=2, data=2), poisoned_rank):
        assert rank["skipped"] == [False, True, False]
        assert rank["declined"] == 1
        first, second, third = rank["weights"]
        assert all(np.array_equal(first[name], second[name]) for name in first), "a weight moved"
        assert any(not np.array_equal(second[name], third[name]) for name in first), "the run did not go on"
        assert np.isfinite(rank["losses"]).all()
