"""Runs one after another in one process: none leaves its weights behind."""

import gc
from pathlib import Path

import torch
from torch import Tensor

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
