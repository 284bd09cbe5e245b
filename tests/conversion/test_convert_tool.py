"""The tool as a user runs it: summary, report, --force, refusals, and death in the middle."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from deberta_dist.conversion import convert as convert_module
from deberta_dist.conversion.convert import convert
from deberta_dist.conversion.output import REPORT_NAME
from deberta_dist.errors import ConfigError
from tests.conversion.small_models import FOLDER, export, make_model, published_tensors, same, write
from tests.harness import ForkedPython, run_script
from tests.tool_calls import assert_one_line_error, call

TOOL = "convert_checkpoint.py"


def test_from_the_command_line(tmp_path: Path) -> None:
    model = make_model("v1")
    tensors = {**published_tensors(model), "extra": published_tensors(model)["lm_predictions.lm_head.bias"] + 1}
    write(tensors, tmp_path / "source", config=model.config.to_dict())
    result = call(TOOL, "source", "target", "--to", "official", cwd=tmp_path)
    assert_one_line_error(result, code=65, words="1 keys of this deberta_dist checkpoint are not explained: extra")
    arguments = ("source", "target", "--to", "official", "--fused", "--allow-unmapped", "ext*", "--dtype", "bfloat16")
    made = run_script([FOLDER / "tools" / TOOL, *arguments, "--report", "report.json"], cwd=tmp_path)
    assert made.returncode == 0 and made.stderr == "", made.stderr
    for words in (
        "found: deberta_dist weights with published names",
        "made:  official",
        "parameters",
        "(e.g. extra): --allow-unmapped ext*",
        "query, key and value joined",
        "numbers were rounded",
        "No tokenizer was found",
    ):
        assert words in made.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == json.loads((tmp_path / "target" / REPORT_NAME).read_text())
    assert report["target"]["dtype"] == ["bfloat16"] and str(tmp_path) not in json.dumps(report)

    before = {path.name: path.read_bytes() for path in (tmp_path / "target").iterdir()}
    assert_one_line_error(call(TOOL, *arguments, cwd=tmp_path), code=2, words="target exists already")
    assert {path.name: path.read_bytes() for path in (tmp_path / "target").iterdir()} == before
    for report, words in (
        ("nowhere/r.json", "--report nowhere/r.json: its directory does not exist"),
        ("source/model.safetensors", "lies in SOURCE or TARGET"),
        ("target/r.json", "lies in SOURCE or TARGET"),
        (".", "exists already"),
    ):
        result = call(TOOL, *arguments, "--force", "--report", report, cwd=tmp_path)
        assert_one_line_error(result, code=2, words=words)
    result = call(TOOL, "source", "new", "--to", "deberta_dist", "--report", "report.json", cwd=tmp_path)
    assert_one_line_error(result, code=2, words="report.json exists already")
    made = call(TOOL, "target", "back", "--to", "deberta_dist", cwd=tmp_path)
    assert made.returncode == 0 and "Microsoft's published form, fused projections of v1" in made.stdout
    assert call(TOOL, "--help", cwd=tmp_path).returncode == 0
    assert call(TOOL, "target", "x", "--to", "tensorflow", cwd=tmp_path).returncode == 2


def test_force_replaces_a_conversion_and_nothing_else(tmp_path: Path) -> None:
    source = export(make_model("v2"), tmp_path / "source")
    target = tmp_path / "target"
    convert(source, target, to="huggingface")
    convert(source, target, to="deberta_dist", force=True)
    assert sorted(path.name for path in target.iterdir()) == ["config.json", REPORT_NAME, "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]
    (tmp_path / "work").mkdir()
    (tmp_path / "work/thesis.txt").write_text("years")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("work")
    (target / "folder").mkdir()
    for path in ("work", "file", "link", "target"):
        with pytest.raises(ConfigError, match=rf"{path} is .*not replaced, --force or not"):
            convert(source, tmp_path / path, to="deberta_dist", force=True)
    # Somebody's own work beside a configuration.
    (tmp_path / "work/config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds thesis\.txt, which no conversion has written"):
        convert(source, tmp_path / "work", to="deberta_dist", force=True)
    assert (tmp_path / "work/thesis.txt").read_text() == "years"
    for path in (source, source / "inside", tmp_path):
        with pytest.raises(ConfigError):
            convert(source, path, to="deberta_dist", force=True)
    assert same(load_file(source / "model.safetensors"), published_tensors(make_model("v2")))


def test_an_error_in_the_middle_leaves_the_old_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = export(make_model("v2"), tmp_path / "source"), tmp_path / "target"
    convert(source, target, to="deberta_dist")
    before = {path.name: path.read_bytes() for path in target.iterdir()}

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert_module, "write_safetensors", full)
    with pytest.raises(Exception, match="target is not written .No space left on device.") as caught:
        convert(source, target, to="huggingface", force=True)
    assert caught.value.exit_code == 74
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


SLOW = """
import signal, sys, time
# A shell's background jobs, of which these tests may be one, ignore interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {root!r})
from deberta_dist.conversion import safetensors_files
fast = safetensors_files.write_tensor
def slow(file, weight, *, name):
    time.sleep(0.05)
    fast(file, weight, name=name)
safetensors_files.write_tensor = slow
from pathlib import Path
import runpy
sys.argv = ["convert_checkpoint.py", "source", "target", "--to", "huggingface"]
runpy.run_path({tool!r}, run_name="__main__")
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_killed_in_the_middle(tmp_path: Path, number: int, code: int) -> None:
    source = export(make_model("v2"), tmp_path / "source")
    program = tmp_path / "slow.py"
    program.write_text(SLOW.format(root=str(FOLDER), tool=str(FOLDER / "tools" / "convert_checkpoint.py")))
    with open(os.devnull, "wb") as null:
        process = ForkedPython([sys.executable, program], cwd=tmp_path, stdout=null, stderr=null)
    deadline = time.monotonic() + 60
    while not (started := list(tmp_path.glob(".target.converting-*/model.safetensors"))):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    program.unlink()
    os.kill(process.pid, number)
    assert process.wait(timeout=30) == code
    assert not (tmp_path / "target").exists() and started[0].exists() == (number == signal.SIGKILL)
    convert(source, tmp_path / "target", to="huggingface")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]
