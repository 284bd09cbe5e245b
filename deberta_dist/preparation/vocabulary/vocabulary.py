"""Makes a vocabulary: trained on a sample of the corpus or copied as published, then measured on held-out text.

Called by tools/train_tokenizer.py.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from deberta_dist.data.tokenizer import Tokenizer, clean_text, sentencepiece_version, train_tokenizer
from deberta_dist.data.training_words import WORD_START, TrainingWords
from deberta_dist.data.vocabulary_options import VocabularyOptions
from deberta_dist.errors import DataError, encodable
from deberta_dist.files.atomic import new_file, refuse_existing
from deberta_dist.preparation.reading.documents import TextReadOptions
from deberta_dist.preparation.reading.inputs import PassedOver, find_inputs
from deberta_dist.preparation.vocabulary.sampling import sample_files


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How a tokenizer takes text.

    Attributes:
        num_documents: documents that were tokenized.
        num_bytes: its bytes in UTF-8.
        num_words: its words, as white space separates them.
        num_characters: its characters once normalised, without white space.
        num_tokens: tokens that the documents become.
        num_unknown_tokens: ``[UNK]`` among them.
        num_byte_tokens: single bytes among them, of models with byte fallback.
        num_unknown_characters: characters that are in ``[UNK]`` or spelled in bytes.
    """

    num_documents: int
    num_bytes: int
    num_words: int
    num_characters: int
    num_tokens: int
    num_unknown_tokens: int
    num_byte_tokens: int
    num_unknown_characters: int

    def __str__(self) -> str:
        """The measures, for people."""
        in_bytes = f"{self.num_byte_tokens / max(1, self.num_tokens):.4%} are bytes, " if self.num_byte_tokens else ""
        covered = 1 - self.num_unknown_characters / max(1, self.num_characters)
        return (
            f"{covered:.4%} of {self.num_characters:,} characters covered, "
            f"{self.num_unknown_tokens / max(1, self.num_tokens):.4%} of {self.num_tokens:,} tokens are [UNK], {in_bytes}"
            f"{self.num_tokens / max(1, self.num_words):.3f} tokens per word, "
            f"{self.num_bytes / max(1, self.num_tokens):.2f} bytes per token "
            f"({self.num_documents:,} documents, {self.num_bytes / 1e6:,.1f} MB)"
        )


def measure(tokenizer: Tokenizer, texts: Iterable[str]) -> Fit:
    """How a tokenizer takes texts."""
    documents = num_bytes = words = characters = tokens = unknown_tokens = byte_tokens = unknown_characters = 0
    for text in map(clean_text, texts):
        ids = tokenizer.encode(text)
        documents += 1
        num_bytes += len(text.encode())
        words += len(text.split())
        tokens += len(ids)
        surfaces = tokenizer.surfaces(text)
        characters += _num_characters("".join(surfaces))
        for i, surface in zip(ids, surfaces, strict=True):
            if i == tokenizer.unk_id or i in tokenizer.byte_ids:
                unknown_tokens += i == tokenizer.unk_id
                byte_tokens += i in tokenizer.byte_ids
                unknown_characters += _num_characters(surface)
    return Fit(
        num_documents=documents,
        num_bytes=num_bytes,
        num_words=words,
        num_characters=characters,
        num_tokens=tokens,
        num_unknown_tokens=unknown_tokens,
        num_byte_tokens=byte_tokens,
        num_unknown_characters=unknown_characters,
    )


