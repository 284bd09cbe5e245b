"""Everything that can be wrong with a run, found before any process group exists.

Every rank checks the same things from the same files, so either all go on or all stop, each by itself.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from deberta_dist.config import RunConfig, deepspeed_config, resolve
from deberta_dist.data.loader import MaskedLMData, check_vocabulary
from deberta_dist.data.masking import MaskingConfig
from deberta_dist.data.token_file import TokenFile
from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.errors import ConfigError, DataError
from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.presets import preset
from deberta_dist.training.flops import ForwardFlops, forward_flops
from deberta_dist.training.layout import Layout, plan_layout

# Masks of the held-out text never depend on the run's seed: losses of different runs are comparable.
EVALUATION_SEED = 20061


@dataclass(frozen=True)
class Plan:
    """A checked configuration with what follows from it.

    Attributes:
        config: Resolved.
        deepspeed: Filled-in DeepSpeed JSON.
        model_config: The model.
        flops: Its cost per token.
        layout: Who holds what.
    """

    config: RunConfig
    deepspeed: dict[str, Any]
    model_config: DebertaConfig
    flops: ForwardFlops
    layout: Layout


@dataclass(frozen=True)
class RunData:
    """The texts of a run, opened and checked against model and tokenizer.

    Attributes:
        train_file: Token file of ``train``.
        tokenizer: The run's tokenizer.
        train: Samples to train on.
        validation: Held-out samples, in file order.
    """

    train_file: TokenFile
    tokenizer: Tokenizer
    train: MaskedLMData
    validation: MaskedLMData


def check_plan(config: RunConfig, *, world_size: int) -> Plan:
    """Checks sizes, model and DeepSpeed JSON. Reads no data file.

    Raises:
        ConfigError: with file, key and value.
    """
    config = resolve(config, world_size)
    ds = deepspeed_config(config.run.deepspeed, config)
    model_config = read_model_config(config)
    if config.data.max_seq_length > model_config.max_position_embeddings:
        raise ConfigError(
            f"{config.source}: data.max_seq_length = {config.data.max_seq_length} is over "
            f"model.max_position_embeddings = {model_config.max_position_embeddings}"
        )
    flops = forward_flops(
        model_config,
        max_seq_length=config.data.max_seq_length,
        micro_batch_size=config.training.micro_batch_size,
        mask_probability=config.data.mask_probability,
    )
    try:
        layout = plan_layout(model_config, parallel=config.parallel, flops=flops)
    except ConfigError as error:
        raise ConfigError(f"{config.source}: {error}") from None
    return Plan(config=config, deepspeed=ds, model_config=model_config, flops=flops, layout=layout)


def read_model_config(config: RunConfig) -> DebertaConfig:
    """The model that ``[model]`` describes.

    Raises:
        ConfigError: an unknown preset or field, a missing or invalid file.
    """
    section = config.model
    try:
        if section.preset is not None:
            return preset(section.preset, **section.overrides)
        published = json.loads(Path(section.config).read_text(encoding="utf-8"))
        if not isinstance(published, dict):
            raise ConfigError(f"model.config = {section.config} is not a JSON object")
        return DebertaConfig.from_dict({**published, **section.overrides})
    except ConfigError as error:
        raise ConfigError(f"{config.source}, [model]: {error}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{config.source}: model.config = {section.config}: {error}") from None


def open_data(plan: Plan) -> RunData:
    """Opens tokenizer and token files and checks that they belong to each other and to the model.

    Raises:
        DataError: with the file and the key that names it.
    """
    data, seed = plan.config.data, plan.config.training.seed
    tokenizer = Tokenizer(data.tokenizer)
    check_vocabulary(tokenizer, plan.model_config.vocab_size)
    masking = MaskingConfig(
        method=data.masking, mask_probability=data.mask_probability, max_ngram=data.max_ngram
    )
    options = {"max_seq_length": data.max_seq_length, "masking": masking}
    train_file = TokenFile(data.train)
    return RunData(
        train_file=train_file,
        tokenizer=tokenizer,
        train=MaskedLMData(train_file, tokenizer, seed=seed, **options),
        validation=MaskedLMData(
            TokenFile(data.validation), tokenizer, seed=EVALUATION_SEED, shuffle=False, **options
        ),
    )



def open_initial_weights(plan: Plan) -> Callable[[str], Tensor] | None:
    """Full float32 tensors of ``training.init`` by published name; None where nothing is to be loaded.

    Raises:
        ConfigError: it is of another model.
        DataError: a file or a tensor is missing, or has another shape.
    """
    directory = plan.config.training.init
    if directory is None:
        return None
    try:
        published = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        weights = safe_open(directory / "model.safetensors", framework="pt")
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"training.init = {directory}: {error}") from None
    there, here = DebertaConfig.from_dict(published).to_dict(), plan.model_config.to_dict()
    if differing := sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key)):
        listing = ", ".join(f"{key} = {there.get(key)} there, {here.get(key)} here" for key in differing)
        raise ConfigError(f"{plan.config.source}: training.init = {directory} is another model: {listing}")
    names = set(weights.keys())
    for name, shape in plan.layout.full_shapes.items():
        if name not in names or tuple(weights.get_slice(name).get_shape()) != shape:
            raise DataError(f"training.init = {directory / 'model.safetensors'}: no tensor {name} of shape {list(shape)}")
    return lambda name: weights.get_tensor(name).float()
