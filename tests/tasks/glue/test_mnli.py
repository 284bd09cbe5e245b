"""GLUE's MNLI files."""

from pathlib import Path

import pytest

from deberta_dist.errors import DataError
from deberta_dist.tasks.glue.mnli import read_mnli

HEADER = "index\tpromptID\tpairID\tsentence1_binary_parse\tsentence1\tsentence2\tlabel1\tgold_label"


def write(directory: Path, *lines: str, end: str = "\n") -> Path:
    (directory / "train.tsv").write_bytes(end.join([HEADER, *lines, ""]).encode())
    return directory


def row(index: object, premise: str = "It rains.", hypothesis: str = "It is wet.", label: str = "neutral") -> str:
    return f"{index}\t1\t1n\t( It rains )\t{premise}\t{hypothesis}\tneutral\t{label}"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_rows(tmp_path: Path, end: str) -> None:
    split = read_mnli(write(tmp_path, row(3, 'He said "no.', "5' tall"), row(1, label="entailment"), end=end), "train")
    assert split.decisions[3,].gold == ("neutral",) and split.decisions[1,].gold == ("entailment",)
    assert split.rows[0]["premise"] == 'He said "no.' and split.rows[0]["hypothesis"] == "5' tall"
    assert list(split.decisions) == [(3,), (1,)] and len(split.sha256) == 64


def test_odd_characters(tmp_path: Path) -> None:
    premises = ["one\rtwo", "a\u2028b\x0b\x85c", "", '"', "long " * 50_000]
    write(tmp_path, *(row(i, premise) for i, premise in enumerate(premises)))
    path = tmp_path / "train.tsv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [found["premise"] for found in read_mnli(tmp_path, "train").rows] == premises


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([row(0), row(0)], "line 3: index 0 stands in line 2 already"),
        ([row(0, label="-")], "line 2: gold_label is '-'"),
        ([row("x")], "line 2: index is 'x'"),
        ([row(0), "", "", row("x")], "line 5: index is 'x'"),
        ([row("9" * 5000)], "line 2: index is '999"),
        ([row(0) + "\tmore"], "line 2: 9 columns, the first line has 8"),
        ([], "is empty"),
    ],
)
def test_faults_have_file_and_line(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(DataError, match="train.tsv") as caught:
        read_mnli(write(tmp_path, *lines), "train")
    assert message in str(caught.value)


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="dev_matched.tsv cannot be read"):
        read_mnli(tmp_path, "val")
    (tmp_path / "train.tsv").write_text("a\tb\n")
    with pytest.raises(DataError, match="line 1: column index is missing; it has a, b"):
        read_mnli(tmp_path, "train")
    (tmp_path / "train.tsv").write_bytes(b"index\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        read_mnli(tmp_path, "train")
