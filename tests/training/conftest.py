"""A tiny corpus of the bundled text, and a run on it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deberta_dist.config import Data, Evaluation, Model, Optimizer, Parallel, Run, RunConfig, Training
from deberta_dist.data.tokenizer import Tokenizer, train_tokenizer
from deberta_dist.preparation.reading.texts import read_texts
from tests.token_files import write_token_file

TEXT = Path(__file__).parents[2] / "launchers" / "demo_text" / "valid.jsonl"
VOCABULARY = 512


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with spm.model, text.tokens made with it, another.model of the same size, and a DeepSpeed JSON."""
    directory = tmp_path_factory.mktemp("corpus")
    whole = "\n".join(read_texts([TEXT]))
    texts = [whole[start : start + 2000] for start in range(0, 40_000, 2000)]
    train_tokenizer(iter(texts), directory / "spm.model", vocab_size=300)
    train_tokenizer(iter(texts[10:]), directory / "another.model", vocab_size=300)
    short = directory / "short.jsonl"
    short.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    write_token_file([short], directory / "text.tokens", tokenizer=Tokenizer(directory / "spm.model"))
    (directory / "deepspeed.json").write_text('{"zero_optimization": {"stage": 3}}')
    return directory


MakeRun = Callable[..., RunConfig]


@pytest.fixture
def make_run(corpus: Path) -> MakeRun:
    """Builds a run of tiny-v2; keyword arguments replace fields of the section that has them."""

    def make(**changes: Any) -> RunConfig:
        sections = {
            "model": (Model, {"preset": "tiny-v2", "vocab_size": VOCABULARY}),
            "data": (Data, {"train": corpus / "text.tokens", "validation": corpus / "text.tokens",
                            "tokenizer": corpus / "spm.model", "max_seq_length": 32}),
            "training": (Training, {"global_batch_size": 8, "micro_batch_size": 2, "max_steps": 4}),
            "optimizer": (Optimizer, {"learning_rate": 1e-3}),
            "evaluation": (Evaluation, {"num_sequences": 11}),
            "parallel": (Parallel, {}),
            "run": (Run, {"directory": corpus / "run", "deepspeed": corpus / "deepspeed.json"}),
        }  # fmt: skip
        return RunConfig(
            **{name: kind(**(values | changes.pop(name, {}))) for name, (kind, values) in sections.items()}, **changes
        )

    return make
