"""Runs as users start them: through the launchers, to the end or to one clear message.

DeepSpeed's command starts ranks once; every other start is the launcher's Python half, forked.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deberta_dist import DebertaConfig, DebertaForMaskedLM
from deberta_dist.data.tokenizer import Tokenizer, train_tokenizer
from tests.harness import ForkedPython, free_port, run_script

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "launchers" / "pretrain_demo.sh")


def layout(tensor: int, pipeline: int, data: int) -> list[str]:
    """Overrides."""
    sizes = {"tensor": tensor, "pipeline": pipeline, "data": data}
    return [f"--parallel.{name}_parallel_size={size}" for name, size in sizes.items()]


ONE_RANK = layout(1, 1, 1)


def start(words: list[str], *, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Starts a command with this interpreter's environment first on PATH, from another directory."""
    return subprocess.run(words, capture_output=True, text=True, timeout=timeout, env=environment(), cwd="/", check=False)


def environment() -> dict[str, str]:
    """A user's, with this interpreter's commands first, and a port of its own: another test may run beside."""
    found = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"):
        found.pop(name, None)
    return {**found, "MASTER_PORT": str(free_port())}


def overrides(corpus: Path, run: Path, **changes: object) -> list[str]:
    """A run of four steps of the demo on the tiny corpus."""
    settings = {
        "data.train": corpus / "train.tokens",
        "data.validation": corpus / "valid.tokens",
        "data.tokenizer": corpus / "spm.model",
        "data.max_seq_length": 64,
        "model.hidden_size": 32,
        "model.attention_head_size": 8,
        "model.intermediate_size": 64,
        "training.max_steps": 4,
        "training.global_batch_size": 8,
        "training.micro_batch_size": 2,
        "schedule.warmup_steps": 1,
        "evaluation.every_steps": 2,
        "evaluation.num_sequences": 11,
        "run.directory": run,
    }
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    return [f"--{key}={value}" for key, value in settings.items()]


