"""``model.vocab_size = "auto"``: how many rows the word embeddings get, as a number, before anything is planned.

Asked by training and by ``tools/plan_layout.py``. Every rank finds the same number in the same files.
"""

from pathlib import Path

from deberta_dist.checkpoint.compatible import compatible
from deberta_dist.checkpoint.errors import CheckpointError
from deberta_dist.checkpoint.find import CHECKPOINTS_NAME, checkpoints
from deberta_dist.checkpoint.manifest import Manifest, read_manifest
from deberta_dist.config import Model, RunConfig
from deberta_dist.conversion.source import open_source
from deberta_dist.data.loader import rows_for
from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.errors import ConfigError
from deberta_dist.models.presets import PRESETS
from deberta_dist.values import AUTO

_KEY = "vocab_size"
_WORD_TABLE = ("word_embeddings.weight", "word_embeddings._weight")


def resolve_vocabulary(config: RunConfig) -> RunConfig:
    """The same run with a number for ``model.vocab_size``.

    A given number stays, and that of a ``model.config``. ``"auto"``, and a preset without a number, become in this order:
    the rows of the checkpoints that the run continues from, those of ``training.init``, the tokens of ``data.tokenizer``
    rounded up. A preset's own number stays where it is no more than that and no less than the tokens. Where
    none of these files exists yet, a preset's own number stays and the configuration is returned unchanged.

    Raises:
        ConfigError: ``"auto"`` and none of the files exists; or the run continues with another tokenizer.
        DataError: the tokenizer cannot be read.
        CheckpointError: ``training.init`` cannot be read.
    """
    asked = config.model.overrides.get(_KEY)
    if (asked is not None and asked != AUTO) or (asked is None and config.model.preset is None):
        return config
    rows = _rows(config, preset=PRESETS.get(config.model.preset) if asked is None else None)
    if rows is None and asked is None:
        return config
    if rows is None:
        init = config.training.init
        absent = f"data.tokenizer = {config.data.tokenizer}" if init is None else f"training.init = {init}"
        raise ConfigError(
            f'{config.source}: model.{_KEY} = "auto" follows from {absent}, which does not exist: to plan without it, give a '
            f"number, such as --model.{_KEY} 128128 for 128,000 pieces and [MASK]"
        )
    model = Model(preset=config.model.preset, config=config.model.config, **{**config.model.overrides, _KEY: rows})
    return config.model_copy(update={"model": model})


def expects_vocabulary(config: RunConfig) -> bool:
    """Whether ``resolve_vocabulary`` will find another number once the run's files are there."""
    return config.model.preset is not None and _KEY not in config.model.overrides


def _rows(config: RunConfig, *, preset: object | None) -> int | None:
    tokenizer, init = config.data.tokenizer, config.training.init
    if config.checkpoint.resume != "never" and (manifest := _manifest_of_run(config.run.directory)) is not None:
        if (
            tokenizer.exists()
        ):  # compared first: the message for a larger one would say to raise a number that is the checkpoint's
            sha256 = Tokenizer(tokenizer).sha256
            compatible(manifest, model_config=manifest.model_config, tokenizer_sha256=sha256)
        return manifest.model_config[_KEY]
    if init is not None:
        return _rows_of_init(init) if init.exists() else None
    if not tokenizer.exists():
        return None
    num_tokens = Tokenizer(tokenizer).num_tokens
    own = None if preset is None else preset.vocab_size
    return own if own is not None and num_tokens <= own <= rows_for(num_tokens) else rows_for(num_tokens)


def _manifest_of_run(directory: Path) -> Manifest | None:
    """Of the newest checkpoint that has one; which of them is whole is found out later, and all are of one model."""
    for path in checkpoints(directory / CHECKPOINTS_NAME):
        try:
            manifest = read_manifest(path)
        except CheckpointError:
            continue
        if isinstance(manifest.model_config.get(_KEY), int):
            return manifest
    return None


def _rows_of_init(path: Path) -> int:
    weights = open_source(path, verify=False).weights
    shapes = [weight.shape for key, weight in weights.items() if key.endswith(_WORD_TABLE) and len(weight.shape) == 2]
    if not shapes:
        raise CheckpointError(f"training.init = {path} has no word embeddings: it is no DeBERTa")
    return shapes[0][0]
