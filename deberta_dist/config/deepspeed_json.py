"""The DeepSpeed JSON: how DeepSpeed runs what the TOML says.

``read_deepspeed`` fills what follows from the TOML and refuses what contradicts it, so that no number
has two homes. DeepSpeed's batch numbers do not count sequences here: its engine sees one forward,
backward and step per optimizer step on a weight store (see the pipeline runner), hence 1 x 1 x
data_parallel_size. The dictionary goes to ``zero/``; nothing here imports DeepSpeed: a caller that
may passes in ``examine``, which asks DeepSpeed's own classes.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deberta_dist.config import deepspeed_plain as plain
from deberta_dist.config.deepspeed_file import nearest, read_json, shown, shown_key, take_out_defaults
from deberta_dist.config.finetune import FineTuneConfig
from deberta_dist.config.schema import RunConfig
from deberta_dist.errors import ConfigError
from deberta_dist.values import AUTO, PRECISIONS, Offload, Precision

AnyConfig = RunConfig | FineTuneConfig

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
PERSISTENCE = "stage3_param_persistence_threshold"
LOW_PRECISIONS = tuple(name for name in PRECISIONS if name != "fp32")  # each a section of DeepSpeed's JSON

# What a user may write: DeepSpeed itself ignores misspelled keys silently.
SECTIONS = (
    *LOW_PRECISIONS,
    "zero_optimization",
    "aio",
    "comms_logger",
    "flops_profiler",
    "tensorboard",
    "csv_monitor",
    "wandb",
    "comet",
)
FILLED_KEYS = (*BATCH_KEYS, "gradient_clipping", "zero_allow_untested_optimizer")
KNOWN_KEYS = (*FILLED_KEYS, *plain.BareKeys.model_fields, *SECTIONS)

_MODEL = "it changes the model, which comes from [model] in the TOML"
_BATCHES = "the text and its order come from [data] in the TOML"
_NORMALISED = "gradients arrive normalised by the tokens of the whole step"
# Known to DeepSpeed, but decided elsewhere or impossible here.
REFUSED_KEYS = {
    "optimizer": "it comes from [optimizer] in the TOML",
    "scheduler": "it comes from [schedule] in the TOML",
    "activation_checkpointing": "it comes from training.recompute in the TOML",
    "pipeline": "DeepSpeed's pipeline refuses ZeRO-3; stages come from [parallel] in the TOML",
    "tensor_parallel": "tensor parallelism comes from [parallel] in the TOML",
    "autotp_size": "tensor parallelism comes from [parallel] in the TOML",
    "sequence_parallel_size": "sequence parallelism comes from [parallel] in the TOML",
    "seq_parallel_communication_data_type": "sequence parallelism comes from [parallel] in the TOML",
    "expert_parallel": _MODEL,
    "amp": "it was apex.amp, which apex no longer has; use bf16 or fp16",
    "torch_autocast": "precision is one of fp32, bf16 and fp16 for the whole model",
    "bfloat16": 'DeepSpeed\'s old name; write "bf16"',
    "fp32_allreduce": 'DeepSpeed\'s old name; write "communication_data_type": "fp32"',
    "data_types": "gradients are accumulated in fp32 outside DeepSpeed",
    "prescale_gradients": _NORMALISED,
    "gradient_predivide_factor": _NORMALISED,
    "gradient_allreduce_op": _NORMALISED,
    "managed_gradient_accumulation": "gradients are accumulated outside DeepSpeed",
    "sparse_gradients": "the gradient of the embedding is dense",
    "disable_allgather": "weights are gathered once per step",
    "graph_harvesting": "it comes from training.compile in the TOML",
    "compile": "it comes from training.compile in the TOML",
    "checkpoint": "checkpoints come from [checkpoint] in the TOML",
    "datastates": "checkpoints come from [checkpoint] in the TOML",
    "nebula": "checkpoints come from [checkpoint] in the TOML",
    "timers": "the run has timers of its own, in its metrics",
    "elasticity": "the number of processes is that of the start",
    "autotuning": "tools/plan_layout.py searches for sizes",
    "data_efficiency": _BATCHES,
    "data_sampling": _BATCHES,
    "curriculum_learning": _BATCHES,
    "dataloader_drop_last": _BATCHES,
    "vocabulary_size": "it comes from [model] in the TOML",
    "compression_training": _MODEL,
    "quantize_training": _MODEL,
    "weight_quantization": _MODEL,
    "progressive_layer_drop": _MODEL,
    "sparse_attention": _MODEL,
    "eigenvalue": _MODEL,
    "hybrid_engine": _MODEL,
}
NOT_CHECKED = "deepspeed cannot be imported here: what its JSON says to DeepSpeed alone was not checked"
OTHER_NAMES = {"thread_count": "intra_op_parallelism"}

Problems = dict[str, str]
"""Dotted key -> what is wrong with it, the key included."""


@dataclass(frozen=True)
class Examined:
    """What DeepSpeed's own classes say to a JSON.

    Attributes:
        values: The JSON with DeepSpeed's types and present names.
        problems: What they refuse.
        defaults: DeepSpeed's default of each dotted key that was left out.
        known: Every dotted key that it has in these sections.
        notes: What the user should know of it, one line each.
    """

    values: dict[str, Any]
    problems: Problems
    defaults: Mapping[str, Any]
    known: tuple[str, ...]
    notes: tuple[str, ...] = ()


Examine = Callable[[dict[str, Any], Mapping[str, str]], Examined | None]
"""(sections of the JSON, what was left out) -> what DeepSpeed says; None where it is not installed."""


@dataclass(frozen=True)
class DeepSpeedJson:
    """A checked JSON.

    Attributes:
        values: What ``deepspeed.initialize`` gets, without any "auto" of ours.
        notes: What the plan should say of it, one line each.
    """

    values: dict[str, Any]
    notes: tuple[str, ...]


def read_deepspeed(path: str | os.PathLike[str], config: AnyConfig, *, examine: Examine | None = None) -> DeepSpeedJson:
    """Reads the DeepSpeed JSON and completes it for a resolved run.

    Args:
        path: The JSON, usually ``config.run.deepspeed``.
        config: From ``resolve``: data_parallel_size is a number.
        examine: Asks DeepSpeed; without it only the values that the planner reads are checked.

    Raises:
        ConfigError: File missing, no JSON, duplicate keys, NaN; unknown or refused keys; values that
            contradict the TOML or that DeepSpeed refuses; all problems of a readable file in one message.
    """
    assert config.parallel.data_parallel_size != AUTO, "resolve(config, world_size) comes first"
    file = Path(path)
    ds = read_json(file)
    problems: Problems = {}
    _require_precision(ds, problems)
    left_out = take_out_defaults(ds)
    _batch(ds, config, problems)
    _clipping(ds, config, problems)
    _zero(ds, left_out, problems)
    _precision(ds, problems)
    _plain(ds, left_out, problems)
    examined = None
    if examine is not None:
        examined = examine({key: ds[key] for key in SECTIONS if isinstance(ds.get(key), dict)}, left_out)
    if examined is None:
        if isinstance(ds.get("zero_optimization"), dict):
            plain.check(ds["zero_optimization"], plain.ZeroAsPlanned, name="zero_optimization.", problems=problems)
        notes = [NOT_CHECKED]
    else:
        ds |= examined.values
        problems |= {dotted: text for dotted, text in examined.problems.items() if dotted not in problems}
        notes = list(examined.notes)
    _keys(ds, left_out, problems, inside=examined.known if examined else ())
    _offload(ds, problems)
    _raise(problems, file)
    defaults = {} if examined is None else {**plain.defaults(), **examined.defaults}
    return DeepSpeedJson(ds, (*notes, *_default_notes(left_out, defaults)))


def deepspeed_config(path: str | os.PathLike[str], config: AnyConfig) -> dict[str, Any]:
    """``read_deepspeed`` without asking DeepSpeed."""
    return read_deepspeed(path, config).values


def precision(ds: dict[str, Any]) -> Precision:
    """Number format of weights and activations that a completed DeepSpeed configuration asks for."""
    for name in LOW_PRECISIONS:
        if ds.get(name, {}).get("enabled", False):
            return name
    return "fp32"


def offload_device(ds: Mapping[str, Any], what: Literal["optimizer", "param"]) -> Offload:
    """Where a completed DeepSpeed configuration puts the optimizer's state, or the weights: ``none``, ``cpu``."""
    return ds.get("zero_optimization", {}).get(f"offload_{what}", {}).get("device", "none")


