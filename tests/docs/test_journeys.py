"""Follows the journeys of the docs: the commands of a page, in its order, with small sizes in the place of large ones.

Slow, for they train; ``test_pages.py`` proves in seconds that every command of every page exists with its flags.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docs.markdown import ROOT, Command, commands
from tests.small_run import small_run, write_text

pytestmark = pytest.mark.slow
TIMEOUT = 900
# What a page says, and what a test has time for.
# A hostfile needs ssh; two CPU processes stand for its machines.
SMALL = {
    "--hostfile hosts": "--num_gpus 2",
    "128000": "600",
    "--workers 16": "--workers 2",
    "--document 17": "--document 1",
    "--seeds 5": "--seeds 1",
}
TOML = small_run(
    corpus="../data/corpus",
    tokenizer="../data/spm.model",
    directory="../runs/pretrain_1.5b",
    deepspeed="../ds_configs/debug_cpu.json",
)


class Workplace:
    """A folder as a reader of the docs has it: a checkout that is installed, and some text.

    Args:
        root: the folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("deberta_dist", "tools"):
            (root / name).symlink_to(ROOT / name)
        shutil.copytree(ROOT / "ds_configs", root / "ds_configs")
        shutil.copytree(ROOT / "launchers", root / "launchers")
        (root / "text").mkdir()
        write_text(root / "text/some.txt")
        programs = root / "bin"
        programs.mkdir()
        script = f'#!/bin/sh\nexec "{sys.executable}" -m deberta_dist "$@"\n'
        (programs / "deberta-dist").write_text(script)
        (programs / "deberta-dist").chmod(0o755)
        path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
        self.environment = {
            **os.environ,
            "PATH": path,
            "PYTHONPATH": str(root),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        }

    def run(self, line: str, *, where: str) -> str:
        """What a command prints.

        Args:
            line: for a shell.
            where: page and line, for a failure.
        """
        words, here = ["sh", "-c", line], self.root
        ran = subprocess.run(
            words, cwd=here, env=self.environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
        assert ran.returncode == 0, f"{where}: {line}\n{ran.stdout[-1500:]}\n{ran.stderr[-1500:]}"
        return ran.stdout

    def follow(self, page: str, *, which: Callable[[Command], bool], more: tuple[str, ...] = ()) -> list[str]:
        """Runs commands of a page in their order; returns what each has printed.

        Args:
            page: its file.
            which: of its commands.
            more: further words for each.
        """
        outputs = []
        for command in filter(which, commands(ROOT / page)):
            line = " ".join(f"'{word}'" if " " in word or "[" in word else word for word in command.words)
            for large, small in SMALL.items():
                line = line.replace(large, small)
            line = " ".join([line, *more])
            outputs.append(self.run(line, where=f"{page}:{command.line}"))
        return outputs


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("journeys"))


def is_tool(command: Command) -> bool:
    """A verb that is not started under MPI."""
    return command.words[0] == "deberta-dist"


def test_data(workplace: Workplace) -> None:
    outputs = workplace.follow("docs/data.md", which=is_tool)
    assert len(outputs) == 7
    root = workplace.root
    assert (root / "data/corpus/report.md").is_file() and (root / "megatron/corpus.idx").is_file()
    assert (root / "data/train.tokens").is_file()


def test_pretraining(workplace: Workplace) -> None:
    if not (workplace.root / "data/corpus").exists():
        workplace.follow("docs/pretraining.md", which=lambda c: c.words[1] in ("train-tokenizer", "prepare-corpus"))
    (workplace.root / "launchers/pretrain_1.5b.toml").write_text(TOML)
    starts = [c for c in commands(ROOT / "docs/pretraining.md") if c.words[0] == "deepspeed"]
    (plan,) = workplace.follow(
        "docs/pretraining.md", which=lambda c: c == starts[0], more=("--training.global_batch_size", "128")
    )
    assert "64" in plan
    workplace.follow("docs/pretraining.md", which=lambda c: c == starts[1])
    assert (workplace.root / "runs/pretrain_1.5b/weights/model.safetensors").is_file()
    fill = workplace.follow("docs/pretraining.md", which=lambda c: c.words[1] in ("convert", "fill-mask"))
    assert fill[-1].startswith("mask 1:")


def test_conversion(workplace: Workplace) -> None:
    run = workplace.root / "runs/pretrain_1.5b"
    if not run.exists():
        pytest.fail("test_pretraining makes the run that is converted here")
    (workplace.root / "runs/pretrain_demo").symlink_to(run)
    shutil.rmtree(workplace.root / "hf", ignore_errors=True)
    outputs = workplace.follow("docs/conversion.md", which=lambda c: is_tool(c) and "onnx" not in c.words)
    assert "emd" in outputs[3] or "mask decoder" in outputs[3]
    assert (workplace.root / "ms/pytorch_model.bin").is_file() and (workplace.root / "hf_code").is_dir()


def test_finetuning_and_submission(workplace: Workplace) -> None:
    root = workplace.root
    assert (root / "start").is_dir(), "test_conversion makes the checkpoint that is fine-tuned here"
    shutil.copytree(ROOT / "launchers/demo_superglue", root / "superglue")
    # One process and a few rows; SiFT, MNLI and seeds have tests of their own.
    short = "--training.epochs 0.02 --schedule.warmup_steps 0 --data.max_seq_length 64 --data.window_overlap 8"
    launcher = "launchers/finetune_superglue.sh"
    for command in commands(ROOT / "docs/finetuning.md"):
        if command.words[0] == "deepspeed":
            line = " ".join(command.words).replace(launcher, f"--num_gpus 1 {launcher}").replace("--seeds 5", "--seeds 1")
            line = line.replace("--intermediate MNLI --mnli glue/MNLI/ ", "").replace("--sift ", "")
            workplace.run(f"{line} {short}", where=f"docs/finetuning.md:{command.line}")
    workplace.follow("docs/submissions.md", which=is_tool)
    assert (root / "submission.zip").is_file()
