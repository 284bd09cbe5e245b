"""The wheel: the checkout's launchers, TOMLs, recipes and DeepSpeed JSONs, no rows of the demo, and every verb outside it."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from deberta_dist.errors import ConfigError
from deberta_dist.files import shipped as shipped_module
from deberta_dist.tasks.base import Release
from deberta_dist.tasks.superglue.benchmark import SUPERGLUE
from tests.small_run import small_run, write_text
from tests.tasks.conftest import write_run

ROOT = Path(__file__).parents[2]
SHIPPED = "deberta_dist/_shipped/"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"  # a build leaves its tree beside the sources
    left_out = shutil.ignore_patterns(".git", ".venv*", "build", "*.egg-info", "runs", "demo_data", "tests", "wheels")
    shutil.copytree(ROOT, source, ignore=left_out)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", str(directory), str(source)], check=True, timeout=300)
    (path,) = directory.glob("*.whl")
    return path


class Installed:
    """An environment with the wheel and a directory to work in, neither of them below the checkout.

    Third-party packages are those of the interpreter that runs the tests: their directory is on the path, its own .pth
    files are not read, so that an editable installation of the checkout that is there is not seen.
    """

    def __init__(self, root: Path, wheel: Path) -> None:
        self.root = root / "work"
        self.root.mkdir()
        venv.create(root / "venv", with_pip=False, symlinks=True)
        self.bin = root / "venv" / "bin"
        (site,) = (root / "venv" / "lib").glob("python*/site-packages")
        (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = [self.bin / "python", "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--ignore-installed"]
        subprocess.run([*pip, wheel], check=True, timeout=120)
        # Third-party commands start the interpreter of their first line.
        command = (Path(sysconfig.get_path("scripts")) / "deepspeed").read_text().partition("\n")[2]
        (self.bin / "deepspeed").write_text(f"#!{self.bin / 'python'}\n{command}")
        (self.bin / "deepspeed").chmod(0o755)
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        path = os.pathsep.join([str(self.bin), os.environ["PATH"]])
        self.environment = kept | {"PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

    def run(self, *words: object, code: int = 0) -> str:
        """What ``deberta-dist VERB`` and the like print.

        Args:
            words: The command.
            code: The exit code that is expected.
        """
        ran = subprocess.run(
            [str(word) for word in words],
            cwd=self.root,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert ran.returncode == code, f"{words}\n{ran.stdout[-2000:]}\n{ran.stderr[-2000:]}"
        return ran.stdout + ran.stderr

    def verb(self, *words: object, code: int = 0) -> str:
        return self.run(self.bin / "deberta-dist", *words, code=code)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed"), wheel)


@pytest.mark.slow  # test_one_lookup_finds_the_files_in_both proves the lookup, test_verbs.py the command line
def test_every_verb_outside_the_checkout(installed: Installed) -> None:
    run, verb, root = installed.run, installed.verb, installed.root
    where = run(installed.bin / "python", "-c", "import deberta_dist; print(deberta_dist.__file__)")
    assert where.startswith(str(installed.bin.parent)), "the checkout's package is tested, not the wheel's"

    # A run of one's own, which needs nothing but the package.
    verb("init", "base", "--preset", "v3-base")
    names = sorted(path.name for path in (root / "base").iterdir())
    assert {"pretrain_v3_base.sh", "pretrain_v3_base.toml", "deepspeed.json"} == set(names)
    verb("init", "base", "--preset", "v3-base", code=ConfigError.exit_code)
    verb("plan", "--model", "base-v3", "--gpus", "8", "--gpu", "h100", "--global-batch", "256")

    # Text to weights on two processes.
    write_text(root / "some.txt")
    verb("train-tokenizer", "--input", "some.txt", "--output", "spm.model", "--vocab-size", "600")
    verb("prepare-corpus", "--input", "some.txt", "--output", "corpus", "--tokenizer", "spm.model", "--workers", "2")
    assert (root / "corpus/report.md").is_file()
    verb("inspect-corpus", "corpus/train", "--tokenizer", "spm.model", "--document", "1")

    (root / "own").mkdir()
    (root / "own/ds_zero3.json").write_bytes((ROOT / "ds_configs/debug_cpu.json").read_bytes())
    toml = small_run(corpus="corpus", tokenizer="spm.model", directory="runs/small", deepspeed="own/ds_zero3.json")
    (root / "own.toml").write_text(toml)
    assert "memory" in verb("pretrain", "own.toml", "--dry-run", "--world-size", "2")
    verb("pretrain", "own.toml", "--num_gpus", "2", "--parallel.pipeline_parallel_size", "2")
    steps = [json.loads(line) for line in (root / "runs/small/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line][-1] == 4

    # Weights to everyone's formats, and back to words.
    verb("inspect", "runs/small")
    verb("convert", "--to", "huggingface", "runs/small", "hf")
    verb("convert", "--to", "official", "hf", "ms")
    verb("inspect", "hf", "--diff", "ms")
    assert "mask 1:" in verb("fill-mask", "hf", "The Congress [MASK] the United States.")

    # Answers.
    shutil.copytree(ROOT / "launchers/demo_superglue", root / "superglue")
    few = [
        "--data.max_seq_length",
        "64",
        "--data.window_overlap",
        "8",
        "--training.epochs",
        "2",
        "--schedule.warmup_steps",
        "0",
    ]
    own = ["--task", "COPA", "--data", "superglue", "--init", "hf", "--out", "answers", "--sift"]
    verb("finetune", "--num_gpus", "2", *own, *few, "--run.deepspeed", "own/ds_zero3.json")
    assert "COPA" in verb("report", "--predictions", "answers", "--data", "superglue")
    write_run(root / "all", Release(root / "superglue", SUPERGLUE))
    verb("make-submission", "--predictions", "all", "--data", "superglue", "--out", "submission.zip")
    assert "is a valid submission" in verb("make-submission", "--validate", "submission.zip", "--data", "superglue")


@pytest.mark.slow  # test_one_lookup_finds_the_files_in_both proves the lookup
def test_the_wheel_has_the_bytes_of_the_checkout_and_no_demo(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        inside = {name.removeprefix(SHIPPED): archive.read(name) for name in names if name.startswith(SHIPPED)}
    wanted = {"launchers/pretrain_1.5b.sh", "launchers/pretrain_1.5b.toml", "launchers/start.sh", "ds_configs/zero3_bf16.json"}
    assert wanted <= set(inside) and "launchers/finetune_recipes/base.toml" in inside
    assert {name: (ROOT / name).read_bytes() for name in inside} == inside
    assert "deberta_dist/py.typed" in names and any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"deberta_dist"}
    assert not any("demo" in name or name.endswith(".jsonl") for name in names)


def test_one_lookup_finds_the_files_in_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "launchers/pretrain_1.5b.toml"
    assert shipped_module.shipped(name) == ROOT / name and not shipped_module.is_installed()
    installed = tmp_path / "_shipped"
    (installed / "launchers").mkdir(parents=True)
    shutil.copy(ROOT / name, installed / name)
    monkeypatch.setattr(shipped_module, "SHIPPED", installed)
    assert shipped_module.shipped(name) == installed / name and shipped_module.is_installed()
    with pytest.raises(ConfigError, match="launchers/demo_text needs a checkout of the project"):
        shipped_module.shipped("launchers/demo_text")
    environment: dict[str, str] = {}
    shipped_module.find_package(environment)
    assert environment == {}, "site-packages in PYTHONPATH would come before the standard library"
