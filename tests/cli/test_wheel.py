"""The wheel: launchers, TOMLs, recipes and DeepSpeed JSONs are the checkout's bytes, and the demo's rows stay out."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from deberta_dist.errors import ConfigError
from deberta_dist.files import shipped as shipped_module

ROOT = Path(__file__).parents[2]
SHIPPED = "deberta_dist/_shipped/"


@pytest.mark.slow  # test_one_lookup_finds_the_files_in_both proves the lookup
def test_the_wheel_has_the_bytes_of_the_checkout_and_no_demo(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77", reason="setuptools 77 builds the wheel")
    source = tmp_path / "source"  # a build leaves its tree beside the sources
    left_out = shutil.ignore_patterns(".git", ".venv*", "build", "*.egg-info", "runs", "demo_data", "tests", "wheels")
    shutil.copytree(ROOT, source, ignore=left_out)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(source),
    ]
    subprocess.run(command, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
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
