"""Models and DeepSpeed settings off the usual path, against one plain process; and a run repeated bit for bit."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from deberta_dist import DebertaConfig
from deberta_dist.data.loader import Batch
from tests.harness import run_ranks
from tests.integration import parallel_run
from tests.integration.parallel_run import Case, relative_error, train, train_plain

usual_batch, usual_settings = parallel_run.global_batch, parallel_run.deepspeed_settings


@dataclass(frozen=True)
class Unusual(Case):
    """A case with other model fields or DeepSpeed settings.

    Attributes:
        changes: Fields of the model's configuration; ids follow a smaller ``vocab_size``.
        zero: Keys of the JSON's zero_optimization.
    """

    steps: int = 3
    changes: tuple[tuple[str, Any], ...] = ()
    zero: tuple[tuple[str, Any], ...] = ()

    def model_config(self) -> DebertaConfig:
        return dataclasses.replace(super().model_config(), **dict(self.changes))


def small_vocabulary_batch(case: Unusual, step: int) -> Batch:
    batch, size = usual_batch(case, step), case.model_config().vocab_size
    return Batch(
        input_ids=batch.input_ids % size,
        attention_mask=batch.attention_mask,
        labels=torch.where(batch.labels > 0, 1 + batch.labels % (size - 1), 0),
    )


def settings(case: Unusual) -> dict[str, Any]:
    found = usual_settings(case)
    found["zero_optimization"] |= dict(case.zero)
    return found


def train_unusual(case: Unusual) -> dict[str, Any]:
    parallel_run.global_batch, parallel_run.deepspeed_settings = small_vocabulary_batch, settings
    return train(case)


CASES = {
    # 60 rows on two shards of 64: the second rank has nothing but padding.
    "v1": Unusual(
        tensor=2, pipeline=2, model="v1",
        changes=(("vocab_size", 60), ("position_biased_input", True), ("type_vocab_size", 2), ("embedding_size", 16),
                 ("attention_head_size", 12)),
    ),
    "v2-plain": Unusual(
        tensor=2, pipeline=2,
        changes=(("vocab_size", 60), ("type_vocab_size", 2), ("conv_groups", 4), ("conv_kernel_size", 5),
                 ("decoder", "plain")),
    ),
    "v2-plain-sequence-data": Unusual(tensor=2, data=2, sequence=True, changes=(("decoder", "plain"),)),
    # Positions are added to the embeddings, so that the last layer is split too; two tokens beside each part.
    "v1-sequence": Unusual(
        tensor=2, pipeline=2, sequence=True, model="v1",
        changes=(("vocab_size", 60), ("position_biased_input", True), ("type_vocab_size", 2), ("embedding_size", 16),
                 ("conv_kernel_size", 5), ("conv_groups", 4)),
    ),
    "no-clipping": Unusual(tensor=2, clipping=0.0),
    "buckets-smaller-than-a-flat": Unusual(
        data=2,
        zero=(("reduce_bucket_size", 100), ("stage3_prefetch_bucket_size", 10), ("sub_group_size", 100),
              ("stage3_max_live_parameters", 10), ("overlap_comm", True), ("contiguous_gradients", False)),
    ),
    "parameters-offloaded": Unusual(
        data=2, zero=(("offload_param", {"device": "cpu"}), ("offload_optimizer", {"device": "cpu"}))
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "v2-plain-sequence-data" else name for name in CASES]
)
def test_equals_one_process(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    alone = dataclasses.replace(
        case, tensor=1, pipeline=1, data=1, micro_batches=1, micro_batch_size=case.global_batch_size,
        clipping=case.clipping or float("inf"),
    )  # fmt: skip
    monkeypatch.setattr(parallel_run, "global_batch", small_vocabulary_batch)
    expected = train_plain(alone)
    found = run_ranks(case.world_size, train_unusual, case)
    for rank in found:
        np.testing.assert_allclose(rank["history"], expected["history"], rtol=1e-5)
    full = found[0]
    assert full["weights"].keys() == expected["weights"].keys()
    total = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in expected["gradients"].values()))
    for parameter, gradient in expected["gradients"].items():
        if parameter.endswith("pos_key_proj.bias"):  # softmax does not see it: rounding noise on both sides
            assert np.linalg.norm(full["gradients"][parameter]) < 1e-6 * total
            continue
        error = np.linalg.norm(full["gradients"][parameter] - gradient)
        # A gradient that all but cancels (v1's key bias) is measured by the noise of the sums it comes from.
        assert error < 1e-5 * max(np.linalg.norm(gradient), 1e-6 * total), f"gradient of {parameter}"
        assert relative_error(full["weights"][parameter], expected["weights"][parameter]) < 1e-4, parameter


def test_a_run_with_dropout_repeats_bit_for_bit() -> None:
    case = Case(tensor=2, dropout=0.1, recompute="selective", steps=2)
    first, second = (run_ranks(case.world_size, train, case) for _ in range(2))
    assert [rank["history"] for rank in first] == [rank["history"] for rank in second]
    for name, weight in first[0]["weights"].items():
        np.testing.assert_array_equal(weight, second[0]["weights"][name], err_msg=name)
    without = run_ranks(case.world_size, train, dataclasses.replace(case, dropout=0.0))
    assert without[0]["history"] != first[0]["history"], "dropout was not on"
