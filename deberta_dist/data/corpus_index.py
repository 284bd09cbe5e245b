"""``index.json``: lists the token files (shards) of a corpus directory, in order.

Preparation writes it last, ``token_corpus.py`` reads it::

    {"format_version": 1, "tokenizer_sha256": "...", "vocab_size": 128001, "source": "where the text came from",
     "files": [{"name": "00000.tokens", "num_tokens": ..., "num_documents": ..., "checksum": "..."}, ...]}
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deberta_dist.data.token_file import TokenFile
from deberta_dist.errors import DataError, printable
from deberta_dist.files.atomic import new_file
from deberta_dist.files.foreign import refuse_foreign
from deberta_dist.files.strict_json import loads

INDEX_NAME = "index.json"
INDEX_VERSION = 1
TOKENS_SUFFIX = ".tokens"
AGAIN = "copy the corpus again or prepare it again with tools/prepare_corpus.py"


@dataclass(frozen=True, kw_only=True)
class CorpusShard:
    """A token file of a corpus.

    Attributes:
        name: file name within the directory.
        num_tokens, num_documents: their numbers.
        checksum: SHA-256 of everything after the file's header, hexadecimal; the header has it, too.
    """

    name: str
    num_tokens: int
    num_documents: int
    checksum: str


@dataclass(frozen=True, kw_only=True)
class Index:
    """What ``index.json`` says.

    Attributes:
        tokenizer_sha256: SHA-256 of the tokenizer's model file.
        vocab_size: number of ids of that tokenizer.
        source: where the text came from.
        shards: the files, in order, at least one.
    """

    tokenizer_sha256: str
    vocab_size: int
    source: str
    shards: tuple[CorpusShard, ...]


def shard_of(file: TokenFile) -> CorpusShard:
    """A token file as an index names it."""
    return CorpusShard(
        name=file.path.name, num_tokens=file.num_tokens, num_documents=file.num_documents, checksum=file.checksum
    )


def write_index(directory: str | Path, names: Sequence[str], *, source: str = "") -> Path:
    """Writes ``index.json`` from the headers of the files, the last step of a preparation.

    Args:
        directory: where the token files lie.
        names: file names, each once, in the order in which they are read.
        source: where the text came from, for people.

    Returns:
        Its path.

    Raises:
        DataError: there is an index already; a file is missing, damaged or of another tokenizer than the first.
    """
    assert names and len(set(names)) == len(names)
    path = Path(directory) / INDEX_NAME
    first: TokenFile | None = None
    shards = []
    for name in names:
        file = TokenFile(Path(directory) / name)
        first = first or file
        if (file.tokenizer_sha256, file.vocab_size) != (first.tokenizer_sha256, first.vocab_size):
            raise DataError(
                f"{file.path} was made with the tokenizer {file.tokenizer_sha256[:12]}..., {names[0]} beside it with "
                f"{first.tokenizer_sha256[:12]}...: prepare them with one"
            )
        shards.append(shard_of(file))
    assert first is not None
    index = {
        "format_version": INDEX_VERSION,
        "tokenizer_sha256": first.tokenizer_sha256,
        "vocab_size": first.vocab_size,
        "source": source,
        "files": [asdict(shard) for shard in shards],
    }
    with new_file(path) as opened:
        opened.write((json.dumps(index, indent=1) + "\n").encode("ascii"))
    return path


def read_index(directory: Path) -> Index:
    """The index of a directory. Looks at none of the files.

    Raises:
        DataError: there is none, or it is damaged or of a newer format.
    """
    path = directory / INDEX_NAME
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(_without_index(directory)) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error
    refuse_foreign(content, path)
    try:
        raw = loads(content, any_text=True)
        version = raw["format_version"]
        index = _parse(raw) if version == INDEX_VERSION else None
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(f"{path} is damaged ({printable(str(error))}): {AGAIN}") from error
    if index is None:
        raise DataError(
            f"{path} has format version {printable(str(version))}, this program reads {INDEX_VERSION}: use the "
            "program's version that wrote it, or prepare the corpus again"
        )
    return index


def _parse(raw: dict[str, Any]) -> Index:
    """The fields, each of its type.

    Raises:
        ValueError, LookupError, TypeError: something is missing or of another type.
    """
    shards = tuple(CorpusShard(**item) for item in raw["files"])
    for shard in shards:
        name, numbers = shard.name, (shard.num_tokens, shard.num_documents)
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(TOKENS_SUFFIX):
            raise ValueError(f"{name!r} is not the name of a token file in this directory")
        if not all(type(number) is int and 1 <= number < 1 << 62 for number in numbers):
            raise ValueError(f"{name} has {numbers} tokens and documents")
        if len(bytes.fromhex(shard.checksum)) != 32:
            raise ValueError(f"{name} has the checksum {shard.checksum!r}")
    if not shards or len({shard.name for shard in shards}) != len(shards):
        raise ValueError("no files, or one of them twice")
    values = {key: raw[key] for key in ("tokenizer_sha256", "vocab_size", "source")}
    if [type(value) for value in values.values()] != [str, int, str]:
        raise TypeError(f"{', '.join(values)} are not text, number, text")
    return Index(**values, shards=shards)


def _without_index(directory: Path) -> str:
    """Why a directory is no corpus."""
    if inner := sorted(path.parent.name for path in directory.glob(f"*/{INDEX_NAME}")):
        named = ", ".join(inner[:5]) + (", ..." if len(inner) > 5 else "")
        return f"{directory} is no corpus but holds some ({named}): name one, or each in a table [data.sources.NAME]"
    if any(directory.glob(f"*{TOKENS_SUFFIX}")):
        return (
            f"{directory} has token files and no {INDEX_NAME}, which is written last: its preparation has not ended; "
            "start it again, or name one of the files"
        )
    return f"{directory} is no corpus: it has no {INDEX_NAME}; correct the path, or use tools/prepare_corpus.py"
