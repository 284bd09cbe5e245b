"""Optimizer steps of a tiny model with DeepSpeed on the device, beside the same steps on a CPU of the same machine.

Both are processes of their own that run ``gpu_training_rank``, at the same time. Called by the correctness steps of ``gpu``
and by a test that needs a GPU.
"""

import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deberta_dist.operations.ranks import start_ranks

TIMEOUT_SECONDS = 90
# Most that device and CPU may differ by, relative to the CPU: losses, gradient norms, and what the steps change about the
# weights, of the worst tensor. float32: sums in another order, no TF32. bfloat16: rounded in other places; on one CPU it
# differs from float32 by 5e-5, 1e-3 and 5e-2.
TOLERANCES = {
    "fp32": {"loss": 1e-5, "gradient norm": 1e-5, "change of weights": 1e-4},
    "bf16": {"loss": 5e-4, "gradient norm": 1e-2, "change of weights": 0.15},
}
# A tensor that hardly moves is measured by this share of the change of all.
_SMALL = 1e-3


@dataclass(frozen=True)
class TrainingComparison:
    """Steps on the device compared with the same steps on the CPU.

    Attributes:
        figures: Losses, norms and times on the device.
        cpu_figures: Losses, norms and times on the CPU.
        errors: Name -> (largest difference, tolerance).
        resumes: Whether a run saved and resumed on the device ends bit-equal to one that was not interrupted.
        resumed: ``resumes`` in words, with what differs.
    """

    figures: Mapping[str, Any]
    cpu_figures: Mapping[str, Any]
    errors: Mapping[str, tuple[float, float]]
    resumes: bool
    resumed: str

    @property
    def wrong(self) -> dict[str, tuple[float, float]]:
        """Errors above their tolerance; NaN counts as above."""
        return {name: (error, at_most) for name, (error, at_most) in self.errors.items() if not error <= at_most}


def compare(precision: str, *, uses_gpu: bool, timeout: float = TIMEOUT_SECONDS) -> TrainingComparison:
    """Trains on both.

    Args:
        precision: "fp32" or "bf16".
        uses_gpu: Without, both are the CPU: a rehearsal.
        timeout: Seconds for everything.

    Raises:
        BenchmarkError: one of the processes failed, or there was no end in time.
    """
    with tempfile.TemporaryDirectory(prefix="gpu-training-") as folder:
        changes = {name: Path(folder) / f"{name}.pt" for name in ("device", "cpu")}

        def train(name: str) -> dict[str, Any]:
            plan = {"precision": precision, "changes": str(changes[name])}
            ranks = start_ranks(
                "benchmarks.gpu_training_rank",
                plan,
                processes=1,
                timeout=timeout,
                uses_gpus=uses_gpu and name == "device",
            )
            return ranks[0]

        with ThreadPoolExecutor(max_workers=len(changes)) as pool:
            device, cpu = pool.map(train, changes)
        moved, expected = (torch.load(path, weights_only=True) for path in changes.values())
    worst, change_error = _worst_change(moved, expected)
    errors = {
        "loss": _largest(device["losses"], cpu["losses"]),
        "gradient norm": _largest(device["norms"], cpu["norms"]),
        "held-out loss": _largest(device["evaluations"], cpu["evaluations"]),
        f"change of weights, {worst}": change_error,
    }
    limits = TOLERANCES[precision] | {"held-out loss": TOLERANCES[precision]["loss"]}
    return TrainingComparison(
        figures={key: device[key] for key in ("device", "attention", "losses", "norms", "evaluations")},
        cpu_figures={key: cpu[key] for key in ("attention", "losses", "norms", "evaluations")},
        errors={name: (error, limits[name.partition(",")[0]]) for name, error in errors.items()},
        resumes=device["resumed_differs"] == [],
        resumed=f"differ: {', '.join(device['resumed_differs'])}" if device["resumed_differs"] else "equal in every bit",
    )


def _largest(found: list[float], expected: list[float]) -> float:
    errors = [abs(x / y - 1) for x, y in zip(found, expected, strict=True)]
    return max(errors, key=lambda error: (error != error, error))  # NaN first


def _worst_change(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[str, float]:
    total = float(torch.stack([x.norm() for x in expected.values()]).norm())
    assert found.keys() == expected.keys()
    errors = {name: float((found[name] - x).norm() / max(float(x.norm()), _SMALL * total)) for name, x in expected.items()}
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    return worst, errors[worst]
