"""Launcher's command line -> DeepSpeed's command line and environment."""

import argparse
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from deberta_dist.errors import ConfigError
from deberta_dist.training import launch

ROOT = Path(__file__).resolve().parents[2]
BIG = "launchers/pretrain_1.5b.sh"
DEMO = "launchers/pretrain_demo.sh"


def test_tables_equal_deepspeeds_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = pytest.importorskip("deepspeed.launcher.runner", reason="deepspeed is not installed")
    parsers: list[argparse.ArgumentParser] = []
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self, args=None: parsers.append(self))
    runner.parse_args([])
    with_value, alone = set(), set()
    for action in parsers[0]._actions:
        if action.dest != "help" and action.option_strings:
            (alone if action.nargs == 0 else with_value).update(action.option_strings)
    assert with_value == launch.FLAGS_WITH_VALUE
    assert alone == launch.FLAGS_ALONE
    assert with_value >= launch.PLACEMENT_FLAGS


def test_default_hostfile_is_deepspeeds() -> None:
    runner = pytest.importorskip("deepspeed.launcher.runner", reason="deepspeed is not installed")
    assert launch.DEFAULT_HOSTFILE == runner.DLTS_HOSTFILE


def test_arguments_are_sorted() -> None:
    split = launch.split_arguments(
        ["--hostfile", "h", "--training.seed", "7", "-i", "a@b", "--no_ssh", "--num_nodes=4", "--run.directory=--x",
         "--launcher_args", "--oversubscribe --num_gpus 3", "--model.preset", "--num_gpus"]
    )  # fmt: skip
    assert split.deepspeed == [
        "--hostfile=h", "-i", "a@b", "--no_ssh", "--num_nodes=4", "--launcher_args=--oversubscribe --num_gpus 3",
    ]  # fmt: skip
    # the value of a dotted key is never taken for a flag
    assert split.script == ["--training.seed", "7", "--run.directory=--x", "--model.preset", "--num_gpus"]
    assert not split.is_alone
    # nor is a path with a dot taken for a key
    assert launch.split_arguments(["--data", "/a.b/c", "--num_gpus", "2"]) == (["--num_gpus=2"], ["--data", "/a.b/c"], False)
    assert launch.split_arguments(["--dry-run", "--training.seed=7"]) == ([], ["--dry-run", "--training.seed=7"], True)


@pytest.mark.parametrize("words", [["--num_gpus"], ["--module"], ["--no_python"]])
def test_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=words[0]):
        launch.split_arguments(words)


