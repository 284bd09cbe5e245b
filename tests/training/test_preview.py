"""What dry runs and starts say of tokenizer, vocabulary, initial weights and run directory; the same of each."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deberta_dist.checkpoint.errors import CheckpointError
from deberta_dist.config import Model, RunConfig
from deberta_dist.data.loader import rows_for, unused_rows
from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.errors import ConfigError, DataError
from deberta_dist.models.masked_lm import DebertaForMaskedLM
from deberta_dist.models.presets import preset
from deberta_dist.planning.plan import check_plan
from deberta_dist.training import vocabulary
from deberta_dist.training.inputs import open_initial_weights
from deberta_dist.training.preview import preview_model, preview_start
from deberta_dist.training.vocabulary import resolve_vocabulary
from tests.conversion.small_models import export, write
from tests.training.conftest import VOCABULARY, MakeRun

TOKENS = 301  # of the tokenizer in ``corpus``
FITTING = 384


def of_preset(config: RunConfig) -> RunConfig:
    """The run without a word on its vocabulary."""
    return config.model_copy(update={"model": Model(preset="tiny-v2")})


def masked_lm(directory: Path, *, vocab_size: int = VOCABULARY, **fields: Any) -> Path:
    """A directory as a run exports it."""
    return export(DebertaForMaskedLM(preset("tiny-v2", vocab_size=vocab_size, **fields)), directory)


def notes(config: RunConfig) -> list[str]:
    """Of the dry run, after a look that a start says the same of its initial weights."""
    plan = check_plan(resolve_vocabulary(config), world_size=1)
    lines = preview_start(plan)
    weights = open_initial_weights(plan, tokenizer_sha256=None, verify=True)
    assert weights is None or set(weights.notes) <= set(lines)
    assert [line for line in preview_model(plan) if line.startswith("warning")] == [w for w in lines if w.startswith("warning")]
    return lines


@pytest.mark.parametrize(("num_tokens", "rows"), [(1, 128), (128, 128), (129, 256), (8001, 8064), (128_001, 128_128)])
def test_rows_are_a_multiple_of_128(num_tokens: int, rows: int) -> None:
    assert rows_for(num_tokens) == rows


def test_auto_follows_from_the_tokenizer_and_stands_as_a_number(make_run: MakeRun, corpus: Path) -> None:
    assert Tokenizer(corpus / "spm.model").num_tokens == TOKENS
    for config in (make_run(model={"vocab_size": "auto"}), of_preset(make_run())):
        config = resolve_vocabulary(config)
        assert config.model.overrides["vocab_size"] == FITTING and resolve_vocabulary(config) is config
        # Three ranks divide nothing here: their pads are the split's own.
        for tensor in (1, 2, 4):
            update = {"parallel": config.parallel.model_copy(update={"tensor_parallel_size": tensor})}
            assert check_plan(config.model_copy(update=update), world_size=tensor).model_config.vocab_size == FITTING
        assert notes(config) == []


def test_a_given_number_stays(make_run: MakeRun) -> None:
    config = make_run(model={"vocab_size": 320})
    assert resolve_vocabulary(config) is config and notes(config) == []


@pytest.mark.parametrize(("own", "rows"), [(300, FITTING), (301, 301), (380, 380), (384, 384), (385, FITTING)])
def test_a_preset_keeps_its_own_number_where_the_tokenizer_fills_it(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, own: int, rows: int
) -> None:
    monkeypatch.setattr(vocabulary, "PRESETS", {"tiny-v2": preset("tiny-v2", vocab_size=own)})
    assert resolve_vocabulary(of_preset(make_run())).model.overrides["vocab_size"] == rows


def test_rows_that_no_token_uses_are_warned_of(make_run: MakeRun, corpus: Path) -> None:
    tokenizer = Tokenizer(corpus / "spm.model")
    assert [unused_rows(tokenizer, rows) for rows in (TOKENS, 316, FITTING)] == [None] * 3
    (line,) = notes(make_run(model={"vocab_size": 4096}))
    assert line.startswith("warning: model.vocab_size = 4096, but ") and "301 tokens" in line and "(93%)" in line
    assert line.endswith(f'"auto" makes {FITTING}')


def test_too_few_rows_are_refused_by_the_dry_run(make_run: MakeRun) -> None:
    plan = check_plan(make_run(model={"vocab_size": 200}), world_size=1)
    for look in (preview_start, preview_model):
        with pytest.raises(DataError, match=r'model\.vocab_size = 200 is less than the 301 tokens .*"auto" makes 384'):
            look(plan)


def test_without_the_files_a_preset_has_its_own_number_and_auto_needs_one(make_run: MakeRun, tmp_path: Path) -> None:
    absent = {"tokenizer": tmp_path / "absent.model", "train": tmp_path / "no.tokens", "validation": tmp_path / "no.tokens"}
    assert notes(of_preset(make_run(data=absent))) == [
        "model.vocab_size = 512 is the preset's: data.tokenizer is not there yet, and the start takes the number from it"
    ]
    with pytest.raises(ConfigError, match=r'"auto" follows from data\.tokenizer = .*absent\.model, which does not exist'):
        resolve_vocabulary(make_run(model={"vocab_size": "auto"}, data=absent))
    init = {"init": tmp_path / "absent"}
    with pytest.raises(ConfigError, match=r'"auto" follows from training\.init = .*absent, which does not exist'):
        resolve_vocabulary(make_run(model={"vocab_size": "auto"}, training=init))
    config = make_run(training=init)
    assert preview_start(check_plan(config, world_size=1)) == [
        f"warning: {unused_rows(Tokenizer(config.data.tokenizer), VOCABULARY)}",
        f"training.init = {tmp_path / 'absent'} does not exist yet",
    ]


def test_auto_with_initial_weights_is_their_number_of_rows(make_run: MakeRun, tmp_path: Path) -> None:
    given = masked_lm(tmp_path / "given", vocab_size=310)
    for config in (
        make_run(model={"vocab_size": "auto"}, training={"init": given}),
        of_preset(make_run(training={"init": given})),
    ):
        assert resolve_vocabulary(config).model.overrides["vocab_size"] == 310
        (line,) = notes(config)
        assert line.startswith(f"starts from {given} ")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 512, "hidden_size": 32}, "hidden_size = 64 there, 32 here"),
        ({"vocab_size": 513}, "vocab_size = 512 there, 513"),
    ],
)
def test_weights_of_another_model_are_refused_by_the_dry_run(
    make_run: MakeRun, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    plan = check_plan(make_run(model=fields, training={"init": masked_lm(tmp_path / "given")}), world_size=1)
    for look in (preview_start, preview_model):
        with pytest.raises(ConfigError, match=message):
            look(plan)


def with_more(directory: Path, source: Path, *, leave_out: str = "-", **shapes: tuple[int, ...]) -> Path:
    """A checkpoint with further tensors, or without some."""
    tensors = {k: v for k, v in load_file(source / "model.safetensors").items() if not k.startswith(leave_out)}
    tensors |= {name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()}
    return write(tensors, directory, config=json.loads((source / "config.json").read_text()))


RTD = {
    "mask_predictions__dense__weight": (64, 64),
    "mask_predictions__dense__bias": (64,),
    "mask_predictions__LayerNorm__weight": (64,),
    "mask_predictions__LayerNorm__bias": (64,),
    "mask_predictions__classifier__weight": (1, 64),
    "mask_predictions__classifier__bias": (1,),
}
CLASSIFIER = {
    "pooler__dense__weight": (64, 64),
    "pooler__dense__bias": (64,),
    "classifier__weight": (3, 64),
    "classifier__bias": (3,),
}
POSITIONS = "deberta.embeddings.position_embeddings"


@pytest.mark.parametrize(
    ("shapes", "leave_out", "warnings"),
    [
        ({}, "-", []),
        (RTD, "-", ["is a v3 discriminator: .* never to predict words", r"mask_predictions\..* does not use them"]),
        (CLASSIFIER, "-", [r"classifier\..* does not use them"]),
        ({}, POSITIONS, [rf"has no {POSITIONS}\.weight .* starts at random"]),
    ],
    ids=["masked-lm", "discriminator", "classifier", "no-positions"],
)
@pytest.mark.parametrize("form", ["deberta_dist", "official"])
def test_weights_that_fit_badly_are_warned_of(
    make_run: MakeRun, tmp_path: Path, shapes: dict[str, Any], leave_out: str, warnings: list[str], form: str
) -> None:
    given = with_more(tmp_path / "given", masked_lm(tmp_path / "plain", vocab_size=TOKENS), leave_out=leave_out, **shapes)
    if form == "official":
        torch.save(load_file(given / "model.safetensors"), given / "pytorch_model.bin")
        (given / "model.safetensors").unlink()
    first, *found = notes(make_run(model={"vocab_size": TOKENS}, training={"init": given}))
    assert first.startswith(f"starts from {given} ")
    assert len(found) == len(warnings)
    for line, words in zip(found, warnings, strict=True):
        assert line.startswith("warning: training.init") and re.search(words, line), line


def test_a_discriminator_without_a_head_names_the_generator(make_run: MakeRun, tmp_path: Path) -> None:
    given = with_more(tmp_path / "given", masked_lm(tmp_path / "plain"), leave_out="lm_predictions", **RTD)
    plan = check_plan(make_run(training={"init": given}), world_size=1)
    with pytest.raises(CheckpointError, match=r"lacks lm_predictions.*its generator, pytorch_model\.generator\.bin"):
        preview_start(plan)
