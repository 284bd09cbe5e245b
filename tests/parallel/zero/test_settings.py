"""The DeepSpeed JSON before a start: every value of every field is taken as DeepSpeed takes it, or refused in one line."""

import copy
import dataclasses
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deberta_dist.config import RunConfig, deepspeed_config, load_config, resolve
from deberta_dist.config import deepspeed_plain as plain
from deberta_dist.config.deepspeed_json import KNOWN_KEYS, REFUSED_KEYS, SECTIONS
from deberta_dist.errors import ConfigError
from deberta_dist.parallel.zero import settings
from deberta_dist.planning.deepspeed import checked_deepspeed
from deberta_dist.planning.dry_run import describe
from deberta_dist.planning.plan import Plan, check_plan
from deberta_dist.training.pretrain import main
from tests.parallel.zero.public_forms import PUBLIC

ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "launchers" / "pretrain_demo.toml"
SMALL = (
    "--parallel.tensor_parallel_size=1", "--parallel.pipeline_parallel_size=1", "--parallel.data_parallel_size=1",
    "--model.num_hidden_layers=2",
)  # fmt: skip
ODD = ("x", "", "5", "5e8", "CPU", "dynamic", True, False, 0, 1, 2, 3.5, 5e8, -1, -5, 1e300, 2**70, 1e-9, [], [1], {}, {"x": 1})
NOTHING = object()

pytest.importorskip("deepspeed", reason="deepspeed is not installed")
CLASSES = settings._classes()


def fields() -> list[Any]:
    """Every key of every section, under all its names, and the bare keys; less used ones are slow."""
    found = [*plain.BareKeys.model_fields, *SECTIONS]
    for name, model in CLASSES.items():
        found += settings._legal(model, name)
    found += [f"{name}.{key}" for name, model in plain.SECTIONS.items() for key in model.model_fields]
    slow = re.compile(r"csv_monitor\.|wandb\.|comet\.(?!enabled|samples)|.*zenflow\.|.*leaf_module\.")
    return [pytest.param(place, marks=pytest.mark.slow) if slow.match(place) else place for place in found]


@pytest.fixture(scope="module")
def small_plan() -> Plan:
    return check_plan(load_config(DEMO, SMALL), world_size=1)


@pytest.fixture
def read(small_plan: Plan, tmp_path: Path) -> Callable[[dict[str, Any]], Plan]:
    """A JSON -> the plan with it."""
    run = small_plan.config.run.model_copy(update={"deepspeed": tmp_path / "ds.json"})
    config = small_plan.config.model_copy(update={"run": run})

    def check(ds: dict[str, Any]) -> Plan:
        config.run.deepspeed.write_text(json.dumps(ds))
        checked = checked_deepspeed(config)
        return dataclasses.replace(small_plan, deepspeed=checked.values, deepspeed_notes=checked.notes)

    return check


def put(place: str, value: Any) -> dict[str, Any]:
    """The smallest JSON with one key of it set."""
    ds: dict[str, Any] = {"zero_optimization": {"stage": 3}}
    *tables, key = place.split(".")
    table = ds
    for name in tables:
        table = table.setdefault(name, {})
    if value is not NOTHING:
        table[key] = value
    return ds


def deepspeed_takes(ds: dict[str, Any]) -> None:
    """DeepSpeed's own reading of a completed JSON, which raises where it refuses."""
    from deepspeed.runtime.config import DeepSpeedConfig

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    DeepSpeedConfig(copy.deepcopy(ds))


