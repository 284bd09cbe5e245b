"""The GPU measurements, rehearsed on a CPU: every step's function, and what becomes of steps that fail."""

import importlib
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gpu, gpu_attention, gpu_training, gpu_wheels
from benchmarks.gpu_processes import CRASHED, KILLED, NOT_RUN, GpuStep
from benchmarks.gpu_worker import DISAGREES, DONE, FAILED, StepReport, StepSetting
from deberta_dist.errors import ConfigError

AHEAD = "tests.benchmarks.planted_steps:ahead"
ROOT = Path(__file__).resolve().parents[2]
REHEARSAL = StepSetting(device="cpu", rehearses=True)
# What takes long, and what a rehearsal cannot tell from another step.
SLOW = {"layer-compiled", "1.5b-compiled", "1.5b-trainer", "train-bf16", "attention-fp16"}
SAME = {"attention-2x4096", "attention-4x512", "v3-large-512", "v3-base-4096", "v3-large-4096"}
STEPS = {step.name: step for part in gpu.PARTS.values() for step in part.steps if step.name not in SAME}


def planted(name: str, *, limit: float = 60, function: str | None = None, **more: Any) -> GpuStep:
    return GpuStep(name, f"tests.benchmarks.planted_steps:{function or name}", limit, "nothing", **more)


def run(out: Path, *steps: GpuStep, words: tuple[str, ...] = ("--rehearse",)) -> tuple[int, dict[str, Any]]:
    code = gpu.run([*words, "--out", str(out)], parts={"correctness": gpu.StepGroup(60, steps)})
    path = out / "summary.json"
    return code, json.loads(path.read_text()) if path.exists() else {}


def report(path: Path) -> StepReport:
    return StepReport(path / "step.json", {"step": "step"}, console=sys.stdout)


def is_gone(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return not status.exists() or "State:\tZ" in status.read_text()


def test_all_right_is_exit_code_0(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, summary = run(tmp_path, planted("fine"), planted("again", function="fine", alone=True, ahead=AHEAD))
    assert code == 0 and summary["wrong"] == [] and summary["device"] == "cpu" and summary["rehearsal"]
    step = json.loads((tmp_path / "again.json").read_text())
    assert step == summary["steps"]["again"] and step["status"] == DONE and step["figures"] == {"answer": {"is": 42.0}}
    assert step["versions"]["torch"] and step["date"] and step["command"][-3:] == ["--rehearse", "--out", str(tmp_path)]
    printed = capfd.readouterr().out
    assert "[fine] answer: is 42" in printed and "chatter" not in printed
    assert "chatter" in (tmp_path / "fine.log").read_text()
    assert (tmp_path / "again.log").read_text().startswith("imported ahead\n")


def test_who_fails_is_named_and_stops_nobody(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    steps = [
        planted("wrong"),
        planted("hangs", limit=2 / 4),  # rehearsals have four times as long
        planted("dies"),
        planted("raises"),
        planted("not_a_number"),
        planted("needy", function="fine", needs=("no_such_package",)),
        planted("spared", function="fine", needs=("no_such_package",), is_optional=True),
        planted("no_such_function"),
        planted("fine"),
    ]
    code, summary = run(tmp_path, *steps)
    assert code == 1
    assert {name: record["status"] for name, record in summary["steps"].items()} == {
        "wrong": DISAGREES,
        "hangs": KILLED,
        "dies": CRASHED,
        "raises": FAILED,
        "not_a_number": DISAGREES,
        "needy": NOT_RUN,
        "spared": NOT_RUN,
        "no_such_function": CRASHED,
        "fine": DONE,
    }
    assert [line.split(":")[0] for line in summary["wrong"]] == [
        "wrong disagrees",
        "hangs killed",
        "dies crashed",
        "raises failed",
        "not_a_number disagrees",
        "needy not run",
        "no_such_function crashed",
    ]
    assert summary["wrong"][0] == "wrong disagrees: error" and "no_such_package" in summary["wrong"][5]
    assert summary["not_run"] == ["spared: needs no_such_package"]
    # What was found before is there, and nothing is left running.
    hung, dead, raised = (summary["steps"][name] for name in ("hangs", "dies", "raises"))
    assert 2 <= hung["seconds"] < 20 and dead["figures"] == {"before": {"is": 1}} and dead["error"] == "signal 6"
    assert is_gone(hung["figures"]["before"]["child"])
    assert "illegal memory access" in raised["error"] and "Traceback" in raised["end_of_log"]
    assert "WRONG: dies crashed: signal 6" in capfd.readouterr().out


def test_the_part_has_a_limit_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_REHEARSAL_PATIENCE", 1)
    steps = {"speed": gpu.StepGroup(2, (planted("hangs"), planted("fine")))}
    assert gpu.run(["--rehearse", "--out", str(tmp_path)], parts=steps) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"]["hangs"]["status"] == KILLED
    assert summary["wrong"][1] == "fine not run: the 2 s of all steps were over"


def test_a_step_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    plan = {"step": "hangs", "function": "tests.benchmarks.planted_steps:hangs", "options": {}, "device": "cpu"}
    plan |= {"ahead": None, "rehearses": True, "command": []}
    command = [sys.executable, "-m", "benchmarks.gpu_worker", str(tmp_path), json.dumps(plan)]
    worker = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, process_group=0)
    worker.stdin.write(b"go\n")
    worker.stdin.flush()
    record, deadline = tmp_path / "hangs.json", time.monotonic() + 30
    while not (record.exists() and json.loads(record.read_text())["figures"]) and time.monotonic() < deadline:
        time.sleep(0.05)
    worker.stdin.close()
    assert worker.wait(timeout=30) == -9
    child = json.loads(record.read_text())["figures"]["before"]["child"]
    while not is_gone(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert is_gone(child)


def test_without_a_gpu_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match="torch sees no GPU here: --rehearse runs every step on a CPU"):
        run(tmp_path, planted("fine"), planted("again", function="fine"), words=())
    assert not (tmp_path / "again.json").exists()


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in STEPS])
def test_a_rehearsed_step_is_right(name: str, tmp_path: Path, forked_ranks: Callable[[], AbstractContextManager[None]]) -> None:
    module, function = STEPS[name].function.split(":")
    found = report(tmp_path)
    with forked_ranks():
        getattr(importlib.import_module(module), function)(REHEARSAL, found, **STEPS[name].options)
    found.end(DONE)
    assert found.record["status"] == DONE, found.record["checks"]
    assert found.record["figures"] or found.record["checks"]
    # A check of numbers that differ: a comparison of something with itself would find nothing either.
    if name.startswith("attention-") and found.record["checks"]:
        assert all(check["found"] > 0 for check in found.record["checks"] if "at_most" in check)
        assert {check["name"].split(",")[2].split(":")[0].strip() for check in found.record["checks"]} == set(
            gpu_attention.FEATURES
        )


