"""32 rows of every task can be learned by heart: the whole way from rows to decisions, with and without SiFT."""

from pathlib import Path

import pytest

from deberta_dist.finetuning.batches import collate
from deberta_dist.tasks.predictions import decide
from deberta_dist.tasks.superglue.tasks import MAIN_TASKS
from tests.finetuning.small import Case, make_tuner
from tests.harness import run_ranks

ROWS, STEPS = 32, 120
ROWS_PER_STEP = 8
KNOWN_LOSS = 0.02  # the mean of every step of an epoch, in nats: 0.98 for the right answer


def memorise(task: str, sift: bool, directory: Path) -> float:
    """Share of 32 training decisions that are right after training on them."""
    overrides = ("--data.max_seq_length", "64", "--data.max_windows", "1", "--optimizer.gradient_clipping", "1.0")
    plan, start = Case(task, sift=sift, overrides=overrides).plan(directory)
    tuner, _ = make_tuner(plan, start)
    features = plan.features["train"]
    chosen = [example for example in features.examples if example.gold][:ROWS]
    ids = {"pad_id": start.tokenizer.pad_id, "sep_id": start.tokenizer.sep_id}
    batches = []
    for first in range(0, len(chosen), ROWS_PER_STEP):
        picks = [(example, range(len(example.seconds))) for example in chosen[first : first + ROWS_PER_STEP]]
        batches.append(collate(features, picks, **ids))
    losses = []
    for step in range(STEPS):
        number = step % len(batches)
        count = len(batches[number].gold)
        rate = 3e-3 * min(1.0, (step + 1) / 10) * (1 - step / STEPS)
        losses.append(tuner.step([(0, batches[number])], num_decisions=count, step=step, learning_rate=rate).loss)
        if max(losses[-len(batches) :]) < KNOWN_LOSS and len(losses) >= len(batches):
            break
    answers = decide(features.split, tuner.predict(features, batch_size=16))
    right = [answers[example.key] in features.split.decisions[example.key].gold for example in chosen]
    return sum(right) / len(right)


@pytest.mark.parametrize("task", MAIN_TASKS)
def test_32_rows_are_learned_by_heart(task: str, start_directory: Path) -> None:
    (share,) = run_ranks(1, memorise, task, False, start_directory)
    assert share >= 0.95


@pytest.mark.parametrize("task", ["WSC", "COPA"])
def test_and_with_sift(task: str, start_directory: Path) -> None:
    (share,) = run_ranks(1, memorise, task, True, start_directory)
    assert share >= 0.95