def _offload(ds: dict[str, Any], problems: Problems) -> None:
    if "zero_optimization" in problems or any(dotted.startswith("zero_optimization.offload_") for dotted in problems):
        return
    if ds["zero_force_ds_cpu_optimizer"] is True and offload_device(ds, "optimizer") != "none":
        problems["zero_force_ds_cpu_optimizer"] = (
            "zero_force_ds_cpu_optimizer = True must be false or left out with offload_optimizer: the optimizer comes from "
            "[optimizer] in the TOML"
        )


def _default_notes(left_out: Mapping[str, str], defaults: Mapping[str, Any]) -> list[str]:
    """What "auto" has become, and ``null`` where DeepSpeed has a default for it."""
    notes = []
    for dotted, word in left_out.items():
        if dotted in FILLED_KEYS or dotted.endswith(PERSISTENCE) or (word == "null" and defaults.get(dotted) is None):
            continue
        value = defaults.get(dotted, ...)
        text = "" if value is ... else f", {value:,}" if type(value) is int else f", {shown(value)}"
        notes.append(f"{dotted} = {word}: DeepSpeed's default{text}")
    return notes


def _raise(problems: Problems, path: Path) -> None:
    lines = [f"{path}: {problem}" for problem in problems.values()]
    if len(lines) == 1:
        raise ConfigError(lines[0])
    if lines:
        raise ConfigError("\n".join([f"{len(lines)} problems in {path}:", *(f"  {line}" for line in lines)]))


