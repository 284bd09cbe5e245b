"""A checked run: configuration, model, cost and layout, checked before any process group exists.

Every rank makes the same checks on the same files, so without communication all continue or all stop. A run's data is not
read here.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deberta_dist.config import RunConfig, resolve
from deberta_dist.errors import ConfigError
from deberta_dist.files.strict_json import loads, read_configuration
from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.defaults import filled_in
from deberta_dist.models.flops import ForwardFlops
from deberta_dist.models.presets import preset
from deberta_dist.parallel.layout import Layout, plan_layout
from deberta_dist.planning.deepspeed import checked_deepspeed
from deberta_dist.training.objectives.base import Objective, TrainedNetwork, check_folds, trained
from deberta_dist.training.objectives.masked_lm import masked_lm


@dataclass(frozen=True)
class NetworkPlan:
    """One network of a plan.

    Attributes:
        config: Resolved, of the run.
        deepspeed: Filled-in DeepSpeed JSON.
        layout: Who holds what.
        flops: Cost per token in sequences of ``data.max_seq_length``.
    """

    config: RunConfig
    deepspeed: dict[str, Any]
    layout: Layout
    flops: ForwardFlops

    @property
    def network(self) -> TrainedNetwork:
        """The network that is laid out."""
        return trained(self.layout.network)

    @property
    def model_config(self) -> DebertaConfig:
        """The network's configuration."""
        return self.layout.config

    @property
    def world_size(self) -> int:
        """Processes."""
        return self.config.parallel.world_size


@dataclass(frozen=True)
class Plan:
    """A checked configuration with what follows from it.

    Attributes:
        config: The TOML with overrides, every "auto" resolved.
        deepspeed: The DeepSpeed JSON, every "auto" filled in.
        model_config: ``[model]`` resolved: preset or file, with overrides.
        objective: The networks to train.
        layouts: Layout of each network.
        network_flops: FLOPs of each network per token, in sequences of ``data.max_seq_length``.
        deepspeed_notes: One line for each value that is left to DeepSpeed.
    """

    config: RunConfig
    deepspeed: dict[str, Any]
    model_config: DebertaConfig
    objective: Objective
    layouts: tuple[Layout, ...]
    network_flops: tuple[ForwardFlops, ...]
    deepspeed_notes: tuple[str, ...] = ()

    @property
    def networks(self) -> tuple[NetworkPlan, ...]:
        """In the order in which a step takes them."""
        parts = zip(self.layouts, self.network_flops, strict=True)
        return tuple(NetworkPlan(self.config, self.deepspeed, layout, flops) for layout, flops in parts)

    @property
    def main(self) -> NetworkPlan:
        """The network whose weights are the run's result."""
        return self.networks[self.objective.main]

    @property
    def layout(self) -> Layout:
        """Layout of the network whose weights are the run's result."""
        return self.layouts[self.objective.main]

    @property
    def flops(self) -> ForwardFlops:
        """FLOPs of the network whose weights are the run's result."""
        return self.network_flops[self.objective.main]

    @property
    def world_size(self) -> int:
        """Processes."""
        return self.config.parallel.world_size

    @property
    def training_flops(self) -> float:
        """FLOPs per token of all networks, forward and backward."""
        return sum(flops.training for flops in self.network_flops)

    @property
    def full_shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shape of every parameter of the run, by its name in a checkpoint."""
        return {layout.network.saved_name(name): shape for layout in self.layouts for name, shape in layout.full_shapes.items()}

    def flops_of_bucket(self, length: int) -> ForwardFlops:
        """The cost per token in a bucket's sequences of ``length`` tokens, which take less attention; of all networks."""
        found = [network_flops(self.config, network, length=length) for network in self.objective.networks]
        return ForwardFlops(by_layer=tuple(cost for flops in found for cost in flops.by_layer))


MakeObjective = Callable[[RunConfig, DebertaConfig], Objective]
"""(resolved configuration, model of ``[model]``) -> the objective of a run."""


def check_plan(config: RunConfig, *, world_size: int, make_objective: MakeObjective = masked_lm) -> Plan:
    """Checks sizes, model and DeepSpeed JSON. Reads no data file.

    Args:
        config: From ``load_config``; "auto" not yet resolved.
        world_size: Number of ranks; has to be the product of the parallel sizes.
        make_objective: Makes the objective from the resolved configuration and the model of ``[model]``.

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
    try:
        objective = make_objective(config, model_config)
        for network in objective.networks:
            _check_convolution(config, network.config)
        plan = plan_networks(config, ds.values, model_config=model_config, objective=objective)
    except ConfigError as error:
        raise ConfigError(f"{config.source}: {error}") from None
    return dataclasses.replace(plan, deepspeed_notes=ds.notes)


def plan_networks(config: RunConfig, deepspeed: dict[str, Any], *, model_config: DebertaConfig, objective: Objective) -> Plan:
    """Adds cost and layout of every network to a checked configuration.

    Args:
        config: The TOML with overrides, every "auto" resolved.
        deepspeed: The DeepSpeed JSON, every "auto" filled in.
        model_config: ``[model]`` resolved: preset or file, with overrides.
        objective: Networks whose stages are balanced by their own cost.

    Raises:
        ConfigError: a network cannot be divided like this, or tables of two do not fit (`check_folds`).
    """
    costs = tuple(network_flops(config, network) for network in objective.networks)
    found = zip(objective.networks, costs, strict=True)
    layouts = tuple(plan_layout(network, parallel=config.parallel, flops=cost) for network, cost in found)
    check_folds(objective, layouts)
    return Plan(config, deepspeed, model_config, objective, layouts, costs)


def _check_convolution(config: RunConfig, model_config: DebertaConfig) -> None:
    """With sequence parallelism the convolution reaches only the neighbouring ranks' tokens."""
    if not config.parallel.sequence_parallel:
        return
    size, taps = config.parallel.tensor_parallel_size, model_config.conv_kernel_size
    shortest = min(length for _, length in config.micro_batch_shapes)
    if (taps - 1) // 2 > shortest // size:
        raise ConfigError(
            f"parallel.sequence_parallel = true leaves {shortest // size} of {shortest} tokens on each of "
            f"parallel.tensor_parallel_size = {size} ranks, fewer than the {(taps - 1) // 2} beside a token that "
            f"model.conv_kernel_size = {taps} looks at; take fewer tensor ranks or longer sequences"
        )


def network_flops(config: RunConfig, network: TrainedNetwork, *, length: int | None = None) -> ForwardFlops:
    """A network's cost per token in sequences of ``length`` tokens, by default ``data.max_seq_length``."""
    length = config.data.max_seq_length if length is None else length
    sequences = {length: count for count, length in config.micro_batch_shapes}
    return network.flops(length=length, micro_batch_size=sequences[length])


def read_model_config(config: RunConfig) -> DebertaConfig:
    """The model that ``[model]`` describes.

    Raises:
        ConfigError: an unknown preset or field, or a missing or invalid file.
    """
    section = config.model
    try:
        if section.preset is not None:
            return preset(section.preset, **section.overrides)
        assert section.config is not None, "exactly one of the two is given"
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
