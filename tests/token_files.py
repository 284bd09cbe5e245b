"""One token file of a few texts, for tests that need one and not its preparation."""

from collections.abc import Sequence
from pathlib import Path

from deberta_dist.data.token_writer import TokenFileWriter
from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.preparation.reading.texts import read_texts


def write_token_file(inputs: Sequence[Path], path: Path, *, tokenizer: Tokenizer) -> None:
    """Every document of the inputs, in order."""
    with TokenFileWriter(path, tokenizer_sha256=tokenizer.sha256, vocab_size=tokenizer.num_tokens) as writer:
        for text in read_texts(inputs):
            writer.add_document(tokenizer.encode_array(text))
