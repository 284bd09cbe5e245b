"""A run that was interrupted ends as if it had not been, on the same layout and on any other."""

import json
import math
import os
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from deberta_dist.conversion.convert import convert
from deberta_dist.errors import ConfigError
from deberta_dist.models.initialisation import initial_tensor
from deberta_dist.training import pretrain
from tests.harness import free_port, run_ranks
from tests.integration.parallel_run import relative_error

ROOT = Path(__file__).parents[2]
STEPS, SAVED = 4, 2
POSITIONS = "deberta.embeddings.position_embeddings.weight"
WORDS = "deberta.embeddings.word_embeddings.weight"

Layout = tuple[int, int, int]


def pretrain_rank(arguments: list[str], port: int) -> None:
    """What a launcher's Python half does on one rank."""
    os.environ["MASTER_PORT"] = str(port)
    pretrain._run(ROOT / "launchers" / "pretrain_demo.sh", arguments)


def settings_of(corpus: Path, directory: Path, layout: Layout) -> dict[str, object]:
    """Four steps of the demo's model, small, on a layout (tensor, pipeline, data), by key."""
    tensor, pipeline, data = layout
    return {
        "data.train": corpus / "train.tokens",
        "data.validation": corpus / "valid.tokens",
        "data.tokenizer": corpus / "spm.model",
        "data.max_seq_length": 32,
        "model.hidden_size": 32,
        "model.attention_head_size": 8,
        "model.intermediate_size": 64,
        "model.vocab_size": 1003,  # padded for every tensor split
        "training.max_steps": STEPS,
        "training.global_batch_size": 8,
        "training.micro_batch_size": 2,
        "schedule.warmup_steps": 2,
        "evaluation.every_steps": 0,
        "evaluation.num_sequences": 8,
        "checkpoint.every_steps": 1,
        "checkpoint.keep_last": 9,
        "parallel.tensor_parallel_size": tensor,
        "parallel.pipeline_parallel_size": pipeline,
        "parallel.data_parallel_size": data,
        "run.directory": directory,
    }


def run(corpus: Path, directory: Path, layout: Layout, **changes: object) -> None:
    """Runs that, continuing where it can."""
    settings = settings_of(corpus, directory, layout)
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    run_ranks(math.prod(layout), pretrain_rank, [f"--{k}={v}" for k, v in settings.items()], free_port())


def interrupted(whole: Path, directory: Path) -> Path:
    """A run directory as a kill after step 2 leaves it."""
    shutil.copytree(whole / "checkpoints" / f"step-{SAVED:08d}", directory / "checkpoints" / f"step-{SAVED:08d}")
    return directory