def test_a_wrong_attention_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import gpu_checks

    plain = gpu_attention.disentangled_attention

    def with_a_wrong_row(*operands: Tensor, implementation: str, **options: Any) -> tuple[Tensor, None]:
        context, _ = plain(*operands, implementation=implementation, **options)
        if implementation != "reference":
            context = torch.cat([context[..., :-1, :], context[..., -1:, :] * 1.1], dim=-2)
        return context, None

    monkeypatch.setattr(gpu_attention, "disentangled_attention", with_a_wrong_row)
    found = report(tmp_path)
    gpu_checks.attention(REHEARSAL, found, dtype="bfloat16")
    found.end(DONE)
    assert found.record["status"] == DISAGREES
    wrong = {check["name"] for check in found.record["checks"] if not check["right"]}
    assert {"portable, 1x40, plain: largest error", "portable, 1x40, decoder: largest error"} <= wrong


def test_memory_that_nobody_wrote_is_found() -> None:
    class Forgetful(gpu_attention.Problem):
        def context(self, implementation: str, operands: Any) -> Tensor:
            context = super().context(implementation, operands)
            return context if implementation == "reference" else context + 0 * torch.empty(())

    problem = Forgetful((1, 1, 8), feature="plain", dtype=torch.float32, device=torch.device("cpu"), buckets=8)
    found = problem.agreement("portable", problem.exact())
    assert found.norm_error != found.norm_error and not found.repeats
    with gpu_attention.Poisoned():
        assert torch.empty(3).isnan().all() and torch.empty_like(torch.zeros(2, dtype=torch.int32)).tolist() == [0x55] * 2
        assert torch.zeros(3).tolist() == [0, 0, 0]


