"""The correctness steps of the GPU measurements: rates, attention beside float64, the tests, training beside a CPU."""

import importlib.util
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from benchmarks import ROOT, gpu_training
from benchmarks.gpu_attention import FEATURES, Agreement, Problem, tolerance
from benchmarks.gpu_rows import RowsProblem
from benchmarks.gpu_worker import StepReport, StepSetting
from benchmarks.stopwatch import TimedPass, race
from deberta_dist.kernels.fused.availability import triton_reason, triton_version
from deberta_dist.models.attention_dispatch import describe_attention
from deberta_dist.models.presets import preset
from deberta_dist.operations.measure import TRAINER_NEEDS, machine


def device(setting: StepSetting, report: StepReport) -> None:
    """Versions, the device, its two rates, and whether the fused attention is what models will use."""
    on = torch.device(setting.device)
    facts = {"cuda": torch.version.cuda, **{key: machine()[key] for key in ("processor", "cores", "system")}}
    if on.type == "cuda":
        properties = torch.cuda.get_device_properties(on)
        facts |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory, GB": properties.total_memory / 1e9,
            "cudnn": torch.backends.cudnn.version(),
        }
        if torch.distributed.is_nccl_available():
            facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    report.row("machine", {"python": platform.python_version(), **facts})
    size, count = setting.sized(8192, 256), setting.sized(2**30, 2**20)
    # Random, not ones: multiplying those takes less power, and a GPU then keeps a higher clock.
    left, right = (torch.randn(size, size, device=on).to(torch.bfloat16) for _ in range(2))
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=on)
    target = torch.empty_like(source)
    figures = race(
        {"product": TimedPass(lambda: left @ right), "copy": TimedPass(lambda: target.copy_(source))},
        rounds=setting.sized(15, 2),
        warm_up=3,
        device=on,
    )
    report.row(
        "rates",
        {
            "bf16 product, TFLOP/s": 2 * size**3 / figures["product"]["seconds"] / 1e12,
            "copy, read and written, TB/s": 2 * count / figures["copy"]["seconds"] / 1e12,
        },
    )
    chosen = describe_attention("auto", preset("v2-xxlarge"), dtype=torch.bfloat16, device=on)
    report.require("attention that models use", setting.rehearses or chosen.startswith("attention: fused"), chosen)


def attention(setting: StepSetting, report: StepReport, *, dtype: str) -> None:
    """Fused and portable attention beside the formula in float64."""
    on, kind = torch.device(setting.device), getattr(torch, dtype)
    shapes = setting.sized(((2, 4, 512), (1, 2, 1024), (2, 4, 333), (1, 2, 4096)), ((1, 1, 40),))
    table = setting.sized({}, {"buckets": 8, "max_distance": 16})
    implementations = ["fused", "portable"]
    if setting.rehearses and (reason := _not_interpreted(kind)) is not None:
        implementations.remove("fused")
        report.note(f"the fused attention is not rehearsed: {reason}")
    for shape in shapes:
        rows: dict[str, dict[str, Any]] = {name: {} for name in implementations}
        size = f"{shape[0]}x{shape[2]}"
        for feature in FEATURES:
            problem = Problem(shape, feature=feature, dtype=kind, device=on, **table)
            exact = problem.exact()
            for name in implementations:
                found = problem.agreement(name, exact)
                rows[name][feature] = {"norm": found.norm_error, "largest": found.largest_error}
                _check_agreement(report, f"{name}, {size}, {feature}", found, dtype=kind, repeats=name == "fused")
            del problem, exact
        for name, row in rows.items():
            report.row(f"errors of {name}, {size}", row)


def rows(setting: StepSetting, report: StepReport) -> None:
    """Dropout, residual and LayerNorm in one kernel beside the formula in float64."""
    on = torch.device(setting.device)
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        kind = str(dtype).removeprefix("torch.")
        if setting.rehearses and (reason := _not_interpreted(dtype, multiplies=False)) is not None:
            report.note(f"the kernels are not rehearsed with {kind}: {reason}")
            continue
        for shape in setting.sized(((16, 512, 1536), (3, 333, 768), (2, 77, 1024)), ((2, 5, 48),)):
            found, case = RowsProblem(shape, dtype=dtype, device=on).agreement(), f"{kind}, {'x'.join(map(str, shape))}"
            report.row(case, {"norm": found.norm_error, "largest": found.largest_error, "worst": found.worst})
            _check_agreement(report, case, found, dtype=dtype, repeats=True)


def _check_agreement(report: StepReport, case: str, found: Agreement, *, dtype: torch.dtype, repeats: bool) -> None:
    limit = tolerance(dtype)
    report.check(f"{case}: error of the norm of {found.worst}", found.norm_error, at_most=limit, quiet=True)
    report.check(f"{case}: largest error", found.largest_error, at_most=2 * limit, quiet=True)
    verdict = "equal" if found.repeats else "not equal"
    if repeats:
        report.require(f"{case}: every bit of three runs", found.repeats, verdict, quiet=True)
    elif not found.repeats:  # the portable one sums the table's gradient with atomics on a GPU
        report.note(f"{case}: runs are {verdict} in every bit")


def _not_interpreted(dtype: torch.dtype, *, multiplies: bool = True) -> str | None:
    """Why Triton's interpreter cannot run kernels, such as make products."""
    if (reason := triton_reason()) is not None:
        return reason
    if multiplies and dtype == torch.bfloat16:
        return "Triton's interpreter multiplies the bit patterns of bfloat16"
    version = triton_version()
    if tuple(int(part) for part in version.split(".")[:2]) < (3, 7):
        return f"the interpreter of Triton {version} needs an older numpy than there is"
    return None


def tests(setting: StepSetting, report: StepReport) -> None:
    """The tests that are marked ``gpu``."""
    marked = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text("utf-8")]
    files = [path.relative_to(ROOT).as_posix() for path in marked]
    if missing := [name for name in TRAINER_NEEDS if importlib.util.find_spec(name) is None]:
        report.note(f"the trainer's tests are not run: they need {', '.join(missing)}")
        files = [file for file in files if not file.startswith("tests/integration/")]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={path}", *files]
        ended = subprocess.run(command, cwd=ROOT, check=False).returncode
        counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
        if path.exists():
            suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
            counts = {name: sum(int(suite.get(name, 0)) for suite in suites) for name in counts}
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    report.row("tests", {"files": len(files), "passed": passed, **counts})
    report.require("pytest's exit code", ended == 0, str(ended))
    # All of them are skipped in a rehearsal, and none may be on a GPU.
    expected = counts["tests"] == (counts["skipped"] if setting.rehearses else passed) and counts["tests"] > 0
    report.require("tests passed", expected, f"{passed} of {counts['tests']}")


def train(setting: StepSetting, report: StepReport, *, precision: str) -> None:
    """A few optimizer steps with DeepSpeed beside the same ones on a CPU; evaluation; save and resume."""
    timeout = setting.sized(gpu_training.TIMEOUT_SECONDS, 400)
    found = gpu_training.compare(precision, uses_gpu=not setting.rehearses, timeout=timeout)
    report.row("device", found.figures)
    report.row("cpu", found.cpu_figures)
    for name, (error, at_most) in found.errors.items():
        report.check(name, error, at_most=at_most)
    report.require("resumed from a checkpoint: losses, norms, weights and moments", found.resumes, found.resumed)