def history(directory: Path) -> list[tuple[float, float, float, int]]:
    """(loss, norm, learning rate, consumed samples) of the steps after the saved one."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(s["loss"], s["grad_norm"], s["lr"], s["consumed_samples"]) for s in lines if "loss" in s and s["step"] > SAVED]


def weights(directory: Path) -> dict[str, np.ndarray]:
    return load_file(directory / "weights" / "model.safetensors")


@pytest.fixture(scope="module")
def whole_run(corpus: Path, tmp_path_factory: pytest.TempPathFactory):
    """Uninterrupted runs by layout and changes, each made once."""

    @cache
    def make(layout: Layout, changes: tuple[tuple[str, object], ...] = ()) -> Path:
        directory = tmp_path_factory.mktemp("whole")
        run(corpus, directory, layout, **dict(changes))
        return directory

    return make


DROPOUT = (("model__hidden_dropout_prob", 0.1), ("model__attention_probs_dropout_prob", 0.1))
PLAIN = (("model__decoder", "plain"),)
BF16 = (("run__deepspeed", ROOT / "ds_configs" / "zero3_bf16.json"),)
OFFLOAD = (("run__deepspeed", ROOT / "ds_configs" / "zero3_offload.json"),)


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        pytest.param((1, 1, 1), DROPOUT + PLAIN, id="one-rank-fp32-plain"),
        pytest.param((1, 1, 1), DROPOUT, id="one-rank-fp32", marks=pytest.mark.slow),
        pytest.param((2, 2, 2), DROPOUT + BF16, id="2x2x2-bf16"),
        pytest.param((1, 1, 1), DROPOUT + BF16, id="one-rank-bf16", marks=pytest.mark.slow),
        pytest.param((2, 2, 2), DROPOUT, id="2x2x2-fp32", marks=pytest.mark.slow),
    ],
)
def test_same_layout_is_bit_equal(corpus: Path, tmp_path: Path, whole_run, layout: Layout, changes) -> None:
    whole = whole_run(layout, changes)
    continued = interrupted(whole, tmp_path / "run")
    run(corpus, continued, layout, **dict(changes))
    assert history(continued) == history(whole)
    expected, found = weights(whole), weights(continued)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    records = [json.loads(line) for line in (continued / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["resumed_from_step"] == SAVED
    saved = [r for r in records if "copy_seconds" in r]
    assert [r["step"] for r in saved] == [3, 4] and all(r["write_seconds"] >= 0 for r in saved)


@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        ((2, 2, 2), (1, 1, 1)),
        ((1, 1, 1), (2, 2, 2)),
        ((2, 2, 2), (4, 1, 1)),
        pytest.param((4, 1, 1), (1, 2, 2), marks=pytest.mark.slow),
        pytest.param((1, 4, 1), (2, 1, 2), marks=pytest.mark.slow),
        ((1, 1, 4), (1, 4, 1)),
        pytest.param((2, 1, 2), (1, 2, 1), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_another_layout_continues_the_same_training(
    corpus: Path, tmp_path: Path, whole_run, writer: Layout, reader: Layout
) -> None:
    whole = whole_run(writer)
    continued = interrupted(whole, tmp_path / "run")
    run(corpus, continued, reader)
    np.testing.assert_allclose(history(continued), history(whole), rtol=1e-5)
    expected, found = weights(whole), weights(continued)
    for name in expected:
        assert relative_error(found[name], expected[name]) < 1e-4, name


def test_dropout_goes_on_across_pipeline_and_data_layouts(corpus: Path, tmp_path: Path, whole_run) -> None:
    whole = whole_run((1, 2, 2), DROPOUT)
    continued = interrupted(whole, tmp_path / "run")
    run(corpus, continued, (1, 1, 1), **dict(DROPOUT))
    np.testing.assert_allclose(history(continued), history(whole), rtol=1e-5)


def test_precision_and_offload_may_change(corpus: Path, tmp_path: Path, whole_run) -> None:
    whole = whole_run((2, 2, 2), BF16)
    continued = interrupted(whole, tmp_path / "fp32")
    run(corpus, continued, (1, 1, 2))
    np.testing.assert_allclose([h[0] for h in history(continued)], [h[0] for h in history(whole)], rtol=2**-8)
    offloaded = interrupted(whole_run((1, 1, 1), BF16), tmp_path / "offload")
    run(corpus, offloaded, (1, 1, 1), **dict(OFFLOAD))
    # The norm is added up on the other device, in another order; from then on a weight may round to the next bfloat16.
    found, expected = history(offloaded), history(whole_run((1, 1, 1), BF16))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found, expected, rtol=2**-8)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(corpus: Path, tmp_path: Path, whole_run) -> None:
    whole = whole_run((1, 1, 1))
    continued = tmp_path / "run"
    shutil.copytree(whole / "checkpoints", continued / "checkpoints")
    for step in (3, 4):
        file = continued / "checkpoints" / f"step-{step:08d}" / "rank-00000.safetensors"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    run(corpus, continued, (1, 1, 1))
    assert history(continued) == history(whole)


def test_another_model_is_refused(corpus: Path, tmp_path: Path, whole_run) -> None:
    continued = interrupted(whole_run((1, 1, 1)), tmp_path / "run")
    with pytest.raises(AssertionError, match="intermediate_size"):
        run(corpus, continued, (1, 1, 1), model__intermediate_size=128)


LONGER = 6


def pretrain_rank_in_one_go(arguments: list[str], port: int) -> None:
    """A run of the larger length whose first steps have the learning rates of the shorter one."""
    of_length = pretrain.learning_rate
    pretrain.learning_rate = lambda step, **schedule: of_length(
        step, **{**schedule, **({"max_steps": STEPS} if step < STEPS else {})}
    )
    pretrain_rank(arguments, port)


def test_a_finished_run_continues_to_a_larger_length(corpus: Path, tmp_path: Path, whole_run) -> None:
    """Bit-equal to one process that is never interrupted and sets these learning rates; killed on the way as well."""
    whole, changes = whole_run((1, 1, 1), DROPOUT), {**dict(DROPOUT), "training__max_steps": LONGER}
    continued, once, killed = tmp_path / "continued", tmp_path / "once", tmp_path / "killed"
    shutil.copytree(whole, continued)
    run(corpus, continued, (1, 1, 1), **changes)
    settings = settings_of(corpus, once, (1, 1, 1)) | {k.replace("__", "."): v for k, v in changes.items()}
    run_ranks(1, pretrain_rank_in_one_go, [f"--{k}={v}" for k, v in settings.items()], free_port())
    assert history(continued) == history(once) and len(history(once)) == LONGER - SAVED
    expected, found = weights(once), weights(continued)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)

    text = (continued / "metrics.jsonl").read_text()
    assert text.startswith((whole / "metrics.jsonl").read_text())
    (record,) = [json.loads(line) for line in text.splitlines() if "resumed_from_step" in line]
    assert record["changed"] == [f"training.max_steps: {STEPS} -> {LONGER}"]
    rates = [step["lr"] for step in map(json.loads, text.splitlines()) if "loss" in step]
    assert (record["lr_before"], record["lr_after"]) == (rates[STEPS - 1], rates[STEPS])
    result = json.loads((continued / "result.json").read_text())
    assert result["steps"] == LONGER and result["earlier"] == [json.loads((whole / "result.json").read_text())]
    assert result["loss"] == json.loads((once / "result.json").read_text())["loss"]
    kept = load_file(continued / f"weights-step-{STEPS:08d}" / "model.safetensors")
    assert all(np.array_equal(kept[name], value) for name, value in weights(whole).items())
    assert f"max_steps = {LONGER}\n" in (continued / "run_config.toml").read_text()

    shutil.copytree(whole, killed)
    last = f"step-{LONGER - 1:08d}"
    shutil.copytree(continued / "checkpoints" / last, killed / "checkpoints" / last)
    run(corpus, killed, (1, 1, 1), **changes)
    assert history(killed)[-1] == history(once)[-1]
    assert all(np.array_equal(weights(killed)[name], expected[name]) for name in expected)
    assert json.loads((killed / "result.json").read_text()) == result
    for steps, message in ((LONGER, "holds a finished run"), (STEPS, f"less than the {LONGER} steps")):
        words = [f"--{k}={v}" for k, v in (settings | {"run.directory": killed, "training.max_steps": steps}).items()]
        for more in ([], ["--dry-run"]):
            with pytest.raises(ConfigError, match=message):  # in this process: before any group
                pretrain._run(ROOT / "launchers" / "pretrain_demo.sh", [*words, *more])


@pytest.mark.slow
@pytest.mark.parametrize(("writer", "reader"), [((1, 1, 1), (2, 2, 2)), ((2, 2, 2), (1, 1, 2))], ids=str)
def test_a_finished_run_continues_on_another_layout(
    corpus: Path, tmp_path: Path, whole_run, writer: Layout, reader: Layout
) -> None:
    for directory, layout in ((tmp_path / "same", writer), (tmp_path / "other", reader)):
        shutil.copytree(whole_run(writer), directory)
        run(corpus, directory, layout, training__max_steps=LONGER)
    np.testing.assert_allclose(history(tmp_path / "other"), history(tmp_path / "same"), rtol=1e-5)


BARELY = {"optimizer__learning_rate": 1e-12, "training__max_steps": 1, "schedule__warmup_steps": 0}


def test_a_run_starts_from_weights_of_any_form(corpus: Path, tmp_path: Path, whole_run) -> None:
    whole = whole_run((1, 1, 1))
    last_loss = json.loads((whole / "result.json").read_text())["loss"]
    last = whole / "checkpoints" / f"step-{STEPS:08d}"
    convert(whole, tmp_path / "official", to="official")
    for number, (init, layout) in enumerate(
        ((whole / "weights", (2, 1, 1)), (last, (1, 2, 1)), (tmp_path / "official", (1, 1, 2)))
    ):
        directory = tmp_path / f"run{number}"
        run(corpus, directory, layout, training__init=init, **BARELY, **dict(DROPOUT))
        assert json.loads((directory / "result.json").read_text())["loss"] == pytest.approx(last_loss, rel=1e-5)


def test_what_weights_lack_starts_at_random_or_is_refused(corpus: Path, tmp_path: Path, whole_run) -> None:
    given = tmp_path / "given"
    shutil.copytree(whole_run((1, 1, 1)) / "weights", given)
    tensors = load_file(given / "model.safetensors")
    del tensors[POSITIONS]
    save_file(tensors, given / "model.safetensors")
    run(corpus, tmp_path / "run", (1, 1, 1), training__init=given, **BARELY)
    found, std = weights(tmp_path / "run"), json.loads((given / "config.json").read_text())["initializer_range"]
    expected = initial_tensor(POSITIONS, found[POSITIONS].shape, seed=42, std=std).numpy()
    np.testing.assert_allclose(found[POSITIONS], expected, atol=1e-9)
    np.testing.assert_allclose(found[WORDS], tensors[WORDS], atol=1e-9)
    save_file({name: value for name, value in tensors.items() if name.startswith("deberta.")}, given / "model.safetensors")
    with pytest.raises(AssertionError, match=r"lacks lm_predictions\.lm_head"):
        run(corpus, tmp_path / "refused", (1, 1, 1), training__init=given, **BARELY)
    with pytest.raises(AssertionError, match="num_attention_heads = .* there"):
        run(corpus, tmp_path / "refused", (1, 1, 1), training__init=given, model__num_attention_heads=2,
            model__attention_head_size=16)  # fmt: skip
    with pytest.raises(AssertionError, match="name one of its checkpoints"):
        run(corpus, tmp_path / "refused", (1, 1, 1), training__init=whole_run((1, 1, 1)), **BARELY)
    (given / "spm.model").write_bytes((whole_run((1, 1, 1)) / "spm.model").read_bytes() + b"\x00")
    with pytest.raises(AssertionError, match="its embeddings are of other pieces|not a sentencepiece model"):
        run(corpus, tmp_path / "refused", (1, 1, 1), training__init=given, **BARELY)
    assert not (tmp_path / "refused").exists()


def test_an_interrupted_run_does_not_need_what_it_started_from(corpus: Path, tmp_path: Path, whole_run) -> None:
    whole = whole_run((1, 1, 1))
    continued = interrupted(whole, tmp_path / "run")
    # Nor does "auto": the checkpoint has its 1003 rows.
    run(corpus, continued, (1, 1, 1), training__init=tmp_path / "gone", model__vocab_size="auto")
    assert history(continued) == history(whole)
    assert "\nvocab_size = 1003\n" in (continued / "run_config.toml").read_text()
    settings = settings_of(corpus, continued, (1, 1, 1)) | {"model.vocab_size": "auto", "training.max_steps": LONGER}
    words = [f"--{key}={value}" for key, value in (settings | {"data.tokenizer": corpus / "other.model"}).items()]
    with pytest.raises(ConfigError, match="data.tokenizer has sha256 .* another vocabulary"):
        pretrain._run(ROOT / "launchers" / "pretrain_demo.sh", [*words, "--dry-run"])
    # The run keeps its tokenizer for conversions.
    assert (continued / "spm.model").read_bytes() == (corpus / "spm.model").read_bytes()


def test_what_has_changed_is_told(corpus: Path, tmp_path: Path, whole_run) -> None:
    """Another text, another precision, another batch: the run goes on behind the samples it has seen."""
    continued = interrupted(whole_run((1, 1, 1)), tmp_path / "run")
    other = corpus / "other.tokens"
    changes = {"data__train": other, "data__validation": other, "training__global_batch_size": 4, **dict(BF16)}
    run(corpus, continued, (1, 1, 1), **changes)
    (record, *_) = [json.loads(line) for line in (continued / "metrics.jsonl").read_text().splitlines()]
    told = "\n".join(record["changed"])
    texts = ("data.train: another text", "data.validation: another text")
    for words in ("training.global_batch_size: 8 -> 4", "precision: fp32 -> bf16", *texts):
        assert words in told
    assert [h[3] for h in history(continued)] == [8 * SAVED + 4 * (step + 1) for step in range(STEPS - SAVED)]


def test_checkpoints_of_another_run_are_not_started_over(corpus: Path, tmp_path: Path, whole_run) -> None:
    directory = interrupted(whole_run((1, 1, 1)), tmp_path / "run")
    with pytest.raises(AssertionError, match='checkpoint.resume is "never"'):
        run(corpus, directory, (1, 1, 1), checkpoint__resume="never")


def test_a_start_without_a_checkpoint_begins_again_and_says_so(corpus: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    run(corpus, directory, (1, 1, 1), training__max_steps=2, model__vocab_size="auto")
    config = json.loads((directory / "weights" / "config.json").read_text())
    manifest = json.loads((directory / "checkpoints" / "step-00000002" / "manifest.json").read_text())
    numbers = [config["vocab_size"], manifest["model_config"]["vocab_size"], manifest["run_config"]["model"]["vocab_size"]]
    assert numbers == [1024] * 3 and len(weights(directory)[WORDS]) == 1024
    assert "\nvocab_size = 1024\n" in (directory / "run_config.toml").read_text()
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("step", line) for line in lines[:3]] == [1, {"resumed_from_step": 0}, 1]
