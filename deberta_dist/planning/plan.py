"""A checked run: configuration, model, cost and layout, found wrong or right before any process group exists.

Every rank checks the same things from the same files, so either all go on or all stop, each by itself. Nothing of
a run's data is read here.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deberta_dist.config import RunConfig, resolve
from deberta_dist.errors import ConfigError
from deberta_dist.files.strict_json import loads, read_configuration
from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.defaults import filled_in
from deberta_dist.models.flops import ForwardFlops, forward_flops
from deberta_dist.models.presets import preset
from deberta_dist.parallel.layout import Layout, plan_layout
from deberta_dist.planning.deepspeed import checked_deepspeed


@dataclass(frozen=True)
class Plan:
    """A checked configuration with what follows from it.

    Attributes:
        config: Resolved.
        deepspeed: Filled-in DeepSpeed JSON.
        model_config: The model.
        flops: Its cost per token in sequences of ``data.max_seq_length``.
        layout: Who holds what.
        deepspeed_notes: What the JSON leaves to DeepSpeed, one line each.
    """

    config: RunConfig
    deepspeed: dict[str, Any]
    model_config: DebertaConfig
    flops: ForwardFlops
    layout: Layout
    deepspeed_notes: tuple[str, ...] = ()

    def flops_of_bucket(self, length: int) -> ForwardFlops:
        """The model's cost per token in a bucket's sequences of ``length`` tokens, which take less attention."""
        return _flops(self.config, self.model_config, length=length)


def check_plan(config: RunConfig, *, world_size: int) -> Plan:
    """Checks sizes, model and DeepSpeed JSON. Reads no data file.

    Raises:
        ConfigError: with file, key and value.
    """
    config = resolve(config, world_size)
    ds = checked_deepspeed(config)
    model_config = read_model_config(config)
    if config.data.max_seq_length > model_config.max_position_embeddings:
        raise ConfigError(
            f"{config.source}: data.max_seq_length = {config.data.max_seq_length} is over "
            f"model.max_position_embeddings = {model_config.max_position_embeddings}"
        )
    _check_convolution(config, model_config)
    flops = read_flops(config, model_config)
    try:
        layout = plan_layout(model_config, parallel=config.parallel, flops=flops)
    except ConfigError as error:
        raise ConfigError(f"{config.source}: {error}") from None
    return Plan(
        config=config,
        deepspeed=ds.values,
        deepspeed_notes=ds.notes,
        model_config=model_config,
        flops=flops,
        layout=layout,
    )


def _check_convolution(config: RunConfig, model_config: DebertaConfig) -> None:
    """Under sequence parallelism the convolution looks at neighbouring parts alone."""
    if not config.parallel.sequence_parallel:
        return
    size, taps = config.parallel.tensor_parallel_size, model_config.conv_kernel_size
    shortest = min(length for _, length in config.micro_batch_shapes)
    if (taps - 1) // 2 > shortest // size:
        raise ConfigError(
            f"{config.source}: parallel.sequence_parallel = true leaves {shortest // size} of {shortest} tokens on each of "
            f"parallel.tensor_parallel_size = {size} ranks, fewer than the {(taps - 1) // 2} beside a token that "
            f"model.conv_kernel_size = {taps} looks at; take fewer tensor ranks or longer sequences"
        )


def read_flops(config: RunConfig, model_config: DebertaConfig) -> ForwardFlops:
    """The model's cost per token in sequences of ``data.max_seq_length``."""
    return _flops(config, model_config, length=config.data.max_seq_length)


def _flops(config: RunConfig, model_config: DebertaConfig, *, length: int) -> ForwardFlops:
    sequences = {length: count for count, length in config.micro_batch_shapes}
    return forward_flops(
        model_config,
        max_seq_length=length,
        micro_batch_size=sequences[length],
        mask_probability=config.data.mask_probability,
    )


def read_model_config(config: RunConfig) -> DebertaConfig:
    """The model that ``[model]`` describes.

    Raises:
        ConfigError: an unknown preset or field, a missing or invalid file.
    """
    section = config.model
    try:
        if section.preset is not None:
            return preset(section.preset, **section.overrides)
        published = loads(read_configuration(Path(section.config), shown=f"model.config = {section.config}"))
        if not isinstance(published, dict):
            raise ConfigError(f"model.config = {section.config} is not a JSON object")
        if published.get("model_type") is not None:
            published, _ = filled_in(published, kind=published["model_type"])
        return DebertaConfig.from_dict({**published, **section.overrides})
    except ConfigError as error:
        raise ConfigError(f"{config.source}, [model]: {error}") from None
    except ValueError as error:
        raise ConfigError(f"{config.source}: model.config = {section.config}: {error}") from None
