"""Which files an input names, and what is refused before anything is read."""

import os
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

from deberta_dist.errors import DataError
from deberta_dist.preparation.reading.inputs import COMPRESSIONS, find_inputs, list_inputs

WIKI = ("wiki/AA/wiki_00", "wiki/AA/wiki_01.bz2", "wiki/part.00001")
LEFT = (".hidden.txt", ".git/x.txt", "README.md", "f.csv", "deep/g.parquet.gz", "wiki_00", "h.00001")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for name in ("b.jsonl", "a.txt.gz", "deep/c.parquet", "deep/er/d.jsonl.zst", "deep/e.txt.bz2"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    for name in LEFT:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"never read")
    return tmp_path


@pytest.fixture
def others(corpus: Path) -> Path:
    """Further kinds, and files whose names say nothing of what they hold."""
    for name in ("more/C.NDJSON", "more/d.json.gz", "more/e.txt.xz", *WIKI):
        (corpus / name).parent.mkdir(parents=True, exist_ok=True)
        (corpus / name).write_bytes(b"x")
    return corpus


def names(inputs: Sequence[str | Path], corpus: Path) -> list[str]:
    return [file.path.relative_to(corpus).as_posix() for file in list_inputs(inputs)]


def test_a_directory_is_every_readable_file_below_it_through_links_too(corpus: Path) -> None:
    expected = ["a.txt.gz", "b.jsonl", "deep/c.parquet", "deep/e.txt.bz2", "deep/er/d.jsonl.zst"]
    assert names([corpus], corpus) == expected
    (corpus / "outside").mkdir()
    (corpus / "outside" / "link").symlink_to(corpus / "deep" / "er")
    assert names([corpus / "outside"], corpus) == ["outside/link/d.jsonl.zst"]
    file = list_inputs([corpus / "deep" / "e.txt.bz2"])[0]
    assert (file.kind, file.compression, file.num_bytes, file.source) == ("text", ".bz2", 1, "")
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
        (["README.md"], r"README.md is not of a supported kind.* readable are .txt, .jsonl"),
        (["wiki_00"], r"wiki_00 is not of a supported kind.*--format says what files with other names hold"),
        (["zip.xlsx"], r"zip.xlsx is not of a supported kind; it begins like a zip archive; readable are"),
        (["deep/g.parquet.gz"], r"g.parquet.gz is not of a supported kind"),
        ([".git/../empty"], r"empty has no readable files below it; readable"),
        ([".git"], r".git has no readable files below it; .*; passed over: 1 \(.git/y.md\)"),
        (["*.xyz"], r"no readable file fits \*.xyz; readable"),
        (["*.csv"], r"no readable file fits \*.csv; .*; passed over: 1 \(f.csv\)"),
        (["dee*"], r"no readable file fits dee\*; for what is below directories, end the pattern with /\*\*"),
        (["b.jsonl", "."], r"b.jsonl is given twice"),
        (["b.jsonl", ".again.jsonl"], r"again.jsonl is given twice \(also as b.jsonl\)"),
        ([".loop"], r"is a link to a directory that it lies in"),
        ([".loop/**"], r"is a link to a directory that it lies in"),
        (["/dev/null"], r"/dev/null is a device and not a regular file"),
        ([".odd/socket"], r"socket is a socket and not a regular file"),
        ([".odd/pipe"], r"pipe is a named pipe and not a regular file"),
        ([".odd/p*"], r"pipe is a named pipe"),
        ([".odd"], r"annex.txt is a link that leads nowhere"),
        ([".odd/**/*.txt"], r"annex.txt is a link that leads nowhere"),
        ([".odd/no*.txt"], r"nowhere.txt is a link that leads nowhere, to gone: fix or remove it"),
        ([".odd/nowhere.txt"], r"nowhere.txt is a link that leads nowhere, to gone"),
        ([".odd/self.jsonl"], r"self.jsonl is a link that leads nowhere, to self.jsonl"),
        ([".odd/annex.txt"], r"annex.txt is a link that leads nowhere, to .*annex/objects/x: run git annex get"),
        ([".pointers/lfs.txt"], r"lfs.txt is a Git LFS pointer, not the file itself \(12,345 bytes\): run git lfs pull"),
        ([".pointers"], r"annex.jsonl is a git-annex pointer, not the file itself: run git annex get"),
    ],
)
def test_inputs_that_cannot_be_meant_are_refused(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, inputs: list[str], message: str
) -> None:
    monkeypatch.chdir(corpus)
    for folder in ("empty", ".loop", ".odd", ".pointers"):
        Path(folder).mkdir()
    Path(".git/x.txt").rename(".git/y.md")
    Path("zip.xlsx").write_bytes(b"PK\x03\x04")
    Path(".again.jsonl").symlink_to("b.jsonl")
    Path(".loop/up").symlink_to(corpus / ".loop")
    os.mkfifo(".odd/pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(".odd/socket")
    for name, target in (("nowhere.txt", "gone"), ("self.jsonl", "self.jsonl"), ("annex.txt", "../.git/annex/objects/x")):
        Path(".odd", name).symlink_to(target)
    Path(".pointers/lfs.txt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
    Path(".pointers/annex.jsonl").write_text("/annex/objects/SHA256E-s3--00.jsonl\n")
    with pytest.raises(DataError, match=message) as raised:
        list_inputs(inputs)
    assert "\n" not in str(raised.value)


def test_what_is_not_read_is_counted_and_named(others: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(others)
    listing = find_inputs(["."])
    assert {file.path.name for file in listing.files} >= {"C.NDJSON", "d.json.gz", "e.txt.xz"}
    assert listing.passed_over.count == 10
    assert listing.passed_over.first[:2] == ("README.md", "deep/g.parquet.gz")
    assert listing.passed_over.first[-2:] == (".git/", ".hidden.txt")
    # A pattern names what it fits: hidden names are not among that, directories are.
    passed_over = find_inputs(["*"]).passed_over
    assert str(passed_over) == "7 (README.md, deep/, f.csv, h.00001, more/, wiki/, wiki_00)"
    assert find_inputs(["**"]).passed_over.count == 8
    for number in range(20):
        (others / f"{number:02}.md").touch()
    told = str(find_inputs(["."]).passed_over)
    assert told.startswith("30 (00.md, ") and told.endswith(", 09.md, ...)")
    assert not find_inputs(["b.jsonl", "deep/er"]).passed_over


@pytest.mark.parametrize(
    ("inputs", "format", "expected"),
    [
        (["wiki"], "wikiextractor", [*WIKI]),
        (["."], "text", ["a.txt.gz", "deep/e.txt.bz2", "h.00001", "more/e.txt.xz", *WIKI, "wiki_00"]),
        (["more"], "jsonl", ["more/C.NDJSON", "more/d.json.gz"]),
        (["wiki/**"], "jsonl", [*WIKI]),
        (["README.md", "*.csv"], "text", ["README.md", "f.csv"]),
        (["b.jsonl"], "text", ["b.jsonl"]),
    ],
)
def test_a_format_is_what_files_hold_whatever_their_names(
    others: Path, monkeypatch: pytest.MonkeyPatch, inputs: list[str], format: str, expected: list[str]
) -> None:
    monkeypatch.chdir(others)
    files = list_inputs(inputs, format=format)
    assert [str(file.path) for file in files] == expected
    assert {file.kind for file in files} == {format}
    endings = [Path(name).suffix for name in expected]
    assert [file.compression for file in files] == [end if end in COMPRESSIONS else "" for end in endings]


def test_a_format_refuses_what_it_cannot_be(others: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(others)
    with pytest.raises(DataError, match=r"wiki/AA/wiki_01.bz2 is not of a supported kind.*--format parquet: readable are"):
        list_inputs(["wiki/AA/wiki_01.bz2"], format="parquet")
    with pytest.raises(DataError, match=r"more has no readable files below it; --format wikiextractor: .*passed over: 3"):
        list_inputs(["more"], format="wikiextractor")


@pytest.mark.parametrize("given", [".", "**", "**/*.jsonl*", "deep/*/*"])
def test_what_may_not_be_read_is_refused(corpus: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.chdir(corpus)
    may, look = os.access, os.scandir
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: Path(path).name != "d.jsonl.zst" and may(path, mode))
        with pytest.raises(DataError, match=r"d.jsonl.zst cannot be read \(Permission denied\)"):
            list_inputs([given])

    def denied(path: Path) -> object:
        if Path(path).name == "er":
            raise PermissionError(13, "Permission denied")
        return look(path)

    # glob and os.walk would leave such a directory out without a word.
    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(DataError, match=r"deep/er cannot be read \(Permission denied\)"):
        list_inputs([given])
