"""deberta-dist init: what it writes is a run, and what it refuses."""

import ast
import sys
from pathlib import Path

import pytest

from deberta_dist.cli import init
from deberta_dist.config import load_config
from deberta_dist.models.presets import PRESETS

ROOT = Path(__file__).parents[2]


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["deberta-dist init", *map(str, words)])
    return init.main()


@pytest.mark.parametrize("preset", init.RECIPES)
def test_the_toml_of_every_preset_is_a_configuration(preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, tmp_path / "run", "--preset", preset, "--name", "mine") == 0
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["deepspeed.json", "mine.sh", "mine.toml"]
    config = load_config(tmp_path / "run" / "mine.toml")
    assert config.model.preset == preset and config.optimizer.learning_rate == float(init.RECIPES[preset].learning_rate)
    assert config.run.directory == tmp_path / "run" / "runs" / "mine" and config.run.deepspeed.is_file()
    assert config.data.train == (tmp_path / "run/data/corpus/train",) or config.data.train == tmp_path / "run/data/corpus/train"


def test_there_is_a_recipe_for_every_published_size() -> None:
    assert set(init.RECIPES) == {name for name in PRESETS if not name.startswith("tiny")}


def test_the_launcher_is_python_too_and_knows_no_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, tmp_path / "run", "--preset", "microsoft/deberta-v3-base") == 0
    launcher = tmp_path / "run" / "pretrain_v3_base.sh"
    ast.parse(launcher.read_text())
    assert launcher.stat().st_mode & 0o100
    for path in launcher.parent.iterdir():
        assert str(ROOT) not in path.read_text() and "launchers/" not in path.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["full", "--preset", "v3-base"], "full is not empty (it holds something)"),
        (["file", "--preset", "v3-base"], "file exists and is not a directory"),
        (["new", "--preset", "v4-base"], "model 'v4-base' does not exist"),
        (["new", "--preset", "tiny-v2"], "is for tests and has no recipe"),
        (["new", "--preset", "v3-base", "--name", "a b"], "--name 'a b': expected 1 to 64 letters"),
        (["new", "--preset", "v3-base", "--name", "../up"], "--name '../up': expected"),
        (["new", "--preset", "v3-base", "--name", "x.y"], "--name 'x.y': expected"),
    ],
)
def test_what_is_refused_leaves_everything_as_it_was(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *words) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1 and shown.out == ""
    assert sorted(path.as_posix() for path in Path().rglob("*")) == ["file", "full", "full/something"]