@pytest.mark.parametrize("place", fields())
def test_every_value_is_taken_or_refused_in_a_line(place: str, read: Callable[[dict[str, Any]], Plan]) -> None:
    refused, seen = [], []
    for value in (NOTHING, "auto", None, *ODD):
        try:
            plan = read(put(place, value))
        except ConfigError as error:
            assert place.rpartition(".")[0] in str(error)
            assert len(str(error).splitlines()) == 1 or "problems in" in str(error)
            refused.append(value)
            continue
        if plan.deepspeed not in seen:  # many spellings of few values
            seen.append(plan.deepspeed)
            for name, model in CLASSES.items():
                model(**plan.deepspeed.get(name, {}))
            if "." not in place:
                deepspeed_takes(plan.deepspeed)
            describe(plan)
    if ".zenflow." in place:
        assert not seen
    elif place not in ("zero_optimization", "zero_optimization.stage"):
        assert NOTHING not in refused and None not in refused
        assert "auto" not in refused or place in ("bf16", "bf16.enabled", "fp16", "fp16.enabled")
        assert refused, "no value at all is refused"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"zero_optimization": {"stage": 3, "offload_optimiser": {}}}, "did you mean zero_optimization.offload_optimizer?"),
        ({"zero_optimization": {"stage": 3, "offload_optimiser": None}}, "did you mean zero_optimization.offload_optimizer?"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"pin_memry": 1}}}, "did you mean zero_optimization.offload_param.pin_memory?"),
        ({"offload_optimizer": {"device": "cpu"}}, "did you mean zero_optimization.offload_optimizer?"),
        ({"zero_optimization": {"stage": 3, "steps_per_print": 1}}, "unknown key zero_optimization.steps_per_print"),
        ({"zero_optimization": {"stage": 3, "strict": True}}, "unknown key zero_optimization.strict"),
        ({"zero_optimization": {"stage": 3, "self": 1}}, "unknown key zero_optimization.self"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "CPU"}}}, 'offload_param.device = "CPU"; expected "cpu" or "none"'),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, 'offload_param.device = "nvme"; expected "cpu" or "none"'),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": -5}}, "reduce_bucket_size = -5; expected greater than 0"),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": True}}, "reduce_bucket_size = true; expected a number"),
        ({"zero_optimization": {"stage": 3, "sub_group_size": 1e300}}, "sub_group_size = 1e+300; expected a whole number"),
        ({"zero_optimization": {"stage": 3, "param_persistence_threshold": 7}}, "param_persistence_threshold = 7 must be 0"),
        ({"zero_optimization": {"stage": 3, "max_live_parameters": 1, "stage3_max_live_parameters": 2}}, "is the same as"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, "zero_hpz_partition_size = 8; expected 0 to 1"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": "true"}}, "zero_quantized_weights = true must be false"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.3}}}, "ratio = 0.3 must be 1.0"),
        ({"zero_optimization": {"stage": 3, "cpu_offload": True, "offload_optimizer": {"device": "cpu"}}}, "cpu_offload"),
        ({"zero_optimization": {"stage": 3, "cpu_offload": True}, "zero_force_ds_cpu_optimizer": True}, "must be false or left out"),
        ({"fp16": {"loss_scale": "dynamic"}}, 'fp16.loss_scale = "dynamic"; expected a number'),
        ({"fp16": {"enabled": True, "initial_scale_power": 2000}}, "initial_scale_power = 2000; expected 0 to 126"),
        ({"fp16": {"enabled": True, "hysteresis": 0}}, "hysteresis = 0; expected 1 to"),
        ({"bf16": {"x": 1}}, "unknown key bf16.x"),
        ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "float32 here"),
        ({"steps_per_print": 0}, "steps_per_print = 0; expected greater than or equal to 1"),
        ({"log_level": "loud"}, "log_level"),
        ({"communication_data_type": "int8"}, "communication_data_type"),
        ({"aio": {"thread_count": 1}}, "aio.intra_op_parallelism"),
        ({"flops_profiler": {"top_module": 3}}, "did you mean flops_profiler.top_modules?"),
        ({"comms_logger": True}, "comms_logger must be an object"),
        ({"wandb": {"enabled": True}}, "needs the package wandb"),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, "bf16.enabled and fp16.enabled"),
        ({"bf16": "auto"}, "write true for one of bf16 and fp16"),
        ({"zero_optimization": "auto"}, 'with "stage": 3, not "auto"'),
        ({"zero_optimization": {"stage": "auto"}}, 'zero_optimization.stage = "auto"; this program needs'),
        ({"zero_optimization": {}}, "zero_optimization.stage is missing; this program needs"),
        ({"BF16": {"enabled": True}}, "did you mean bf16?"),
        ({"zero_optimization": {"stage": 3, "Offload_Param": {}}}, "did you mean zero_optimization.offload_param?"),
        ({"_comment": "ZeRO-3"}, "unknown key _comment; remove it"),
        ({"zero_optimization": {"stage": 3, "//": 1}}, "remove it"),
        ({"": 1}, 'unknown key ""; remove it'),
        ({"x\n\x1b[31m": 1}, r"unknown key 'x\n\x1b[31m'; "),
        ({"csv_monitor": {"enabled": True, "output_path": __file__}}, "is not a writable folder"),
    ],
)  # fmt: skip
def test_refused_by_the_dry_run(
    keys: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(settings.PACKAGES, "wandb", "no_package_of_this_name")
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}} | keys))
    with pytest.raises(SystemExit) as caught:
        main(str(DEMO.with_suffix(".sh")), ["--dry-run", "--run.deepspeed", str(file)])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert said.replace("wandb", "") in message.replace("no_package_of_this_name", "").replace("wandb", "")
    assert message.startswith(f"error: {file}: ") and len(message.splitlines()) == 1


