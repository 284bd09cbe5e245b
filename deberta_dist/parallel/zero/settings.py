"""Checks a DeepSpeed JSON with DeepSpeed's own classes before any process starts, and refuses what the weight store cannot run.

The planner passes ``examine`` to ``config.deepspeed_json.read_deepspeed``, so that the dry run reports what would otherwise
be a traceback on every rank. Keys, types and bounds come from DeepSpeed's classes. ``ONLY`` and ``BOUNDS`` list what these
accept although the engine or the weight store cannot run with it.
"""

import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any, get_args

from deberta_dist.config.deepspeed_file import nearest, shown, shown_key
from deberta_dist.config.deepspeed_json import Examined, Problems
from deberta_dist.config.deepspeed_plain import LARGEST, describe_errors
from deberta_dist.parallel.zero.weight_store import import_deepspeed

_CPU_ADAM = "it needs DeepSpeed's own CPU optimizer; ours comes from [optimizer] in the TOML"
_FLOAT32 = "master weights, gradients and moments are float32 here"
_WHOLE = "communication is not quantised here, and weights are not held twice"
_FLAT = "DeepSpeed sees flat parameters here, no modules"
# Dotted key -> (the one value it may have, why).
ONLY: dict[str, tuple[Any, str]] = {
    "zero_optimization.zenflow": (None, "it takes the optimizer's place, which comes from [optimizer] in the TOML"),
    "zero_optimization.offload_optimizer.ratio": (1.0, _CPU_ADAM),
    "zero_optimization.offload_optimizer.super_offload": (False, _CPU_ADAM),
    "zero_optimization.zero_quantized_weights": (False, _WHOLE),
    "zero_optimization.zero_quantized_nontrainable_weights": (False, _WHOLE),
    "zero_optimization.zero_quantized_gradients": (False, _WHOLE),
    "zero_optimization.stage3_module_granularity_threshold": (0, _FLAT),
    "zero_optimization.legacy_stage1": (False, "DeepSpeed no longer has it"),
    "zero_optimization.enable_sanity_checks": (False, "it forbids gathering weights for more than one pass"),
    "bf16.bf16_master_weights_and_grads": (False, _FLOAT32),
    "bf16.bf16_optimizer_states": (False, _FLOAT32),
    "fp16.fp16_master_weights_and_grads": (False, _FLOAT32),
    "fp16.auto_cast": (False, "gradients go into the engine in float32, which it would round"),
}  # fmt: skip
# Dotted key -> (least, most, unit or reason).
BOUNDS: dict[str, tuple[int, int, str]] = {
    "zero_optimization.zero_hpz_partition_size": (0, 1, _WHOLE),
    "fp16.loss_scale": (0, 2**126, "a float32 holds no larger one"),
    "fp16.min_loss_scale": (1, 2**126, "a float32 holds no larger one"),
    "fp16.initial_scale_power": (0, 126, "the power of 2 of a float32"),
    "fp16.loss_scale_window": (1, LARGEST, "steps"),
    "fp16.hysteresis": (1, LARGEST, "steps"),
    "comet.samples_log_interval": (1, LARGEST, "samples"),
}
DEVICES = ("none", "cpu")
# Section of a monitor -> the package that it writes with.
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
# Monitors that create a folder when the engine is created.
WRITERS = ("tensorboard", "csv_monitor")


def examine(sections: dict[str, Any], left_out: Mapping[str, str]) -> Examined | None:
    """Checks the sections of a JSON with DeepSpeed's classes.

    Args:
        sections: Top-level keys whose values are objects, with ``null`` and ``"auto"`` removed; not changed.
        left_out: The removed dotted keys, each with ``null`` or ``"auto"``.

    Returns:
        Values, problems and defaults; None if DeepSpeed cannot be imported.
    """
    try:
        classes = _classes()
    except ImportError:
        return None
    values: dict[str, Any] = {}
    problems: Problems = {}
    notes: list[str] = []
    defaults: dict[str, Any] = {}
    for name, section in sections.items():
        model = classes.get(name)
        if model is None:
            continue
        legal = _legal(model, name)
        unknown = _unknown(section, name, left_out, legal, classes)
        problems |= unknown | _wrong_kinds(section, name, legal)
        made, table = _built(model, section, name, problems)
        if made is None:
            problems |= _impossible(table, name)
            continue
        values[name] = _dump(made, table, name, notes)
        problems |= _impossible(values[name], name)
        defaults |= {key: value for key in left_out if (value := _default(made, key, name)) is not ...}
    problems |= _missing_packages(values) | _no_folder(values)
    problems |= {dotted: _device(dotted, _value(sections, dotted)) for dotted in problems if dotted.endswith(".device")}
    known = [key for name, model in classes.items() for key in _legal(model, name)]
    return Examined(values, problems, defaults=defaults, known=tuple(known), notes=tuple(notes))


