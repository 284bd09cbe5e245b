#!/usr/bin/env python
"""Quotes measurements in Markdown pages, so that a number stands in one file alone.

    python benchmarks/quote.py            fills the marked blocks of README.md, docs/ and benchmarks/
    python benchmarks/quote.py --check    changes nothing; exit code 1 if a page is not what its results say

``benchmarks/results/README.md`` describes the files. A page has ``<!-- result NAME -->`` ... ``<!-- end -->``: between them
comes the table of ``results/NAME.json`` with its conditions, machine, date and command. ``<!-- result NAME:QUOTE -->`` is
one of its sentences, with machine and date where it is a paragraph. A block whose mark stands alone on a line is a
paragraph, any other stays on its line.

Needs the standard library alone.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "CONTRIBUTING.md", "docs/*.md", "benchmarks/*.md", "benchmarks/results/*.md")
NOT_RECORDED = "not recorded"
REQUIRED = ("title", "how", "machine", "date", "command", "conditions", "rows")
OPTIONAL = ("versions", "columns", "quotes", "notes", "output")
_MARK = r"<!-- result (?P<name>[a-z0-9_]+)(?::(?P<quote>[a-z0-9_]+))? -->"
_END = "<!-- end -->"
_BLOCK = re.compile(rf"(?P<mark>{_MARK})(?P<old>.*?){_END}", re.S)
_FIELD = re.compile(r"\{(\w+)\.(\w+)(:[^{}]+)?\}")
_FENCE = re.compile(r"^```.*?^```", re.S | re.M)


class ResultError(Exception):
    """A result file or a mark of a page is wrong; the message names it."""


def load(name: str) -> dict[str, Any]:
    """``results/NAME.json``.

    Raises:
        ResultError: it is missing, no JSON, or lacks a key.
    """
    path = RESULTS / f"{name}.json"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultError(f"{path}: {error}") from None
    lacking = [key for key in REQUIRED if key not in result]
    unknown = [key for key in result if key not in REQUIRED + OPTIONAL]
    if lacking or unknown:
        raise ResultError(f"{path}: lacks {lacking}, has unknown keys {unknown}; benchmarks/results/README.md has the list")
    return result


def cell(result: dict[str, Any], row: dict[str, Any], key: str, spec: str = "") -> str:
    """A value as it is shown: by ``spec``, else by its column's format. Empty where the row has none."""
    if row.get(key) is None:
        return ""
    formats = {column["key"]: column["format"] for column in result.get("columns", ())}
    return ("{" + spec + "}" if spec else formats.get(key, "{}")).format(row[key])


def sentence(name: str, result: dict[str, Any], quote: str) -> str:
    """One of a result's quotes with ``{ROW.KEY}`` filled in.

    Raises:
        ResultError: there is no such quote, row or key.
    """
    if quote not in result.get("quotes", {}):
        raise ResultError(f"results/{name}.json has no quote {quote!r}; it has {sorted(result.get('quotes', {}))}")
    rows = {row["id"]: row for row in result["rows"]}

    def fill(match: re.Match[str]) -> str:
        row, key, spec = match.groups()
        if key not in rows.get(row, {}):
            raise ResultError(f"results/{name}.json: quote {quote!r} asks for {row}.{key}, which no row has")
        return cell(result, rows[row], key, spec or "")

    return _FIELD.sub(fill, result["quotes"][quote])


def table(result: dict[str, Any]) -> str:
    """The rows as a Markdown table; rows with ``hidden`` are for quotes alone."""
    columns = result["columns"]
    lines = ["| " + " | ".join(column["title"] for column in columns) + " |", "|" + "---|" * len(columns)]
    for row in result["rows"]:
        if not row.get("hidden"):
            lines.append("| " + " | ".join(cell(result, row, column["key"]) for column in columns) + " |")
    return "\n".join(line.replace("|  |", "| |") for line in lines)


