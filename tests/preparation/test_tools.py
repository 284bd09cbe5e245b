"""The two tools as a user runs them: output, refusals, exit codes."""

import subprocess
import sys
from pathlib import Path

from deberta_dist.data.token_corpus import open_corpus
from deberta_dist.data.tokenizer import Tokenizer
from tests.tool_calls import assert_one_line_error

ROOT = Path(__file__).parents[2]
TEXT = ROOT / "launchers" / "demo_text" / "valid.jsonl"


def run(tool: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


def test_text_to_tokenizer_to_token_file(tmp_path: Path) -> None:
    train = ("train_tokenizer.py", "--input", TEXT, "--output", "spm.model")
    made = run(*train, "--vocab-size", 600, cwd=tmp_path)
    assert made.returncode == 0 and "601 tokens" in made.stdout, made.stderr
    tokenizer = Tokenizer(tmp_path / "spm.model")
    prepare = ("prepare_corpus.py", "--input", TEXT, "--output", "x", "--tokenizer", "spm.model", "--held-out", 20)
    made = run(*prepare, cwd=tmp_path)
    assert made.returncode == 0 and "17 documents" in made.stdout and "MB/s" in made.stdout, made.stderr
    splits = [open_corpus(tmp_path / "x" / name) for name in ("train", "heldout")]
    assert sum(split.num_documents for split in splits) == 17
    assert {split.tokenizer_sha256 for split in splits} == {tokenizer.sha256}

    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    again = run(*train, "--vocab-size", 700, cwd=tmp_path)
    assert_one_line_error(again, code=65, words="spm.model exists already")
    again = run(*prepare, cwd=tmp_path)
    assert_one_line_error(again, code=65, words="x is a complete corpus")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_errors_are_one_line_and_leave_nothing(tmp_path: Path) -> None:
    train = ("train_tokenizer.py", "--input", TEXT, "--output", "spm.model", "--vocab-size")
    assert_one_line_error(run(*train, 10**6, cwd=tmp_path), code=65, words="largest possible is")
    assert_one_line_error(run(*train, 2, cwd=tmp_path), code=2, words="vocab_size = 2")
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    prepare = ("prepare_corpus.py", "--input", "bad.txt", "--output", "x", "--tokenizer")
    assert_one_line_error(run(*prepare, "bad.txt", cwd=tmp_path), code=65, words="not a sentencepiece model")
    assert run(*train, 600, cwd=tmp_path).returncode == 0
    zero = run(*prepare, "spm.model", "--benchmark", TEXT, "--benchmark-ngram", 0, cwd=tmp_path)
    assert_one_line_error(zero, code=2, words="--benchmark-ngram, n = 0")
    (tmp_path / "spm.model").unlink()
    (tmp_path / "spm.model").symlink_to(tmp_path / "nowhere")
    assert_one_line_error(run(*train, 600, cwd=tmp_path), code=65, words="exists already")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.txt", "spm.model", "spm.model.report.md"]


def test_help(tmp_path: Path) -> None:
    for tool in ("train_tokenizer.py", "prepare_corpus.py"):
        result = run(tool, "--help", cwd=tmp_path)
        assert result.returncode == 0 and "--input" in result.stdout
