"""What the tests of measurements share."""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from deberta_dist.operations import calibration_world, ranks
from tests.harness import ForkedPython
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


@pytest.fixture(scope="session")
def forked_ranks() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Within it the ranks of a measurement are forked from the tests' server; module, arguments and environment are theirs."""

    @contextlib.contextmanager
    def forked() -> Iterator[None]:
        forking = SimpleNamespace(Popen=ForkedPython, PIPE=subprocess.PIPE, STDOUT=subprocess.STDOUT)
        with pytest.MonkeyPatch.context() as patch:
            for module in (ranks, calibration_world):
                patch.setattr(module, "subprocess", forking)
            yield

    return forked
