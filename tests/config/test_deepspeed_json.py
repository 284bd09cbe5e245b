"""The DeepSpeed JSON: filled from the TOML, refused where it contradicts it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from deberta_dist.config import deepspeed_config, load_config, precision, resolve
from deberta_dist.errors import ConfigError

Write = Callable[..., Path]


def refusal(toml: Path, json_file: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        deepspeed_config(json_file, resolve(load_config(toml), 8))
    assert str(json_file) in str(caught.value)
    return str(caught.value)


def test_filled(toml: Path, ds_json: Write) -> None:
    ds = deepspeed_config(ds_json(gradient_clipping="auto", train_batch_size="auto"), resolve(load_config(toml), 8))
    assert ds == {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "gradient_clipping": 1.0,
        "train_batch_size": 2,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def test_what_agrees_stays(toml: Path, ds_json: Write) -> None:
    offload = {"stage": 3, "stage3_param_persistence_threshold": 0, "offload_optimizer": {"device": "cpu"}}
    file = ds_json(gradient_clipping=1, zero_force_ds_cpu_optimizer=False, zero_optimization=offload)
    ds = deepspeed_config(file, resolve(load_config(toml), 8))
    assert ds["zero_force_ds_cpu_optimizer"] is False
    assert ds["zero_optimization"] == offload
    file = ds_json(zero_force_ds_cpu_optimizer=True)
    assert deepspeed_config(file, resolve(load_config(toml), 8))["zero_force_ds_cpu_optimizer"] is True


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, "fp32"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": False}}, "bf16"),
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"fp16": {}}, "fp32"),
    ],
)
def test_precision(toml: Path, ds_json: Write, keys: dict[str, object], expected: str) -> None:
    assert precision(deepspeed_config(ds_json(**keys), resolve(load_config(toml), 8))) == expected


@pytest.mark.parametrize("key", ["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"])
def test_batch_numbers_name_both_files(toml: Path, ds_json: Write, key: str) -> None:
    message = refusal(toml, ds_json(**{key: 32}))
    assert f'{key} = 32 must be "auto"' in message
    assert "do not count sequences" in message
    assert str(toml) in message
    assert "training.global_batch_size = 32" in message


def test_clipping_contradiction_names_both_files(toml: Path, ds_json: Write) -> None:
    message = refusal(toml, ds_json(gradient_clipping=0.5))
    assert "gradient_clipping = 0.5 contradicts optimizer.gradient_clipping = 1.0" in message
    assert str(toml) in message


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage = 2; this program needs stage 3"),
        ({"zero_optimization": {}}, "zero_optimization.stage is missing"),
        ({"zero_optimization": 3}, "zero_optimization must be an object"),
        ({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 1000}}, "must be 0"),
        ({"zero_allow_untested_optimizer": False}, "zero_allow_untested_optimizer = False must be true"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bf16 and fp16 are both enabled"),
        ({"bf16": {"enabled": "auto"}}, 'bf16.enabled = "auto"'),
        ({"bf16": {"enabled": 1}}, 'bf16 must be an object with "enabled"'),
        (
            {"zero_force_ds_cpu_optimizer": True, "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}},
            "zero_force_ds_cpu_optimizer = True must be false",
        ),
        ({"zero_optimization": {"stage": 3, "param_persistence_threshold": 5}}, "must be 0"),
        ({"gradient_cliping": None}, "unknown key gradient_cliping; did you mean gradient_clipping?"),
        ({"comms_logger": 3}, "comms_logger must be an object"),
        ({"bf16": True}, 'bf16 must be an object with "enabled"'),
        ({"optimizer": {"type": "Adam"}}, "optimizer is refused: it comes from [optimizer]"),
        ({"scheduler": {}}, "scheduler is refused"),
        ({"amp": {"enabled": True}}, "amp is refused"),
        ({"activation_checkpointing": {}}, "training.recompute"),
        ({"gradient_cliping": 1.0}, "unknown key gradient_cliping; did you mean gradient_clipping?"),
    ],
)
def test_refused(toml: Path, ds_json: Write, keys: dict[str, object], expected: str) -> None:
    assert expected in refusal(toml, ds_json(**keys))


def test_all_problems_in_one_message(toml: Path, ds_json: Write) -> None:
    keys = {"optimizer": {}, "train_batch_size": 3, "gradient_clipping": 2, "zero_optimization": {"stage": 1}}
    message = refusal(toml, ds_json(**keys))
    assert message.startswith("4 problems")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1, "a": 2}', "key given twice: a"),
        ('{"gradient_clipping": NaN}', "NaN is not a JSON number"),
        ('{"gradient_clipping": Infinity}', "Infinity"),
        ("[]", "expected an object"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a": ' * 900 + "1" + "}" * 900, "nested more than 64 deep"),
        ('{"steps_per_print": 1e400}', "1e400 is not a JSON number"),
        ('{"steps_per_print": 1' + "0" * 5000 + "}", "not valid JSON"),
        (" " * (1 << 21), "too many for a configuration"),
        ("", "the file is empty"),
        ("null", "expected an object {...}, not null"),
        ("[zero_optimization]\nstage = 3", "is one JSON object"),
        ('{"zero_optimization": {"stage": 3,},}', "no comma stands before } or ]"),
        ('{"wandb": {"project": "http://x # y"}, // why\n}', "JSON has no comments"),
        ('{"bf16": {"enabled": True}}', "JSON writes true, false and null"),
        ("{'zero_optimization': {}}", 'JSON has " around texts'),
        ('{"steps_per_print": "\ud800"}', "not UTF-8"),
    ],
)
def test_unreadable(toml: Path, ds_json: Write, text: str, expected: str) -> None:
    file = ds_json()
    file.write_text(text, errors="surrogatepass")
    assert expected in refusal(toml, file)


def test_absent(toml: Path, tmp_path: Path) -> None:
    assert "No such file" in refusal(toml, tmp_path / "absent.json")


def test_known_to_deepspeed(toml: Path, ds_json: Write) -> None:
    """Our words are DeepSpeed's: it reads the completed dictionary without complaint."""
    runtime = pytest.importorskip("deepspeed.runtime.config", reason="deepspeed is not installed")

    shipped = sorted((Path(__file__).resolve().parents[2] / "ds_configs").glob("*.json"))
    for file in shipped:
        ds = deepspeed_config(file, resolve(load_config(toml), 4))  # data_parallel_size 1, as without a group
        read = runtime.DeepSpeedConfig(ds)
        assert read.zero_config.stage == 3
        assert read.zero_config.param_persistence_threshold == 0
