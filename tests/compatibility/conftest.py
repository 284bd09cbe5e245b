"""The files that version 0.1.0 wrote, as somebody has them who moved their directory to another machine."""

import json
import shutil
from pathlib import Path

import pytest

from tests.compatibility.commands import FIXTURES, LAUNCHERS


def lay_out(target: Path) -> Path:
    """Copies inputs, settings and made files into one directory, as they lay when they were made."""
    for part in ("settings", "made"):
        shutil.copytree(FIXTURES / part, target, dirs_exist_ok=True)
    shutil.copytree(FIXTURES / "inputs", target / "inputs")
    for copy, kept in json.loads((target / "same.json").read_text(encoding="utf-8")).items():
        (target / copy).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(target / kept, target / copy)
    # The launchers are today's: a run is continued with the code that is there.
    for toml, launcher in (
        ("pretrain", "pretrain_demo.sh"),
        ("planned", "pretrain_demo.sh"),
        ("finetune", "finetune_superglue.sh"),
    ):
        shutil.copy(LAUNCHERS / launcher, target / f"{toml}.sh")
    return target


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of it, to read; nobody writes there."""
    return lay_out(tmp_path_factory.mktemp("compatibility") / "v0.1.0")


@pytest.fixture
def moved(tmp_path: Path) -> Path:
    """A copy of it of the test's own, to continue runs in."""
    return lay_out(tmp_path / "v0.1.0")
