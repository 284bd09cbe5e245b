"""Options of a vocabulary beside its size; ``tokenizer`` trains with them."""

import codecs
from dataclasses import dataclass
from pathlib import Path

from deberta_dist.errors import ConfigError, DataError, printable

NORMALIZATION_RULES = ("nmt_nfkc", "nmt_nfkc_cf", "nfkc", "nfkc_cf", "identity")
# These leave line ends and tabs as they are, where the others make them spaces.
_KEEP_LINE_ENDS = ("nfkc", "nfkc_cf", "identity")
MIN_CHARACTER_COVERAGE = 0.98
_MIN_RUN_CHARACTERS = 32


@dataclass(frozen=True, kw_only=True)
class VocabularyOptions:
    """How a vocabulary is trained.

    Attributes:
        character_coverage: Fraction of all characters that must become pieces, 0.98 to 1. The others, the rarest,
            become ``[UNK]``, or bytes.
        byte_fallback: 256 pieces for bytes: a character outside the vocabulary becomes its bytes in UTF-8.
        user_defined_symbols: Strings that are always one piece each, wherever they stand.
        normalization_rule: One of ``NORMALIZATION_RULES``: Unicode's NFKC, ``cf`` with lower case, ``nmt`` with all
            kinds of white space as spaces; "identity" leaves text as it is.
        max_run_characters: Longest run without white space, in normalised characters; a longer one is cut into
            several before training. Text that is tokenized later is not.
    """

    character_coverage: float = 0.9995
    byte_fallback: bool = False
    user_defined_symbols: tuple[str, ...] = ()
    normalization_rule: str = "nmt_nfkc"
    max_run_characters: int = 1000

    def __post_init__(self) -> None:
        """Checks the values; ``tokenizer`` checks the symbols against its own pieces.

        Raises:
            ConfigError: a value is none of those above.
        """
        if not MIN_CHARACTER_COVERAGE <= self.character_coverage <= 1:
            raise ConfigError(
                f"character_coverage = {self.character_coverage}, expected {MIN_CHARACTER_COVERAGE} to 1: the fraction "
                "of all characters that become pieces"
            )
        if self.normalization_rule not in NORMALIZATION_RULES:
            raise ConfigError(
                f"normalization_rule = {self.normalization_rule!r}, expected one of {', '.join(NORMALIZATION_RULES)}"
            )
        if self.max_run_characters < _MIN_RUN_CHARACTERS:
            raise ConfigError(f"max_run_characters = {self.max_run_characters}, expected at least {_MIN_RUN_CHARACTERS}")

    @property
    def symbols(self) -> tuple[str, ...]:
        """The user-defined symbols; under rules that keep line ends and tabs these too, which were ``[UNK]`` else."""
        line_ends = "\t\n\r" if self.normalization_rule in _KEEP_LINE_ENDS else ""
        return (*self.user_defined_symbols, *line_ends)


def read_symbols(path: str | Path) -> tuple[str, ...]:
    """The user-defined symbols of a file, one a line; empty lines are passed over.

    Raises:
        DataError: the file cannot be read or is not UTF-8; a line is no symbol, or comes twice.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"user-defined symbols {path} cannot be read ({error.strerror})") from error
    symbols: dict[str, int] = {}
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).splitlines(), start=1):
        try:
            symbol = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: not UTF-8: convert the file to UTF-8 first") from error
        if len(symbol.split()) > 1:
            raise DataError(f"{path}:{number}: {printable(symbol)!r} holds white space, which no symbol can: one symbol a line")
        if symbol in symbols:
            raise DataError(f"{path}:{number}: {printable(symbol)} is in line {symbols[symbol]} already")
        if symbol:
            symbols[symbol] = number
    if not symbols:
        raise DataError(f"user-defined symbols {path} holds none: expected one a line")
    return tuple(symbols)
