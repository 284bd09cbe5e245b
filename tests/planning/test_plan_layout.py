"""The search for layouts, and the tool around it as users start it."""

import dataclasses
import io
import itertools
import json
import os
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from deberta_dist.config import RunConfig, load_config
from deberta_dist.errors import ConfigError
from deberta_dist.models.presets import PRESETS, preset_name
from deberta_dist.planning.dry_run import rank_reports
from deberta_dist.planning.machine import GPUS
from deberta_dist.planning.plan import check_plan
from deberta_dist.planning.search import SearchResult, Space, search
from deberta_dist.planning.step_cost import step_cost
from tests.harness import run_script

ROOT = Path(__file__).parents[2]
DEMO, TOOL, JSONS = ROOT / "launchers" / "pretrain_demo.toml", ROOT / "tools" / "plan_layout.py", ROOT / "ds_configs"
H100 = GPUS["h100"]
OVERRIDES = ("--data.max_seq_length", "64", "--run.deepspeed", str(JSONS / "zero3_bf16.json"))
SPACE = Space(deepspeed=(JSONS / "zero3_bf16.json", JSONS / "zero3_offload.json"), micro_batch=(1, 4), stages_per_rank=(2,))


def find(limit: float, *, world_size: int = 4, space: Space = SPACE, count: int = 100) -> SearchResult:
    config = load_config(DEMO, OVERRIDES)
    return search(config, world_size=world_size, machine=H100, memory_limit=limit, space=space, count=count)


def test_every_layout_found_passes_the_checks_of_a_run_and_fits() -> None:
    found = find(1e9)
    sizes = [choice.plan.config.parallel for choice in found.choices]
    layouts = {(one.tensor_parallel_size, one.pipeline_parallel_size, one.data_parallel_size) for one in sizes}
    assert layouts == {(1, 1, 4), (1, 2, 2), (1, 4, 1), (2, 1, 2), (2, 2, 1), (4, 1, 1)} and len(layouts) == len(sizes)
    seconds = [choice.cost.seconds for choice in found.choices]
    assert seconds == sorted(seconds)
    for choice in found.choices:
        plan = check_plan(choice.plan.config, world_size=4)
        reports = rank_reports(plan)
        assert choice.peak == max(report.memory.peak for report in reports) <= 1e9
        assert choice.sent == max(report.communication.total for report in reports)
        assert choice.cost == step_cost(plan, dataclasses.replace(H100, has_fused_attention=True))


def test_less_memory_finds_less_and_never_more_than_the_limit() -> None:
    peaks = sorted(choice.peak for choice in find(1e9).choices)
    limit = (peaks[0] + peaks[-1]) / 2
    found = find(limit)
    assert found.choices and all(choice.peak <= limit for choice in found.choices)
    assert all(choice.cost.seconds >= best.cost.seconds for choice, best in zip(found.choices, find(1e9).choices, strict=False))
    nothing = find(1e6)
    assert not nothing.choices and nothing.candidates > 50


def test_nothing_better_is_passed_over() -> None:
    """The search with its bounds against every candidate looked at by itself."""
    space = dataclasses.replace(SPACE, recompute=("none", "full"))
    (best,) = find(1e9, space=space, count=1).choices
    single = []
    parts = itertools.product((1, 2, 4), (1, 2, 4), space.micro_batch, space.schedules, space.recompute, space.deepspeed)
    for tensor, pipeline, micro, schedule, recompute, path in parts:
        one = Space(
            (path,), (tensor,), (pipeline,), (micro,), recompute=(recompute,), schedules=(schedule,), stages_per_rank=(2,)
        )
        if tensor * pipeline <= 4:
            try:
                single += find(1e9, space=one).choices
            except ConfigError as error:
                assert "no layout of 4 processes" in str(error)
    assert len(single) > 30
    assert best.cost.seconds == min(choice.cost.seconds for choice in single)


LARGE = ROOT / "launchers" / "pretrain_1.5b.toml"


@pytest.mark.slow
def test_no_layout_of_the_large_model_is_faster_than_the_shipped_one() -> None:
    assert LARGE.read_text().startswith("# For 8 nodes of 8 H100 (80 GB): ")
    config = load_config(LARGE)
    shipped = check_plan(config, world_size=64)
    jsons = (JSONS / "zero3_bf16.json", JSONS / "zero3_offload.json")
    found = search(config, world_size=64, machine=H100, memory_limit=0.9 * H100.memory, space=Space(jsons), count=1)
    (best,) = found.choices

    def sizes(of: RunConfig) -> tuple[object, ...]:
        parallel, training = of.parallel, of.training
        split = parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.data_parallel_size
        return *split, parallel.schedule, training.micro_batch_size, training.recompute

    assert sizes(shipped.config) == sizes(best.plan.config)
    assert step_cost(shipped, dataclasses.replace(H100, has_fused_attention=True)) == best.cost


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    """In this process: what one search has measured of a model's layers the next ones need not measure again."""
    output, errors, code = io.StringIO(), io.StringIO(), 0
    words = [str(TOOL), *map(str, arguments)]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(errors):
        patch.setattr(sys, "argv", words)
        try:
            runpy.run_path(str(TOOL), run_name="__main__")
        except SystemExit as end:
            code = int(end.code or 0)
    return subprocess.CompletedProcess(words, code, output.getvalue(), errors.getvalue())