def _classes() -> dict[str, Any]:
    """DeepSpeed's class of each section that has one."""
    import_deepspeed()
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig,
        "tensorboard": TensorBoardConfig,
        "csv_monitor": CSVConfig,
        "wandb": WandbConfig,
        "comet": CometConfig,
    }


def _inner(field: Any) -> Any:
    """The class of a field that is itself an object, or None."""
    kinds = (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if hasattr(kind, "model_fields")), None)


@lru_cache
def _legal(model: Any, above: str) -> dict[str, tuple[str, Any]]:
    """Every dotted key -> (the field's own name, the field), under all names that DeepSpeed accepts."""
    found = {}
    for name, field in model.model_fields.items():
        for written in dict.fromkeys((field.alias or name, name)):
            found[f"{above}.{written}"] = (name, field)
            if (inner := _inner(field)) is not None:
                found |= _legal(inner, f"{above}.{written}")
    return found


def _unknown(
    section: Mapping[str, Any], name: str, left_out: Mapping[str, str], legal: Mapping[str, Any], classes: Mapping[str, Any]
) -> Problems:
    given = [*_key_paths(section, name), *(key for key in left_out if key.startswith(f"{name}."))]
    found: Problems = {}
    for key in given:
        table = key.rpartition(".")[0]
        if key in legal or (table != name and table not in legal):
            continue  # one message for an unknown table, none for the keys in it
        beside = [other for other in legal if other.rpartition(".")[0] == table]
        elsewhere = [other for section_name, model in classes.items() for other in _legal(model, section_name)]
        found[key] = f"unknown key {shown_key(key)}; {nearest(key, beside, elsewhere)}"
    return found


def _key_paths(table: Mapping[str, Any], above: str) -> Iterator[str]:
    for key, value in table.items():
        yield f"{above}.{key}"
        if isinstance(value, Mapping):
            yield from _key_paths(value, f"{above}.{key}")


def _wrong_kinds(table: Mapping[str, Any], above: str, legal: Mapping[str, tuple[str, Any]]) -> Problems:
    """Values that pydantic would silently convert (true to 1), and keys given under two names."""
    found: Problems = {}
    names: dict[str, str] = {}
    for key, value in table.items():
        dotted = f"{above}.{key}"
        if dotted not in legal:
            continue
        name, field = legal[dotted]
        if name in names:
            found[dotted] = f"{dotted} is the same as {names[name]}; leave one of them out"
        names[name] = dotted
        kinds = {field.annotation, *get_args(field.annotation)}
        if _inner(field) is not None:
            if isinstance(value, Mapping):
                found |= _wrong_kinds(value, dotted, legal)
            else:
                found[dotted] = f"{dotted} = {shown(value)}; expected an object {{...}} or null"
        elif isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            found[dotted] = f"{dotted} = {shown(value)}; expected a number"
    return found


def _without(table: Mapping[str, Any], above: str, dotted_keys: set[str]) -> dict[str, Any]:
    return {
        key: _without(value, f"{above}.{key}", dotted_keys) if isinstance(value, Mapping) else value
        for key, value in table.items()
        if f"{above}.{key}" not in dotted_keys
    }


def _built(model: Any, section: Mapping[str, Any], name: str, problems: Problems) -> tuple[Any, dict[str, Any]]:
    """DeepSpeed's object of every key that it accepts, and those keys; None if it refuses the whole section.

    Refused keys go into ``problems`` and the rest is tried again, so that one run reports all problems.
    """
    while True:
        table = _without(section, name, set(problems))
        try:
            return _made(model, table), table
        except Exception as error:  # DeepSpeed's validators raise what they like
            if hasattr(error, "errors"):
                found = describe_errors(error.errors(include_url=False), table, name=f"{name}.")
            else:
                found = {name: f"{name}: DeepSpeed refuses it: {str(error).strip().splitlines()[0][:300]}"}
        problems |= found
        if name in found:
            return None, table


def _made(model: Any, table: Mapping[str, Any]) -> Any:
    """DeepSpeed's object, without its warnings about deprecated names: `_dump` reports those as notes."""
    logger = logging.getLogger("DeepSpeed")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        return model(**table)
    finally:
        logger.disabled = was_disabled


