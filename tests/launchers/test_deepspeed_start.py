"""DeepSpeed's own launcher and ours, together: a copy of the launchers with a stand-in for training."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import run_script

ROOT = Path(__file__).resolve().parents[2]
DEEPSPEED = Path(sys.executable).parent / "deepspeed"
STAND_IN = """\
import os, sys

def main(launcher_file):
    # one write per rank: the ranks share the pipe
    line = " ".join((os.environ["RANK"], os.environ["WORLD_SIZE"], os.path.basename(launcher_file), repr(sys.argv[1:])))
    os.write(1, f"HERE {line} {os.environ.get('OMP_NUM_THREADS')}\\n".encode())
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The launchers and what starts them, with a training that only says that it was called."""
    home = tmp_path / "checkout"
    shutil.copytree(ROOT / "launchers", home / "launchers")
    for part in (
        "__init__.py",
        "errors.py",
        "values.py",
        "files",
        "config",
        "training/__init__.py",
        "training/arguments.py",
        "training/launch.py",
        "training/hostfile.py",
    ):
        source, target = ROOT / "deberta_dist" / part, home / "deberta_dist" / part
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    (home / "deberta_dist" / "training" / "pretrain.py").write_text(STAND_IN)
    return home


def start(words: list[str], cwd: Path, *, code: int = 0, forked: bool = False) -> list[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "PYTHONPATH")}
    environment = kept | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "DS_ACCELERATOR": "cpu",
    }
    if forked:
        # A script of Python, too: forked, it has imported DeepSpeed. The launcher that it starts has not.
        result = run_script([DEEPSPEED, *words[1:]], cwd=cwd, env=environment, timeout=180)
    else:
        result = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert result.returncode == code, result.stdout + result.stderr
    return sorted(line for line in result.stdout.splitlines() if line.startswith("HERE"))


@pytest.fixture(autouse=True)
def _deepspeed_is_installed() -> None:
    if not DEEPSPEED.exists():
        pytest.skip("the deepspeed command is not installed beside this Python")


def test_deepspeed_starts_the_launcher(checkout: Path, tmp_path: Path) -> None:
    script = str(checkout / "launchers" / "pretrain_demo.sh")
    lines = start(["deepspeed", "--num_gpus", "2", script, "--run.directory", "a b"], tmp_path, forked=True)
    said = ["--local_rank={}", "--run.directory", "a b"]
    assert lines == [f"HERE {rank} 2 pretrain_demo.sh {[said[0].format(rank), *said[1:]]!r} None" for rank in range(2)]


def test_shell_starts_as_many_as_the_toml_needs(checkout: Path, tmp_path: Path) -> None:
    script = str(checkout / "launchers" / "pretrain_demo.sh")
    lines = start(["sh", script, "--training.seed", "3"], tmp_path)
    threads = max(1, (os.cpu_count() or 1) // 8)
    assert lines == [
        f"HERE {rank} 8 pretrain_demo.sh {[f'--local_rank={rank}', '--training.seed', '3']!r} {threads}" for rank in range(8)
    ]


def test_dry_run_is_one_process(checkout: Path) -> None:
    (checkout / "deberta_dist" / "training" / "pretrain.py").write_text(
        "import sys\ndef main(file): print('HERE', sys.argv[1:])\n"
    )
    (checkout / "h").write_text("node1 slots=8\n")
    lines = start(["sh", "launchers/pretrain_1.5b.sh", "--dry-run", "--hostfile", "h", "--training.seed=3"], checkout)
    assert lines == ["HERE ['--dry-run', '--training.seed=3']"]


def test_a_hostfile_that_deepspeed_does_not_find_ends_the_start(checkout: Path, tmp_path: Path) -> None:
    """Its launcher goes on with this machine alone; the rank finds it above itself."""
    (checkout / "deberta_dist" / "training" / "pretrain.py").write_text(
        "import sys\nfrom deberta_dist.errors import ConfigError\nfrom deberta_dist.training.hostfile import check_front\n"
        "def main(file):\n    try:\n        check_front({'--num_gpus'})\n    except ConfigError as error:\n"
        "        print('HERE', error, flush=True)\n        sys.exit(error.exit_code)\n    print('HERE it ran')\n"
    )
    script = str(checkout / "launchers" / "pretrain_demo.sh")
    words = ["deepspeed", "--num_gpus", "1", "--hostfile", "nowhere/hosts", script]
    (line,) = start(words, tmp_path, code=2)  # not forked: the rank reads the command lines above it
    assert "--hostfile nowhere/hosts does not exist" in line
