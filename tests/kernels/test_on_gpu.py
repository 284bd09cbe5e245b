"""Kernels as a GPU computes them, beside their formulas in float64. The GPU measurements have more sizes."""

import pytest
import torch

from benchmarks.gpu_attention import FEATURES, Problem, tolerance
from benchmarks.gpu_rows import RowsProblem
from deberta_dist.kernels import unavailable_reason


def problem(feature: str, dtype: torch.dtype) -> Problem:
    """Several tiles and a rest, distances beyond the table's end."""
    return Problem((2, 3, 333), feature=feature, dtype=dtype, device=torch.device("cuda"), buckets=32, max_distance=128)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("feature", FEATURES)
def test_fused_equals_the_formula_and_itself(feature: str, dtype: torch.dtype) -> None:
    case = problem(feature, dtype)
    found = case.agreement("fused", case.exact())
    assert found.norm_error <= tolerance(dtype) and found.largest_error <= 2 * tolerance(dtype), found
    assert found.repeats, "two runs, or one in memory full of NaN, differ"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("feature", FEATURES)
def test_portable_equals_the_formula(feature: str, dtype: torch.dtype) -> None:
    case = problem(feature, dtype)
    found = case.agreement("portable", case.exact())
    assert found.norm_error <= tolerance(dtype) and found.largest_error <= 2 * tolerance(dtype), found


@pytest.mark.gpu
def test_models_use_the_fused_attention() -> None:
    case = problem("plain", torch.bfloat16)
    assert unavailable_reason(case.operands[1], positions=case.positions, mask=None) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_residual_and_norm_equal_the_formula_and_themselves(dtype: torch.dtype) -> None:
    found = RowsProblem((2, 33, 768), dtype=dtype, device=torch.device("cuda")).agreement()
    assert found.norm_error <= tolerance(dtype) and found.largest_error <= 2 * tolerance(dtype), found
    assert found.repeats, "two runs, or one in memory full of NaN, differ"
