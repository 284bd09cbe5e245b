"""What a start would refuse, warn of or resume from, as far as the run's files exist: for dry runs and planning.

Reads what a start reads and writes nothing. Checks of the machine (GPUs, compilers) are left to the start.
"""

from deberta_dist.checkpoint.find import newest_complete
from deberta_dist.checkpoint.reader import CheckpointReader
from deberta_dist.data.loader import check_vocabulary, unused_rows
from deberta_dist.data.token_corpus import open_corpus
from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.planning.plan import Plan
from deberta_dist.planning.reading import training_paths
from deberta_dist.training.inputs import RunData, open_data, open_initial_weights
from deberta_dist.training.length import learning_rates, refuse_finished
from deberta_dist.training.metrics import describe_learning_rates
from deberta_dist.training.resume import changed_settings, check_checkpoint, checkpoint_directory, refuse_to_begin
from deberta_dist.training.vocabulary import expects_vocabulary


def preview_start(plan: Plan) -> list[str]:
    """Lines on how the run would start. Text is looked at only where that writes nothing.

    Raises:
        ConfigError, DataError, CheckpointError: as a start does.
    """
    refuse_finished(plan)
    refuse_to_begin(plan)
    tokenizer = _tokenizer(plan)
    data = None if tokenizer is None else _data(plan, tokenizer)
    lines: list[str] = []
    reader = None
    if plan.config.checkpoint.resume != "never":
        reader = newest_complete(
            checkpoint_directory(plan), on_skip=lambda text: lines.append(f"warning: {text}"), verify=False
        )
    sha256 = None if tokenizer is None else tokenizer.sha256
    check_checkpoint(reader, plan=plan, tokenizer_sha256=sha256, data=data)
    lines += _vocabulary_lines(plan, tokenizer)
    return lines + (_weights_lines(plan, sha256) if reader is None else _continuation(plan, reader, data))


def preview_model(plan: Plan) -> list[str]:
    """Lines on tokenizer and initial weights alone, for a search of layouts.

    Raises:
        ConfigError, DataError, CheckpointError: as a start does.
    """
    tokenizer = _tokenizer(plan)
    return _vocabulary_lines(plan, tokenizer) + _weights_lines(plan, None if tokenizer is None else tokenizer.sha256)


def _tokenizer(plan: Plan) -> Tokenizer | None:
    path = plan.config.data.tokenizer
    if not path.exists():
        return None
    tokenizer = Tokenizer(path)
    check_vocabulary(tokenizer, plan.model_config.vocab_size)
    return tokenizer


def _data(plan: Plan, tokenizer: Tokenizer) -> RunData | None:
    """All texts as a start opens them; None where some are missing, or where their list of sequences would be written."""
    data = plan.config.data
    paths = [*training_paths(plan.config).values(), data.validation]
    if data.bucket_lengths is None and all(path.exists() for path in paths):
        return open_data(plan)
    for path in paths:
        if path.exists():
            open_corpus(path).require_tokenizer(tokenizer)
    return None


def _vocabulary_lines(plan: Plan, tokenizer: Tokenizer | None) -> list[str]:
    rows, config = plan.model_config.vocab_size, plan.config
    if expects_vocabulary(config):
        source = "data.tokenizer" if config.training.init is None else "training.init"
        return [f"model.vocab_size = {rows} is the preset's: {source} is not there yet, and the start takes the number from it"]
    unused = None if tokenizer is None else unused_rows(tokenizer, rows)
    return [] if unused is None else [f"warning: {unused}"]


def _weights_lines(plan: Plan, tokenizer_sha256: str | None) -> list[str]:
    path = plan.config.training.init
    if path is not None and not path.exists():
        return [f"training.init = {path} does not exist yet"]
    weights = open_initial_weights(plan, tokenizer_sha256=tokenizer_sha256, verify=False)
    return [] if weights is None else list(weights.notes)


def _continuation(plan: Plan, reader: CheckpointReader, data: RunData | None) -> list[str]:
    manifest = reader.manifest
    lines = [f"continues from {reader.directory} (step {manifest.step})"]
    if data is not None:
        lines += [f"  changed since: {line}" for line in changed_settings(plan, data, manifest=manifest)]
    rates = learning_rates(plan, manifest)
    return lines if rates is None else [*lines, describe_learning_rates(manifest.step, rates)]