def _keys(ds: dict[str, Any], left_out: Mapping[str, str], problems: Problems, *, inside: Sequence[str]) -> None:
    inside = [*inside, *(f"{name}.{key}" for name, model in plain.SECTIONS.items() for key in model.model_fields)]
    for key in (*ds, *(key for key in left_out if "." not in key)):
        if key in REFUSED_KEYS:
            if left_out.get(key) != "null":
                problems[key] = f"{key} is refused: {REFUSED_KEYS[key]}; remove it"
        elif key not in KNOWN_KEYS:
            problems[key] = f"unknown key {shown_key(key)}; {nearest(key, KNOWN_KEYS, inside)}"
    for key in SECTIONS:
        if key in ds and not isinstance(ds[key], dict) and key not in (*LOW_PRECISIONS, "zero_optimization"):
            problems[key] = f"{key} must be an object {{...}}, not {shown(ds[key])}"


def _batch(ds: dict[str, Any], config: AnyConfig, problems: Problems) -> None:
    numbers = (config.parallel.data_parallel_size, 1, 1)
    for key, number in zip(BATCH_KEYS, numbers, strict=True):
        given = ds.get(key, AUTO)
        if given != AUTO:
            problems[key] = (
                f'{key} = {given!r} must be "auto": DeepSpeed\'s batch numbers do not count sequences here '
                f"(its engine steps once per optimizer step, on weights); {config.source} decides: "
                f"training.global_batch_size = {config.training.global_batch_size}, micro_batch_size = "
                f"{config.training.micro_batch_size}"
            )
        ds[key] = number


def _clipping(ds: dict[str, Any], config: AnyConfig, problems: Problems) -> None:
    wanted, given = config.optimizer.gradient_clipping, ds.get("gradient_clipping", AUTO)
    if given != AUTO and (isinstance(given, bool) or given != wanted):
        problems["gradient_clipping"] = (
            f'gradient_clipping = {given!r} contradicts optimizer.gradient_clipping = {wanted} in {config.source}; write "auto"'
        )
    ds["gradient_clipping"] = wanted


