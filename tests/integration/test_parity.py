"""Every layout trains the same model: losses, norms, gradients and weights against one plain-PyTorch process."""

from functools import cache
from typing import Any

import numpy as np
import pytest

from tests.harness import run_ranks
from tests.integration.parallel_run import LENGTH, Case, relative_error, train, train_plain

BUCKETS = (8, 12, LENGTH)


def slow(case: Case) -> Any:
    """Near to a case that always runs."""
    return pytest.param(case, marks=pytest.mark.slow)


LAYOUTS = [Case(tensor=tensor, pipeline=pipeline, data=data) for tensor in (1, 2) for pipeline in (1, 2) for data in (1, 2)] + [
    Case(tensor=4),
    Case(pipeline=4, micro_batches=4),
    Case(pipeline=4, micro_batches=1),
    slow(Case(pipeline=4, micro_batches=5)),
    slow(Case(tensor=2, pipeline=2, micro_batches=5, schedule="gpipe")),
    Case(tensor=2, pipeline=2, micro_batches=1),
    slow(Case(pipeline=2, data=2, micro_batches=2, schedule="gpipe")),
    Case(pipeline=2, layers_per_stage=(1, 4)),
    slow(Case(tensor=2, pipeline=2, layers_per_stage=(4, 1))),
    Case(pipeline=2, schedule="interleaved_1f1b", stages_per_rank=2, micro_batches=4),
    slow(Case(tensor=2, pipeline=2, schedule="interleaved_1f1b", stages_per_rank=2, micro_batches=2)),
    Case(tensor=2, pipeline=2, data=2, model="v1"),
    Case(tensor=2, pipeline=2, recompute="full"),
    Case(tensor=2, pipeline=2, recompute="selective"),
    Case(data=2, offload=True),
    Case(tensor=2, pipeline=2, documents=True),
    Case(tensor=2, data=2, vocabulary_chunks=3),
    Case(tensor=2, pipeline=2, buckets=BUCKETS),
    slow(Case(pipeline=2, data=2, schedule="interleaved_1f1b", stages_per_rank=2, buckets=BUCKETS)),
    slow(Case(tensor=2, pipeline=2, compile=True)),
    Case(tensor=2, pipeline=2, data=2, as_on_a_gpu=True),
    slow(Case(as_on_a_gpu=True)),
    slow(Case(tensor=2, as_on_a_gpu=True, model="v1", vocabulary_chunks=3)),
    slow(Case(pipeline=2, as_on_a_gpu=True, schedule="interleaved_1f1b", stages_per_rank=2, recompute="full")),
    slow(Case(tensor=2, pipeline=2, as_on_a_gpu=True, documents=True, buckets=BUCKETS)),
]


def label(case: Case) -> str:
    """The fields of a case that differ from its defaults."""
    default = Case()
    changed = {k: v for k, v in vars(case).items() if v != getattr(default, k)}
    return ",".join(f"{k}={v}" for k, v in changed.items()) or "one-rank"


@cache
def oracle(global_batch_size: int, model: str, **texts: Any) -> dict[str, Any]:
    """The plain process, once per (batch, model): its layout does not matter to it."""
    return train_plain(Case(micro_batches=1, micro_batch_size=global_batch_size, model=model, **texts))


def without_gradient(name: str) -> bool:
    """Biases whose gradient is zero in exact arithmetic, so that only rounding noise can be compared.

    A bias on the projected position keys adds the same amount to all scores of a query, which softmax does
    not see. (Not so under ``share_att_key``, where the key bias is used in two places.)
    """
    return name.endswith("pos_key_proj.bias")


def gradient_tolerance(name: str, case: Case) -> float:
    """1e-5, but for a sum most of which is zero in exact arithmetic.

    v1's key bias adds to content scores what softmax does not see, and to p2c scores what it does. The second is so
    small here (1e-8) that the rounding of the first is 1e-5 of it: so far are both the formula in float32 and the
    portable attention from float64, in one process.
    """
    return 3e-5 if case.model == "v1" and name.endswith("self.key_proj.bias") else 1e-5


@pytest.mark.parametrize("case", LAYOUTS, ids=label)
def test_layout_equals_one_process(case: Case) -> None:
    require_one_process(case)


def require_one_process(case: Case) -> None:
    """Runs a layout without dropout and compares every rank with the plain process."""
    expected = oracle(case.global_batch_size, case.model, documents=case.documents, buckets=case.buckets)
    found = run_ranks(case.world_size, train, case)
    for rank in found:
        np.testing.assert_allclose(rank["history"], expected["history"], rtol=1e-5, err_msg="loss, norm per step")
    clipping_was_active = [norm > case.clipping for _, norm in expected["history"]]
    assert all(clipping_was_active)

    full = found[0]
    assert full["gradients"].keys() == full["weights"].keys() == expected["weights"].keys()
    total = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in expected["gradients"].values()))
    for name, gradient in expected["gradients"].items():
        if without_gradient(name):
            assert np.linalg.norm(full["gradients"][name]) < 1e-6 * total, name
            continue
        assert relative_error(full["gradients"][name], gradient) < gradient_tolerance(name, case), f"gradient of {name}"
        assert relative_error(full["weights"][name], expected["weights"][name]) < 1e-4, f"weight {name}"


def test_dropout_does_not_depend_on_pipeline_and_data_layout() -> None:
    # Eight micro-batches of two sequences each time.
    common = {"dropout": 0.1, "steps": 2}
    layouts = [
        Case(micro_batches=8, **common),
        Case(pipeline=2, micro_batches=8, **common),
        Case(pipeline=2, data=2, micro_batches=4, **common),
        Case(data=4, micro_batches=2, **common),
        Case(pipeline=2, micro_batches=8, recompute="full", **common),
        Case(data=2, micro_batches=4, as_on_a_gpu=True, **common),
    ]
    histories = [run_ranks(case.world_size, train, case)[0]["history"] for case in layouts]
    for history in histories[1:]:
        np.testing.assert_allclose(history, histories[0], rtol=1e-5)
    plain = oracle(16, "v2")["history"]
    assert abs(histories[0][0][0] - plain[0][0]) > 1e-4, "dropout was not on"


@pytest.mark.parametrize(
    "options", [{}, *(pytest.param({name: True}, marks=pytest.mark.slow) for name in ("as_on_a_gpu", "compile"))], ids=str
)
def test_bf16_master_weights_follow_float32(options: dict[str, bool]) -> None:
    case = Case(tensor=2, pipeline=2, data=2, precision="bf16", **options)
    expected = oracle(case.global_batch_size, case.model)
    found = run_ranks(case.world_size, train, case)
    # bf16 has 8 bits of mantissa: losses agree to their rounding, and so does the first norm.
    np.testing.assert_allclose([loss for loss, _ in found[0]["history"]], [loss for loss, _ in expected["history"]], rtol=2**-8)
    assert abs(found[0]["history"][0][1] / expected["history"][0][1] - 1) < 2**-5
    weights = found[0]["weights"]
    assert all(weight.dtype == np.float32 for weight in weights.values())
    word = weights["deberta.embeddings.word_embeddings.weight"]
    as_bf16 = (word.view(np.uint32) & 0xFFFF0000).view(np.float32)
    assert np.any(word != as_bf16), "master weights were rounded to bf16"
