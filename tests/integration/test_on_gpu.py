"""Steps of the real trainer on a GPU, beside the same steps on the CPU."""

import pytest

from benchmarks import gpu_training


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_trains_as_the_cpu_does_and_resumes_bit_equal(precision: str) -> None:
    found = gpu_training.compare(precision, uses_gpu=True)
    assert found.figures["device"] != "cpu" and found.figures["attention"].startswith("attention: fused")
    assert found.wrong == {}
    assert found.resumes, found.resumed
