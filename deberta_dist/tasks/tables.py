"""Tables of a report, as text in columns and as Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass

from deberta_dist.errors import printable


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        title: Above it.
        header: Names of the columns.
        rows: As many cells each.
        below: Sentences under it.
        names: Columns, from the first, that stand to the left; numbers stand to the right.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    below: Sequence[str] = ()
    names: int = 1

    def text(self) -> str:
        """Columns of spaces under a title."""
        lines = [[printable(cell) for cell in row] for row in (self.header, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        shown = [self.title, ""]
        for line in lines:
            cells = enumerate(zip(line, widths, strict=True))
            shown.append("  ".join(c.ljust(w) if place < self.names else c.rjust(w) for place, (c, w) in cells).rstrip())
        return "\n".join([*shown, *self.below])

    def markdown(self) -> str:
        """A table of GitHub's dialect under a heading."""
        lines = [[_cell(cell) for cell in row] for row in (self.header, *self.rows)]
        lines.insert(1, ["---"] * self.names + ["---:"] * (len(self.header) - self.names))
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join([f"## {self.title}", table, *([bullets(self.below)] if self.below else [])])


def bullets(lines: Sequence[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {line}" for line in lines)


def _cell(text: str) -> str:
    """Without what would end it: names of folders may hold anything."""
    return printable(text).replace("\\", "\\\\").replace("|", "\\|")
