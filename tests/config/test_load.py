"""Reading a TOML and overrides: every refusal names file, key and what is expected."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from deberta_dist.config import load_config
from deberta_dist.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
Spoil = Callable[[str, str], Path]


def refusal(toml: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(toml, overrides)
    return str(caught.value)


def test_values_and_defaults(toml: Path) -> None:
    config = load_config(toml)
    assert config.training.global_batch_size == 32
    assert config.training.num_micro_batches == "auto"
    assert config.optimizer.betas == (0.9, 0.98)
    assert isinstance(config.optimizer.gradient_clipping, float)  # 1 is good for 1.0
    assert config.data.masking == "official"
    assert (config.model.preset, config.model.overrides) == ("tiny-v2", {"num_hidden_layers": 4})
    assert config.source == str(toml)


def test_config_is_frozen(toml: Path) -> None:
    with pytest.raises(ValidationError):
        load_config(toml).training.max_steps = 3


def test_paths(toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "elsewhere"
    other.mkdir()
    monkeypatch.chdir(other)
    config = load_config("../conf/run.toml", ["--data.train", "here.tokens", "--run.directory=~/r"])
    assert config.data.train == other / "here.tokens"
    assert config.data.validation == toml.parent / "sub" / "valid.tokens"
    assert config.data.tokenizer == Path("/abs/spm.model")
    assert config.run.directory == Path.home() / "r"
    assert config.run.deepspeed == toml.parent / "ds.json"


def test_overrides(toml: Path) -> None:
    config = load_config(
        toml,
        ["--training.seed", "7", "--optimizer.learning_rate=2e-4", "--parallel.layers_per_stage", "[3, 1]",
         "--training.num_micro_batches", "auto", "--model.hidden_act=gelu", "--model.share_att_key", "true",
         "--schedule.warmup_steps=10", "--model.preset", '"v2-xlarge"', "--run.directory", "/runs/2024"],
    )  # fmt: skip
    assert config.training.seed == 7
    assert config.optimizer.learning_rate == 2e-4
    assert config.parallel.layers_per_stage == (3, 1)
    assert config.model.overrides == {"num_hidden_layers": 4, "hidden_act": "gelu", "share_att_key": True}
    assert config.schedule.warmup_steps == 10
    assert config.model.preset == "v2-xlarge"


def test_text_fields_stay_text(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(toml.parent)
    assert load_config(toml, ["--run.directory", "2024"]).run.directory == toml.parent / "2024"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("max_steps", "max_step", "unknown key training.max_step; did you mean training.max_steps?"),
        ("max_steps = 100", "max_steps = 100\nlearning_rate = 1e-3", "did you mean optimizer.learning_rate?"),
        ("[parallel]", "[paralel]", "unknown key paralel; did you mean [parallel]?"),
        ("[model]", "max_steps = 3\n[model]", "unknown key max_steps; did you mean training.max_steps?"),
        ("max_steps = 100", "", "training.max_steps is missing: Optimizer steps"),
        ("betas = [0.9, 0.98]", "betas = [0.9]", "optimizer.betas has too few values"),
        ("micro_batch_size = 4", 'micro_batch_size = "4"', "training.micro_batch_size = '4'; expected a valid integer"),
        ("micro_batch_size = 4", "micro_batch_size = 4.0", "expected a valid integer"),
        ("micro_batch_size = 4", "micro_batch_size = true", "expected a valid integer"),
        ("micro_batch_size = 4", "micro_batch_size = 0", "expected a number from 1 to 16777216"),
        ("learning_rate = 1e-3", 'learning_rate = "1e-3"', "expected a valid number"),
        ("learning_rate = 1e-3", "learning_rate = nan", "expected a number from 1e-15 to 10"),
        ("learning_rate = 1e-3", "learning_rate = inf", "expected a number from 1e-15 to 10"),
        ("learning_rate = 1e-3", "learning_rate = 0", "expected a number from 1e-15 to 10"),
        ("max_steps = 100", 'max_steps = 100\nnum_micro_batches = "all"', "expected a valid integer or 'auto'"),
        ("max_steps = 100", 'max_steps = 100\nrecompute = "yes"', "'none', 'full' or 'selective'"),
        ("num_hidden_layers = 4", 'config = "c.json"', "exactly one of model.preset and model.config is needed; both"),
        ('preset = "tiny-v2"', "", "exactly one of model.preset and model.config is needed; neither"),
        ("num_hidden_layers = 4", "num_hidden_layers = [4]", "model.num_hidden_layers = [4]"),
        ("num_hidden_layers = 4", "layer_norm_eps = nan", "a finite number"),
        ("max_steps = 100", "max_steps = 100\nmax_steps = 5", "given twice"),
        ("[run]", "[data]\n[run]", "not valid TOML"),
        ("max_steps = 100", "max_steps = ", "not valid TOML"),
        ("[parallel]", "[schedule]\nwarmup_steps = 101\n[parallel]", "warmup_steps = 101 is more than"),
        ("max_steps = 100", f"max_steps = {'9' * 5000}", "not valid TOML"),
        ("max_steps = 100", f"max_steps = {'[' * 5000}", "not valid TOML"),
        ("[data]", "[[data]]", "data must be a table [data]"),
    ],
)  # fmt: skip
def test_refused_in_the_file(spoil: Spoil, old: str, new: str, expected: str) -> None:
    toml = spoil(old, new)
    message = refusal(toml)
    assert str(toml) in message
    assert expected in message


def test_section_that_is_no_table(toml: Path) -> None:
    toml.write_text("schedule = 3\n" + toml.read_text())
    assert "schedule must be a table [schedule], not 3" in refusal(toml)
    assert "schedule must be a table [schedule], not 3" in refusal(toml, "--schedule.warmup_steps", "1")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--training.max_stps", "3"], "unknown key training.max_stps; did you mean training.max_steps?"),
        (["--trainin.max_steps", "3"], "unknown key trainin; did you mean [training]?"),
        (["--training.seed", "-1"], "training.seed = -1; expected a number from 0 to 2147483647"),
        (["--training.seed", "1\nx = 2"], "expected a valid integer"),
        (["--training.seed"], "--training.seed has no value"),
        (["--training.seed", "--training.max_steps", "3"], "--training.seed has no value"),
        (["--training.seed", "1", "--training.seed=2"], "--training.seed is given twice ('1' and '2')"),
        (
            ["--parallel.layers_per_stage", "[0, 4]"],
            "command line: parallel.layers_per_stage = 0; expected a number from 1 to 10000",
        ),
        (["--data.bucket_lengths", "[0]"], "data.bucket_lengths = 0; expected a number from 3 to"),
        (["--data.bucket_lengths", "[[8], 64]"], "data.bucket_lengths = [8]; expected a valid integer"),
        (["--data.bucket_lengths", "[]"], "data.bucket_lengths = []; expected at least 1 of them"),
        (["--optimizer.betas", "[0.9, 0.9, 0.9]"], "optimizer.betas = [0.9, 0.9, 0.9]; expected at most 2 of them"),
        (["--seed", "1"], "'--seed' is not of the form --section.key value"),
        (["training.seed=1"], "is not of the form"),
        (["--a.b.c=1"], "is not of the form"),
    ],
)
def test_refused_on_the_command_line(toml: Path, overrides: list[str], expected: str) -> None:
    message = refusal(toml, *overrides)
    assert "command line" in message
    assert expected in message


def test_a_wrong_value_in_a_list_is_one_problem(toml: Path) -> None:
    assert len(refusal(toml, "--parallel.layers_per_stage", "[0, 4]").splitlines()) == 1


def test_all_problems_in_one_message(spoil: Spoil) -> None:
    spoil("max_steps = 100", 'max_step = 100\nrecompute = "all"')
    spoil("betas", "beta")
    toml = spoil("[run]", "[runn]")
    message = refusal(toml, "--training.seed=x", "--data.max_ngram", "0")
    assert message.startswith("9 problems")
    for part in (
        "training.max_step;", "training.max_steps is missing", "training.recompute = 'all'", "optimizer.beta;",
        "unknown key runn", "run.directory is missing", "run.deepspeed is missing", "training.seed = 'x'",
        "command line: data.max_ngram = 0",
    ):  # fmt: skip
        assert part in message


def test_unreadable_files(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "absent.toml")
    assert "Is a directory" in refusal(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    assert "not valid TOML" in refusal(tmp_path / "binary.toml")
    (tmp_path / "huge.toml").write_bytes(b"#" * (1 << 21))
    assert "too many for a configuration" in refusal(tmp_path / "huge.toml")


def test_imports_neither_torch_nor_deepspeed() -> None:
    code = "import sys, deberta_dist.config; print([m for m in ('torch', 'deepspeed') if m in sys.modules])"
    words = [sys.executable, "-c", code]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert result.stdout == "[]\n", result.stderr
