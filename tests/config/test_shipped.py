"""Every shipped TOML and JSON loads, resolves for its intended world, and comes back from a run directory."""

import re
import tomllib
from pathlib import Path

import pytest

from deberta_dist.config import (
    FineTuneConfig,
    RunConfig,
    deepspeed_config,
    load_config,
    precision,
    read_recipes,
    resolve,
    resolve_finetuning,
    write_resolved,
)
from deberta_dist.config.write import to_toml
from deberta_dist.models.presets import preset
from deberta_dist.tasks.superglue.tasks import MAIN_TASKS

ROOT = Path(__file__).resolve().parents[2]
WORLDS = [("pretrain_1.5b.toml", 64), ("pretrain_1.5b.toml", 8), ("pretrain_demo.toml", 8)]


@pytest.mark.parametrize(("name", "world_size"), WORLDS)
def test_launcher_configurations(name: str, world_size: int) -> None:
    config = resolve(load_config(ROOT / "launchers" / name), world_size)
    deepspeed_config(config.run.deepspeed, config)
    assert config.run.directory == ROOT / "runs" / name.removesuffix(".toml")


@pytest.mark.parametrize("name", ["pretrain_1.5b.toml", "pretrain_demo.toml"])
def test_models_know_the_model(name: str) -> None:
    config = load_config(ROOT / "launchers" / name)
    model = preset(config.model.preset, **config.model.overrides)
    assert model.max_position_embeddings >= config.data.max_seq_length
    assert model.num_attention_heads % config.parallel.tensor_parallel_size == 0


def test_demo_vocabulary_holds_the_tokenizer() -> None:
    script = (ROOT / "launchers" / "demo.sh").read_text()
    pieces = int(re.search(r"^pieces=(\d+)", script, re.MULTILINE)[1])
    assert load_config(ROOT / "launchers" / "pretrain_demo.toml").model.overrides["vocab_size"] > pieces


def test_every_pretraining_toml_is_covered() -> None:
    assert {path.name for path in (ROOT / "launchers").glob("pretrain*.toml")} == {name for name, _ in WORLDS}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("zero3_bf16", "bf16"),
        ("zero3_fp16", "fp16"),
        ("zero3_offload", "bf16"),
        ("zero3_fp16_offload", "fp16"),
        ("finetune_zero3", "bf16"),
        ("debug_cpu", "fp32"),
    ],
)
def test_deepspeed_jsons(name: str, expected: str) -> None:
    config = resolve(load_config(ROOT / "launchers" / "pretrain_demo.toml"), 8)
    assert precision(deepspeed_config(ROOT / "ds_configs" / f"{name}.json", config)) == expected


def test_the_paper() -> None:
    """Table 8, column 1.5B."""
    config = resolve(load_config(ROOT / "launchers" / "pretrain_1.5b.toml"), 64)
    assert config.model.preset == "v2-xxlarge"
    assert (config.training.global_batch_size, config.training.max_steps) == (2048, 1_000_000)
    assert (config.schedule.warmup_steps, config.optimizer.learning_rate) == (10_000, 1.5e-4)
    assert (config.optimizer.betas, config.optimizer.eps) == ((0.9, 0.999), 1e-6)
    assert (config.optimizer.weight_decay, config.optimizer.gradient_clipping) == (0.01, 1.0)


@pytest.mark.parametrize(("name", "world_size"), WORLDS)
def test_written_pair_starts_again(name: str, world_size: int, tmp_path: Path) -> None:
    config = resolve(load_config(ROOT / "launchers" / name), world_size)
    ds = deepspeed_config(config.run.deepspeed, config)
    toml, json_file = write_resolved(config, ds, tmp_path / "run")
    again = resolve(load_config(toml), world_size)
    assert again.run.deepspeed == json_file
    assert deepspeed_config(json_file, again) == ds
    same = config.model_dump()
    same["run"]["deepspeed"] = json_file
    assert again.model_dump() == same
    assert sorted(path.name for path in toml.parent.iterdir()) == ["deepspeed.json", "run_config.toml"]
    # and again with another number of processes, as the docstring says
    words = ["--parallel.data_parallel_size", "auto", "--training.num_micro_batches", "auto"]
    fewer = resolve(load_config(toml, words), world_size // 2)
    assert fewer.training.num_micro_batches == config.training.num_micro_batches * 2


def test_a_finetuning_pair_loads_again(tmp_path: Path) -> None:
    launchers = ROOT / "launchers"
    recipes = read_recipes(launchers / "finetune_recipes" / "base.toml", "RTE", known=("MNLI", *MAIN_TASKS))
    loaded = load_config(
        launchers / "finetune_superglue.toml", ["--sift.enabled", "true"], schema=FineTuneConfig, recipes=recipes
    )
    config = resolve_finetuning(loaded, 4)
    ds = deepspeed_config(config.run.deepspeed, config)
    toml, json_file = write_resolved(config, ds, tmp_path / "run")
    again = load_config(toml, schema=FineTuneConfig)
    assert again.sift == config.sift and again.training == config.training and again.parallel.data_parallel_size == 4
    assert deepspeed_config(json_file, again) == ds


def test_awkward_values_survive(toml: Path) -> None:
    text = 'a "quoted" \\ path\twith é, \u2028, \x7f and 😀'
    config = load_config(toml)
    model = config.model.model_copy(update={"preset": text})
    model.__pydantic_extra__.update({"odd key.": "x", "eps": 1e-16, "big": 1e22, "flag": False})
    changed: RunConfig = config.model_copy(update={"model": model})
    read = tomllib.loads(to_toml(changed))["model"]
    assert read == {"preset": text, "num_hidden_layers": 4, "odd key.": "x", "eps": 1e-16, "big": 1e22, "flag": False}


@pytest.mark.parametrize("schema", [RunConfig, FineTuneConfig])
def test_every_field_has_its_docstring(schema: type[RunConfig] | type[FineTuneConfig]) -> None:
    for section, table in schema.model_fields.items():
        for key, field in table.annotation.model_fields.items():
            assert field.description, f"{section}.{key} has no docstring"
