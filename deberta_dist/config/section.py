"""What all tables of a TOML have in common, and the kinds of values in them."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

AUTO = "auto"

Auto = Literal["auto"]
Count = Annotated[int, Field(ge=1)]
CountOrNone = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
# TOML has no paths and no tuples: these two kinds alone are converted.
File = Annotated[Path, Field(strict=False)]
Betas = Annotated[tuple[Fraction, Fraction], Field(strict=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
Patterns = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)]
Layers = Annotated[tuple[Count, ...], Field(strict=False, min_length=1)]
Lengths = Annotated[tuple[Annotated[int, Field(ge=3)], ...], Field(strict=False, min_length=1)]


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
