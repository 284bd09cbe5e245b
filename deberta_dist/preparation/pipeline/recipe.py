"""The settings that decide a preparation's output: equal recipes on equal text give equal bytes, wherever they run."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.errors import ConfigError
from deberta_dist.preparation.filtering.filters import Filters
from deberta_dist.preparation.reading.texts import TextReadOptions

# sentencepiece counts bytes in 32 bits with a sign.
MAX_DOCUMENT_BYTES = 2**31 - 1
# A new number where the same recipe would give other spool files or shards than before.
VERSION = 1
MIN_SHARD_BYTES = 1 << 12


@dataclass(frozen=True, kw_only=True)
class PreparationRecipe:
    """The settings that decide the output.

    Attributes:
        tokenizer_sha256: SHA-256 of the tokenizer's model file, hexadecimal.
        reading: how files become documents.
        filters: which documents are dropped for what they look like.
        held_out_percent: share of the documents that is held out, by their hash.
        deduplicate: whether only the first of documents with equal normalised text stays.
        near_duplicates: least similarity of two documents of which only the first stays; None: both stay.
        contamination: fingerprint of the n-grams no document may hold; None: there are none.
        shard_bytes: most bytes of ids in one token file; a document is never cut, a longer one has a file of its own.
        piece_bytes: bytes of input that one process takes at a time, about; decides nothing in the output.
    """

    tokenizer_sha256: str
    reading: TextReadOptions = field(default_factory=TextReadOptions)
    filters: Filters = field(default_factory=Filters)
    held_out_percent: float = 5.0
    deduplicate: bool = True
    near_duplicates: float | None = None
    contamination: str | None = None
    shard_bytes: int = 1 << 30
    piece_bytes: int = 1 << 23

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            ConfigError: one is outside its range.
        """
        if not 0 <= self.held_out_percent < 100:
            raise ConfigError(f"--held-out {self.held_out_percent}: expected a percentage, at least 0 and below 100")
        if self.near_duplicates is not None and not 0 < self.near_duplicates <= 1:
            raise ConfigError(f"--near-duplicates {self.near_duplicates}: expected above 0 and at most 1 (usually 0.8)")
        if self.shard_bytes < MIN_SHARD_BYTES:
            raise ConfigError(f"--shard-bytes {self.shard_bytes}: expected at least {MIN_SHARD_BYTES}")
        if self.piece_bytes < 1:
            raise ConfigError(f"--piece-bytes {self.piece_bytes}: expected at least 1")
        if self.reading.max_document_bytes > MAX_DOCUMENT_BYTES:
            raise ConfigError(f"--max-document-bytes {self.reading.max_document_bytes}: expected at most {MAX_DOCUMENT_BYTES}")

    @classmethod
    def of(cls, tokenizer: Tokenizer, **settings: Any) -> "PreparationRecipe":
        """The defaults for a tokenizer, with other ``settings`` where they are given."""
        return cls(tokenizer_sha256=tokenizer.sha256, **settings)

    def as_json(self) -> dict[str, Any]:
        """All settings, as they are written beside the spool files."""
        return {"version": VERSION, **dataclasses.asdict(self)}
