"""What a run leaves behind: no weights in memory, no answers that are not numbers."""

import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deberta_dist.errors import DivergedError
from deberta_dist.finetuning.batches import collate
from tests.finetuning.small import Case, make_tuner
from tests.harness import run_ranks


def bytes_alive() -> int:
    """Of all tensors that Python knows, each storage once."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, Tensor) and thing.device.type == "cpu"]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def train_and_close(directory: Path, precision: str) -> tuple[int, int, int]:
    """Bytes of tensors before a run, in it and after it."""
    torch.set_num_threads(1)
    (directory / "precision.json").write_text(f'{{{precision}"zero_optimization": {{"stage": 3}}}}')
    case = Case("RTE", overrides=("--run.deepspeed", str(directory / "precision.json")))
    plan, start = case.plan(directory)
    before = bytes_alive()
    tuner, _ = make_tuner(plan, start)
    tuner.step([], num_decisions=1, step=0, learning_rate=1e-3)
    during = bytes_alive()
    tuner.model.store.close()
    return before, during, bytes_alive()


def test_a_closed_store_holds_nothing(start_directory: Path) -> None:
    for precision in ("", '"bf16": {"enabled": true}, '):
        ((before, during, after),) = run_ranks(1, train_and_close, start_directory, precision)
        assert during - before > 300_000, "weights, moments"
        assert after - before < 30_000


def predict_after_a_huge_step(directory: Path) -> str:
    """What predicting says of weights that a far too high learning rate has made."""
    plan, start = Case("RTE").plan(directory)
    tuner, _ = make_tuner(plan, start)
    batch = collate(plan.features["train"], plan.order(7).micro_batches(0)[0], pad_id=0, sep_id=start.tokenizer.sep_id)
    tuner.step([(0, batch)], num_decisions=3, step=0, learning_rate=1e30)
    with pytest.raises(DivergedError) as caught:
        tuner.predict(plan.features["val"], batch_size=4)
    return str(caught.value)


def test_answers_that_are_not_finite_are_none(start_directory: Path) -> None:
    (message,) = run_ranks(1, predict_after_a_huge_step, start_directory)
    assert "RTE/val.jsonl: the model's answers are not finite; lower optimizer.learning_rate" in message