def as_told(ds: dict[str, Any], message: str) -> dict[str, Any]:
    """A JSON edited as each line of a message says, all at once."""
    ds = copy.deepcopy(ds)
    lines = message.splitlines()
    for line in lines[1:] or lines:
        text = line.partition(".json: ")[2]
        if "Trainer" in text:
            ds["bf16"], ds["fp16"] = {"enabled": True}, {"enabled": False}
            continue
        place = re.search(r"(?:unknown key )?([\w.]+)", text)[1]
        *tables, key = place.split(".")
        table = ds
        for name in tables:
            table = table[name]
        value = table.pop(key)
        if "remove it" in text or "left out" in text:
            continue
        if meant := re.search(r"did you mean ([\w.]+)\?|calls it ([\w.]+) now", text):
            name = (meant[1] or meant[2]).rpartition(".")[2]
            if name not in table:
                table[name] = value
        elif '"auto"' in text:
            table[key] = "auto"
        else:
            table[key] = json.loads(re.search(r"expected (\"\w+\")", text)[1])
    return ds


@pytest.mark.parametrize("whose", PUBLIC)
def test_public_forms_run_once_they_are_edited_as_told(whose: str, read: Callable[[dict[str, Any]], Plan]) -> None:
    ds = PUBLIC[whose]
    try:
        plan = read(ds)
    except ConfigError as error:
        plan = read(as_told(ds, str(error)))  # one round: all is said at once
    deepspeed_takes(plan.deepspeed)
    text = describe(plan)
    if ds["zero_optimization"].get("reduce_bucket_size") == "auto":
        assert 'zero_optimization.reduce_bucket_size = "auto": DeepSpeed\'s default, 500,000,000' in text
        assert "5.0E8" not in text
    assert "= null" not in text


def test_old_names_become_present_ones(read: Callable[[dict[str, Any]], Plan]) -> None:
    old = {"stage": 3, "cpu_offload": True, "stage3_gather_fp16_weights_on_model_save": True, "prefetch_bucket_size": 5e7}
    plan = read({"zero_optimization": old})
    assert plan.deepspeed["zero_optimization"] == {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "stage3_gather_16bit_weights_on_model_save": True,
        "stage3_prefetch_bucket_size": 50_000_000,
        "stage3_param_persistence_threshold": 0,
    }
    text = describe(plan)
    assert "on the host [cpu]" in text and "cpu_offload is DeepSpeed's deprecated name for offload_optimizer" in text


