"""Settings of all tests."""

import os

import pytest
import torch

# Small tensors: more threads cost more than they save, and the order of sums stays the same everywhere.
torch.set_num_threads(1)

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Read by Triton when it is first imported, whoever does it.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests that need a GPU where there is none."""
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: sh tests/run.sh -m gpu"))
