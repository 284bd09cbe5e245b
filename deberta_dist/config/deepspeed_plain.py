"""The parts of the DeepSpeed JSON that DeepSpeed does not validate: bare keys, ``flops_profiler`` and ``aio``.

It has no classes for them, so a wrong value ends in the middle of a step. Names and defaults are DeepSpeed's (a test
compares them); the bounds are what its code can run with. ``ZeroAsPlanned`` stands in for DeepSpeed's class of
``zero_optimization`` where DeepSpeed is not installed: the values that the planner reads, and no others.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from deberta_dist.config.deepspeed_file import shown
from deberta_dist.values import Offload, Precision

LARGEST = 2**63 - 1


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number, not true or false")
    return value


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


Whole = Annotated[int, BeforeValidator(_not_bool), Field(strict=False, le=LARGEST)]
OneOrMore = Annotated[Whole, Field(ge=1)]
Number = Annotated[float, BeforeValidator(_not_bool), Field(strict=False, ge=0)]


class Plain(BaseModel):
    """Base: whole numbers may be written as ``5e8``; unknown keys are looked for before."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class BareKeys(Plain):
    """Keys of the JSON that are no section; those that follow from the TOML are not among them."""

    zero_force_ds_cpu_optimizer: bool = False
    communication_data_type: Annotated[Precision, BeforeValidator(_lower)] | None = None
    steps_per_print: OneOrMore | None = None
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False
    log_level: Annotated[Literal["debug", "info", "warning", "error", "critical"], BeforeValidator(_lower)] | None = None
    disable_python_gc: bool = False


class FlopsProfiler(Plain):
    """``flops_profiler``."""

    enabled: bool = False
    recompute_fwd_factor: Number = 0.0
    profile_step: OneOrMore = 1
    module_depth: Annotated[Whole, Field(ge=-1)] = -1
    top_modules: OneOrMore = 1
    detailed: bool = True
    output_file: str | None = None


class Aio(Plain):
    """``aio``."""

    block_size: OneOrMore = 1048576
    queue_depth: OneOrMore = 8
    intra_op_parallelism: OneOrMore = 1
    single_submit: bool = False
    overlap_events: bool = True
    use_gds: Literal[False] = False


class OffloadAsPlanned(Plain):
    """``offload_optimizer`` and ``offload_param``."""

    device: Offload = "none"


class ZeroAsPlanned(Plain):
    """``zero_optimization``, without DeepSpeed."""

    reduce_bucket_size: OneOrMore = 500_000_000
    contiguous_gradients: bool = True
    offload_optimizer: OffloadAsPlanned | None = None
    offload_param: OffloadAsPlanned | None = None


_TEXTS = {
    "int_parsing": "a whole number",
    "int_parsing_size": f"a whole number of at most {LARGEST}",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
}
SECTIONS: dict[str, type[Plain]] = {"flops_profiler": FlopsProfiler, "aio": Aio}


def check(table: dict[str, Any], model: type[Plain], *, name: str, problems: dict[str, str]) -> None:
    """Brings the values that ``model`` knows to their types, in place.

    Args:
        table: The section, or the whole JSON for ``BareKeys``.
        model: Class whose fields are the table's known keys.
        name: Of the section, with a dot behind it; empty for the whole.
        problems: Takes what is wrong, by dotted key.
    """
    try:
        found = model.model_validate(table)
    except ValidationError as error:
        problems |= describe_errors(error.errors(include_url=False), table, name=name)
        return
    for key in table.keys() & model.model_fields.keys():
        value = getattr(found, key)
        if isinstance(value, Plain):
            table[key] |= value.model_dump(exclude_unset=True)
        else:
            table[key] = value


def defaults() -> dict[str, Any]:
    """DeepSpeed's defaults of all keys of this file, by dotted key."""
    bare = {name: field.default for name, field in BareKeys.model_fields.items()}
    inside = {f"{name}.{key}": field.default for name, model in SECTIONS.items() for key, field in model.model_fields.items()}
    return bare | inside


def describe_errors(errors: Sequence[Mapping[str, Any]], table: Mapping[str, Any], *, name: str) -> dict[str, str]:
    """Pydantic's errors by dotted key, as ``key = value; expected ...``.

    Args:
        errors: Of a ``ValidationError``.
        table: What was validated.
        name: Of the section, with a dot behind it; empty for the whole.
    """
    given: dict[str, str] = {}
    expected: dict[str, list[str]] = {}
    for item in errors:
        names, value = [], table
        for part in item["loc"]:  # behind the key come positions in a list and alternatives of a union
            if not isinstance(value, Mapping) or part not in value:
                break
            names.append(str(part))
            value = value[part]
        dotted = (name + ".".join(names)).removesuffix(".")
        given[dotted] = f"{dotted} = {shown(value)}; expected " if names else f"{dotted}: "
        text = _TEXTS.get(item["type"], item["msg"])
        for words in ("Value error, ", "Assertion failed, ", "Input should be ", f"{dotted} must be "):
            text = text.removeprefix(words)
        expected.setdefault(dotted, []).append(text)
    return {dotted: given[dotted] + " or ".join(dict.fromkeys(texts)) for dotted, texts in expected.items()}
