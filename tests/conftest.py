"""Settings of all tests. Rooms that need no torch are tested where there is none."""

import dataclasses
import os
from typing import Any

import pytest

HAS_GPU, TRITON = False, ""
try:
    import torch
except ModuleNotFoundError:
    pass
else:
    # Small tensors: more threads cost more than they save, and the order of sums stays the same everywhere.
    torch.set_num_threads(1)
    HAS_GPU = torch.cuda.is_available()
    if not HAS_GPU:
        # Read by Triton when it is first imported, whoever does it.
        os.environ.setdefault("TRITON_INTERPRET", "1")

    from deberta_dist.kernels.fused.availability import triton_version

    TRITON = triton_version() or ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests that need a GPU where there is none."""
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: sh tests/run.sh -m gpu"))


def _let_the_interpreter_count() -> None:
    """Triton 3.6's interpreter asks int() of an array of one element, which numpy refuses from 2.4 on."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_repair(tensor: type, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_repair


if TRITON.startswith("3.6."):
    _let_the_interpreter_count()


@pytest.fixture
def no_overflow_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter checks every sum and product of int32, which no compiled kernel does, in 40% of its time.

    Of the attention they are on in tests/kernels/test_fused.py::test_random_shapes, which takes every kernel.
    """
    if TRITON and not HAS_GPU:
        from triton.runtime import interpreter

        builder = interpreter.interpreter_builder
        monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))


def _without_half_surrogates(value: Any) -> Any:
    """Names of files that are not UTF-8 stand in reports as half surrogates, which cannot be sent to pytest-xdist's parent."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, dict):
        return {key: _without_half_surrogates(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_without_half_surrogates(inner) for inner in value)
    return value


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Any:
    """What a worker sends of a test."""
    return _without_half_surrogates((yield))
