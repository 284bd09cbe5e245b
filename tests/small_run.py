"""A text and a run that users' commands take minutes less for: what the tests of whole journeys start from."""

import json
from pathlib import Path

DEMO_TEXT = Path(__file__).parents[1] / "launchers" / "demo_text"


def write_text(path: Path) -> None:
    """Writes documents of a paragraph each, a blank line between them: fewer may leave nothing to hold out."""
    lines = (DEMO_TEXT / "train.jsonl").read_text(encoding="utf-8").splitlines()[:24]
    paragraphs = [paragraph for line in lines for paragraph in json.loads(line)["text"].split("\n") if len(paragraph) > 40]
    assert len(paragraphs) > 200
    path.write_text("\n\n".join(paragraphs[:600]), encoding="utf-8")


def small_run(*, corpus: str, tokenizer: str, directory: str, deepspeed: str) -> str:
    """The TOML of four steps of a tiny model; paths are relative to the file that it is written to.

    Args:
        corpus: What ``prepare-corpus`` made.
        tokenizer: SentencePiece model.
        directory: ``run.directory``.
        deepspeed: ``run.deepspeed``.
    """
    return f"""
[model]
preset = "tiny-v2"
[data]
train = "{corpus}/train"
validation = "{corpus}/heldout"
tokenizer = "{tokenizer}"
max_seq_length = 64
[training]
global_batch_size = 8
micro_batch_size = 2
max_steps = 4
[optimizer]
learning_rate = 1e-3
[checkpoint]
every_steps = 2
[run]
directory = "{directory}"
deepspeed = "{deepspeed}"
"""
