"""A tiny corpus, tokenizer and token files, made once with the tools' own functions."""

from pathlib import Path

import pytest

from deberta_dist.data.tokenizer import Tokenizer, train_tokenizer
from deberta_dist.preparation.reading.texts import read_texts
from tests.token_files import write_token_file

TEXT = Path(__file__).parents[2] / "launchers" / "demo_text"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with spm.model, and train.tokens and valid.tokens of the held-out demo text, other.tokens of half.

    And other.model, a tokenizer with more pieces.
    """
    directory = tmp_path_factory.mktemp("corpus")
    inputs = [TEXT / "valid.jsonl"]
    train_tokenizer(read_texts(inputs), directory / "spm.model", vocab_size=1000)
    train_tokenizer(read_texts(inputs), directory / "other.model", vocab_size=1100)
    tokenizer = Tokenizer(directory / "spm.model")
    for name in ("train", "valid"):
        write_token_file(inputs, directory / f"{name}.tokens", tokenizer=tokenizer)
    half = directory / "half.jsonl"
    half.write_text("".join((TEXT / "valid.jsonl").read_text().splitlines(keepends=True)[::2]))
    write_token_file([half], directory / "other.tokens", tokenizer=tokenizer)
    return directory