def _dump(made: Any, given: Mapping[str, Any], above: str, notes: list[str]) -> dict[str, Any]:
    """The given keys with DeepSpeed's types, deprecated names replaced by current ones."""
    by_name = {alias: name for name, field in type(made).model_fields.items() for alias in (field.alias or name, name)}
    values: dict[str, Any] = {}
    for key in given:
        field = type(made).model_fields[by_name[key]]
        extra = field.json_schema_extra or {}
        if not extra.get("deprecated"):
            values[field.alias or by_name[key]] = _plain(getattr(made, by_name[key]), given[key], f"{above}.{key}", notes)
            continue
        new = extra.get("new_param", "")
        if not extra.get("set_new_param", True):
            notes.append(f"{above}.{key} is a deprecated name that DeepSpeed ignores; use {new}")
            continue
        value = getattr(made, new)
        notes.append(f"{above}.{key} is DeepSpeed's deprecated name for {new}")
        if value is not None:
            values[type(made).model_fields[new].alias or new] = _plain(value, None, f"{above}.{new}", notes)
    return values


def _plain(value: Any, given: Any, above: str, notes: list[str]) -> Any:
    """The value as JSON represents it."""
    if hasattr(type(value), "model_fields"):
        return _dump(value, given if isinstance(given, Mapping) else dict.fromkeys(value.model_fields_set), above, notes)
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, PurePath) else value


def _default(made: Any, key: str, section: str) -> Any:
    """The value of DeepSpeed's object for a dotted key; ``...`` if it has no such key."""
    parts = key.split(".")
    if parts[0] != section:
        return ...
    for part in parts[1:]:
        names = [name for name, field in getattr(type(made), "model_fields", {}).items() if part in (name, field.alias)]
        if not names or not hasattr(made, names[0]):
            return ...
        made = getattr(made, names[0])
    return made.value if isinstance(made, Enum) else made if made is None or isinstance(made, int | float | str) else ...


def _impossible(table: Mapping[str, Any], name: str) -> Problems:
    """Values that DeepSpeed's classes accept although the engine or the weight store cannot run with them."""
    found: Problems = {}
    for dotted, value in _values(table, name):
        if dotted in ONLY and value != ONLY[dotted][0]:
            given = "{...}" if isinstance(value, Mapping) else shown(value)
            found[dotted] = f"{dotted} = {given} must be {shown(ONLY[dotted][0])} or left out: {ONLY[dotted][1]}"
        elif dotted in BOUNDS and isinstance(value, int | float) and not BOUNDS[dotted][0] <= value <= BOUNDS[dotted][1]:
            least, most, reason = BOUNDS[dotted]
            found[dotted] = f"{dotted} = {shown(value)}; expected {least} to {most} ({reason})"
        elif isinstance(value, int) and abs(value) > LARGEST:
            found[dotted] = f"{dotted} = {shown(value)}; expected at most {LARGEST}"
        elif dotted.endswith(".device") and value not in DEVICES:
            found[dotted] = _device(dotted, value)
        elif dotted.startswith("zero_optimization.leaf_module."):
            found[dotted] = f"{dotted} is refused: {_FLAT}; remove it"
    return found


def _device(dotted: str, value: Any) -> str:
    return f'{dotted} = {shown(value)}; expected "cpu" or "none": checkpoints read weights and moments from memory here'


def _value(sections: Mapping[str, Any], dotted: str) -> Any:
    value: Any = sections
    for part in dotted.split("."):
        value = value[part]
    return value


def _values(table: Mapping[str, Any], above: str) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        yield f"{above}.{key}", value
        if isinstance(value, Mapping):
            yield from _values(value, f"{above}.{key}")


def _missing_packages(values: Mapping[str, Any]) -> Problems:
    return {
        f"{name}.enabled": f"{name}.enabled = true needs the package {package}: pip install {package}, or write false"
        for name, package in PACKAGES.items()
        if values.get(name, {}).get("enabled") and importlib.util.find_spec(package) is None
    }


def _no_folder(values: Mapping[str, Any]) -> Problems:
    found: Problems = {}
    for name in WRITERS:
        section = values.get(name, {})
        if not section.get("enabled"):
            continue
        folder = Path(section.get("output_path") or ".") / section.get("job_name", "")
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))
        if not (there.is_dir() and os.access(there, os.W_OK)):
            dotted = f"{name}.output_path"
            found[dotted] = f"{dotted} = {shown(section.get('output_path', ''))}; {there} is not a writable folder"
    return found
