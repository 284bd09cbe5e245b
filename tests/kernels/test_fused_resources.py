"""The fused kernels as they are shipped, compiled for GPUs that need not be here: nothing spills, everything fits.

Another process compiles: in this one the kernels may be interpreted.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install 'deberta_dist[triton]'")

from deberta_dist.kernels.fused.tiles import HEAD_SIZES  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
_COMPILE = """
import json, sys
from deberta_dist.kernels.fused.resources import all_resources
print(json.dumps(all_resources(head_size=int(sys.argv[1]), dtype=sys.argv[2], capability=int(sys.argv[3]))))
"""
# Everything that one call launches, compiled with the types and the sizes that it is launched with.
_LAUNCH = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

class NoDevice:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 80, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

launched, run = [], jit.JITFunction.run

def compile_only(kernel, *arguments, grid, warmup, **options):
    launched.append(kernel.__name__)
    return run(kernel, *arguments, grid=grid, warmup=True, **options)

driver.set_active(NoDevice())
jit.JITFunction.run = compile_only
from deberta_dist.kernels.fused import launch
from tests.kernels.fused_cases import Case, values_and_gradients

launch.INTERPRETED = True  # tensors of the CPU are welcome
positions, ones = torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 19, dtype=torch.int64)
case = Case(queries=5, positions=positions, documents=ones, dropout_p=0.1, dtype=torch.bfloat16)
values_and_gradients(case.fused, case.operands, case.gradient)
print(" ".join(launched))
"""
# Per thread: two of Triton's versions agree for half precision and differ by 8 bytes otherwise.
STACK_BYTES = {"bf16": 0, "fp16": 0, "fp32": 16}
# Per program, by compute capability; 8.6 and 8.9 have less than 8.0.
SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024}
# At least four programs of 128 threads at a time where no product is made.
LIGHT = {"row_sums": 128, "delta": 128, "keep_bits": 64}


def output_of(program: str, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", program, *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check(head_size: int, dtype: str, capability: int) -> None:
    kernels = json.loads(output_of(_COMPILE, str(head_size), dtype, str(capability)))
    assert len(kernels) == 6
    for name, (registers, stack_bytes, shared_bytes) in kernels.items():
        assert stack_bytes <= STACK_BYTES[dtype], f"{name} keeps {stack_bytes} bytes per thread in local memory"
        assert 16 <= registers <= LIGHT.get(name, 255), f"{name} takes {registers} registers"
        assert shared_bytes <= SHARED_BYTES[capability], f"{name} takes {shared_bytes} bytes of shared memory"


@pytest.mark.parametrize("capability", [80, 90])
def test_heads_of_64_in_bfloat16_do_not_spill(capability):
    check(64, "bf16", capability)


def test_what_a_call_launches_compiles_as_it_is_launched():
    backward = ["keep_bits", "delta", "backward", *["row_sums"] * 2, *["token_gradient"] * 2]
    expected = [f"{name}_kernel" for name in ("keep_bits", "forward", *backward)]
    assert output_of(_LAUNCH).split() == expected


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_nothing_shipped_spills(head_size, dtype, capability):
    check(head_size, dtype, capability)
