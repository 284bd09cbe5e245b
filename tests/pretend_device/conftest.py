"""What the tests of this directory share: the built library, and how many kernels a compiled function is."""

import hashlib
import inspect
import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from deberta_dist.kernels.dropout import keep_probability, threshold
from deberta_dist.kernels.fused.availability import triton_version
from deberta_dist.models.layers import _hashed_residual_norm, _residual_norm
from tests.harness import run_ranks
from tests.pretend_device.build import CACHE, build
from tests.pretend_device.compiled import Kernels, count_kernels
from tests.pretend_device.device import PretendDevice


@pytest.fixture(scope="session", autouse=True)
def library() -> None:
    """Built before a rank needs it, so that a failure has one report and no rank's time limit is spent on it."""
    build()


@pytest.fixture(scope="session")
def residual_kernels() -> dict[str, Kernels]:
    """Kernels of what training.compile compiles, by the function's name: for a step, and for an evaluation.

    Counted once for a version of it, of torch and of Triton.
    """
    words = [torch.__version__, triton_version()]
    words += map(inspect.getsource, (_hashed_residual_norm, _residual_norm, count_kernels, _count, _arguments))
    path = CACHE / f"kernels-{hashlib.sha256(''.join(words).encode()).hexdigest()[:16]}.json"
    if not path.exists():
        (kernels,) = run_ranks(1, _count)
        path.write_text(json.dumps(kernels))
    return {name: Kernels(*numbers) for name, numbers in json.loads(path.read_text()).items()}


def _count() -> dict[str, Kernels]:
    with PretendDevice():
        return {
            "_hashed_residual_norm": count_kernels(_hashed_residual_norm, lambda: _arguments(drops=True)),
            "_residual_norm": count_kernels(_residual_norm, lambda: _arguments(drops=False)),
        }


def _arguments(*, drops: bool) -> Sequence[Any]:
    """Of the 1.5B with micro-batches of 16 sequences of 512 tokens."""
    rows, columns = 16 * 512, 1536

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True)

    limits: tuple[Any, ...] = None, 0, 1.0
    if drops:
        low, high = (torch.zeros(rows, 1, dtype=torch.int32, device="cuda") for _ in range(2))
        limits = low, high, threshold(0.1), keep_probability(0.1)
    return random(rows, columns), random(rows, columns), *limits, random(columns), random(columns), 1e-7
