"""Which files an input names, and what is refused before anything is read."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from deberta_dist.corpus.inputs import list_inputs
from deberta_dist.errors import DataError


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for name in ("b.jsonl", "a.txt.gz", "deep/c.parquet", "deep/er/d.jsonl.zst", "deep/e.txt.bz2"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    for name in (".hidden.txt", ".git/x.txt", "README.md", "f.json.gz", "deep/g.parquet.gz", "h.txt.xz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"never read")
    return tmp_path


def names(inputs: Sequence[str | Path], corpus: Path) -> list[str]:
    return [file.path.relative_to(corpus).as_posix() for file in list_inputs(inputs)]


def test_a_directory_is_every_readable_file_below_it_through_links_too(corpus: Path) -> None:
    expected = ["a.txt.gz", "b.jsonl", "deep/c.parquet", "deep/e.txt.bz2", "deep/er/d.jsonl.zst"]
    assert names([corpus], corpus) == expected
    (corpus / "outside").mkdir()
    (corpus / "outside" / "link").symlink_to(corpus / "deep" / "er")
    assert names([corpus / "outside"], corpus) == ["outside/link/d.jsonl.zst"]
    file = list_inputs([corpus / "deep" / "e.txt.bz2"])[0]
    assert (file.kind, file.compression, file.num_bytes, file.source) == (".txt", ".bz2", 1, "")
    assert file.modified_ns == file.path.stat().st_mtime_ns


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*", ["a.txt.gz", "b.jsonl"]),
        ("**", ["a.txt.gz", "b.jsonl", "deep/c.parquet", "deep/e.txt.bz2", "deep/er/d.jsonl.zst"]),
        ("**/*.b?2", ["deep/e.txt.bz2"]),
        ("deep/[cd].*", ["deep/c.parquet"]),
    ],
)
def test_a_pattern_is_every_readable_file_that_fits(corpus: Path, pattern: str, expected: list[str]) -> None:
    assert names([f"{corpus}/{pattern}"], corpus) == expected


def test_what_exists_is_neither_a_pattern_nor_a_name(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (corpus / "x[1].txt").write_text("x")
    (corpus / "x1.txt").write_text("x")
    (corpus / "day=1").mkdir()
    (corpus / "day=1" / "a.txt").write_text("x")
    monkeypatch.chdir(corpus)
    files = list_inputs(["x[1].txt", "day=1"])
    assert [(str(file.path), file.source) for file in files] == [("x[1].txt", ""), ("day=1/a.txt", "")]


def test_sources_are_named_and_the_order_is_as_given(corpus: Path) -> None:
    files = list_inputs([f"web-1={corpus}/deep", f"my_books={corpus}/b.jsonl"])
    assert [file.source for file in files] == ["web-1"] * 3 + ["my_books"]
    with pytest.raises(DataError, match=r"b.jsonl has no name and others have: write NAME=PATH"):
        list_inputs([f"web={corpus}/deep", corpus / "b.jsonl"])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["missing.txt"], "missing.txt does not exist"),
        (["bad name=b.jsonl"], "bad name=b.jsonl does not exist"),
        (["README.md"], r"README.md is of no kind .* readable are .txt, .jsonl"),
        (["f.json.gz"], r"f.json.gz is of no kind .*one object a line, in files named .jsonl"),
        (["deep/g.parquet.gz"], r"g.parquet.gz is of no kind"),
        (["h.txt.xz"], r"h.txt.xz is of no kind"),
        ([".git/../empty"], r"empty has no readable files below it"),
        (["*.csv"], r"no readable file fits \*.csv; readable"),
        (["dee*"], r"no readable file fits dee\*; for what is below directories, end the pattern with /\*\*"),
        (["b.jsonl", "."], r"b.jsonl is given twice"),
        (["b.jsonl", ".again.jsonl"], r"again.jsonl is given twice \(also as b.jsonl\)"),
        ([".loop"], r"is a link to a directory that it lies in"),
        (["/dev/null"], r"/dev/null is not a regular file"),
    ],
)
def test_inputs_that_cannot_be_meant_are_refused(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, inputs: list[str], message: str
) -> None:
    monkeypatch.chdir(corpus)
    Path("empty").mkdir()
    Path(".again.jsonl").symlink_to("b.jsonl")
    Path(".loop").mkdir()
    Path(".loop/up").symlink_to(corpus / ".loop")
    with pytest.raises(DataError, match=message) as raised:
        list_inputs(inputs)
    assert "\n" not in str(raised.value)
