"""Fine-tuning as users start it: from a zip of data to predictions, a table of scores and a submission.

The shell starts two ranks once; every other start is the launcher's Python half, forked. What stands between them, and that
DeepSpeed passes exit codes on, is in tests/launchers.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deberta_dist.conversion.canonical import to_canonical
from deberta_dist.conversion.source import open_source
from deberta_dist.finetuning.batches import pad
from deberta_dist.models.classification import DebertaForSequenceClassification
from deberta_dist.tasks.base import Release
from deberta_dist.tasks.predictions import read_predictions, require_covering
from deberta_dist.tasks.superglue.benchmark import SUPERGLUE
from deberta_dist.tasks.superglue.tasks import TASKS
from tests.finetuning.small import DATA, ROOT, Case
from tests.finetuning.test_plan import write_mnli
from tests.harness import free_port, run_script

LAUNCHER = str(ROOT / "launchers" / "finetune_superglue.sh")


def environment() -> dict[str, str]:
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"):
        env.pop(name, None)
    return {**env, "MASTER_PORT": str(free_port())}


def fixed(directory: Path, out: Path) -> list[str]:
    return ["--init", str(directory / "dropout-0"), "--recipe", str(directory / "recipes.toml"), "--out", str(out)]


def start(directory: Path, out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Two ranks."""
    command = [
        "bash",
        LAUNCHER,
        "--quiet",
        "--num_gpus",
        "2",
        "--master_port",
        str(free_port()),
        *fixed(directory, out),
        *words,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment(), check=False)


