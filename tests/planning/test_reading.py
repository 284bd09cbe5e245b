"""How often max_steps goes through each source, in the dry run."""

from pathlib import Path

import pytest

from deberta_dist.config import load_config
from deberta_dist.data.token_writer import TokenFileWriter
from deberta_dist.errors import DataError
from deberta_dist.planning.dry_run import describe
from deberta_dist.planning.plan import check_plan

ROOT = Path(__file__).parents[2]


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    """The demo's, 500 steps of 32 samples of 126 tokens, with sources of 1,000, 3,000 and 500 samples."""
    for name, size in (("books", 1000), ("web", 3000), ("wiki", 500)):
        with TokenFileWriter(tmp_path / f"{name}.tokens", tokenizer_sha256="ab" * 32, vocab_size=99) as writer:
            writer.add_document([7] * (126 * size + 5))
    text = (ROOT / "launchers" / "pretrain_demo.toml").read_text().replace("../", f"{ROOT}/")
    path = tmp_path / "run.toml"
    path.write_text("".join(line for line in text.splitlines(keepends=True) if not line.startswith("train =")))
    return path


def text_of(toml: Path, **sources: str) -> str:
    overrides = []
    for name, line in sources.items():
        overrides += [f"--data.sources.{name}.path={toml.with_name(f'{name}.tokens')}", f"--data.sources.{name}.{line}"]
    return describe(check_plan(load_config(toml, overrides), world_size=8))


def test_epochs_of_every_source(toml: Path) -> None:
    text = text_of(toml, web="proportion=6", books="proportion=3", wiki="proportion=1")
    block = text[text.index("DATA ") : text.index("\n\nNOTES")].splitlines()
    assert block[0] == "DATA        16,000 samples of 128 tokens in 500 steps"
    assert [line.split() for line in block[2:]] == [
        ["books", "30.000%", "1,000", "4.800"], ["web", "60.000%", "3,000", "3.200"], ["wiki", "10.000%", "500", "3.200"]
    ]  # fmt: skip
    assert "data.sources.wiki" not in text


def test_more_or_fewer_steps_than_the_epochs_hold_are_told(toml: Path) -> None:
    text = text_of(toml, books="epochs=2", web="epochs=1", wiki="epochs=0.5")  # 5,250 samples, 164.06 steps
    lines = [line.split() for line in text.splitlines() if "asked for" in line]
    assert lines[0] == ["books", "38.095%", "1,000", "6.095", "(asked", "for:", "2)"]
    assert "training.max_steps = 500 reads 3.05 times what the epochs asked for hold (5,250 samples, 164.1 steps)" in text
    assert "reads" not in text_of(toml, books="epochs=6", web="epochs=3", wiki="epochs=2")


def test_what_is_not_there_is_named_and_what_is_no_corpus_refused(toml: Path) -> None:
    toml.with_name("wiki.tokens").unlink()
    text = text_of(toml, books="epochs=2", wiki="epochs=1")
    assert "wiki.tokens does not exist yet" in text and "data.sources.wiki.path = " in text and "DATA " not in text
    toml.with_name("wiki.tokens").write_text("text")
    with pytest.raises(DataError, match="wiki.tokens is not a token file"):
        text_of(toml, books="epochs=2", wiki="epochs=1")
