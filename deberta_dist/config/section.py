"""Base class of all TOML tables, and the types of their values."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

# What a run of years, or of all GPUs there are, stays below by far: a number beyond it is a slip, and would end in an overflow
# or in a plan that takes for ever.
MOST = 2**31 - 1
MOST_SEQUENCES = 2**24
MOST_TOKENS = 2**18
MOST_RANKS = 2**20

Count = Annotated[int, Field(ge=1, le=MOST)]
CountOrNone = Annotated[int, Field(ge=0, le=MOST)]
Sequences = Annotated[int, Field(ge=1, le=MOST_SEQUENCES)]
Few = Annotated[int, Field(ge=1, le=10_000)]
Ranks = Annotated[int, Field(ge=1, le=MOST_RANKS)]
Positive = Annotated[float, Field(ge=1e-6, le=1e6)]
NotNegative = Annotated[float, Field(ge=0, le=1e9)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(ge=1e-15, le=10)]
Minutes = Annotated[float, Field(ge=0.1, le=7 * 24 * 60)]
# TOML has no paths and no tuples: these two kinds alone are converted.
File = Annotated[Path, Field(strict=False)]
Betas = Annotated[tuple[Fraction, Fraction], Field(strict=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
Patterns = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)]
Layers = Annotated[tuple[Few, ...], Field(strict=False, min_length=1)]
Length = Annotated[int, Field(ge=3, le=MOST_TOKENS)]
Lengths = Annotated[tuple[Length, ...], Field(strict=False, min_length=1)]


class Section(BaseModel):
    """Base of all tables: immutable, strict, no unknown keys, finite numbers."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
    )


class WholeFile(Section):
    """Base of the schemas of a whole TOML, whose tables are the fields; ``source`` names the file in messages."""

    _source: Path | None = PrivateAttr(default=None)

    @property
    def source(self) -> str:
        """The TOML's path as given, or ``configuration`` for one that was made in Python."""
        return str(self._source) if self._source else "configuration"
