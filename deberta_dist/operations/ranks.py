"""Starts the processes of a benchmark, waits for all of them, and collects their results."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deberta_dist.files.shipped import find_package
from deberta_dist.operations.measure import BenchmarkError


def store_settings(data_parallel_size: int, **zero_optimization: Any) -> dict[str, Any]:
    """DeepSpeed's JSON under a weight store, in float32: its engine sees one batch per step, and clips at norm 1.

    Args:
        data_parallel_size: Ranks that share the weights.
        zero_optimization: Further keys of that section.
    """
    return {
        "train_batch_size": data_parallel_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **zero_optimization},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def start_ranks(module: str, plan: Mapping[str, Any], *, processes: int, timeout: float, uses_gpus: bool = False) -> list[Any]:
    """Runs ``python -m module FOLDER`` in every process; returns what each left as ``FOLDER/rank-N.json``.

    Args:
        module: Its main program, which reads a launcher's variables; FOLDER also has the ranks' file rendezvous.
        plan: Settings for the ranks, written to ``FOLDER/plan.json`` with ``timeout_seconds``.
        processes: World size.
        timeout: Seconds after which all are killed and the call fails.
        uses_gpus: Whether GPUs are visible to them.

    Raises:
        BenchmarkError: a rank ended with an error, or had not ended in time.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-ranks-") as name:
        folder = Path(name)
        (folder / "plan.json").write_text(json.dumps({"timeout_seconds": timeout, **plan}), encoding="utf-8")
        ranks = [
            _start(module, rank, launcher_environment(rank, processes=processes, uses_gpus=uses_gpus), folder=folder)
            for rank in range(processes)
        ]
        try:
            _wait(ranks, folder=folder, deadline=time.monotonic() + timeout)
        finally:
            for process in ranks:
                process.kill()
            for process in ranks:
                process.wait()
        return [json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(processes)]


def launcher_environment(rank: int, *, processes: int, uses_gpus: bool = False) -> dict[str, str]:
    """Environment that a launcher on this machine would set for a rank that runs modules of this package."""
    hidden = {} if uses_gpus else {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    found = {"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}
    find_package(found)
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "OMP_NUM_THREADS": "1",
        **hidden,
        **found,
    }


def _start(module: str, rank: int, environment: Mapping[str, str], *, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", module, str(folder)]
    with open(folder / f"rank-{rank}.log", "wb") as log:
        return subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT)


def _wait(ranks: Sequence[subprocess.Popen[bytes]], *, folder: Path, deadline: float) -> None:
    while any(process.poll() is None for process in ranks):
        if any(process.poll() for process in ranks):
            break
        if time.monotonic() > deadline:
            late = next(rank for rank, process in enumerate(ranks) if process.poll() is None)
            raise BenchmarkError(f"rank {late} had not ended after --timeout: {_last_words(folder, late)}")
        time.sleep(0.1)
    for rank, process in enumerate(ranks):
        if process.poll():
            raise BenchmarkError(f"rank {rank} ended with {process.returncode}: {_last_words(folder, rank)}")


def _last_words(folder: Path, rank: int) -> str:
    text = (folder / f"rank-{rank}.log").read_text(encoding="utf-8", errors="replace")
    return text[-1000:].strip() or "nothing"