def test_products_that_add_train_as_autograd_does() -> None:
    from benchmarks import device_models
    from deberta_dist.models.presets import preset
    from deberta_dist.operations import random_batch

    config, weights = preset("tiny-v2", num_hidden_layers=2), []
    ids, labels = random_batch.masked_tokens((2, 24), vocab_size=config.vocab_size, num_targets=4, seed=1)
    for products_add in (False, True):
        model = device_models.random_masked_lm(config, device=torch.device("cpu"), dtype=torch.float32)
        loss = lambda model=model: model(ids, labels=labels, dropout_key=3).loss  # noqa: E731
        training = device_models.PlainTraining(model, loss, products_add=products_add)
        first, *_, last = [float(training.step()) for _ in range(4)]
        assert last < first
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert (weights[0] - weights[1]).norm() < 1e-5 * weights[0].norm()


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({}, []),
        ({"losses": [2.0, 1.0001]}, ["loss"]),
        ({"norms": [float("nan"), 1.0]}, ["gradient norm"]),
        ({"evaluations": [3.1]}, ["held-out loss"]),
        ({"moved": {"a": torch.ones(4), "b": torch.tensor([1e-3, 2e-3])}}, ["change of weights, b"]),
    ],
)
def test_training_that_differs_is_found(change: dict, wrong: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = {"losses": [2.0, 1.0], "norms": [1.0, 1.0], "evaluations": [3.0], "attention": "fused", "device": "gpu"}
    moved = {"a": torch.ones(4), "b": torch.tensor([1e-3, 1e-3])}

    def start_ranks(module: str, plan: dict[str, Any], *, uses_gpus: bool, **_: Any) -> list[dict[str, Any]]:
        changed = change if uses_gpus else {}
        torch.save(changed.get("moved", moved), plan["changes"])
        return [right | {"resumed_differs": []} | {k: v for k, v in changed.items() if k != "moved"}]

    monkeypatch.setattr(gpu_training, "start_ranks", start_ranks)
    found = gpu_training.compare("fp32", uses_gpu=True)
    assert list(found.wrong) == wrong and found.resumes


def test_every_step_is_listed_and_in_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.run(["--list"]) == 0
    listed = capsys.readouterr().out
    docs = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    for part in gpu.PARTS.values():
        for step in part.steps:
            assert f"  {step.name} " in listed and f"{step.limit:.0f} s" in listed
            assert f"`{step.name}`" in docs, f"docs/gpu.md does not tell what {step.name} proves"
    with pytest.raises(ConfigError, match="--step device: there is no such step; there are attention-16x512, layer,"):
        gpu.run(["--list", "--part", "speed", "--step", "device"])


def test_most_steps_need_torch_alone() -> None:
    heavy = ("deepspeed", "pydantic", "safetensors", "sentencepiece", "transformers", "scipy")
    program = (
        "import sys\n"
        "from benchmarks import gpu, gpu_checks, gpu_speed, gpu_training, gpu_processes\n"
        f"print([name for name in {heavy} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "[]\n"
    program = "import sys\nfrom benchmarks import gpu\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "False\n", "the process that watches the others must not load what they may crash in"


def test_wheels_are_used_without_being_installed(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    info = "answers-1.0.dist-info"
    with zipfile.ZipFile(wheels / "answers-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("answers/__init__.py", "ANSWER = 42\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: answers\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    step = planted("imports", options={"package": "answers"}, needs=("answers",))
    code, summary = run(tmp_path / "out", step, words=("--rehearse", "--install", str(wheels)))
    assert code == 0 and summary["steps"]["imports"]["status"] == DONE
    code, summary = run(tmp_path / "out", step)
    assert code == 1 and summary["wrong"] == ["imports not run: needs answers"]
    assert os.listdir(wheels) == ["answers-1.0-py3-none-any.whl"]


def test_wheels_are_collected_for_another_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], dict[str, str]]] = []

    def pip(arguments: list[str], environment: dict[str, str] | None = None) -> None:
        asked.append((list(arguments), environment or {}))
        (tmp_path / f"{len(asked)}.whl").write_bytes(b"x" * 1000)

    monkeypatch.setattr(gpu_wheels, "_pip", pip)
    (tmp_path / "old.whl").write_bytes(b"")
    told = gpu_wheels.collect(tmp_path, python="3.12")
    assert told.endswith(f"3,000  bytes in 3 wheels for Python 3.12: {tmp_path}") and not (tmp_path / "old.whl").exists()
    pins = gpu_wheels.pinned(ROOT / "launchers" / "requirements.txt")
    assert all("3.12" in words for words, _ in asked[:2]) and pins["pydantic"] in asked[0][0]
    assert {pins["tqdm"], pins["sentencepiece"], "hjson", "--no-deps"} <= set(asked[1][0])
    assert pins["deepspeed"] in asked[2][0] and asked[2][1] == {"DS_BUILD_OPS": "0"}
    assert not any(name in " ".join(words) for words, _ in asked for name in ("torch", "numpy", "triton"))


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--python 3: expected a version such as 3.12"):
        gpu_wheels.collect(tmp_path, python="3")
    with pytest.raises(ConfigError, match="there are no wheels; collect them with --wheels"):
        gpu_wheels.install(tmp_path, tmp_path / "target")
    (tmp_path / "broken-1.0-cp27-none-any.whl").write_bytes(b"")
    with pytest.raises(ConfigError, match="pip install .* failed: .*not a supported wheel"):
        gpu_wheels.install(tmp_path, tmp_path / "target")
