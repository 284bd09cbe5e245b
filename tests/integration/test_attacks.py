"""Layouts against one plain process where something is missing: a position term, the decoder, layers, targets.

And what must change nothing at all: an evaluation between two steps.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from deberta_dist import DebertaConfig, DebertaForMaskedLM
from deberta_dist.data.loader import Batch
from deberta_dist.training.export import gather_full_weights
from tests.harness import run_ranks
from tests.integration import parallel_run
from tests.integration.parallel_run import (
    LEARNING_RATE,
    SEED,
    Case,
    make_trainer,
    own_batch,
    relative_error,
    train,
    train_plain,
)

pytestmark = pytest.mark.slow

whole_batch: Callable[[Case, int], Batch] = parallel_run.global_batch


@dataclass(frozen=True)
class Attack(Case):
    """A case with another model or with targets taken away.

    Attributes:
        changes: Fields of the model's configuration to replace.
        without_targets: (step, first row, last row + 1) of the global batch.
    """

    steps: int = 3
    changes: tuple[tuple[str, Any], ...] = ()
    without_targets: tuple[tuple[int, int, int], ...] = ()

    def model_config(self) -> DebertaConfig:
        return dataclasses.replace(super().model_config(), **dict(self.changes))


def batch_without_targets(case: Attack, step: int) -> Batch:
    """The usual batch with the targets of some rows taken away."""
    batch = whole_batch(case, step)
    for which, start, stop in case.without_targets:
        if which == step:
            batch.labels[start:stop] = 0
    return batch


def attack(case: Attack) -> dict[str, Any]:
    """``train`` on this rank, with the batches of the attack."""
    parallel_run.global_batch = batch_without_targets
    return train(case)


def one_process(case: Attack) -> Attack:
    return dataclasses.replace(
        case, tensor=1, pipeline=1, data=1, micro_batches=1, micro_batch_size=case.global_batch_size,
        schedule="1f1b", stages_per_rank=1, layers_per_stage="auto",
    )  # fmt: skip


BIASED = (("position_biased_input", True),)
C2P = (("pos_att_type", ("c2p",)),)
P2C = (("pos_att_type", ("p2c",)),)
# Where these add the same to all scores of a query, softmax does not see them and their gradient is zero in exact
# arithmetic: key biases where no p2c term uses them, a shift of the whole table where only c2p does.
UNSEEN_BY_SOFTMAX = ("key_proj.bias", "encoder.LayerNorm.bias")
# Data-parallel ranks of four rows; a micro-batch has two.
FIRST, SECOND, ALL = (0, 4), (4, 8), (0, 8)

ATTACKS = {
    "v1-biased": Attack(tensor=2, pipeline=2, model="v1", changes=BIASED),
    "v2-biased": Attack(tensor=2, pipeline=2, changes=BIASED),
    "v1-c2p": Attack(tensor=2, pipeline=2, model="v1", changes=C2P),
    "v1-p2c": Attack(tensor=2, pipeline=2, model="v1", changes=P2C),
    "v2-c2p": Attack(tensor=2, pipeline=2, changes=C2P),
    "v2-p2c": Attack(tensor=2, pipeline=2, changes=P2C),
    "v1-two-layers": Attack(pipeline=2, model="v1", num_layers=2),
    "v2-two-layers": Attack(tensor=2, pipeline=2, num_layers=2),
    "v1-biased-two-layers": Attack(pipeline=2, model="v1", num_layers=2, changes=BIASED),
    "no-targets-somewhere": Attack(data=2, steps=4, without_targets=((0, *FIRST), (1, *SECOND), (3, 0, 2))),
    "no-targets-somewhere-pp-tp": Attack(tensor=2, pipeline=2, data=1, steps=3, without_targets=((0, 0, 2), (1, 2, 4))),
    "no-targets-anywhere": Attack(pipeline=2, data=2, steps=4, without_targets=((1, *SECOND), (2, *ALL))),
    "no-targets-anywhere-tp": Attack(tensor=2, steps=3, without_targets=((1, *ALL),)),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_layout_equals_one_process(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = ATTACKS[name]
    monkeypatch.setattr(parallel_run, "global_batch", batch_without_targets)
    expected = train_plain(one_process(case))
    found = run_ranks(case.world_size, attack, case)

    empty = {step for step, start, stop in case.without_targets if (start, stop) == ALL}
    for step in empty:
        assert expected["history"][step] == (0.0, 0.0), "the oracle had targets"
    for rank in found:
        np.testing.assert_allclose(rank["history"], expected["history"], rtol=1e-5, err_msg="loss, norm per step")

    full = found[0]
    assert full["gradients"].keys() == full["weights"].keys() == expected["weights"].keys()
    total = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in expected["gradients"].values()))
    for parameter, gradient in expected["gradients"].items():
        if parameter.endswith(UNSEEN_BY_SOFTMAX) and np.linalg.norm(gradient) < 1e-6 * total:
            # Nothing but rounding on either side.
            assert np.linalg.norm(full["gradients"][parameter]) < 1e-6 * total, parameter
            continue
        assert relative_error(full["gradients"][parameter], gradient) < 1e-5, f"gradient of {parameter}"
        error = relative_error(full["weights"][parameter], expected["weights"][parameter])
        assert error < 1e-4, f"weight {parameter}"


def train_and_look(case: Attack, look_after: tuple[int, ...]) -> dict[str, Any]:
    """Trains; after some steps evaluates batches that are not trained on."""
    trainer = make_trainer(case)
    history, seen = [], []
    for step in range(-1, case.steps):
        if step >= 0:
            result = trainer.step(own_batch(case, step), step=step, learning_rate=LEARNING_RATE)
            history.append((result.loss, result.grad_norm))
        if step in look_after:
            looked = trainer.evaluate([own_batch(case, 100), own_batch(case, 101)])
            seen.append((looked.loss, looked.accuracy, looked.num_targets))
    weights = gather_full_weights(trainer.parts.sharded_model, layout=trainer.parts.layout, mesh=trainer._mesh)
    return {"history": history, "seen": seen, "weights": {n: w.numpy() for n, w in weights.items()}}


@pytest.mark.parametrize(
    "case",
    [
        Attack(tensor=2, pipeline=2, dropout=0.1),
        Attack(pipeline=2, data=2, dropout=0.1, micro_batches=4, schedule="interleaved_1f1b", stages_per_rank=2),
    ],
    ids=["tp-pp", "interleaved-dp"],
)
def test_evaluation_changes_nothing_in_later_steps(case: Attack) -> None:
    plain = run_ranks(case.world_size, train_and_look, case, ())
    looked = run_ranks(case.world_size, train_and_look, case, (-1, 0, 1))
    for one, other in zip(plain, looked, strict=True):
        assert one["history"] == other["history"]
        assert other["seen"] == looked[0]["seen"], "ranks disagree"
    assert plain[0]["weights"].keys() == looked[0]["weights"].keys()
    for name, weight in plain[0]["weights"].items():
        np.testing.assert_array_equal(weight, looked[0]["weights"][name], err_msg=name)

    # What was seen before the first step is what the plain model says, without dropout.
    model = DebertaForMaskedLM(case.model_config(), seed=SEED).eval()
    loss, targets = 0.0, 0
    with torch.no_grad():
        for step in (100, 101):
            batch = whole_batch(case, step)
            count = int((batch.labels > 0).sum())
            output = model(batch.input_ids, batch.attention_mask, batch.labels)
            loss, targets = loss + output.loss.item() * count, targets + count
    assert looked[0]["seen"][0][2] == targets
    assert looked[0]["seen"][0][0] == pytest.approx(loss / targets, rel=1e-5)
    assert len({loss for loss, _, _ in looked[0]["seen"]}) == 3, "the weights did not change between looks"
