"""Inputs of the verb ``data``: a text, a tokenizer, its token files, and a working directory.

They are made by subprocesses: a measured process must not inherit the memory of making them.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks import ROOT
from deberta_dist.operations.measure import run_command


@dataclass(frozen=True, kw_only=True)
class DataInputs:
    """Files of a benchmark of the data path.

    Attributes:
        text: Text of the bundled corpus, .jsonl.
        tokenizer: SentencePiece model, .model.
        tokens: Token file encoded with ``tokenizer``, or a directory of them.
        directory: Working directory, removed at the end.
    """

    text: Path
    tokenizer: Path
    tokens: Path
    directory: Path


def bundled_text() -> Path:
    """The corpus that comes with the program, .jsonl."""
    return ROOT / "launchers" / "demo_text" / "train.jsonl"


def make_tokens(directory: Path, *, vocab_size: int) -> tuple[Path, Path]:
    """Trains a tokenizer on the bundled text and writes its corpus.

    Args:
        directory: Gets ``spm.model`` and ``corpus/``.
        vocab_size: Number of pieces in the vocabulary.

    Returns:
        Paths of the tokenizer and of the corpus's training split.

    Raises:
        BenchmarkError: the text is too small for the vocabulary, or the disk is full.
    """
    tokenizer, corpus = directory / "spm.model", directory / "corpus"
    given = ["--input", str(bundled_text()), "--output"]
    train, prepare = (str(ROOT / "tools" / name) for name in ("train_tokenizer.py", "prepare_corpus.py"))
    run_command([sys.executable, train, *given, str(tokenizer), "--vocab-size", str(vocab_size)])
    run_command([sys.executable, prepare, *given, str(corpus), "--tokenizer", str(tokenizer), "--held-out", "0"])
    return tokenizer, corpus / "train"