@pytest.mark.parametrize(
    ("command", "words", "plan"),
    [
        pytest.param(
            ["deepspeed", "--num_gpus", "2"],
            [DEMO, *layout(1, 2, 1)],
            "tensor 1 x pipeline 2 x data 1",
            id="deepspeed",
        ),
        # As many as the TOML needs. What differs, the number of processes and their environment, is in tests/launchers;
        # eight ranks of this launcher's Python half run and resume in test_resume.
        pytest.param(["bash", DEMO], [], "tensor 2 x pipeline 2 x data 2", id="bash", marks=pytest.mark.slow),
    ],
)
def test_a_run_from_start_to_weights(command: list[str], words: list[str], plan: str, corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = start([*command, "--master_port", str(free_port()), *words, *overrides(corpus, run)])
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{plan}; 4 steps of 8 sequences" in done.stdout
    assert "\nattention: " in done.stdout

    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [s for s in steps if "loss" in s]
    assert [s["step"] for s in trained] == [1, 2, 3, 4]
    assert [s["consumed_samples"] for s in trained] == [8, 16, 24, 32]
    assert all(s["grad_norm"] > 0 and s["tokens_per_second"] > 0 and s["mfu"] is None for s in trained)
    assert all(0 <= s["data_seconds"] < 5 for s in trained)
    assert trained[0]["lr"] == 4e-3 and trained[-1]["lr"] < trained[1]["lr"]
    assert [s["step"] for s in steps if "valid_loss" in s] == [2, 4]

    result = json.loads((run / "result.json").read_text())
    assert {"loss", "accuracy", "num_targets", "unigram_loss", "unigram_entropy_of_targets"} <= result.keys()
    assert result["loss"] == [s for s in steps if "valid_loss" in s][-1]["valid_loss"]
    assert (run / "result.txt").read_text().strip() in done.stdout

    config = DebertaConfig.from_dict(json.loads((run / "weights" / "config.json").read_text()))
    model = DebertaForMaskedLM(config)
    model.load_state_dict(load_file(run / "weights" / "model.safetensors"), strict=True)
    assert all(torch.isfinite(p).all() for p in model.parameters())

    again = run_script([DEMO, *ONE_RANK, *overrides(corpus, run)], env=environment(), cwd="/")
    assert again.returncode == 2
    assert again.stderr.count("holds a finished run") == 1
    assert len((run / "metrics.jsonl").read_text().splitlines()) == len(steps), "the first run was touched"


def refused(corpus: Path, run: Path, *words: str, **changes: object) -> str:
    """Starts one rank that must refuse; returns its message, which must be one line."""
    done = run_script([DEMO, *ONE_RANK, *overrides(corpus, run, **changes), *words], env=environment(), cwd="/")
    assert done.returncode in (2, 65), done.stdout + done.stderr
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr
    assert not run.exists(), "something was written"
    return message


def test_sizes_and_keys_are_refused(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert "training.max_step" in refused(corpus, run, "--training.max_step=3")
    assert "hiden_size" in refused(corpus, run, "--model.hiden_size=3")
    message = refused(corpus, run, data__max_seq_length=200)
    assert "data.max_seq_length = 200" in message and "max_position_embeddings = 128" in message
    assert "global_batch_size = 9" in refused(corpus, run, training__global_batch_size=9)
    assert "vocab_size = 900" in refused(corpus, run, "--model.vocab_size=900")


def test_a_wrong_number_of_processes_is_refused(corpus: Path, tmp_path: Path) -> None:
    done = run_script([DEMO, *overrides(corpus, tmp_path / "run")], env=environment(), cwd="/")
    assert done.returncode == 2
    assert "makes 8 processes, but there are 1" in done.stderr


def test_heads_that_do_not_divide_are_refused_by_all_ranks_without_a_hang(corpus: Path, tmp_path: Path) -> None:
    """As DeepSpeed starts ranks; that its launcher passes their exit code on is in tests/launchers/test_deepspeed_start."""
    words, port, results = [DEMO, *overrides(corpus, tmp_path / "run"), *layout(3, 1, 1)], free_port(), []
    with (tmp_path / "errors").open("wb") as errors:
        for rank in range(3):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "3"}
            env = environment() | own | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            results.append(ForkedPython([sys.executable, *words], env=env, cwd="/", stdout=errors, stderr=errors))
    assert [rank.wait(60) for rank in results] == [2, 2, 2]
    assert (tmp_path / "errors").read_text().count("does not divide model.num_attention_heads = 4") == 1
    assert not (tmp_path / "run").exists()


def test_damaged_and_foreign_files_are_refused(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert "absent.tokens" in refused(corpus, run, data__train=tmp_path / "absent.tokens")
    empty = tmp_path / "empty.tokens"
    empty.touch()
    assert "empty.tokens" in refused(corpus, run, data__train=empty)
    torn = tmp_path / "torn.tokens"
    torn.write_bytes((corpus / "train.tokens").read_bytes()[:-1000])
    assert "torn.tokens" in refused(corpus, run, data__train=torn)
    train_tokenizer(iter(["an entirely different text of a few words " * 20] * 30), tmp_path / "other.model", vocab_size=20)
    assert Tokenizer(tmp_path / "other.model").num_tokens == 21
    message = refused(corpus, run, data__tokenizer=tmp_path / "other.model")
    assert "train.tokens" in message and "other.model" in message
    shutil.copy(corpus / "train.tokens", tmp_path / "not_a_model")
    assert "not_a_model" in refused(corpus, run, data__tokenizer=tmp_path / "not_a_model")


def test_text_that_is_not_utf8_is_refused(corpus: Path, tmp_path: Path) -> None:
    text = tmp_path / "latin1.txt"
    text.write_bytes("good line\n\nna\xefve\n".encode("latin-1"))
    tool = str(ROOT / "tools" / "prepare_corpus.py")
    output = tmp_path / "out"
    done = run_script(
        [tool, "--input", text, "--output", output, "--tokenizer", corpus / "spm.model"], env=environment(), cwd="/"
    )
    assert done.returncode == 65
    assert "latin1.txt" in done.stderr
    assert not (output / "report.json").exists() and not (output / "train").exists()
