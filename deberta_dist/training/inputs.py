"""What a run reads: token files, tokenizer and initial weights, opened and checked before any process group exists."""

import json
from collections.abc import Callable
from dataclasses import dataclass

from safetensors import SafetensorError, safe_open
from torch import Tensor

from deberta_dist.data.loader import MaskedLMData, check_vocabulary
from deberta_dist.data.masking import MaskingConfig
from deberta_dist.data.token_file import TokenFile
from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.errors import ConfigError, DataError
from deberta_dist.models.config import DebertaConfig
from deberta_dist.planning.plan import Plan

# Masks of the held-out text never depend on the run's seed: losses of different runs are comparable.
EVALUATION_SEED = 20061


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
