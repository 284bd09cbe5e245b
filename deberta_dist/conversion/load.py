"""Loads a model from a checkpoint of any format on one device, for scripts, notebooks and tools."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from torch import nn

from deberta_dist.checkpoint.errors import CheckpointError
from deberta_dist.conversion.canonical import CanonicalCheckpoint, as_asked, require_decoder, to_canonical
from deberta_dist.conversion.find_tokenizer import find_tokenizer, unread_settings
from deberta_dist.conversion.official import GENERATORS_HEAD, is_discriminator
from deberta_dist.conversion.options import CheckpointReadOptions
from deberta_dist.conversion.source import CheckpointSource, open_source
from deberta_dist.conversion.weights import in_one_dtype, shorten
from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.models.encoder import ModelWithBackbone
from deberta_dist.models.heads import MASKED_LM, model_with_head
from deberta_dist.models.initialisation import without_memory

M = TypeVar("M", bound=nn.Module)


def load_masked_lm(
    path: str | Path,
    *,
    dtype: str | None = None,
    allow_unmapped: Sequence[str] = (),
    prefix: str | None = None,
    decoder: str | None = None,
) -> tuple[ModelWithBackbone, Tokenizer | None]:
    """The masked language model of a checkpoint, in evaluation mode, with the decoder that it was trained with.

    Args:
        path: A run, one of its checkpoints or its ``weights/``; released weights; a Hugging Face directory.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None keeps what the checkpoint has.
        allow_unmapped: Patterns of keys that nothing explains and that may be left out, as in file names.
        prefix: What stands before the model's names in the file; None: nothing, or wrappers that are known.
        decoder: "emd" or "plain", where the checkpoint does not say it: one that Hugging Face's classes have written.

    Returns:
        The model in that number format (of several, and without ``dtype``, the one that holds all, with a warning), and the
        SentencePiece model that lies with it, if one does.

    Raises:
        ConfigError: the configuration or an option is refused, or nothing says how to decode.
        DataError: the checkpoint is refused, or is not a whole masked language model.
    """
    options = CheckpointReadOptions(dtype=dtype, allow_unmapped=tuple(allow_unmapped), prefix=prefix, decoder=decoder)
    source = open_source(Path(path), options=options)
    found = as_asked(to_canonical(source), options)
    require_decoder(found, where=path)
    if is_discriminator(found.weights):
        warnings.warn(f"{path}: {GENERATORS_HEAD}", stacklevel=2)
    with without_memory():
        model = model_with_head(found.config, MASKED_LM)
    names = [name for name, _ in model.named_parameters()]
    if missing := [name for name in names if name not in found.weights]:
        raise CheckpointError(
            f"{path} ({source.description}) is not a complete masked language model: it lacks {shorten(missing)}"
        )
    return _filled(model, found, where=path), _tokenizer(found, source)


def load_with_head(
    path: str | Path, *, dtype: str | None = None, allow_unmapped: Sequence[str] = (), prefix: str | None = None
) -> tuple[ModelWithBackbone, Tokenizer | None]:
    """The model of a checkpoint with a head of fine-tuning (`models.heads`), in evaluation mode.

    Args:
        path: A fine-tuned model's ``weights/``; a Hugging Face directory; files of the published code.
        dtype: See `load_masked_lm`.
        allow_unmapped, prefix: As for `load_masked_lm`.

    Returns:
        The model in that number format (see `load_masked_lm`), and the SentencePiece model that lies with it, if one does.

    Raises:
        ConfigError: the configuration or an option is refused.
        DataError: the checkpoint is refused, or has no such head.
    """
    options = CheckpointReadOptions(dtype=dtype, allow_unmapped=tuple(allow_unmapped), prefix=prefix)
    source = open_source(Path(path), options=options)
    found = as_asked(to_canonical(source), options)
    if not found.head:
        raise CheckpointError(f"{path} ({source.description}) has no head of fine-tuning")
    with without_memory():
        model = model_with_head(found.config, found.head, num_labels=found.num_labels)
    if not found.config.position_biased_input:
        # Only masked language modelling uses the table, and most files lack it.
        model.deberta.embeddings.position_embeddings = None
    return _filled(model, found, where=path), _tokenizer(found, source)


def _filled(model: M, found: CanonicalCheckpoint, *, where: object) -> M:
    """A model without memory with its weights out of a checkpoint that has them all, in evaluation mode."""
    weights, mixed = in_one_dtype({name: found.weights[name] for name, _ in model.named_parameters()})
    if mixed:
        warnings.warn(f"{where}: {mixed}", stacklevel=3)
    model.load_state_dict({name: weight.read() for name, weight in weights.items()}, strict=True, assign=True)
    return model.eval()


def _tokenizer(found: CanonicalCheckpoint, source: CheckpointSource) -> Tokenizer | None:
    """The SentencePiece model that lies with a checkpoint; warns where its files say more than that."""
    tokenizer, _ = find_tokenizer(source, given=None, config=found.config)
    for note in unread_settings(source):
        warnings.warn(note, stacklevel=3)
    return tokenizer
