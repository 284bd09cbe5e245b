"""The DeepSpeed JSON: how DeepSpeed runs what the TOML says.

``deepspeed_config`` fills what follows from the TOML and refuses what contradicts it, so that no number
has two homes. DeepSpeed's batch numbers do not count sequences here: its engine sees one forward,
backward and step per optimizer step on a weight store (see the pipeline runner), hence 1 x 1 x
data_parallel_size. The dictionary is handed to ``zero/``; nothing here imports DeepSpeed.
"""

import difflib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from deberta_dist.config.finetune import FineTuneConfig
from deberta_dist.config.schema import RunConfig
from deberta_dist.config.section import AUTO
from deberta_dist.errors import ConfigError
from deberta_dist.foreign import HEAD_BYTES, refuse_foreign

Precision = Literal["fp32", "bf16", "fp16"]
AnyConfig = RunConfig | FineTuneConfig

MAX_BYTES = 1 << 20
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")

# What a user may write, beside the batch keys: DeepSpeed itself ignores misspelled keys silently.
KNOWN_KEYS = (
    *BATCH_KEYS,
    "gradient_clipping",
    "bf16",
    "fp16",
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "communication_data_type",
    "aio",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "log_level",
    "disable_python_gc",
    "comms_logger",
    "flops_profiler",
    "tensorboard",
    "csv_monitor",
    "wandb",
    "comet",
)

# Known to DeepSpeed, but decided elsewhere or impossible here; the text ends "... refused: <reason>".
REFUSED_KEYS = {
    "optimizer": "it comes from [optimizer] in the TOML",
    "scheduler": "it comes from [schedule] in the TOML",
    "activation_checkpointing": "it comes from training.recompute in the TOML",
    "pipeline": "DeepSpeed's pipeline refuses ZeRO-3; stages come from [parallel] in the TOML",
    "tensor_parallel": "tensor parallelism comes from [parallel] in the TOML",
    "autotp_size": "tensor parallelism comes from [parallel] in the TOML",
    "amp": "it was apex.amp, which apex no longer has; use bf16 or fp16",
    "torch_autocast": "precision is one of fp32, bf16 and fp16 for the whole model",
    "bfloat16": 'DeepSpeed\'s old name; write "bf16"',
    "data_types": "gradients are accumulated in fp32 outside DeepSpeed",
    "prescale_gradients": "gradients arrive normalised by the tokens of the whole step",
    "gradient_predivide_factor": "gradients arrive normalised by the tokens of the whole step",
    "gradient_allreduce_op": "gradients arrive normalised by the tokens of the whole step",
}

PERSISTENCE = "stage3_param_persistence_threshold"


def deepspeed_config(path: str | os.PathLike[str], config: AnyConfig) -> dict[str, Any]:
    """Reads the DeepSpeed JSON and completes it for a resolved run.

    Args:
        path: The JSON, usually ``config.run.deepspeed``.
        config: From ``resolve``: data_parallel_size is a number.

    Returns:
        What ``deepspeed.initialize`` gets, without any "auto" of ours.

    Raises:
        ConfigError: File missing, no JSON, duplicate keys, NaN; unknown or refused keys; values that
            contradict the TOML; all problems of a readable file in one message.
    """
    assert config.parallel.data_parallel_size != AUTO, "resolve(config, world_size) comes first"
    file = Path(path)
    ds = _read_json(file)
    problems = _key_problems(ds, file)
    _batch(ds, file, config, problems)
    _clipping(ds, file, config, problems)
    _zero(ds, file, problems)
    _precision_problems(ds, file, problems)
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        listing = "\n".join(f"  {problem}" for problem in problems)
        raise ConfigError(f"{len(problems)} problems in {file}:\n{listing}")
    return ds


def precision(ds: dict[str, Any]) -> Precision:
    """Number format of weights and activations that a completed DeepSpeed configuration asks for."""
    for name in ("bf16", "fp16"):
        if ds.get(name, {}).get("enabled", False):
            return name
    return "fp32"