def _zero(ds: dict[str, Any], left_out: Mapping[str, str], problems: Problems) -> None:
    # Otherwise DeepSpeed refuses optimizers that are not its own.
    _force(ds, "zero_allow_untested_optimizer", True, "", "the optimizer comes from the TOML", problems)
    ds.setdefault("zero_force_ds_cpu_optimizer", False)
    section = "zero_optimization"
    zero = ds.get(section)
    if not isinstance(zero, dict):
        problems[section] = f'{section} must be an object with "stage": 3, not {left_out.get(section) or shown(zero)}'
        return
    if isinstance(zero.get("stage"), bool) or zero.get("stage") != 3:
        word = left_out.get(f"{section}.stage")
        given = f" = {word or shown(zero['stage'])}" if word or "stage" in zero else " is missing"
        problems[f"{section}.stage"] = f"{section}.stage{given}; this program needs stage 3"
        zero["stage"] = 3
    # A flat parameter below the threshold would stay whole on every rank and be no shard.
    why = "every weight is partitioned"
    if (short := PERSISTENCE.removeprefix("stage3_")) in zero:  # DeepSpeed takes both names
        _force(zero, short, 0, f"{section}.", why, problems)
        del zero[short]
    _force(zero, PERSISTENCE, 0, f"{section}.", why, problems)


def _force(table: dict[str, Any], key: str, value: Any, where: str, why: str, problems: Problems) -> None:
    given = table.get(key, AUTO)
    if given != AUTO and (given != value or isinstance(given, bool) is not isinstance(value, bool)):
        problems[where + key] = f'{where}{key} = {given!r} must be {shown(value)} or "auto": {why}'
    table[key] = value


def _require_precision(ds: dict[str, Any], problems: Problems) -> None:
    """DeepSpeed's default is fp32, which is hardly what is meant by "auto" for bf16 or fp16."""
    enabled = {
        name: ds[name].get("enabled") if isinstance(ds[name], dict) else ds[name] for name in LOW_PRECISIONS if name in ds
    }
    open_ones = [f"{name}.enabled" for name, value in enabled.items() if value == AUTO]
    if open_ones and True not in enabled.values():
        problems["precision"] = (
            f'{" and ".join(open_ones)} = "auto": Hugging Face\'s Trainer fills this in, and nobody does here; write true '
            "for one of bf16 and fp16, or false for both (fp32)"
        )


def _precision(ds: dict[str, Any], problems: Problems) -> None:
    enabled = []
    for name in LOW_PRECISIONS:
        section = ds.get(name, {})
        if not isinstance(section, dict) or not isinstance(section.get("enabled", False), bool):
            dotted = f"{name}.enabled" if isinstance(section, dict) else name
            problems[dotted] = f'{name} must be an object with "enabled": true or false, not {shown(section)}'
        elif section.get("enabled", False):
            enabled.append(name)
    if len(enabled) > 1:
        problems["precision"] = "bf16 and fp16 are both enabled; enable one, or none for fp32"


def _plain(ds: dict[str, Any], left_out: Mapping[str, str], problems: Problems) -> None:
    """Checks what DeepSpeed itself does not."""
    plain.check(ds, plain.BareKeys, name="", problems=problems)
    for name, model in plain.SECTIONS.items():
        if not isinstance(ds.get(name), dict):
            continue
        known = [f"{name}.{key}" for key in model.model_fields]
        given = [*(f"{name}.{key}" for key in ds[name]), *(key for key in left_out if key.startswith(f"{name}."))]
        for key in given:
            if key not in known:
                other = OTHER_NAMES.get(key.rpartition(".")[2])
                hint = f"DeepSpeed calls it {name}.{other} now" if other else nearest(key, known)
                problems[key] = f"unknown key {shown_key(key)}; {hint}"
        plain.check(ds[name], model, name=f"{name}.", problems=problems)
