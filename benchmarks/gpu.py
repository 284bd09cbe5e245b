"""Correctness and speed on one NVIDIA GPU in minutes; every step is a process with a time limit of its own.

    python -m benchmarks.gpu                        both parts, correctness first
    python -m benchmarks.gpu --part speed           one of them
    python -m benchmarks.gpu --step layer --step 1.5b
    python -m benchmarks.gpu --list                 all steps, with their limits
    python -m benchmarks.gpu --rehearse             all of them on a CPU, sizes cut

Every step prints its figures as it finds them and saves DIRECTORY/NAME.json; DIRECTORY/summary.json has all of them and
is written when a step ends. The exit code is 1 where a number disagrees, or a step failed, was killed or could not run;
the last lines name it. Most steps need torch, Triton and this checkout; --list says what else.

For a machine without a package index, on one that has an index:

    python -m benchmarks.gpu --wheels wheels --python 3.12

and there with --install wheels: into a folder of this start's own, with no effect on what is installed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import ROOT, gpu_wheels
from benchmarks.gpu_processes import NOT_RUN, GpuStep, StepEnvironment, run_steps
from benchmarks.gpu_worker import DONE, versions, write_json
from deberta_dist.errors import ConfigError, with_exit_code
from deberta_dist.operations.measure import TRAINER_NEEDS

_CHECKS, _SPEED = "benchmarks.gpu_checks", "benchmarks.gpu_speed"
_OUT = Path("runs/benchmark_gpu")
_MOST_AT_ONCE = 4
_REHEARSAL_PATIENCE = 4  # a CPU that others use as well


@dataclass(frozen=True)
class StepGroup:
    """Steps that share a time limit, the value of ``--part``.

    Attributes:
        limit: Seconds for all of them together.
        steps: In the order in which they run, the most important first.
    """

    limit: float
    steps: tuple[GpuStep, ...]


def _attention_check(dtype: str, name: str) -> GpuStep:
    proves = f"fused and portable attention equal the formula in float64: {dtype}, forward and all gradients"
    return GpuStep(f"attention-{name}", f"{_CHECKS}:attention", 120, proves, {"dtype": dtype})


def _train_check(precision: str) -> GpuStep:
    proves = f"steps with DeepSpeed and NCCL equal a CPU's, evaluation too; a resumed run is bit-equal: {precision}"
    return GpuStep(f"train-{precision}", f"{_CHECKS}:train", 120, proves, {"precision": precision}, needs=TRAINER_NEEDS)


def _attention_speed(batch: int, length: int, limit: float) -> GpuStep:
    proves = f"attention of the 1.5B, {batch} x {length}, beside SDPA and disentangled-flash; times of its kernels"
    options = {"batch": batch, "length": length}
    return GpuStep(f"attention-{batch}x{length}", f"{_SPEED}:attention", limit, proves, options, alone=True)


def _model_speed(size: str, batch: int, length: int) -> GpuStep:
    proves = f"v3-{size}'s step, {batch} x {length}, beside ModernBERT-{size} and transformers' DeBERTa"
    options = {"size": size, "batch": batch, "length": length}
    ahead = "benchmarks.peers:import_ahead"
    return GpuStep(f"v3-{size}-{length}", f"{_SPEED}:model_beside_peers", 60, proves, options, alone=True, ahead=ahead)


def _speed(name: str, function: str, limit: float, proves: str, **more: Any) -> GpuStep:
    return GpuStep(name, f"{_SPEED}:{function}", limit, proves, alone=True, **more)


PARTS: Mapping[str, StepGroup] = {
    "correctness": StepGroup(
        360,
        (
            GpuStep(
                "device",
                f"{_CHECKS}:device",
                90,
                "versions, rates of products and copies, and that models use the fused attention",
                alone=True,
            ),
            _attention_check("bfloat16", "bf16"),
            _train_check("fp32"),
            _attention_check("float32", "fp32"),
            _train_check("bf16"),
            GpuStep("rows", f"{_CHECKS}:rows", 90, "dropout, residual and LayerNorm in one kernel equal the formula in float64"),
            _attention_check("float16", "fp16"),
            GpuStep(
                "tests",
                f"{_CHECKS}:tests",
                150,
                "the tests that are marked gpu pass",
                needs=("pytest",),
                is_optional=True,
            ),
        ),
    ),
    "speed": StepGroup(
        240,
        (
            _attention_speed(16, 512, 60),
            _speed("layer", "layer", 45, "a layer of the 1.5B, three sizes, beside one without positions",
                   options={"compiles": False}),
            _speed("1.5b", "whole_model", 60, "the 1.5B's step at 16 x 512: tokens/s, share of peak, memory",
                   options={"compiles": False}),
            _speed("1.5b-trainer", "trainer", 90, "the same as a run takes it, with DeepSpeed", needs=TRAINER_NEEDS),
            _model_speed("base", 32, 512),
            _model_speed("large", 32, 512),
            _speed("launching", "launching", 40, "12 layers at 16 x 512 and 4 x 512: whether launching is the limit"),
            _attention_speed(2, 4096, 40),
            _attention_speed(4, 512, 30),
            _speed("layer-compiled", "layer", 60, "the layer with training.compile", options={"compiles": True}),
            _model_speed("base", 4, 4096),
            _model_speed("large", 4, 4096),
            _speed("1.5b-compiled", "whole_model", 60, "the 1.5B's step with training.compile",
                   options={"compiles": True}),
        ),
    ),
}  # fmt: skip


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    summary, _, details = __doc__.partition("\n\n")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=f"{summary}\n\n{details}", formatter_class=formatter)
    parser.add_argument("--part", choices=PARTS, help="default: both, correctness first")
    parser.add_argument("--step", action="append", metavar="NAME", help="this step alone; may be repeated")
    parser.add_argument("--list", action="store_true", help="print all steps, and run none")
    parser.add_argument("--out", type=Path, default=_OUT, metavar="DIRECTORY", help="default: %(default)s")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with sizes cut: nothing is measured")
    parser.add_argument("--install", type=Path, metavar="WHEELS", help="use the packages of this folder, offline")
    parser.add_argument("--wheels", type=Path, metavar="DIRECTORY", help="collect those packages there, and run nothing")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    help_text = "of the machine that they are for (default: %(default)s)"
    parser.add_argument("--python", default=version, metavar="X.Y", help=help_text)
    return parser.parse_args(arguments)


def chosen(parts: Mapping[str, StepGroup], *, part: str | None, names: Sequence[str] | None) -> dict[str, StepGroup]:
    """The parts with the steps that were asked for.

    Raises:
        ConfigError: there is no such step.
    """
    found = {key: value for key, value in parts.items() if part in (None, key)}
    known = [step.name for one in found.values() for step in one.steps]
    if unknown := [name for name in names or () if name not in known]:
        raise ConfigError(f"--step {unknown[0]}: there is no such step; there are {', '.join(known)}")
    if names is not None:
        chosen_steps = {key: tuple(step for step in value.steps if step.name in names) for key, value in found.items()}
        found = {key: StepGroup(parts[key].limit, steps) for key, steps in chosen_steps.items() if steps}
    return found


def describe(parts: Mapping[str, StepGroup]) -> str:
    """All steps, with limits and what they need."""
    lines = []
    for name, part in parts.items():
        lines.append(f"{name}, at most {part.limit:.0f} s:")
        for step in part.steps:
            needs = f" (needs {', '.join(step.needs)})" if step.needs else ""
            lines.append(f"  {step.name:<18}{step.limit:4.0f} s  {step.proves}{needs}")
    return "\n".join(lines)


def verdict(record: Mapping[str, Any]) -> str | None:
    """What is wrong with a step, in a line; None if nothing is."""
    if record["status"] == DONE or (record["status"] == NOT_RUN and record.get("optional")):
        return None
    wrong = [check["name"] for check in record.get("checks", ()) if not check["right"]]
    reason = "; ".join(wrong) if wrong else str(record.get("error")).partition("\n")[0]
    return f"{record['step']} {record['status']}: {reason}"


@with_exit_code
def main() -> int:
    """Runs the command; the exit code is 1 where a step is not as it should be, or that of the error printed."""
    return run(sys.argv[1:])


def run(arguments: Sequence[str], *, parts: Mapping[str, StepGroup] = PARTS) -> int:
    """Runs a command line.

    Args:
        arguments: Words after the program's name.
        parts: Value of ``--part`` -> its steps; tests pass their own.

    Raises:
        ConfigError: a step, a GPU or wheels that the command line asks for do not exist.
    """
    parsed = parse_arguments(arguments)
    if parsed.wheels is not None:
        print(gpu_wheels.collect(parsed.wheels, python=parsed.python))
        return 0
    found = chosen(parts, part=parsed.part, names=parsed.step)
    if parsed.list:
        print(describe(found))
        return 0
    out = parsed.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    command = ["python", "-m", "benchmarks.gpu", *arguments]
    with ExitStack() as stack:
        packages = None
        if parsed.install is not None:
            packages = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-gpu-packages-")))
            print(gpu_wheels.install(parsed.install, packages), flush=True)
        place = StepEnvironment(
            folder=out,
            command=command,
            rehearses=parsed.rehearse,
            packages=packages,
            at_once=max(1, min(_MOST_AT_ONCE, (os.cpu_count() or 1) // 3)),
        )
        return _run(found, place=place)


def _run(parts: Mapping[str, StepGroup], *, place: StepEnvironment) -> int:
    summary: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(place.command),
        "commit": _commit(),
        "device": None,
        "versions": versions(),
        "rehearsal": place.rehearses,
        "wrong": [],
        "not_run": [],
        "steps": {},
    }

    def on_end(record: dict[str, Any]) -> None:
        summary["steps"][record["step"]] = record
        summary["device"] = record.get("device", summary["device"])
        summary["versions"] |= record.get("versions", {})
        if (wrong := verdict(record)) is not None:
            summary["wrong"].append(wrong)
        elif record["status"] == NOT_RUN:
            summary["not_run"].append(f"{record['step']}: {record['error']}")
        write_json(place.folder / "summary.json", summary)
        ended = f"{record['status']} after {record['seconds']:.1f} s" if "seconds" in record else record["status"]
        reason = f": {record['error']}" if record.get("error") else ""
        print(f"== {record['step']}: {ended}{reason}", flush=True)
        if "end_of_log" in record:
            print(record["end_of_log"], flush=True)

    patience = _REHEARSAL_PATIENCE if place.rehearses else 1
    for part in parts.values():
        steps = [replace(step, limit=step.limit * patience) for step in part.steps]
        run_steps(steps, place=place, limit=part.limit * patience, on_end=on_end)
    for line in summary["not_run"]:
        print(f"not run: {line}")
    for line in summary["wrong"]:
        print(f"WRONG: {line}")
    wrong, left_out = len(summary["wrong"]), len(summary["not_run"])
    done = len(summary["steps"]) - wrong - left_out
    print(f"{done} steps done, {wrong} wrong, {left_out} left out: {place.folder / 'summary.json'}")
    return 1 if summary["wrong"] else 0


def _commit() -> str | None:
    """Of the checkout; None where git or its folder is missing."""
    try:
        asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return asked.stdout.strip() or None


if __name__ == "__main__":
    sys.exit(main())