def _read_json(path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"key given twice: {', '.join(twice)}")
        return dict(pairs)

    def finite(text: str) -> float:
        raise ValueError(f"{text} is no number of JSON")

    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path}: {path.stat().st_size} bytes is no configuration (at most {MAX_BYTES})")
        content = path.read_bytes()
        refuse_foreign(content[:HEAD_BYTES], path, error=ConfigError)
        text = content.decode("utf-8-sig")
        ds = json.loads(text, object_pairs_hook=unique, parse_constant=finite)
    except OSError as error:
        raise ConfigError(f"run.deepspeed = {path}: cannot be read ({error.strerror})") from None
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(ds, dict):
        raise ConfigError(f"{path}: expected an object {{...}}, got {type(ds).__name__}")
    return ds


def _key_problems(ds: dict[str, Any], path: Path) -> list[str]:
    problems = []
    for key in ds:
        if key in REFUSED_KEYS:
            problems.append(f"{path}: {key} is refused: {REFUSED_KEYS[key]}")
        elif key not in KNOWN_KEYS:
            near = difflib.get_close_matches(key, KNOWN_KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(KNOWN_KEYS)}"
            problems.append(f"{path}: unknown key {key}; {hint}")
    return problems


def _batch(ds: dict[str, Any], path: Path, config: AnyConfig, problems: list[str]) -> None:
    numbers = (config.parallel.data_parallel_size, 1, 1)
    for key, number in zip(BATCH_KEYS, numbers, strict=True):
        given = ds.get(key, AUTO)
        if given != AUTO:
            problems.append(
                f'{path}: {key} = {given!r} must be "auto": DeepSpeed\'s batch numbers do not count sequences here '
                f"(its engine steps once per optimizer step, on weights); {config.source} decides: "
                f"training.global_batch_size = {config.training.global_batch_size}, micro_batch_size = "
                f"{config.training.micro_batch_size}"
            )
        ds[key] = number


def _clipping(ds: dict[str, Any], path: Path, config: AnyConfig, problems: list[str]) -> None:
    wanted, given = config.optimizer.gradient_clipping, ds.get("gradient_clipping", AUTO)
    if given != AUTO and (isinstance(given, bool) or given != wanted):
        problems.append(
            f"{path}: gradient_clipping = {given!r} contradicts optimizer.gradient_clipping = {wanted} in "
            f'{config.source}; write "auto"'
        )
    ds["gradient_clipping"] = wanted


def _zero(ds: dict[str, Any], path: Path, problems: list[str]) -> None:
    zero = ds.get("zero_optimization")
    if not isinstance(zero, dict):
        problems.append(f'{path}: zero_optimization must be an object with "stage": 3, not {zero!r}')
        return
    if isinstance(zero.get("stage"), bool) or zero.get("stage") != 3:
        problems.append(f"{path}: zero_optimization.stage = {zero.get('stage')!r}; this program needs stage 3")
    # A flat parameter below the threshold would stay whole on every rank and be no shard.
    _force(zero, PERSISTENCE, 0, f"{path}: zero_optimization.", "every weight is partitioned", problems)
    # Otherwise DeepSpeed refuses optimizers that are not its own.
    why = "the optimizer comes from the TOML"
    _force(ds, "zero_allow_untested_optimizer", True, f"{path}: ", why, problems)
    if ds.get("zero_force_ds_cpu_optimizer", AUTO) == AUTO:
        ds["zero_force_ds_cpu_optimizer"] = False


def _force(table: dict[str, Any], key: str, value: Any, where: str, why: str, problems: list[str]) -> None:
    given = table.get(key, AUTO)
    if given not in (AUTO, value) or (given != AUTO and type(given) is not type(value)):
        problems.append(f'{where}{key} = {given!r} must be {json.dumps(value)} or "auto": {why}')
    table[key] = value


def _precision_problems(ds: dict[str, Any], path: Path, problems: list[str]) -> None:
    enabled: Sequence[str] = []
    for name in ("bf16", "fp16"):
        section = ds.get(name, {})
        if not isinstance(section, dict) or not isinstance(section.get("enabled", False), bool):
            problems.append(f'{path}: {name} must be an object with "enabled": true or false, not {section!r}')
        elif section.get("enabled", False):
            enabled = [*enabled, name]
    if len(enabled) > 1:
        problems.append(f"{path}: bf16 and fp16 are both enabled; enable one, or none for fp32")
