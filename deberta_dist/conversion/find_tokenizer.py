"""Finds the tokenizer that belongs to a checkpoint: its class, its files, and the SentencePiece model among them."""

from pathlib import Path
from typing import Any

from deberta_dist.conversion import files, huggingface
from deberta_dist.conversion.source import CONFIG_NAMES, SPM_NAME, SUFFIXES, CheckpointSource
from deberta_dist.conversion.tokenizer_names import CONFIG_NAME, is_tokenizer_file, missing_files, stem_of
from deberta_dist.conversion.tokenizer_settings import read_settings
from deberta_dist.conversion.weights import shorten
from deberta_dist.data.sentencepiece_model import parse_model
from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.errors import DataError
from deberta_dist.models.config import DebertaConfig

NONE_FOUND = "No tokenizer was found; give --tokenizer spm.model."
DEFAULT_CLASSES = {huggingface.V1: "DebertaTokenizer", huggingface.V2: "DebertaV2Tokenizer"}
# Classes of which spm.model is the vocabulary, or may be: the last two take any tokenizer.json.
_OTHERS = (*SUFFIXES, ".md", *CONFIG_NAMES)
_OF_SPM = ("DebertaV2", "PreTrained", "TokenizersBackend")


def find_tokenizer(source: CheckpointSource, *, given: Path | None, config: DebertaConfig) -> tuple[Tokenizer | None, str]:
    """The SentencePiece model that belongs to a checkpoint, and why there is none.

    Args:
        source: Its directory, and the run it belongs to, are searched.
        given: By the user; otherwise the source's directory is searched, and where a run had it.
        config: Its `vocab_size` must hold the tokenizer's ids.

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
            # Reports and cards are published: they name no folder of this machine.
            return None, f"{str(error).replace(str(source.directory / SPM_NAME), SPM_NAME)}."
    if tokenizer is not None and tokenizer.num_tokens > config.vocab_size:
        raise DataError(
            f"{tokenizer.path} has {tokenizer.num_tokens} tokens, the model {config.vocab_size}: it is another model's"
        )
    return tokenizer, NONE_FOUND


def _found(source: CheckpointSource) -> Tokenizer | None:
    own = own_spm(source)
    if own is not None:
        return Tokenizer(own)
    for path in source.tokenizer_hints:
        if path.is_file() and (tokenizer := Tokenizer(path)).sha256 == source.tokenizer_sha256:
            return tokenizer
    if (names := tokenizer_names(source)) and (other := class_of(source)):
        raise DataError(
            f"its tokenizer is {other} ({shorten(names)}), and training here reads SentencePiece models of DeBERTa's make "
            f"alone; give --tokenizer {SPM_NAME} if the model was trained with one"
        )
    return None


def is_of_spm(source: CheckpointSource) -> bool:
    """Whether SentencePiece is what the checkpoint's own library takes for its tokenizer, if it says so."""
    stated = _stated_class(source)
    return not stated or stem_of(stated) in _OF_SPM


def own_spm(source: CheckpointSource) -> Path | None:
    """The SentencePiece model that lies with a checkpoint, unless its own library would take another vocabulary.

    Raises:
        CheckpointError: a file is damaged or a link that leads elsewhere.
    """
    if not files.has(source.directory, SPM_NAME):
        return None
    if not is_of_spm(source):
        return None
    # Where nothing is stated, v1's class takes its own files if they are there.
    default = class_of(source)
    takes_its_own = not _stated_class(source) and default == DEFAULT_CLASSES[huggingface.V1]
    if takes_its_own and not missing_files(default, set(_names_in(source))):
        return None
    return files.inside(source.directory, SPM_NAME)


def _stated_class(source: CheckpointSource) -> str:
    config = json_of(source, CONFIG_NAME)
    named = config.get("tokenizer_class") or source.config.get("tokenizer_class")
    return named if isinstance(named, str) else ""


def class_of(source: CheckpointSource) -> str:
    """Class that Hugging Face's library takes for a checkpoint; empty where the checkpoint is none of theirs."""
    kind = source.config.get("model_type") or huggingface.V2
    default = DEFAULT_CLASSES.get(str(kind), "") if source.format is huggingface.FORMAT else ""
    return _stated_class(source) or default


def json_of(source: CheckpointSource, name: str) -> dict[str, Any]:
    """A JSON file of a checkpoint, empty where there is none. Raises CheckpointError."""
    return files.read_json(files.inside(source.directory, name)) if files.has(source.directory, name) else {}


def _names_in(source: CheckpointSource) -> list[str]:
    return sorted(path.name for path in source.directory.iterdir() if not path.is_dir())


def tokenizer_names(source: CheckpointSource) -> list[str]:
    """Names of the tokenizer's files: those that are known, and those that its configuration names."""
    named: set[str] = set()

    def collect(value: object) -> None:
        if isinstance(value, str):
            # Code of its own is named as module.Class.
            named.update((value, value.partition(".")[0] + ".py"))
        elif isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                collect(item)

    collect(json_of(source, CONFIG_NAME))
    # What belongs to the model or to the conversion is not the tokenizer's, whatever its configuration says.
    named = {name for name in named if not name.endswith(_OTHERS)}
    return [name for name in _names_in(source) if is_tokenizer_file(name) or name in named]


def unread_settings(source: CheckpointSource) -> list[str]:
    """What the source's files do to text or ids that a SentencePiece model alone does not, for who reads only that."""
    changes = read_settings(source.directory).changes() if own_spm(source) is not None else []
    if not changes:
        return []
    said = f"the tokenizer's files of {source.path} say {'; '.join(changes)}"
    return [f"{said}: {SPM_NAME} alone, which is read here, does not do it"]


def is_sentencepiece(source: CheckpointSource) -> bool:
    """Whether spm.model is a sound model, if of another make than DeBERTa's."""
    try:
        return bool(parse_model((source.directory / SPM_NAME).read_bytes()).pieces)
    except (DataError, OSError):
        return False
