"""A small checkpoint to start from."""

from pathlib import Path

import pytest

from tests.finetuning.small import write_start


@pytest.fixture(scope="session")
def start_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two checkpoints, with and without dropout, and settings for them."""
    directory = tmp_path_factory.mktemp("start")
    for dropout in (0.0, 0.1):
        write_start(directory, dropout=dropout)
    return directory
