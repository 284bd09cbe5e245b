"""A vocabulary for a corpus: trained on a sample of it or taken as published, and judged on text of the corpus.

Called by tools/train_tokenizer.py.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from deberta_dist.corpus.documents import ReadOptions
from deberta_dist.corpus.sampling import sample_texts
from deberta_dist.data.new_file import new_file, refuse_existing
from deberta_dist.data.tokenizer import WORD_START, Tokenizer, clean_text, train_tokenizer
from deberta_dist.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How a tokenizer takes text.

    Attributes:
        num_documents: documents of the text.
        num_bytes: its bytes in UTF-8.
        num_words: its words, as white space separates them.
        num_characters: its characters once normalised, without white space.
        num_tokens: tokens it becomes.
        num_unknown_tokens: ``[UNK]`` among them.
        num_unknown_characters: characters that are in them.
    """

    num_documents: int
    num_bytes: int
    num_words: int
    num_characters: int
    num_tokens: int
    num_unknown_tokens: int
    num_unknown_characters: int

    def __str__(self) -> str:
        """The four measures, for people."""
        covered = 1 - self.num_unknown_characters / max(1, self.num_characters)
        return (
            f"{covered:.4%} of {self.num_characters:,} characters covered, "
            f"{self.num_unknown_tokens / max(1, self.num_tokens):.4%} of {self.num_tokens:,} tokens are [UNK], "
            f"{self.num_tokens / max(1, self.num_words):.3f} tokens per word, "
            f"{self.num_bytes / max(1, self.num_tokens):.2f} bytes per token "
            f"({self.num_documents:,} documents, {self.num_bytes / 1e6:,.1f} MB)"
        )


def measure(tokenizer: Tokenizer, texts: Iterable[str]) -> Fit:
    """How a tokenizer takes texts."""
    documents = num_bytes = words = characters = tokens = unknown_tokens = unknown_characters = 0
    for text in map(clean_text, texts):
        ids = tokenizer.encode(text)
        documents += 1
        num_bytes += len(text.encode())
        words += len(text.split())
        tokens += len(ids)
        surfaces = tokenizer.surfaces(text)
        characters += _num_characters("".join(surfaces))
        unknown = [surface for i, surface in zip(ids, surfaces, strict=True) if i == tokenizer.unk_id]
        unknown_tokens += len(unknown)
        unknown_characters += _num_characters("".join(unknown))
    return Fit(
        num_documents=documents,
        num_bytes=num_bytes,
        num_words=words,
        num_characters=characters,
        num_tokens=tokens,
        num_unknown_tokens=unknown_tokens,
        num_unknown_characters=unknown_characters,
    )


def _num_characters(surface: str) -> int:
    return len(surface) - surface.count(WORD_START)


def train_vocabulary(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    options: ReadOptions,
    vocab_size: int,
    max_bytes: int | None,
) -> Fit:
    """Trains a vocabulary on an even sample of the inputs and measures it on the 2% of the sample kept apart.

    Args:
        inputs: as for ``list_inputs``.
        output: model file to make.
        options: as for ``read_documents``.
        vocab_size: as for ``train_tokenizer``.
        max_bytes: as for ``sample_texts``; the sample is held in memory.

    Returns:
        The measures on the documents kept apart; of a small input there may be none.

    Raises:
        ConfigError: as ``train_tokenizer`` and ``sample_texts``.
        DataError: ``output`` exists; or as ``train_tokenizer`` and ``sample_texts``.
    """
    refuse_existing(output)
    held_out: list[str] = []

    def to_train_on() -> Iterator[str]:
        for text, is_held_out in sample_texts(inputs, options=options, max_bytes=max_bytes):
            if is_held_out:
                held_out.append(text)
            else:
                yield text

    train_tokenizer(to_train_on(), output, vocab_size=vocab_size)
    return measure(Tokenizer(output), held_out)


def take_published(
    inputs: Sequence[str | Path], output: str | Path, *, model: str | Path, options: ReadOptions, max_bytes: int | None
) -> Fit:
    """Copies a published model, byte for byte, and measures it on an even sample of the inputs.

    Args:
        inputs, options, max_bytes: as for ``train_vocabulary``.
        output: model file to make.
        model: the published one.

    Returns:
        The measures on all documents of the sample.

    Raises:
        ConfigError: as ``sample_texts``.
        DataError: ``output`` exists; ``model`` is not a model of DeBERTa (as ``Tokenizer``); or as ``sample_texts``.
    """
    refuse_existing(output)
    tokenizer = Tokenizer(model)
    texts = sample_texts(inputs, options=options, max_bytes=max_bytes)
    fit = measure(tokenizer, (text for text, _ in texts))
    with new_file(output) as file:
        file.write(Path(model).read_bytes())
    if Tokenizer(output).sha256 != tokenizer.sha256:
        raise DataError(f"{model} changed while it was copied: {output} is not what was measured")
    return fit