def _num_characters(surface: str) -> int:
    return len(surface) - surface.count(WORD_START)


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A tokenizer that was made, and how.

    Attributes:
        tokenizer: The new or published tokenizer, loaded from its file.
        fit: How it takes text that it was not trained on; of a small input there may be none.
        words: The words it was trained on; None where it was taken as published.
        passed_over: What lay beside the inputs and was not read.
    """

    tokenizer: Tokenizer
    fit: Fit
    words: TrainingWords | None
    passed_over: PassedOver


def report_path(output: str | Path) -> Path:
    """Where the report about a tokenizer lies: ``spm.model.report.md`` for ``spm.model``."""
    return Path(f"{output}.report.md")


def train_vocabulary(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    reading: TextReadOptions,
    options: VocabularyOptions,
    vocab_size: int,
    max_bytes: int | None,
) -> Vocabulary:
    """Trains a vocabulary on an even sample of the inputs and measures it on the 2% of the sample kept apart.

    Args:
        inputs: as for ``list_inputs``.
        output: model file to make; the report is written beside it.
        reading: as for ``read_documents``.
        options, vocab_size: as for ``train_tokenizer``.
        max_bytes: as for ``sample_files``.

    Raises:
        ConfigError: as ``train_tokenizer`` and ``sample_files``.
        DataError: ``output`` or its report exists; or as ``train_tokenizer`` and ``sample_files``.
    """
    _refuse_existing(output)
    listing = find_inputs(inputs, format=reading.format)
    held_out: list[str] = []

    def to_train_on() -> Iterator[str]:
        for text, is_held_out in sample_files(listing.files, options=reading, max_bytes=max_bytes):
            if is_held_out:
                held_out.append(text)
            else:
                yield text

    words = train_tokenizer(to_train_on(), output, vocab_size=vocab_size, options=options)
    tokenizer = Tokenizer(output)
    cut = f"{words.num_cut_runs:,} runs without white space, of {words.num_cut_characters:,} characters together"
    lines = (
        ("trained by", f"sentencepiece {sentencepiece_version()}"),
        ("vocab-size", f"{vocab_size:,}"),
        ("character-coverage", str(options.character_coverage)),
        ("byte-fallback", "yes" if options.byte_fallback else "no"),
        ("user-defined-symbols", _in_code(options.user_defined_symbols)),
        ("normalization-rule", options.normalization_rule),
        ("max-run-characters", f"{options.max_run_characters:,}"),
        ("cut because they were longer", cut if words.num_cut_runs else "none"),
        ("words", f"{sum(words.counts.values()):,}, {len(words.counts):,} different ones"),
    )
    made = Vocabulary(tokenizer=tokenizer, fit=measure(tokenizer, held_out), words=words, passed_over=listing.passed_over)
    _write_report(output, made=made, inputs=inputs, lines=lines)
    return made


def take_published(
    inputs: Sequence[str | Path], output: str | Path, *, model: str | Path, reading: TextReadOptions, max_bytes: int | None
) -> Vocabulary:
    """Copies a published model, byte for byte, and measures it on an even sample of the inputs.

    Args:
        inputs, reading, max_bytes: as for ``train_vocabulary``.
        output: model file to make; the report is written beside it.
        model: path of the published ``spm.model``.

    Returns:
        The model, with its measures on all documents of the sample.

    Raises:
        ConfigError: as ``sample_files``.
        DataError: ``output`` or its report exists; ``model`` is not a model of DeBERTa (as ``Tokenizer``); or as
            ``sample_files``.
    """
    _refuse_existing(output)
    tokenizer = Tokenizer(model)
    listing = find_inputs(inputs, format=reading.format)
    texts = sample_files(listing.files, options=reading, max_bytes=max_bytes)
    fit = measure(tokenizer, (text for text, _ in texts))
    with new_file(output) as file:
        file.write(Path(model).read_bytes())
    copy = Tokenizer(output)
    if copy.sha256 != tokenizer.sha256:
        raise DataError(f"{model} changed while it was copied: {output} is not what was measured")
    made = Vocabulary(tokenizer=copy, fit=fit, words=None, passed_over=listing.passed_over)
    _write_report(output, made=made, inputs=inputs, lines=(("copied from", _in_code([str(model)])),))
    return made


def _refuse_existing(output: str | Path) -> None:
    refuse_existing(output)
    refuse_existing(report_path(output))


def _write_report(
    output: str | Path, *, made: Vocabulary, inputs: Sequence[str | Path], lines: Sequence[tuple[str, str]]
) -> None:
    few = "no text: 2% of the documents are held out, and there are too few of them"
    rows = (
        ("tokens", f"{made.tokenizer.num_tokens:,} with [MASK]"),
        ("SHA-256", made.tokenizer.sha256),
        *lines,
        ("inputs", _in_code(map(str, inputs))),
        ("held-out text" if made.words else "text of the input", str(made.fit) if made.fit.num_documents else few),
    )
    table = "".join(f"| {name} | {value} |\n" for name, value in rows)
    with new_file(report_path(output)) as file:
        file.write(f"# {encodable(Path(output).name)}\n\n| | |\n|---|---|\n{table}".encode())


def _in_code(names: Iterable[str]) -> str:
    """Strings as a cell of a Markdown table; a hundred of them at most."""
    names = list(names)
    shown = ", ".join("`" + encodable(name).replace("|", "\\|") + "`" for name in names[:100])
    return (shown or "none") + (f" and {len(names) - 100:,} more" if len(names) > 100 else "")
