"""Every verb as a user types it: help where heavy packages are missing, unknown verbs, what a missing package says."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from deberta_dist.cli.main import VERBS, module_of
from deberta_dist.errors import ConfigError

ROOT = Path(__file__).parents[2]
NAMES = [name for verbs in VERBS.values() for name in verbs]
HEAVY = ("torch", "deepspeed", "scipy", "sentencepiece", "safetensors", "transformers", "onnx", "tqdm")
PROGRAM = """
import contextlib, io, sys
sys.path.insert(0, {root!r})
for name in {hidden!r}:
    sys.modules[name] = None
from deberta_dist.cli.main import main
for words in {commands!r}:
    sys.argv = ["deberta-dist", *words]
    try:
        code = main()
    except SystemExit as end:
        code = end.code or 0
    print("exit", code, flush=True)
"""


def run_without(hidden: tuple[str, ...], *commands: list[str], cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Verbs in one process where packages cannot be imported."""
    program = PROGRAM.format(root=str(ROOT), hidden=hidden, commands=commands)
    return subprocess.run([sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def test_help_of_every_verb_without_heavy_packages() -> None:
    found = run_without(HEAVY, *([name, "--help"] for name in NAMES))
    assert found.stdout.count("exit 0") == len(NAMES), found.stdout[-500:] + found.stderr
    for name in NAMES:
        assert f"usage: deberta-dist {name}" in found.stdout, name


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["convert", "a", "b", "--to", "official"], "torch is not installed: pip install 'deberta_dist'"),
        (
            ["pretrain", str(ROOT / "launchers/pretrain_demo.toml"), "--dry-run"],
            "deepspeed is not installed: pip install 'deberta_dist[train]'",
        ),
        (["calibrate", "new.json"], "deepspeed is not installed: pip install 'deberta_dist[train]'"),
    ],
)
def test_a_missing_package_is_one_line_with_the_extra(words: list[str], hint: str, tmp_path: Path) -> None:
    hidden = ("torch",) if hint.startswith("torch") else ("deepspeed",)
    found = run_without(hidden, words, cwd=tmp_path)
    assert found.stdout == "exit 2\n" and found.stderr.splitlines()[-1] == f"error: {hint}", found.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_verb_lists_the_verbs_and_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean prepare-corpus[?] The verbs are init, plan"):
        module_of("prepare_corpora")
    with pytest.raises(ConfigError) as caught:
        module_of("xyzzy")
    assert all(name in str(caught.value) for name in NAMES) and "did you mean" not in str(caught.value)


def test_every_tool_is_the_verb_of_its_docstring() -> None:
    tools = [path for path in (ROOT / "tools").glob("*.py") if path.stem not in ("benchmark", "make_rule_task")]
    named = {path.read_text(encoding="utf-8").split("``deberta-dist ")[1].split("``")[0]: path for path in tools}
    assert set(named) <= set(NAMES)
    for verb, path in named.items():
        assert f"from {module_of(verb)} import main\n" in path.read_text(encoding="utf-8")
        assert importlib.import_module(module_of(verb)).main.__module__ == module_of(verb)
