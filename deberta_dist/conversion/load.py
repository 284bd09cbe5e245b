"""A model in memory out of a checkpoint of any form: for scripts, notebooks and tools, on one device."""

import warnings
from pathlib import Path

from deberta_dist.checkpoint.errors import CheckpointError
from deberta_dist.conversion.carry import find_tokenizer
from deberta_dist.conversion.meeting import to_published
from deberta_dist.conversion.source import open_source
from deberta_dist.conversion.weights import in_one_dtype, shorten
from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.models.initialisation import without_memory
from deberta_dist.models.masked_lm import DebertaForMaskedLM


def load_masked_lm(path: str | Path) -> tuple[DebertaForMaskedLM, Tokenizer | None]:
    """The masked language model of a checkpoint, in evaluation mode, with its enhanced mask decoder.

    Args:
        path: A run, one of its checkpoints or its ``weights/``; released weights; a Hugging Face directory.

    Returns:
        The model in the checkpoint's number format (of several the one that holds all, with a warning), and the SentencePiece model that lies with it, if one does.

    Raises:
        ConfigError: the configuration is refused.
        DataError: the checkpoint is refused, or is not a whole masked language model.
    """
    source = open_source(Path(path))
    found = to_published(source)
    with without_memory():
        model = DebertaForMaskedLM(found.config)
    names = [name for name, _ in model.named_parameters()]
    if missing := [name for name in names if name not in found.weights]:
        raise CheckpointError(f"{path} ({source.description}) is no whole masked language model: it lacks {shorten(missing)}")
    weights, mixed = in_one_dtype({name: found.weights[name] for name in names})
    if mixed:
        warnings.warn(f"{path}: {mixed}", stacklevel=2)
    state = {name: weights[name].read() for name in names}
    model.load_state_dict(state, strict=True, assign=True)
    tokenizer, _ = find_tokenizer(source, given=None, config=found.config)
    return model.eval(), tokenizer
