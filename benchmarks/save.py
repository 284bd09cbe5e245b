"""Saving a run's state: the pause that a step sees and the whole way to disk, beside others and the floor.

One process owns a whole model with both moments, as training leaves them. Ours copies the state (the pause), then
writes, hashes and forces it to disk in a thread and commits it. Floor: ``cp``, SHA-256 and fsync of the files that ours
wrote. Peers, of the same state: ``torch.save`` forced to disk, and the ``save_checkpoint`` of the DeepSpeed engine that holds
it, which forces nothing; neither computes a checksum, and training waits for both.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from deberta_dist.operations.measure import machine, run_command

OURS, PAUSE = "ours, to the commit", "ours, the pause"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this verb."""
    parser.add_argument("--preset", default="v3-small", help="model whose state is saved")
    parser.add_argument("--directory", type=Path, help="where to write (default: the system's temporary directory)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Saves round by round in a process of its own, and returns figures as JSON.

    Raises:
        BenchmarkError: the process failed.
    """
    with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="benchmark-save-") as folder:
        launcher = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
        variables = [f"{name}={value}" for name, value in {**launcher, "PYTHONPATH": ROOT}.items()]
        program = [sys.executable, "-m", "benchmarks.save_rank"]
        run_command(["env", *variables, *program, folder, arguments.preset, str(arguments.rounds)])
        found = json.loads((Path(folder) / "found.json").read_text(encoding="utf-8"))
    figures = found["figures"]
    print(f"saving {arguments.preset}, {found['parameters']:,} parameters, from {found['device']}")
    for name, row in figures.items():
        low, high = row["wall_seconds_range"]
        rate = f"{row['bytes'] / 1e9:6.2f} GB  {row['bytes'] / row['wall_seconds'] / 1e9:5.2f} GB/s"
        ratio = f"  {row['ratios'][OURS]:.2f}x {OURS}" if OURS in row["ratios"] else ""
        print(f"  {name:<28} {row['wall_seconds']:7.2f} s ({low:.2f} to {high:.2f})  {rate}{ratio}")
    return {"machine": machine(), "preset": arguments.preset, **found}