def test_numbers_of_the_plan_are_those_that_deepspeed_reads(read: Callable[[dict[str, Any]], Plan]) -> None:
    table = {"stage": 3, "reduce_bucket_size": "1000000", "contiguous_gradients": "yes", "offload_optimizer": {"device": "cpu"}}
    odd = read({"zero_optimization": table, "communication_data_type": "BF16"})
    usual = read(
        {
            "zero_optimization": table | {"reduce_bucket_size": 1_000_000, "contiguous_gradients": True},
            "communication_data_type": "bf16",
        }
    )
    assert odd.deepspeed == usual.deepspeed
    auto = read({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}})
    assert describe(auto).partition("NOTES")[0] == describe(read({"zero_optimization": {"stage": 3}})).partition("NOTES")[0]


def test_all_that_is_wrong_is_said_at_once(read: Callable[[dict[str, Any]], Plan]) -> None:
    zero = {"stage": 2, "offload_optimiser": 1, "reduce_bucket_size": 0, "offload_param": {"device": "nvme", "buffer_size": -1}}
    with pytest.raises(ConfigError, match="8 problems") as caught:
        read({"zero_optimization": zero, "optimizer": {}, "bf16": {"enabled": 3}, "aio": {"block_size": "x"}})
    for place in ("stage = 2", "offload_optimiser", "reduce_bucket_size", "offload_param.device", "buffer_size", "optimizer is",
                  "bf16", "aio.block_size"):  # fmt: skip
        assert place in str(caught.value)


def test_a_section_refused_as_a_whole_hides_nothing(read: Callable[[dict[str, Any]], Plan]) -> None:
    keys = {"enabled": True, "loss_scale": -1, "min_loss_scale": 0, "hysteresis": 0, "initial_scale_power": 200}
    with pytest.raises(ConfigError) as caught:
        read({"zero_optimization": {"stage": 3}, "fp16": keys})
    assert all(f"fp16.{key} = " in str(caught.value) for key in keys if key != "enabled")


def test_without_deepspeed_the_plan_says_so_and_still_checks_what_it_reads(
    read: Callable[[dict[str, Any]], Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> None:
        raise ModuleNotFoundError("No module named 'deepspeed'")

    monkeypatch.setattr(settings, "_classes", absent)
    text = describe(read({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "offload_optimizer": None}}))
    assert "deepspeed cannot be imported here" in text and 'reduce_bucket_size = "auto": DeepSpeed\'s default\n' in text
    for value in ODD:
        for place in (
            "reduce_bucket_size",
            "contiguous_gradients",
            "offload_optimizer",
            "offload_optimizer.device",
            "offload_param",
        ):
            try:
                describe(read(put(f"zero_optimization.{place}", value)))
            except ConfigError as error:
                assert place in str(error)


def test_our_tables_are_deepspeeds() -> None:
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT

    assert vars(DeepSpeedFlopsProfilerConfig({})) == plain.FlopsProfiler().model_dump()
    assert plain.Aio().model_dump() == AIO_DEFAULT_DICT
    assert set(_REMOVED_TOP_LEVEL_CONFIG_KEYS) <= {*REFUSED_KEYS, *KNOWN_KEYS}
    legal = {place for name, model in CLASSES.items() for place in settings._legal(model, name)}
    assert {*settings.ONLY, *settings.BOUNDS} <= legal, "DeepSpeed has renamed what we refuse"


def config_of(file: Path) -> RunConfig:
    return resolve(load_config(DEMO, ("--run.deepspeed", str(file))), 8)


@pytest.mark.parametrize("file", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda file: file.stem)
def test_shipped_ones_are_taken_as_they_stand(file: Path) -> None:
    checked = checked_deepspeed(config_of(file))
    assert checked.notes == ()
    assert checked.values == deepspeed_config(file, config_of(file))
