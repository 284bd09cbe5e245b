"""Results come into pages as they stand in their files, and what does not fit is an error that names page and file."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import quote

RESULT: dict[str, Any] = {
    "title": "Speed",
    "how": "measured",
    "machine": "a laptop",
    "date": "2026-01-02",
    "command": "python tools/benchmark.py layer",
    "conditions": "two rounds",
    "columns": [{"key": "name", "title": "", "format": "{}"}, {"key": "share", "title": "share", "format": "{:.0%}"}],
    "rows": [
        {"id": "ours", "name": "ours", "share": 0.755},
        {"id": "others", "name": "others"},
        {"id": "x", "hidden": True, "ms": 3},
    ],
    "quotes": {"short": "{ours.share} and {x.ms} ms", "precise": "{ours.share:.1%}", "wrong": "{ours.speed}"},
}


@pytest.fixture(autouse=True)
def _results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quote, "RESULTS", tmp_path)
    (tmp_path / "speed.json").write_text(json.dumps(RESULT))


def test_a_table_with_its_origin() -> None:
    text = quote.filled("a\n\n<!-- result speed -->\nold\n<!-- end -->\n\nb\n", page="p.md")
    assert text.splitlines()[3:7] == ["| | share |", "|---|---|", "| ours | 76% |", "| others | |"]
    assert "Two rounds. Measured: a laptop; 2026-01-02; `python tools/benchmark.py layer`." in text
    assert text.startswith("a\n") and text.endswith("<!-- end -->\n\nb\n") and "old" not in text
    assert quote.filled(text, page="p.md") == text, "filling twice changes nothing"


def test_sentences_in_lines_and_as_paragraphs() -> None:
    assert quote.filled("x <!-- result speed:short --><!-- end --> y", page="p").endswith("-->76% and 3 ms<!-- end --> y")
    assert "-->75.5%<!-- end -->" in quote.filled("x <!-- result speed:precise -->1<!-- end -->", page="p")
    paragraph = quote.filled("- item\n  <!-- result speed:short -->\n  <!-- end -->\n", page="p")
    assert paragraph.splitlines()[2:] == ["  76% and 3 ms (a laptop, 2026-01-02)", "  <!-- end -->"]


def test_examples_in_fences_stay() -> None:
    text = "```markdown\n<!-- result speed -->\n<!-- end -->\n```\n"
    assert quote.filled(text, page="p") == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a <!-- result nothing:short --><!-- end -->", "p.md: .*nothing.json"),
        ("a <!-- result speed:nothing --><!-- end -->", "p.md: .*speed.json has no quote 'nothing'; it has"),
        ("a <!-- result speed:wrong --><!-- end -->", "p.md: .*asks for ours.speed, which no row has"),
        ("<!-- result speed -->\n", "p.md: 1 blocks begin and 0 end"),
        ("<!-- result speed -->\n<!-- result speed:short -->\n<!-- end -->", "p.md: .* has no <!-- end -->"),
        ("<!-- result speed:short -->76%<!-- end --> of", "p.md: .*start of a line has to stand alone"),
    ],
)
def test_what_does_not_fit_is_refused(text: str, message: str) -> None:
    with pytest.raises(quote.ResultError, match=message):
        quote.filled(text, page="p.md")


def test_a_result_without_its_machine_is_refused(tmp_path: Path) -> None:
    (tmp_path / "speed.json").write_text(json.dumps({key: value for key, value in RESULT.items() if key != "machine"}))
    with pytest.raises(quote.ResultError, match="machine"):
        quote.load("speed")
