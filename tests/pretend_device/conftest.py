"""What the tests of this directory share: the built library, and how many kernels a compiled function is."""

import hashlib
import importlib.metadata
import inspect
import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from deberta_dist.models.residual import _residual_norm
from tests.harness import run_ranks
from tests.pretend_device.build import CACHE, build
from tests.pretend_device.compiled import Kernels, count_kernels
from tests.pretend_device.device import PretendDevice


@pytest.fixture(scope="session", autouse=True)
def library() -> None:
    """Built before a rank needs it, so that a failure has one report and no rank's time limit is spent on it."""
    build()


@pytest.fixture(scope="session")
def residual_kernels() -> Kernels:
    """Kernels of what training.compile compiles. Counted once for a version of it, of torch and of Triton."""
    words = [torch.__version__, importlib.metadata.version("triton")]
    words += map(inspect.getsource, (_residual_norm, count_kernels, _arguments))
    path = CACHE / f"kernels-{hashlib.sha256(''.join(words).encode()).hexdigest()[:16]}.json"
    if not path.exists():
        (kernels,) = run_ranks(1, _count)
        path.write_text(json.dumps(kernels))
    return Kernels(*json.loads(path.read_text()))


def _count() -> Kernels:
    with PretendDevice():
        return count_kernels(_residual_norm, _arguments)


def _arguments() -> Sequence[Any]:
    """Of the 1.5B with micro-batches of 16 sequences of 512 tokens."""
    rows, columns = 16 * 512, 1536

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True)

    numbers = torch.zeros(rows, columns, dtype=torch.int16, device="cuda")
    return random(rows, columns), random(rows, columns), numbers, -29491, 1.1, random(columns), random(columns), 1e-7
