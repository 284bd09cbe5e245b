"""Every number of a TOML has bounds: beyond them it is refused by name, within them the dry run works."""

import dataclasses
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from deberta_dist.config import FineTuneConfig, RunConfig, load_config, smallest_world_size
from deberta_dist.config.load import _fields, _marks
from deberta_dist.data.token_writer import TokenFileWriter
from deberta_dist.errors import ConfigError
from deberta_dist.models.config import LARGEST, DebertaConfig
from deberta_dist.planning.dry_run import describe
from deberta_dist.planning.plan import check_plan

ROOT = Path(__file__).parents[2]
NEVER = ("1e300", "nan", "inf", "-inf", "-1", "true", "9223372036854775808", "9223372036854775807")
PERHAPS = ("1e-9", "0", "1", "1.5", "2147483647", "'x'", "[]")
FINE_TUNING = """
[training]
epochs = 2
global_batch_size = 8
[optimizer]
learning_rate = 1e-3
[run]
directory = "run"
deepspeed = "ds.json"
"""
# The model is built without memory, but layer by layer.
SLOW = ("num_hidden_layers", "vocabulary_chunks")


def is_number(annotation: Any) -> bool:
    return annotation in (int, float) or any(is_number(part) for part in get_args(annotation) if not isinstance(part, str))


def numbers(schema: type[BaseModel]) -> list[str]:
    return [".".join(place) for place, field in _fields(schema).items() if is_number(field.annotation)]


def ends(schema: type[BaseModel], key: str) -> list[str]:
    """The bounds of a key."""
    field = _fields(schema)[tuple(key.split("."))]
    marks = [*field.metadata, *_marks(field.annotation)]
    return [str(getattr(mark, name)) for mark in marks for name in ("ge", "gt", "le", "lt") if hasattr(mark, name)]


@pytest.fixture(scope="module")
def toml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's on one process, with two small sources."""
    folder = tmp_path_factory.mktemp("bounds")
    for name, size in (("books", 100), ("web", 300)):
        with TokenFileWriter(folder / f"{name}.tokens", tokenizer_sha256="ab" * 32, vocab_size=99) as writer:
            writer.add_document([7] * (126 * size + 5))
    text = (ROOT / "launchers" / "pretrain_demo.toml").read_text().replace("../", f"{ROOT}/")
    path = folder / "run.toml"
    path.write_text("".join(line for line in text.splitlines(keepends=True) if not line.startswith("train =")))
    return path


def dry_run(toml: Path, key: str, value: str) -> None:
    """As ``--dry-run`` does, with one number of the run replaced."""
    kind = "epochs" if key.endswith(".epochs") else "proportion"
    words = {f"parallel.{axis}_parallel_size": size for axis, size in (("tensor", "1"), ("pipeline", "1"), ("data", "auto"))}
    words |= {"model.num_hidden_layers": "2"}
    for name in ("books", "web"):
        words |= {f"data.sources.{name}.path": str(toml.with_name(f"{name}.tokens")), f"data.sources.{name}.{kind}": "1"}
    words[key.replace("NAME", "books")] = value
    config = load_config(toml, [f"--{name}={text}" for name, text in words.items()])
    describe(check_plan(config, world_size=smallest_world_size(config)))


@pytest.mark.parametrize("key", numbers(RunConfig))
def test_numbers_of_pre_training(key: str, toml: Path) -> None:
    assert len(ends(RunConfig, key)) >= 2, "a number without bounds"
    listed = key.endswith(("betas", "layers_per_stage", "bucket_lengths"))
    for value in (*NEVER, *PERHAPS, *ends(RunConfig, key)):
        for text in (value, f"[{value}]", f"[{value}, {value}]") if listed else (value,):
            if key.endswith(SLOW) and value.isdecimal() and int(value) > 2:
                continue
            try:
                dry_run(toml, key, text)
            except ConfigError as error:
                assert key.rpartition(".")[2] in str(error)
                assert len(str(error).splitlines()[0]) < 600
                continue
            assert value not in NEVER, text


@pytest.mark.parametrize("key", numbers(FineTuneConfig))
def test_numbers_of_fine_tuning(key: str, tmp_path: Path) -> None:
    assert len(ends(FineTuneConfig, key)) >= 2, "a number without bounds"
    path = tmp_path / "finetune.toml"
    path.write_text(FINE_TUNING)
    for value in NEVER:
        with pytest.raises(ConfigError) as caught:
            load_config(path, [f"--{key}", value], schema=FineTuneConfig)
        assert key in str(caught.value)


@pytest.mark.parametrize("name", LARGEST)
def test_numbers_of_the_model(name: str, toml: Path) -> None:
    for value in (*NEVER, *PERHAPS, str(LARGEST[name]), f"{LARGEST[name]}1"):
        if name in SLOW and value.isdecimal() and 2 < int(value) <= LARGEST[name]:
            continue
        try:
            dry_run(toml, f"model.{name}", value)
        except ConfigError as error:
            assert name in str(error) or "largest distance" in str(error)


def test_every_size_of_the_model_has_a_bound() -> None:
    sizes = {
        field.name for field in dataclasses.fields(DebertaConfig) if any(kind in str(field.type) for kind in ("int", "float"))
    }
    bounded_by_others = {"conv_groups", "padding_idx", "pooler_hidden_size"}
    shares = {"hidden_dropout_prob", "attention_probs_dropout_prob", "pooler_dropout", "cls_drop_out"}
    assert sizes == {*LARGEST, *bounded_by_others, *shares}


def test_the_message_has_key_and_range(toml: Path) -> None:
    for key, value, said in (
        ("run.timeout_minutes", "1e300", "run.timeout_minutes = 1e+300; expected a number from 0.1 to 10080"),
        ("run.timeout_minutes", "1e-9", "run.timeout_minutes = 1e-09; expected a number from 0.1 to 10080"),
        ("optimizer.betas", "[0.9, 1.0]", "expected a number from 0 to less than 1"),
        ("data.sources.books.proportion", "1e300", "data.sources.books.proportion = 1e+300; expected a number from 1e-06 to 1000000"),
        ("parallel.data_parallel_size", "0", "expected a number from 1 to 1048576 or 'auto'"),
    ):  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            dry_run(toml, key, value)
        assert said in str(caught.value)
