"""A fine-tuning that version 0.1.0 finished after one epoch is recognised, and continued for five more.

RTE with SiFT and dropout on two tensor ranks, from the Hugging Face form of the pre-trained weights. What they
give was recorded with 0.1.0: losses, scores, every probability, the best weights, weights and moments behind the last step. Bit-equality and its conditions are
those of `test_pretraining.py`; on a machine that computes otherwise, numbers agree to 1e-5.
"""

import json
from pathlib import Path

from safetensors.numpy import load_file

from tests.compatibility.commands import (
    computes_as_recorded,
    launch,
    metrics,
    numbers,
    recorded,
    same_as_recorded,
    same_numbers,
    same_tensors,
    weights,
)

EPOCHS, STEPS = 6, 2  # of an epoch: 16 rows, 8 in a step
TASK = Path("seed-7", "RTE")
WORDS = ("--init", "huggingface", "--data", "inputs/superglue", "--recipe", "recipes.toml", "--task", "RTE", "--sift")


def at_home(directory: Path) -> Path:
    """Gives a moved run the path of the checkpoint it started from, as its user has to: it knows it by that path."""
    file = directory / "finetuning" / TASK / "run.json"
    described = json.loads(file.read_text(encoding="utf-8"))
    described["made_from"]["init"] = str((directory / "huggingface").resolve())
    file.write_text(json.dumps(described), encoding="utf-8")
    return directory


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_more_epochs_give_what_they_gave(moved: Path) -> None:
    run, expected = at_home(moved) / "finetuning", moved / "finetuning.continued"
    launch(moved / "finetune.sh", *WORDS, "--training.epochs", EPOCHS, processes=2)
    exact = computes_as_recorded()
    relative = 0 if exact else 1e-5
    same_numbers(numbers(metrics(run / TASK), after=0), numbers(metrics(expected / TASK), after=0), relative=relative)
    assert max(line["step"] for line in numbers(metrics(expected / TASK), after=0)) == EPOCHS * STEPS
    same_tensors(weights(run / TASK / "weights"), weights(expected / TASK / "weights"), relative=0 if exact else 1e-4)
    for file, tensors in recorded(moved, "tensors").items():
        if file.startswith("finetuning.continued"):
            found = load_file(moved / file.replace("finetuning.continued", "finetuning"))
            same_as_recorded(found, tensors, relative=0 if exact else 1e-3)
    for name in ("RTE/val.jsonl", "RTE/test.jsonl", "AX-b/test.jsonl", "AX-g/test.jsonl"):
        found, then = rows(run / "seed-7" / name), rows(expected / "seed-7" / name)
        same_numbers(found, then, relative=relative, where=name)
        assert len(then) == (8 if name == "RTE/val.jsonl" else 4)
    described, then = (json.loads((directory / TASK / "run.json").read_text()) for directory in (run, expected))
    for key in ("task", "seed", "best_step", "steps", "metrics"):
        assert described[key] == then[key]
    assert then["best_step"] > STEPS, "predictions and weights are those of the first epoch"


def test_a_finished_run_is_not_done_again(moved: Path) -> None:
    """On one rank and another layout: nothing that decides its numbers has changed, so nothing is written anew."""
    folder = at_home(moved) / "finetuning" / TASK
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}
    launch(moved / "finetune.sh", *WORDS, "--parallel.tensor_parallel_size", 1, processes=1)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()} == before
