"""Steps in fp16: a loss scale that grows moves no weight. fp16 is for GPUs; here a CPU is made to do it."""

from typing import Any
from unittest import mock

import numpy as np
import torch

from tests.harness import run_ranks
from tests.integration import parallel_run


def train_in_fp16(scale_window: int) -> tuple[list[float], dict[str, Any]]:
    """The loss scale of every step, and what training returns."""
    from deepspeed.accelerator import get_accelerator

    from deberta_dist.parallel.zero.weight_store import WeightStore

    scales, reduce_gradients = [], WeightStore.reduce
    fp16 = {"enabled": True, "initial_scale_power": 10, "loss_scale_window": scale_window}
    settings = parallel_run.deepspeed_settings

    def noted(store: WeightStore, *, loss_scale: float) -> torch.Tensor:
        scales.append(loss_scale)
        return reduce_gradients(store, loss_scale=loss_scale)

    with (
        mock.patch.object(type(get_accelerator()), "is_fp16_supported", lambda _: True),
        mock.patch.object(parallel_run, "deepspeed_settings", lambda case: {**settings(case), "fp16": fp16}),
        mock.patch.object(WeightStore, "reduce", noted),
    ):
        # Unclipped, since clipping would hide a gradient that is halved.
        trained = parallel_run.train(parallel_run.Case(precision="fp16", dropout=0.0, clipping=100.0, steps=5))
    return scales, trained


def test_a_growing_loss_scale_moves_no_weight() -> None:
    ((scales, constant),) = run_ranks(1, train_in_fp16, 1000)
    ((growing_scales, growing),) = run_ranks(1, train_in_fp16, 2)
    assert scales == [1024.0] * 5
    assert growing_scales == [1024.0] * 3 + [2048.0] * 2
    # Half the gradient in the step of growth moves norms by 8e-4, weights by 2e-3.
    np.testing.assert_allclose(growing["history"], constant["history"], rtol=3e-5)
    for name, weight in constant["weights"].items():
        np.testing.assert_allclose(growing["weights"][name], weight, atol=1e-5)
