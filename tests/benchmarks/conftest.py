"""What the tests of measurements share."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.small_corpus import other_tokenizer, texts, token_file, tokenizer

__all__ = ["other_tokenizer", "texts", "token_file", "tokenizer"]


@pytest.fixture
def ranks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A function that makes every rank started from now on run a shell script instead of Python."""

    def run(script: str) -> None:
        stand_in = tmp_path / "python"
        stand_in.write_text(f"#!/bin/sh\n{script}\n")
        stand_in.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(stand_in))

    return run