def provenance(result: dict[str, Any]) -> str:
    """How, where, when and with which command, as one paragraph."""
    where = [f"machine {result['machine']}" if result["machine"] == NOT_RECORDED else result["machine"]]
    where.append(f"date {result['date']}" if result["date"] == NOT_RECORDED else result["date"])
    where += [result["versions"]] if "versions" in result else []
    command = result["command"]
    # Most commands begin with a program; the others are told in words.
    is_command = command.split(" ")[0] in ("python", "sh", "bash", "deepspeed", "deberta-dist", "mpirun")
    where.append(f"command {command}" if command == NOT_RECORDED else f"`{command}`" if is_command else command)
    text = f"{result['how'].capitalize()}: {'; '.join(where)}."
    if result["conditions"]:
        text = f"{result['conditions'][0].upper()}{result['conditions'][1:]}. {text}"
    return f"{text} {result['notes']}" if "notes" in result else text


def origin(result: dict[str, Any]) -> str:
    """Where and when, in brackets behind a sentence; the result's file has the rest."""
    recorded = [result[key] for key in ("machine", "date") if result[key] != NOT_RECORDED]
    return f"({', '.join(recorded) or 'machine and date not recorded'})"


def block(name: str, quote: str | None) -> str:
    """What stands between the marks of a block.

    Raises:
        ResultError: the result has nothing of the kind.
    """
    result = load(name)
    if quote is not None:
        return sentence(name, result, quote)
    if "output" in result:
        return "```text\n" + "\n".join(result["output"]) + "\n```\n\n" + provenance(result)
    if "columns" not in result:
        raise ResultError(f"results/{name}.json has no table; quote one of {sorted(result.get('quotes', {}))}")
    return f"{table(result)}\n\n{provenance(result)}"


def filled(text: str, *, page: object) -> str:
    """A page with all its blocks as the results say; blocks in code fences are examples and stay.

    Raises:
        ResultError: a mark is wrong, or has no end.
    """

    def fill(match: re.Match[str]) -> str:
        old, mark = match["old"], match["mark"]
        if any(start <= match.start() < stop for start, stop in fences):
            return match[0]
        if re.search(_MARK, old):
            raise ResultError(f"{page}: {mark} has no {_END}")
        before = text[: match.start()].rpartition("\n")[2]
        if not before.strip() and not old.startswith("\n"):
            # Markdown would take the whole line for HTML.
            raise ResultError(f"{page}: {mark} at the start of a line has to stand alone on it")
        try:
            content = block(match["name"], match["quote"])
        except ResultError as error:
            raise ResultError(f"{page}: {error}") from None
        is_paragraph = old.startswith("\n") or "\n" in content
        if is_paragraph and match["quote"] is not None:
            content += f" {origin(load(match['name']))}"
        if not is_paragraph:
            return f"{mark}{content}{_END}"
        # In a list the paragraph belongs to its item.
        return "\n".join([mark, *(before + line if line else "" for line in content.split("\n")), before + _END])

    fences = [match.span() for match in _FENCE.finditer(text)]
    result = _BLOCK.sub(fill, text)
    outside = _FENCE.sub("", result)
    begun, ended = len(re.findall(_MARK, outside)), outside.count(_END)
    if begun != ended:
        raise ResultError(f"{page}: {begun} blocks begin and {ended} end")
    return result


def pages() -> list[Path]:
    """Every page that may quote a result."""
    return sorted(path for pattern in PAGES for path in ROOT.glob(pattern))


def main() -> int:
    """Runs the script; 1 if a page had to change with --check, 2 if a result or a mark is wrong."""
    parser = argparse.ArgumentParser(description="Quote benchmarks/results/*.json in Markdown pages.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a page is out of date")
    is_check = parser.parse_args().check
    stale = []
    try:
        for page in pages():
            text = page.read_text(encoding="utf-8")
            if (new := filled(text, page=page.relative_to(ROOT))) != text:
                stale.append(str(page.relative_to(ROOT)))
                if not is_check:
                    page.write_text(new, encoding="utf-8")
    except ResultError as error:
        print(error, file=sys.stderr)
        return 2
    for name in stale:
        print(f"{name} {'is out of date: run python benchmarks/quote.py' if is_check else 'filled'}")
    return 1 if stale and is_check else 0


if __name__ == "__main__":
    sys.exit(main())
