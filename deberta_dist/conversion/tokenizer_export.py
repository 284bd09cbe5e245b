"""Writes the tokenizer of a conversion in the target's form: copied unchanged, or rebuilt to split text alike."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from deberta_dist.conversion import files, huggingface
from deberta_dist.conversion.find_tokenizer import (
    DEFAULT_CLASSES,
    NONE_FOUND,
    class_of,
    is_of_spm,
    is_sentencepiece,
    json_of,
    own_spm,
    tokenizer_names,
)
from deberta_dist.conversion.output import OutputDirectory
from deberta_dist.conversion.source import SPM_NAME, CheckpointSource
from deberta_dist.conversion.tokenizer_files import compare, probe, tokenizer_texts
from deberta_dist.conversion.tokenizer_names import ADDED_NAME, CONFIG_NAME, JSON_NAME, TEMPLATES_NAME, missing_files
from deberta_dist.conversion.tokenizer_settings import TokenizerSettings, read_settings
from deberta_dist.conversion.weights import shorten
from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.errors import DataError
from deberta_dist.models.config import DebertaConfig


@dataclass
class TokenizerResult:
    """What was done about the tokenizer.

    Attributes:
        files: Names of the files written.
        sha256: Of the SentencePiece model, None without one.
        message: What the terminal and the model card say about it.
        compared: Whether the exported tokenizer was compared with SentencePiece.
        differences: Texts, of those compared, that the exported tokenizer splits into other ids.
    """

    files: list[str] = field(default_factory=list)
    sha256: str | None = None
    message: str = NONE_FOUND
    compared: bool = False
    differences: list[str] = field(default_factory=list)

    def add(self, *sentences: str) -> None:
        """Says more."""
        self.message = " ".join([self.message, *(f"{sentence.rstrip('.')}." for sentence in sentences if sentence)])


def write_tokenizer(
    output: OutputDirectory,
    source: CheckpointSource,
    *,
    tokenizer: Tokenizer | None,
    message: str,
    model_type: str,
    is_given: bool,
    config: DebertaConfig,
) -> TokenizerResult:
    """Writes the tokenizer's files: the source's own as they are, or new ones that split text alike.

    Args:
        output: Receives the tokenizer's files.
        source: Its own tokenizer files give the settings that SentencePiece does not hold.
        tokenizer: The SentencePiece model, from `find_tokenizer`; None where there is none.
        message: What `find_tokenizer` says of it.
        model_type: Of Hugging Face's configuration, whose files are written too; empty for other targets.
        is_given: The user named the tokenizer, so the source's own vocabularies do not matter.
        config: Its longest sequence limits the texts that are compared; tokens beyond its vocabulary are reported.

    Raises:
        CheckpointError: a file of the source is damaged, or a link that leads elsewhere.
    """
    # Of a file that the user named, the rest of its directory is not carried; a SentencePiece model there is its own.
    names = [] if source.is_file else tokenizer_names(source)
    settings = read_settings(source.directory) if tokenizer and is_of_spm(source) else TokenizerSettings()
    replaced = [name for name in names if is_given and name != SPM_NAME]
    if is_given:
        names = []
    elif tokenizer is None and SPM_NAME in names and not is_sentencepiece(source):
        names.remove(SPM_NAME)
    texts, why_not = {}, ""
    if model_type and tokenizer is not None and JSON_NAME not in names:
        try:
            texts = tokenizer_texts(tokenizer, settings, max_length=config.max_position_embeddings)
        except DataError as error:
            why_not = f"{error}: `AutoTokenizer` cannot load it, the sentencepiece library can"
    result = TokenizerResult(message=message)
    if texts:
        assert tokenizer is not None
        _write_new(output, source, result, texts=texts, names=names, tokenizer=tokenizer, settings=settings)
        ids = settings.with_ids(tokenizer.pieces(range(tokenizer.mask_id)))
        if lost := [token.content for number, token in ids.items() if number >= config.vocab_size]:
            result.add(f"The model has no rows for {shorten(lost)}: its vocab_size is {config.vocab_size}")
    elif names:
        _copy_files(output, source, result, names=names, model_type=model_type)
        # Whether training could read it matters to Hugging Face's classes only where they read the same file.
        is_theirs_too = SPM_NAME in names and own_spm(source) is not None
        if tokenizer is None and message != NONE_FOUND and (is_theirs_too or not model_type):
            result.add(message)
        if tokenizer is not None and JSON_NAME in names:
            text = files.inside(source.directory, JSON_NAME).read_text(encoding="utf-8", errors="replace")
            _compare(result, text, tokenizer=tokenizer, settings=settings)
            if result.differences:
                result.add(f"`--tokenizer {SPM_NAME}` writes new ones instead")
    if tokenizer is not None:
        result.sha256 = tokenizer.sha256
        if SPM_NAME not in result.files:
            output.copy(tokenizer.path, name=SPM_NAME)
            result.files = [SPM_NAME, *result.files]
        if result.message == message:
            result.message = f"`{SPM_NAME}`, SHA-256 {tokenizer.sha256}."
        result.add(why_not)
        if not model_type and (changes := settings.changes()):
            result.add(f"What reads `{SPM_NAME}` alone does not do what the source says: {'; '.join(changes)}")
    if replaced:
        result.add(f"It takes the place of the source's {shorten(replaced)}")
    return result


def _write_new(
    output: OutputDirectory,
    source: CheckpointSource,
    result: TokenizerResult,
    *,
    texts: dict[str, str],
    names: Sequence[str],
    tokenizer: Tokenizer,
    settings: TokenizerSettings,
) -> None:
    """New files for Hugging Face's classes, and whatever else of the source's they do not replace."""
    result.message = f"`{SPM_NAME}`, SHA-256 {tokenizer.sha256}."
    for name, text in texts.items():
        output.write_text(name, text)
    others = [name for name in names if name not in (*texts, SPM_NAME, ADDED_NAME)]
    for name in others:
        output.copy(files.inside(source.directory, name), name=name)
    result.files = [*texts, *others]
    mask = settings.roles["mask_token"].content
    result.add(f"`a {mask} b` has the mask token in it, where SentencePiece sees ordinary characters")
    if changes := settings.changes():
        result.add(f"`{JSON_NAME}` does what the source's files say: {'; '.join(changes)}")
    result.add(*settings.moved(tokenizer.pieces(range(tokenizer.mask_id))), *settings.untold)
    if others:
        result.add(f"Carried as they were: {shorten(others)}")
    _compare(result, texts[JSON_NAME], tokenizer=tokenizer, settings=settings)


def _copy_files(
    output: OutputDirectory, source: CheckpointSource, result: TokenizerResult, *, names: Sequence[str], model_type: str
) -> None:
    """The source's own files as they are."""
    name_of_class = class_of(source)
    default = DEFAULT_CLASSES[model_type or huggingface.V2]
    config = json_of(source, CONFIG_NAME)
    # Where nothing in these files says the class, the target's configuration would lead to another one.
    needs_class = name_of_class not in ("", default) and not config.get("tokenizer_class")
    for name in names:
        if name != CONFIG_NAME or not needs_class:
            output.copy(files.inside(source.directory, name), name=name)
    result.files = list(names)
    result.message = "The tokenizer files of the source, unchanged."
    if needs_class:
        text = json.dumps({**config, "tokenizer_class": name_of_class}, indent=2, ensure_ascii=False) + "\n"
        output.write_text(CONFIG_NAME, text)
        result.files = sorted({*names, CONFIG_NAME})
        result.add(f"Added to `{CONFIG_NAME}`: `tokenizer_class` = {name_of_class}, which the source's configuration says")
    if model_type or name_of_class:
        result.add(missing_files(name_of_class or default, set(names)))
    if (source.directory / TEMPLATES_NAME).is_dir():
        result.add(f"The folder {TEMPLATES_NAME} is not carried")
    if SPM_NAME in names and own_spm(source) is None:
        result.add(f"`{SPM_NAME}` is not what {name_of_class} reads")


def _compare(result: TokenizerResult, tokenizer_json: str, *, tokenizer: Tokenizer, settings: TokenizerSettings) -> None:
    texts = probe(tokenizer)
    try:
        differences = compare(tokenizer_json, tokenizer=tokenizer, texts=texts, settings=settings)
    except DataError as error:
        result.message += f" {error}."
        return
    result.compared = differences is not None
    result.differences = differences or []
    if differences is None:
        result.message += (
            " `tokenizer.json` was not compared with the SentencePiece model: the tokenizers library is not installed."
        )
    else:
        result.message += (
            f" `tokenizer.json` splits {len(texts) - len(differences)} of {len(texts)} difficult probe texts as the "
            "SentencePiece model does" + (f"; not {', '.join(map(ascii, differences))}." if differences else ".")
        )
