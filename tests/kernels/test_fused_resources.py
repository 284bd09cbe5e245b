"""The fused kernels as they are shipped, compiled for GPUs that need not be here.

Nothing spills, everything fits, and the threads of a warp gather neighbours. Another process compiles: in this one the
kernels may be interpreted.
"""

import functools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install 'deberta_dist[triton]'")

from deberta_dist.kernels.fused.tiles import HEAD_SIZES
from tests.kernels.fused_reads import reads

ROOT = Path(__file__).resolve().parents[2]
_COMPILE = """
import json, sys
from tests.kernels.fused_reads import reads
from tests.kernels.fused_resources import compiled_kernels, resources
found = {}
for name, kernel in compiled_kernels(**json.loads(sys.argv[1])).items():
    all_read = [(read.argument, read.shape, read.neighbours(0)) for read in reads(kernel.asm["ttgir"])]
    found[name] = {"resources": resources(kernel)._asdict(), "reads": all_read}
print(json.dumps(found))
"""
_COMPILE_ROWS = """
import json, sys
from tests.kernels.fused_resources import compiled_row_kernels, resources
kernels = compiled_row_kernels(**json.loads(sys.argv[1]))
print(json.dumps({name: resources(kernel)._asdict() for name, kernel in kernels.items()}))
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
# Per program, by compute capability; 8.6 and 8.9 have less than 8.0.
SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024}
# At least four programs of 128 threads at a time where no product is made.
LIGHT = {"row_sums": 128, "row_sums_of_queries": 128, "delta": 128, "keep_bits": 64}
# What is read at places that come out of a table, by kernel, in tiles whose first dimension is that of neighbours in
# memory; each as often as the kernel has a loop for it.
OF_PAIRS = {"row_of_distance": 2, "c2p": 1, "p2c": 1, "keep_bits": 1}
GATHERED = {
    "forward": OF_PAIRS,
    "backward": OF_PAIRS,
    "row_sums": {"score_gradient": 2},
    "row_sums_of_queries": {"score_gradient": 2},
}
# With queries anywhere.
GATHERED_BY_ORDER = {"score_gradient": 2, "order": 2, "order_starts": 2}


def output_of(program: str, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", program, *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def compiled(*, capability: int, head_size: int = 64, dtype: str = "bf16", has_positions: bool = False):
    """Of every kernel: its resources, and argument, shape and neighbours of what it reads."""
    options = {"capability": capability, "head_size": head_size, "dtype": dtype, "has_positions": has_positions}
    return json.loads(output_of(_COMPILE, json.dumps(options)))


def check(**options) -> None:
    kernels = compiled(**options)
    assert len(kernels) == 7
    check_resources({name: kernel["resources"] for name, kernel in kernels.items()}, options["capability"])


def check_resources(kernels: dict[str, dict[str, int]], capability: int) -> None:
    for name, kernel in kernels.items():
        registers, stack_bytes, shared_bytes = kernel.values()
        assert stack_bytes == 0, f"{name} keeps {stack_bytes} bytes per thread in local memory"
        assert 16 <= registers <= LIGHT.get(name, 255), f"{name} takes {registers} registers"
        limit = SHARED_BYTES[capability]
        assert shared_bytes <= limit, f"{name} takes {shared_bytes} bytes of shared memory"


@pytest.mark.parametrize(("capability", "has_positions"), [(80, False), (90, False), (90, True)])
def test_heads_of_64_in_bfloat16_do_not_spill(capability, has_positions):
    check(capability=capability, has_positions=has_positions)


@pytest.mark.parametrize(
    ("columns", "dtype", "capability"),
    [
        (768, "fp32", 80),
        (1536, "bf16", 90),
        pytest.param(1024, "bf16", 80, marks=pytest.mark.slow),
        pytest.param(4096, "fp32", 90, marks=pytest.mark.slow),
    ],
)
def test_kernels_on_rows_do_not_spill(columns, dtype, capability):
    kernels = json.loads(output_of(_COMPILE_ROWS, json.dumps({"columns": columns, "dtype": dtype, "capability": capability})))
    assert len(kernels) == 3
    check_resources(kernels, capability)


@pytest.mark.parametrize(("capability", "has_positions"), [(80, False), (90, False), (90, True)])
def test_neighbouring_threads_gather_neighbours(capability, has_positions):
    kernels = compiled(capability=capability, has_positions=has_positions)
    expected = GATHERED | ({"row_sums": GATHERED_BY_ORDER} if has_positions else {})
    for name, gathered in expected.items():
        # Where a range has no neighbours, one element is read for each owner.
        found = [read for read in kernels[name]["reads"] if read[0] in gathered and read[1][0] > 1]
        assert Counter(argument for argument, *_ in found) == gathered, name
        for argument, shape, neighbours in found:
            assert neighbours == 32, f"{name}: {neighbours} threads read neighbours of {argument} in a tile of {shape}"


@pytest.mark.parametrize(
    ("layout", "neighbours"),
    [
        ("blocked<{sizePerThread = [1, 1], threadsPerWarp = [32, 1], warpsPerCTA = [1, 4], order = [0, 1]}>", (32, 1)),
        ("blocked<{sizePerThread = [1, 1], threadsPerWarp = [16, 2], warpsPerCTA = [2, 2], order = [0, 1]}>", (16, 1)),
        ("blocked<{sizePerThread = [1, 1], threadsPerWarp = [1, 32], warpsPerCTA = [4, 1], order = [1, 0]}>", (1, 32)),
        ("blocked<{sizePerThread = [1, 8], threadsPerWarp = [4, 8], warpsPerCTA = [4, 1], order = [1, 0]}>", (1, 1)),
        ("linear<{register = [[0, 1]], lane = [[1, 0], [2, 0], [4, 0], [8, 0], [16, 0]], warp = []}>", (32, 1)),
        ("linear<{register = [[1, 0]], lane = [[2, 0], [4, 0], [0, 1], [0, 2], [0, 4]], warp = []}>", (1, 1)),
    ],
)
def test_what_a_layout_gives_the_threads_of_a_warp(layout, neighbours):
    assembly = f"""
#layout = #ttg.{layout}
tt.func public @kernel(%some: !tt.ptr<bf16> {{tt.divisibility = 16 : i32}}, %other: !tt.ptr<bf16>, %n: i32) {{
    %0 = tt.splat %other : !tt.ptr<bf16> -> tensor<64x32x!tt.ptr<bf16>, #layout>
    %1 = tt.addptr %0, %n : tensor<64x32x!tt.ptr<bf16>, #layout>, tensor<64x32xi32, #layout>
    %2 = tt.load %1 : tensor<64x32x!tt.ptr<bf16>, #layout>
"""
    (read,) = reads(assembly)
    assert (read.argument, read.shape) == ("other", (64, 32))
    assert (read.neighbours(0), read.neighbours(1)) == neighbours
    with pytest.raises(ValueError, match="no parameter is the origin of 1"):
        reads(assembly.replace("%other :", "%unknown :"))


def test_what_a_call_launches_compiles_as_it_is_launched():
    backward = ["keep_bits", "delta", "backward", *["row_sums"] * 2, *["token_gradient"] * 2]
    expected = [f"{name}_kernel" for name in ("keep_bits", "forward", *backward)]
    assert output_of(_LAUNCH).split() == expected


@pytest.mark.slow
@pytest.mark.parametrize("has_positions", [False, True])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_nothing_shipped_spills(head_size, dtype, capability, has_positions):
    check(capability=capability, head_size=head_size, dtype=dtype, has_positions=has_positions)
