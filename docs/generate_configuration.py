#!/usr/bin/env python
"""Writes the tables of docs/configuration.md from the schema, so that the page cannot disagree with the program.

    python docs/generate_configuration.py            fills the page
    python docs/generate_configuration.py --check    changes nothing; exit code 1 if the page is out of date

Every key, its kind, range and default come from the pydantic sections in ``deberta_dist/config/``, its meaning from the
docstring under it; the fields of ``[model]`` are read off ``deberta_dist/models/config.py``. Needs pydantic, not torch.
"""

import argparse
import ast
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from deberta_dist.config.finetune import FineTuneConfig  # noqa: E402
from deberta_dist.config.schema import RunConfig  # noqa: E402
from deberta_dist.config.section import Section  # noqa: E402

PAGE = ROOT / "docs" / "configuration.md"
MODEL_FIELDS = ROOT / "deberta_dist" / "models" / "config.py"
# Sections that fine-tuning shares with pre-training are described once.
SHARED = ("optimizer", "schedule", "parallel")
# Upper bounds that only catch slips; the page leaves them out.
LEAST_SLIP = 10_000
_BEGIN, _END = "<!-- {name}: python docs/generate_configuration.py -->", "<!-- end of {name} -->"


def number(value: float) -> str:
    """A number without needless digits; thousands are marked as TOML allows."""
    return f"{value:_}" if isinstance(value, int) else f"{value:g}"


def kind(schema: dict[str, Any]) -> str:
    """What a value may be, in words."""
    if "enum" in schema:
        return ", ".join(f'`"{word}"`' for word in schema["enum"])
    if "const" in schema:
        return f'`"{schema["const"]}"`'
    if "anyOf" in schema:
        return " or ".join(kind(one) for one in schema["anyOf"] if one.get("type") != "null")
    if "$ref" in schema or schema.get("type") == "object":
        return "table"
    if schema["type"] == "array":
        inner = schema.get("items") or schema["prefixItems"][0]
        return f"list of {kind(inner)}"
    if schema["type"] == "boolean":
        return "`true`, `false`"
    if schema["type"] == "string":
        return "path" if schema.get("format") == "path" else "text"
    return _range(schema, "integer" if schema["type"] == "integer" else "number")


def _range(schema: dict[str, Any], name: str) -> str:
    least, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    most, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    words = [name]
    if least is not None and (most is not None and most <= LEAST_SLIP):
        return f"{name}, {number(least)} to {number(most)}"
    words += [f"from {number(least)}"] if least is not None else [f"above {number(above)}"] if above is not None else []
    words += [f"below {number(below)}"] if below is not None else []
    return " ".join(words)


def default(schema: dict[str, Any], is_required: bool) -> str:
    """The default as a TOML has it."""
    if is_required:
        return "required"
    value = schema.get("default")
    if value is None:
        return "absent"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str):
        return f'`"{value}"`'
    if isinstance(value, list | tuple):
        return f"`[{', '.join(number(one) for one in value)}]`"
    return f"`{number(value)}`"


def prose(text: str) -> str:
    """A docstring as Markdown on one line: ``code`` becomes `code`."""
    return " ".join(text.replace("``", "`").replace("|", "\\|").split())


def rows(section: dict[str, Any]) -> list[str]:
    """The table of one section."""
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for key, schema in section.get("properties", {}).items():
        is_required = key in section.get("required", ())
        lines.append(f"| `{key}` | {kind(schema)} | {default(schema, is_required)} | {prose(schema.get('description', ''))} |")
    return lines


def sections(model: type[Section], *, leave_out: tuple[str, ...] = ()) -> list[str]:
    """All sections of a TOML, each with a heading."""
    schema = model.model_json_schema()
    lines: list[str] = []
    for name, reference in schema["properties"].items():
        if name in leave_out:
            continue
        table = schema["$defs"][reference["$ref"].rpartition("/")[2]]
        summary, _, more = table.get("description", "").partition("\n\n")
        title, _, what = summary.partition(": ")
        lines += [f"#### {title.replace('``', '`')}", "", prose(f"{what[:1].upper()}{what[1:]}"), ""]
        lines += [prose(paragraph) + "\n" for paragraph in more.split("\n\n") if paragraph]
        lines += [*rows(table), ""]
        for key, value in table.get("properties", {}).items():
            for pattern in value.get("patternProperties", {}).values():
                inner = schema["$defs"][pattern["$ref"].rpartition("/")[2]]
                what = prose(inner["description"].partition(": ")[2])
                lines += [f"#### `[{name}.{key}.NAME]`", "", f"{what[:1].upper()}{what[1:]}", "", *rows(inner), ""]
    return lines


def model_fields() -> list[str]:
    """The published fields that ``[model]`` takes, read off the dataclass without importing torch."""
    tree = ast.parse(MODEL_FIELDS.read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "DebertaConfig")
    lines = ["| field | default when a `config.json` lacks it | meaning |", "|---|---|---|"]
    for node, following in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign):
            continue
        meaning = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            meaning = prose(str(following.value.value))
        value = "" if node.value is None else ast.unparse(node.value).replace("'", '"')
        shown = "required" if not value else "absent" if value == "None" else f"`{value}`"
        lines.append(f"| `{ast.unparse(node.target)}` | {shown} | {meaning} |")
    return lines


def filled(text: str) -> str:
    """The page with its generated parts as the schema says."""
    parts = {
        "pre-training": sections(RunConfig),
        "model fields": [*model_fields(), ""],
        "fine-tuning": sections(FineTuneConfig, leave_out=SHARED),
    }
    for name, lines in parts.items():
        begin, end = _BEGIN.format(name=name), _END.format(name=name)
        before, found, rest = text.partition(begin)
        _, ended, after = rest.partition(end)
        assert found and ended, f"{PAGE} lacks {begin} ... {end}"
        text = f"{before}{begin}\n\n{chr(10).join(lines).rstrip()}\n\n{end}{after}"
    return text


def main() -> int:
    """Runs the script; 1 if the page had to change with --check."""
    parser = argparse.ArgumentParser(description="Write the tables of docs/configuration.md from the schema.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if the page is out of date")
    is_check = parser.parse_args().check
    text = PAGE.read_text(encoding="utf-8")
    if (new := filled(text)) == text:
        return 0
    if is_check:
        print(f"{PAGE.relative_to(ROOT)} is out of date: run python docs/generate_configuration.py")
        return 1
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