def test_without_gpu_processes_and_environment_come_from_the_toml(start: Callable, called: Callable) -> None:
    sizes = [f"--parallel.{axis}_parallel_size={size}" for axis, size in (("tensor", 2), ("pipeline", 4), ("data", 2))]
    call = called(start("bash", BIG, "--run.directory", "a b'c", *sizes))
    flags, rest = call["argv"][:2], call["argv"][2:]
    assert flags[0].startswith("--master_port=")
    assert flags[1] == "--num_gpus=16"
    assert rest == [BIG, "--run.directory", "a b'c", *sizes]
    threads = max(1, (os.cpu_count() or 1) // 16)
    assert call["env"] == {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("shell", [["sh"], ["bash"], []])
def test_other_directory_and_direct_execution(shell: list[str], tmp_path: Path, start: Callable, called: Callable) -> None:
    call = called(start(*shell, str(ROOT / DEMO), "--num_gpus", "8", cwd=tmp_path))
    assert call["argv"][0] == "--num_gpus=8"
    assert call["argv"][2:] == [str(ROOT / DEMO)]


def test_hostfile_leaves_placement_and_port_to_deepspeed(start: Callable, called: Callable, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("".join(f"node{number} slots=8\n" for number in range(4)))
    call = called(start("bash", BIG, "--hostfile", str(hosts), "--num_nodes", "4", "--training.max_steps", "5"))
    assert call["argv"] == [f"--hostfile={hosts}", "--num_nodes=4", BIG, "--training.max_steps", "5"]


def test_given_environment_is_kept(start: Callable, called: Callable) -> None:
    call = called(start("bash", DEMO, "--num_gpus", "8", env={"OMP_NUM_THREADS": "3", "PYTHONPATH": "/other"}))
    assert call["env"]["OMP_NUM_THREADS"] == "3"
    assert call["env"]["PYTHONPATH"] == f"{ROOT}:/other"


def test_with_gpus_nothing_is_added(start: Callable, called: Callable) -> None:
    call = called(start("bash", BIG, "--master_port", "29501", env={"DS_ACCELERATOR": "cuda"}))
    assert call["argv"] == ["--master_port=29501", BIG]
    assert call["env"]["OMP_NUM_THREADS"] is None


@pytest.mark.parametrize("word", ["--dry-run", "--help", "-h"])
def test_what_only_prints_starts_python_itself(word: str) -> None:
    environment = {"DS_ACCELERATOR": "cpu"}
    split = launch.split_arguments(["--num_gpus", "8", word, "--training.seed=7"])
    words = launch.command(ROOT / DEMO, split, environment)
    assert words == [sys.executable, str(ROOT / DEMO), word, "--training.seed=7"]


def test_wrong_parallel_section_is_said_before_anything_starts(start: Callable) -> None:
    result = start("bash", DEMO, "--parallel.tensor_parallel_sise", "2")
    assert result.returncode == 2
    assert result.stderr == (
        "command line: unknown key parallel.tensor_parallel_sise; did you mean parallel.tensor_parallel_size?\n"
    )


def bare_shell(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a script by sh in an environment that has nothing but the system's commands."""
    environment = {"PATH": "/usr/bin:/bin", **environment}
    return subprocess.run(["sh", *words], env=environment, capture_output=True, text=True, timeout=20, check=False)


def test_no_environment_at_all(tmp_path: Path) -> None:
    script = tmp_path / "launchers" / "start.sh"
    script.parent.mkdir()
    script.write_text((ROOT / "launchers" / "start.sh").read_text())
    result = bare_shell(str(script), "x.sh")
    assert result.returncode == 2
    assert "setup_env.sh" in result.stderr


def test_existing_venv_is_put_on_path(tmp_path: Path) -> None:
    script = tmp_path / "launchers" / "start.sh"
    script.parent.mkdir()
    script.write_text((ROOT / "launchers" / "start.sh").read_text())
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    for name in ("deepspeed", "python"):
        (binaries / name).write_text('#!/bin/sh\necho "$(basename "$0") $* $PYTHONPATH"\n')
        (binaries / name).chmod(0o755)
    result = bare_shell(str(script), "x.sh", "a b")
    assert result.stdout == f"python -m deberta_dist.training.launch x.sh a b {tmp_path}\n"


def test_gpu_detection(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.has_gpu({"DS_ACCELERATOR": "cuda"})
    assert not launch.has_gpu({"DS_ACCELERATOR": "cpu"})
    assert not launch.has_gpu({"CUDA_VISIBLE_DEVICES": ""})
    monkeypatch.setattr(launch.importlib.metadata, "version", lambda name: "2.13.0")
    answer = subprocess.CompletedProcess([], 0, "GPU 0: NVIDIA H100\n", "")
    monkeypatch.setattr(launch.subprocess, "run", lambda *args, **kwargs: answer)
    assert launch.has_gpu({})
    monkeypatch.setattr(launch.importlib.metadata, "version", lambda name: "2.13.0+cpu")
    assert not launch.has_gpu({})


def test_imports_neither_torch_nor_deepspeed() -> None:
    code = "import sys, deberta_dist.training.launch; print([m for m in ('torch', 'deepspeed') if m in sys.modules])"
    words = [sys.executable, "-c", code]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert result.stdout == "[]\n", result.stderr


def test_demo_repeats_nothing_and_shows_again(tmp_path: Path) -> None:
    """With stand-ins for the environment and Python: which steps it takes, from what is there."""
    (tmp_path / "launchers").mkdir()
    demo = tmp_path / "launchers" / "demo.sh"
    demo.write_text((ROOT / "launchers" / "demo.sh").read_text())
    (tmp_path / "launchers" / "setup_env.sh").write_text("exit 0\n")
    (tmp_path / "launchers" / "pretrain_demo.sh").write_text('echo "trains"\n')
    (tmp_path / "launchers" / "finetune_superglue.sh").write_text('echo "fine-tunes"\n')
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "runs $1"\n')
    python.chmod(0o755)

    def steps() -> list[str]:
        result = subprocess.run(["sh", str(demo)], cwd="/", capture_output=True, text=True, timeout=20, check=False)
        assert result.returncode == 0, result.stderr
        return [line for line in result.stdout.splitlines() if line and not line.startswith("demo:")]

    looks = ["runs tools/fill_mask.py"] * 2
    submits = ["fine-tunes", "runs tools/make_submission.py"]
    made = ["runs tools/train_tokenizer.py", "runs tools/prepare_corpus.py"]
    assert steps() == [*made, "trains", "runs tools/convert_checkpoint.py", *looks, *submits]
    (tmp_path / "demo_data" / "corpus").mkdir()
    for name in ("spm.model", "corpus/report.json"):
        (tmp_path / "demo_data" / name).touch()
    run = tmp_path / "runs" / "pretrain_demo"
    run.mkdir(parents=True)
    assert steps() == ["trains", "runs tools/convert_checkpoint.py", *looks, *submits], "an interrupted run goes on"
    (run / "result.json").write_text("{}")
    (run / "result.txt").write_text("loss 1.25\n")
    (run / "huggingface").mkdir()
    assert steps() == ["loss 1.25", *looks, *submits]
    finetuned = tmp_path / "runs" / "superglue_demo"
    finetuned.mkdir()
    (finetuned / "submission.zip").touch()
    (finetuned / "scores.txt").write_text("average 50\n")
    assert steps() == ["loss 1.25", *looks, "average 50"]


def test_setup_refuses_an_old_python(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    (tmp_path / "launchers").mkdir()
    setup = tmp_path / "launchers" / "setup_env.sh"
    setup.write_text((ROOT / "launchers" / "setup_env.sh").read_text())
    result = bare_shell(str(setup), PYTHON=str(old))
    assert result.returncode == 2
    assert "3.11" in result.stderr
    assert not (tmp_path / ".venv").exists()


def test_setup_makes_the_command(tmp_path: Path) -> None:
    checkout, elsewhere = tmp_path / "a checkout", tmp_path / "elsewhere"
    checkout.mkdir()
    elsewhere.mkdir()
    for name in ("launchers", "pyproject.toml", "deberta_dist"):
        (checkout / name).symlink_to(ROOT / name)
    (checkout / "launchers").unlink()
    (checkout / "launchers").mkdir()
    for path in (ROOT / "launchers").glob("*.*"):
        (checkout / "launchers" / path.name).write_bytes(path.read_bytes())
    venv = checkout / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    (packages,) = venv.glob("lib/python*/site-packages")
    (packages / "pip.py").touch()  # installs nothing
    command = venv / "bin" / "deberta-dist"

    def set_up() -> None:
        result = bare_shell(str(checkout / "launchers" / "setup_env.sh"), PYTORCH_CPU_INDEX="")
        assert result.returncode == 0, result.stderr

    set_up()
    made = command.stat().st_mtime_ns
    shown = subprocess.run([str(command), "--version"], cwd=elsewhere, capture_output=True, text=True, check=True)
    assert shown.stdout.startswith("deberta-dist ")
    unknown = subprocess.run([str(command), "two words"], cwd=elsewhere, capture_output=True, text=True, check=False)
    assert unknown.returncode == 2
    assert "'two words' is not a verb" in unknown.stderr
    set_up()
    assert command.stat().st_mtime_ns == made
    command.write_text("#!/bin/sh\necho by pip\n")
    set_up()
    assert command.read_text() == "#!/bin/sh\necho by pip\n"


def test_requirements_satisfy_the_ranges() -> None:
    lines = (ROOT / "launchers" / "requirements.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    # A checkout trains: its requirements are the core's and those of the extra for training.
    wanted = [*project["dependencies"], *project["optional-dependencies"]["train"]]
    ranges = {Requirement(text).name: Requirement(text).specifier for text in wanted}
    assert set(pins) == set(ranges)
    assert [name for name, version in pins.items() if version not in ranges[name]] == []
    assert "apex" not in pins  # the package of that name on the index is a web toolkit


def test_the_pythons_are_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    prefix = "Programming Language :: Python :: "
    versions = [text.removeprefix(prefix) for text in project["classifiers"] if text.startswith(prefix)]
    assert project["requires-python"] == f">={versions[0]}"
    setup = (ROOT / "launchers" / "setup_env.sh").read_text()
    assert f"Python >= {versions[0]}" in setup
    assert f"sys.version_info < ({versions[0].replace('.', ', ')})" in setup
    assert re.findall(r" python(3\.\d+)", setup) == versions[::-1]
    told = re.findall(r"^\| (3\.\d+) +\|", (ROOT / "docs" / "versions.md").read_text(), re.MULTILINE)
    assert told == versions
