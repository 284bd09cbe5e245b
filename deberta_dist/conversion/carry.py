"""The tokenizer of a conversion: found, checked against the model, written in the form of the target."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deberta_dist.conversion import files
from deberta_dist.conversion.output import OutputDirectory
from deberta_dist.conversion.source import SPM_NAME, Source
from deberta_dist.conversion.tokenizer_files import MASK_PROBE, compare, probe, tokenizer_texts
from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.errors import DataError
from deberta_dist.models.config import DebertaConfig

_CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "bpe_encoder.bin",
    SPM_NAME,
)


@dataclass
class TokenizerResult:
    """What was done about the tokenizer.

    Attributes:
        files: Written.
        sha256: Of the SentencePiece model, None without one.
        message: One sentence for the user and the model card.
        compared: Whether the exported tokenizer was compared with SentencePiece.
        differences: Texts that it splits differently.
    """

    files: list[str] = field(default_factory=list)
    sha256: str | None = None
    message: str = "No tokenizer was found; give --tokenizer spm.model."
    compared: bool = False
    differences: list[str] = field(default_factory=list)


def find_tokenizer(source: Source, *, given: Path | None, config: DebertaConfig) -> tuple[Tokenizer | None, str]:
    """The SentencePiece model that belongs to a checkpoint, and why there is none.

    Args:
        source: The checkpoint.
        given: By the user; otherwise the source's directory is searched, and where a run had it.
        config: The model.

    Raises:
        DataError: it is not one, another than the run used, or has more tokens than the model.
    """
    if given is not None:
        tokenizer = Tokenizer(given)
        if source.tokenizer_sha256 not in (None, tokenizer.sha256):
            raise DataError(
                f"--tokenizer {given} has SHA-256 {tokenizer.sha256[:12]}..., the run used "
                f"{source.tokenizer_sha256[:12]}...: give the file that the run was trained with"
            )
    else:
        try:
            tokenizer = _found(source)
        except DataError as error:
            return None, f"{error}; no tokenizer was written."
    if tokenizer is not None and tokenizer.num_tokens > config.vocab_size:
        raise DataError(
            f"{tokenizer.path} has {tokenizer.num_tokens} tokens, the model {config.vocab_size}: it is another model's"
        )
    return tokenizer, TokenizerResult().message


def _found(source: Source) -> Tokenizer | None:
    if files.has(source.directory, SPM_NAME):
        return Tokenizer(files.inside(source.directory, SPM_NAME))
    for path in source.tokenizer_hints:
        if path.is_file() and (tokenizer := Tokenizer(path)).sha256 == source.tokenizer_sha256:
            return tokenizer
    return None


def write_tokenizer(
    output: OutputDirectory,
    source: Source,
    *,
    tokenizer: Tokenizer | None,
    message: str,
    for_huggingface: bool,
    is_given: bool,
    max_length: int,
) -> TokenizerResult:
    """Writes the tokenizer's files.

    Args:
        output: The conversion's directory.
        source: The checkpoint.
        tokenizer: From `find_tokenizer`.
        message: Likewise.
        for_huggingface: Write their files too.
        is_given: The user named the tokenizer, so the source's own files do not matter.
        max_length: Longest text that the model can take, tokens.
    """
    names = [] if is_given or source.is_file else [name for name in _CARRIED if files.has(source.directory, name)]
    if tokenizer is None:
        names = [name for name in names if name != SPM_NAME]
    if (for_huggingface and "tokenizer.json" in names) or (names and tokenizer is None):
        return _carry(output, source, names=names, tokenizer=tokenizer)
    result = TokenizerResult(message=message)
    if tokenizer is None:
        return result
    output.copy(tokenizer.path, name=SPM_NAME)
    result.files, result.sha256 = [SPM_NAME], tokenizer.sha256
    result.message = f"`{SPM_NAME}`, SHA-256 {tokenizer.sha256}."
    if not for_huggingface:
        return result
    try:
        texts = tokenizer_texts(tokenizer, max_length=max_length)
    except DataError as error:
        result.message += f" {error}: `AutoTokenizer` cannot load it, the sentencepiece library can."
        return result
    for name, text in texts.items():
        output.write_text(name, text)
        result.files.append(name)
    result.message += f" `{MASK_PROBE}` has the mask token in it, where SentencePiece sees ordinary characters."
    _compare(result, texts["tokenizer.json"], tokenizer=tokenizer)
    return result


def _carry(
    output: OutputDirectory, source: Source, *, names: Sequence[str], tokenizer: Tokenizer | None
) -> TokenizerResult:
    """The source's own files as they are, compared with its SentencePiece model where it has one."""
    result = TokenizerResult(files=list(names), message="The tokenizer files of the source, unchanged.")
    for name in names:
        output.copy(files.inside(source.directory, name), name=name)
    if tokenizer is not None and "tokenizer.json" in names:
        result.sha256 = tokenizer.sha256
        text = files.inside(source.directory, "tokenizer.json").read_text(encoding="utf-8", errors="replace")
        _compare(result, text, tokenizer=tokenizer)
        if result.differences:
            result.message += f" `--tokenizer {SPM_NAME}` writes new ones instead."
    return result


def _compare(result: TokenizerResult, tokenizer_json: str, *, tokenizer: Tokenizer) -> None:
    texts = probe(tokenizer)
    try:
        differences = compare(tokenizer_json, tokenizer=tokenizer, texts=texts)
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
