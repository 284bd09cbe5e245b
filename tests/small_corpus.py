"""Fixtures: one small tokenizer and token file for the tests of a folder, made from the bundled text."""

import json
from pathlib import Path

import pytest

from deberta_dist.data.token_file import TokenFile
from deberta_dist.data.tokenizer import Tokenizer, train_tokenizer
from tests.token_files import write_token_file

DEMO_TEXT = Path(__file__).parents[1] / "launchers" / "demo_text"


@pytest.fixture(scope="session")
def texts() -> list[str]:
    with open(DEMO_TEXT / "valid.jsonl", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


@pytest.fixture(scope="session")
def tokenizer(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "spm.model"
    train_tokenizer(texts, path, vocab_size=1000)
    return Tokenizer(path)


@pytest.fixture(scope="session")
def other_tokenizer(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "other.model"
    train_tokenizer(texts[:5], path, vocab_size=1000)
    return Tokenizer(path)


@pytest.fixture(scope="session")
def token_file(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> TokenFile:
    path = tmp_path_factory.mktemp("tokens") / "valid.tokens"
    write_token_file([DEMO_TEXT / "valid.jsonl"], path, tokenizer=tokenizer)
    return TokenFile(path)
