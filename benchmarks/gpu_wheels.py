"""Packages for a GPU machine that has torch and Triton and no package index: collected elsewhere, installed there.

Versions are those of ``launchers/requirements.txt``; the rest comes in the newest version that goes with them.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks import ROOT
from deberta_dist.errors import ConfigError

DEEPSPEED = "deepspeed"
# What the steps import beside torch, Triton and numpy, found by leaving out one after the other. DeepSpeed asks for ninja and
# py-cpuinfo as well, and uses them where it compiles, which it does not here.
WITH_THEIR_NEEDS = ("pydantic",)
ALONE = ("einops", "filelock", "hjson", "msgpack", "packaging", "psutil", "sentencepiece", "tqdm", "disentangled-flash")
# pip takes only the tags it is given, and some wheels carry old ones alone.
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64",
              "manylinux_2_12_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64")  # fmt: skip


def collect(folder: Path, *, python: str) -> str:
    """Downloads the wheels and builds DeepSpeed's, which has none; returns what there is, in words.

    Args:
        folder: Where they go; wheels of another start are replaced.
        python: Version that they are for, such as "3.12".

    Raises:
        ConfigError: the version is none, or pip failed.
    """
    if not re.fullmatch(r"3\.\d+", python):
        raise ConfigError(f"--python {python}: expected a version such as 3.12")
    folder.mkdir(parents=True, exist_ok=True)
    for wheel in folder.glob("*.whl"):
        wheel.unlink()
    target = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    target += [word for platform in _PLATFORMS for word in ("--platform", platform)]
    pins = pinned(ROOT / "launchers" / "requirements.txt")
    _pip(["download", "--dest", str(folder), *target, *_requirements(WITH_THEIR_NEEDS, pins)])
    _pip(["download", "--dest", str(folder), *target, "--no-deps", *_requirements(ALONE, pins)])
    # Its sources are all Python where nothing is compiled ahead.
    _pip(["wheel", "--wheel-dir", str(folder), "--no-deps", *_requirements((DEEPSPEED,), pins)], {"DS_BUILD_OPS": "0"})
    wheels = sorted(folder.glob("*.whl"))
    lines = [f"{wheel.stat().st_size:>10,}  {wheel.name}" for wheel in wheels]
    total = sum(wheel.stat().st_size for wheel in wheels)
    return "\n".join([*lines, f"{total:>10,}  bytes in {len(wheels)} wheels for Python {python}: {folder}"])


def install(wheels: Path, target: Path) -> str:
    """Unpacks the wheels into a folder, without an index; returns what was done, in words.

    Raises:
        ConfigError: there are no wheels, or pip failed: it refuses those of another Python, for example.
    """
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise ConfigError(f"--install {wheels}: there are no wheels; collect them with --wheels where there is an index")
    _pip(["install", "--no-index", "--no-deps", "--no-compile", "--target", str(target), *map(str, found)])
    return f"{len(found)} wheels of {wheels} are used"


def pinned(requirements: Path) -> dict[str, str]:
    """``NAME==VERSION`` by name."""
    lines = requirements.read_text(encoding="utf-8").splitlines()
    return {line.partition("==")[0]: line for line in lines if "==" in line and not line.startswith("#")}


def _requirements(names: Iterable[str], pins: Mapping[str, str]) -> list[str]:
    return [pins.get(name, name) for name in names]


def _pip(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(command, env=os.environ | dict(environment or {}), capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"pip {' '.join(arguments)[:200]} failed: {(done.stderr or done.stdout)[-1000:].strip()}")