def test_the_toml_of_the_best_layout_is_accepted_by_a_launcher(tmp_path: Path) -> None:
    folder = tmp_path / "launchers"
    folder.mkdir()
    toml, launcher = folder / "mine.toml", folder / "mine.sh"
    flags = ("--gpus", 4, "--gpu", "a100-40", "--micro-batch", "2,4", "--recompute", "none", "--price-per-gpu-hour", 2)
    result = run_tool(DEMO, *flags, "--toml", toml)
    assert result.returncode == 0, result.stderr
    assert f"cp {ROOT / 'launchers' / 'pretrain_1.5b.sh'} {launcher}" in result.stdout and "not a measurement" in result.stdout
    first = result.stdout.splitlines()[1].split()
    launcher.write_bytes((ROOT / "launchers" / "pretrain_1.5b.sh").read_bytes())
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    dry_run = run_script([launcher, "--dry-run"], timeout=120, env=environment)
    assert dry_run.returncode == 0, dry_run.stderr
    assert f"4 = tensor {first[0]} x pipeline {first[1]} x data {first[2]}" in dry_run.stdout
    peaks = re.search(r"^  PEAK +([0-9. ]+)$", dry_run.stdout, re.MULTILINE)[1].split()
    unit = 1 if "MEMORY of a rank, GB" in dry_run.stdout else 1e3
    peak = float(result.stdout.splitlines()[1].split(" none ")[-1].split()[2])
    assert max(map(float, peaks)) / unit == pytest.approx(peak, abs=0.006)

    again = run_tool(DEMO, *flags, "--toml", toml)
    assert again.returncode == 2 and again.stderr == f"error: --toml {toml} exists; --force replaces it\n"
    written = toml.read_text()
    assert run_tool(DEMO, *flags, "--toml", toml, "--force").returncode == 0 and toml.read_text() == written


def test_scaling_tells_the_best_of_every_number_and_that_it_is_a_simulation() -> None:
    result = run_script([TOOL, DEMO, "--scaling", "1,2,8", "--micro-batch", 4, "--recompute", "none", "--gpu", "v100-32"])
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["1", "2", "8"]
    assert lines[1].split()[-1] == "100.0%" and "A simulation, not a measurement" in lines[-1]


def test_a_preset_in_either_spelling_and_calibration(tmp_path: Path) -> None:
    file = tmp_path / "measured.json"
    file.write_text(json.dumps({"cores": 2, "name": "two cores", "product_rate": 5e10}))
    flags = ("--gpus", 2, "--tensor", 1, "--pipeline", 2, "--micro-batch", 1, "--recompute", "full", "--schedule", "1f1b")
    result = run_tool("--model", "small-v3", *flags, "--offload", "cpu", "--global-batch", 8, "--calibration", file)
    assert result.returncode == 0, result.stderr
    assert "two cores, 2 cores shared by all processes: products 0.05 TFLOP/s" in result.stdout
    assert 'preset = "v3-small"' in result.stdout and "global_batch_size = 8" in result.stdout
    assert "zero3_offload.json" in result.stdout and "zero-bubble schedule (not offered)" in result.stdout
    assert all(preset_name(name) == name for name in PRESETS)
    assert preset_name("microsoft/deberta-v2-xxlarge") == preset_name("xxlarge-v2") == "v2-xxlarge"
    assert preset_name("large") == preset_name("deberta-large") == "v1-large"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "exactly one of --gpus and --scaling is needed; neither is given"),
        (["--gpus", "8", "--scaling", "8"], "both are given"),
        (["--gpus", "8"], "a TOML or --model is needed"),
        (["--scaling", "8", "--model", "v3-base", "--toml", "x"], "--toml writes one layout"),
        (["--gpus", "0", "--model", "v3-base"], "expected a positive integer, got '0'"),
        (["--gpus", "8", "--model", "v3-base", "--gpu", "h900"], "invalid choice: 'h900'"),
        (["--gpus", "8", "--model", "v3-base", "--memory-margin", "1"], "expected a share"),
        (["--gpus", "8", "--model", "v3-base", "--recompute", "some"], "'some' is not one of none, full, selective"),
        (["--gpus", "8", "--model", "v9"], "model 'v9' does not exist; known models: v1-base"),
        (["--gpus", "7", str(DEMO)], "no layout of 7 processes passes the checks"),
        (["--gpus", "4", str(DEMO), "--gpu-memory", "0.001"], "layouts of 4 processes fits into 0.00 GB per GPU"),
        (["--gpus", "4", "none.toml"], "none.toml"),
        (["--gpus", "4", str(DEMO), "--calibration", "none.json"], "--calibration none.json: cannot be read"),
        (["--gpus", "4", str(DEMO), "--offload", "cpu"], "run.deepspeed = "),
        (
            ["--gpus", "4", str(DEMO), "--gpu", "v100-32", "--run.deepspeed", str(JSONS / "zero3_bf16.json")],
            "asks for bf16, which a V100 32 GB does not have; add --run.deepspeed",
        ),
        (["--gpus", "4", str(DEMO), "--training.batch", "4"], "unknown key training.batch"),
    ],
)
def test_what_is_wrong_is_one_line(arguments: list[str], message: str) -> None:
    result = run_tool(*arguments)
    assert result.returncode == 2 and result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert message in last and (last.startswith("error: ") or ": error: " in last)
