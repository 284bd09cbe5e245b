"""The fused kernels as they are shipped, compiled for GPUs that need not be here: nothing spills, everything fits.

Another process compiles: in this one the kernels may be interpreted.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install 'deberta_dist[triton]'")

from deberta_dist.kernels.fused_tiles import HEAD_SIZES  # noqa: E402

_COMPILE = """
import json, sys
from deberta_dist.kernels.fused_resources import all_resources
print(json.dumps(all_resources(head_size=int(sys.argv[1]), dtype=sys.argv[2], capability=int(sys.argv[3]))))
"""
# What one program may have, by compute capability; 8.6 and 8.9 have less than 8.0.
SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024}
# At least four programs of 128 threads at a time where no product is made.
LIGHT = {"row_sums": 128, "end_sums": 128, "delta": 128, "keep_bits": 64}


def compiled(head_size: int, dtype: str, capability: int) -> dict[str, list[int]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", _COMPILE, str(head_size), dtype, str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(head_size: int, dtype: str, capability: int) -> None:
    kernels = compiled(head_size, dtype, capability)
    assert len(kernels) == 7
    for name, (registers, stack_bytes, shared_bytes) in kernels.items():
        assert stack_bytes == 0, f"{name} keeps {stack_bytes} bytes per thread in local memory"
        assert 16 <= registers <= LIGHT.get(name, 255), f"{name} takes {registers} registers"
        assert shared_bytes <= SHARED_BYTES[capability], f"{name} takes {shared_bytes} bytes of shared memory"


@pytest.mark.parametrize("capability", [80, 90])
def test_heads_of_64_in_bfloat16_do_not_spill(capability):
    check(64, "bf16", capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_nothing_shipped_spills(head_size, dtype, capability):
    check(head_size, dtype, capability)