def one_rank(directory: Path, out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run_script([LAUNCHER, *fixed(directory, out), *words], env=environment())


def run_tool(name: str, *words: object) -> subprocess.CompletedProcess[str]:
    return run_script([ROOT / "tools" / name, *words])


def test_from_a_zip_to_a_submission(start_directory: Path, tmp_path: Path) -> None:
    for name in ("RTE", "COPA", "AX-b", "AX-g"):
        shutil.copytree(DATA / name, tmp_path / "data" / name)
    pairs = tmp_path / "data" / "AX-g" / "AX-g.jsonl"
    pairs.write_text("".join(pairs.read_text().splitlines(keepends=True)[:24]))
    data = shutil.make_archive(str(tmp_path / "combined"), "zip", tmp_path / "data")
    out, fp32 = tmp_path / "run", ["--run.deepspeed", str(ROOT / "ds_configs" / "debug_cpu.json")]
    words = ["--task", "all", "--data", data, "--seeds", "2", "--sift", *fp32]
    result = start(start_directory, out, *words)
    assert result.returncode == 0, result.stderr + result.stdout
    release = Release(data, SUPERGLUE)
    for seed in (7, 8):
        for name, split in (
            ("RTE", "val"),
            ("RTE", "test"),
            ("COPA", "val"),
            ("COPA", "test"),
            ("AX-b", "test"),
            ("AX-g", "test"),
        ):
            path = out / f"seed-{seed}" / name / f"{split}.jsonl"
            found = read_predictions(path)
            require_covering(found, release.read(TASKS[name], split), where=path)
            assert list(found) == sorted(found)
    assert (out / "seed-7/RTE/test.jsonl").read_text() != (out / "seed-8/RTE/test.jsonl").read_text()
    described = json.loads((out / "seed-7/RTE/run.json").read_text())
    assert described["made_from"]["settings"]["sift"]["enabled"] and described["seed"] == 7
    steps = [json.loads(line) for line in (out / "seed-7/RTE/metrics.jsonl").read_text().splitlines()]
    assert all(line["sift_loss"] > 0 for line in steps if "loss" in line)
    best = max(line["valid_accuracy"] for line in steps if "valid_accuracy" in line)
    assert described["score"] == best and "2 of 8, missing BoolQ" in (out / "scores.txt").read_text()
    assert json.loads((out / "scores.json").read_text()) and "| RTE" in (out / "scores.md").read_text()

    # The weights that are kept are those that predicted.
    predictions = read_predictions(out / "seed-7/RTE/test.jsonl")
    plan, point = Case("RTE").plan(start_directory)
    published = to_canonical(open_source(out / "seed-7/RTE/weights"))
    assert published.labels["id2label"] == {"0": "entailment", "1": "not_entailment"}
    model = DebertaForSequenceClassification(published.config)
    model.deberta.embeddings.position_embeddings = None
    model.load_state_dict({name: weight.read() for name, weight in published.weights.items()}, strict=True)
    model.eval()
    for example in plan.features["test"].examples:
        ids, mask, _ = pad(plan.features["test"].sequences(example, 0), pad_id=0, sep_id=point.tokenizer.sep_id)
        with torch.no_grad():
            probabilities = model(ids, mask).logits.mean(0).softmax(0)
        assert abs(probabilities[0].item() - predictions[example.key]["entailment"]) < 1e-5

    again = one_rank(start_directory, out, *words)
    assert again.returncode == 0 and "everything is finished already" in again.stdout
    other = one_rank(start_directory, out, *words, "--training.epochs", "1")
    assert other.returncode == 2 and "settings.training.epochs was 2.0, is 1.0" in other.stderr
    whole = run_tool("make_submission.py", "--predictions", out, "--data", data, "--out", tmp_path / "s.zip")
    assert whole.returncode == 65 and "finetune_superglue.sh --task WSC" in whole.stderr
    partial = run_tool("make_submission.py", "--predictions", out, "--data", data, "--out", tmp_path / "s.zip", "--partial")
    assert partial.returncode == 0 and (tmp_path / "s.partial.zip").exists(), partial.stderr
    manifest = json.loads((tmp_path / "s.partial.manifest.json").read_text())
    assert len(json.dumps(manifest).split(str(start_directory / "dropout-0"))) > 2, "the checkpoint is named"


@pytest.mark.slow
def test_tasks_start_from_mnli_in_bf16(start_directory: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for name in ("RTE", "CB"):
        shutil.copytree(DATA / name, data / name)
    write_mnli(data / "MNLI")
    out = tmp_path / "run"
    words = ["--task", "RTE,CB", "--data", str(data), "--intermediate", "MNLI", "--run.keep_weights", "false"]
    bf16 = ["--run.deepspeed", str(ROOT / "ds_configs" / "finetune_zero3.json")]
    result = start(start_directory, out, *words, *bf16)
    assert result.returncode == 0, result.stderr + result.stdout
    mnli = out / "seed-7" / "MNLI" / "weights"
    assert (
        f"RTE, seed 7: starts from {mnli}" in result.stdout
        and "CB, seed 7: starts from " + str(start_directory) in result.stdout
    )
    assert json.loads((out / "seed-7/RTE/run.json").read_text())["made_from"]["through"] == "MNLI"
    assert not (out / "seed-7" / "RTE" / "weights").exists() and mnli.is_dir()
    # A run that lost the small task starts it from the MNLI model that is there.
    shutil.rmtree(out / "seed-7" / "RTE")
    again = one_rank(start_directory, out, *words, *bf16)
    assert again.returncode == 0 and "RTE, seed 7: starts from" in again.stdout and "MNLI, seed" not in again.stdout


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--task", "RTE", "--data", "/nowhere"], 65, "/nowhere is neither a folder nor a zip file of SuperGLUE data"),
        (["--task", "all"], 2, "required: --data"),
    ],
)
def test_refusals_end_with_one_line(words: list[str], code: int, message: str, start_directory: Path, tmp_path: Path) -> None:
    result = one_rank(start_directory, tmp_path / "run", *words)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode == code and len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "run").exists()


def test_dry_run_prints_the_plan_and_makes_nothing(start_directory: Path, tmp_path: Path) -> None:
    words = ["--task", "WSC", "--data", str(DATA), "--dry-run", "--world-size", "16"]
    result = one_rank(start_directory, tmp_path / "run", *words)
    assert result.returncode == 0 and "tensor 1 x data 16" in result.stdout and "WSC: 387 decisions" in result.stdout
    assert not (tmp_path / "run").exists()
