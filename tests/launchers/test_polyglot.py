"""Every launcher is good for both readers, and every script for its shell."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = sorted(toml.with_suffix(".sh") for toml in (ROOT / "launchers").glob("*.toml"))
SCRIPTS = sorted([*(ROOT / "launchers").glob("*.sh"), ROOT / "tests" / "run.sh"])
SHELLS = [shell for shell in ("sh", "dash", "bash") if shutil.which(shell)]


def test_every_toml_has_its_launcher() -> None:
    assert {path.name for path in LAUNCHERS} >= {"pretrain_1.5b.sh", "pretrain_demo.sh", "finetune_superglue.sh"}
    assert [path for path in LAUNCHERS if not path.is_file()] == []


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_accepts(script: Path, shell: str) -> None:
    result = subprocess.run([shell, "-n", str(script)], capture_output=True, text=True, timeout=20, check=False)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda path: path.name)
def test_python_accepts_and_calls_main(launcher: Path) -> None:
    tree = ast.parse(launcher.read_text())
    assert isinstance(tree.body[0], ast.Expr), "the shell half has to be one string to Python"
    assert ast.unparse(tree.body[-2]) == "main(__file__)"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_executable(script: Path) -> None:
    assert script.stat().st_mode & 0o111


def test_ci_script() -> None:
    ci = ROOT / ".ci" / "run"
    assert ci.stat().st_mode & 0o111
    assert subprocess.run(["bash", "-n", str(ci)], timeout=20, check=False).returncode == 0


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda path: path.name)
def test_python_half_runs_from_anywhere_without_installation(launcher: Path, tmp_path: Path) -> None:
    # A copy beside a stand-in package: the launcher has to find the package of its own checkout.
    home = tmp_path / "checkout"
    (home / "launchers").mkdir(parents=True)
    for module in ("training/pretrain", "finetuning/finetune"):
        stand_in = home / "deberta_dist" / f"{module}.py"
        stand_in.parent.mkdir(parents=True)
        stand_in.write_text("import sys\ndef main(file): print(file, sys.argv[1:])\n")
    copy = Path(shutil.copy(launcher, home / "launchers" / launcher.name))
    words = [sys.executable, "-I", "-u", str(copy), "--local_rank=0", "a b"]
    result = subprocess.run(words, cwd="/", capture_output=True, text=True, timeout=20, check=False)
    assert result.stdout == f"{copy} ['--local_rank=0', 'a b']\n", result.stderr
