"""What is refused before any process group exists, and what a plan is made of."""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import pytest

from deberta_dist.config import read_recipes
from deberta_dist.errors import ConfigError, DataError, DebertaDistError
from deberta_dist.finetuning.arguments import ALL, parse
from deberta_dist.finetuning.plan import RECIPES, describe, make_plans, recipe_size
from deberta_dist.finetuning.starting_point import StartingPoint, open_starting_point
from deberta_dist.models.presets import PRESETS
from deberta_dist.tasks.superglue.benchmark import SUPERGLUE
from tests.finetuning.small import DATA, ROOT


def plans(directory: Path, *words: str, task: str = "RTE", data: Path = DATA, world_size: int = 1) -> list:
    given = ["--task", task, "--data", str(data), "--init", str(directory / "dropout-0")]
    arguments = parse([*given, "--recipe", str(directory / "recipes.toml"), *words])
    start = open_starting_point(arguments.init, tokenizer=arguments.tokenizer, verify=True)
    return make_plans(arguments, toml=directory / "finetune.toml", start=start, world_size=world_size)


def write_mnli(folder: Path, rows: int = 6) -> Path:
    """GLUE's files in miniature."""
    folder.mkdir(parents=True)
    header = "index\tpromptID\tgenre\tsentence1\tsentence2\tlabel1\tgold_label"
    labels = ["entailment", "contradiction", "neutral"]
    for name in ("train", "dev_matched"):
        lines = [f'{i}\tp{i}\tfiction\tHe said "yes {i}.\tIt is {i}.\tx\t{labels[i % 3]}' for i in range(rows)]
        (folder / f"{name}.tsv").write_text("\n".join([header, *lines]) + "\n")
    return folder


def test_recipe_over_toml_and_command_line_over_recipe(start_directory: Path) -> None:
    (plan,) = plans(start_directory, "--training.epochs", "3", "--seeds", "2", "--sift", "--out", "x/y")
    config = plan.config
    assert (config.training.epochs, config.training.global_batch_size, config.training.seed) == (3, 12, 7)
    assert list(plan.seeds) == [7, 8] and plan.sift.weight == 5.0 and config.run.directory == Path.cwd() / "x" / "y"
    assert {name: f.split.name for name, f in plan.features.items()} == {"train": "train", "val": "val", "test": "test"}
    assert [f.split.task.name for f in plan.diagnostics] == ["AX-b", "AX-g"]
    assert "SiFT 5 x symmetric_kl" in describe(
        [plan], start=open_starting_point(start_directory / "dropout-0", tokenizer=None, verify=True)
    )


def test_deepspeed_json_is_checked_as_for_pre_training(start_directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    table = {"stage": 3, "reduce_bucket_size": "auto", "offload_optimizer": None}
    file.write_text(json.dumps({"zero_optimization": table}))
    start = open_starting_point(start_directory / "dropout-0", tokenizer=None, verify=True)
    text = describe(plans(start_directory, "--run.deepspeed", str(file)), start=start)
    assert 'reduce_bucket_size = "auto": DeepSpeed\'s default, 500,000,000' in text
    file.write_text(json.dumps({"zero_optimization": table | {"offload_optimiser": {}, "sub_group_size": -1}}))
    with pytest.raises(ConfigError, match="did you mean zero_optimization.offload_optimizer") as caught:
        plans(start_directory, "--run.deepspeed", str(file))
    assert "sub_group_size = -1" in str(caught.value)


def test_all_takes_what_the_data_holds_in_order(start_directory: Path, tmp_path: Path) -> None:
    for name in ("WiC", "CB", "RTE"):
        shutil.copytree(DATA / name, tmp_path / name)
    assert [plan.task.name for plan in plans(start_directory, task=ALL, data=tmp_path)] == ["RTE", "CB", "WiC"]
    write_mnli(tmp_path / "MNLI")
    found = plans(start_directory, "--intermediate", "MNLI", "--seeds", "3", task=ALL, data=tmp_path)
    assert [plan.task.name for plan in found] == ["MNLI", "RTE", "CB", "WiC"]
    assert [len(plan.seeds) for plan in found] == [1, 3, 3, 3]
    assert [plan.starts_from_intermediate for plan in found] == [False, True, False, False]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "AX-b"], "AX-b has no training rows: --task RTE answers it as well"),
        (["--task", "RTE,Wic"], "--task RTE,Wic: 'Wic' is none of RTE, CB"),
        (["--task", "all,MNLI"], "'all' is none of RTE, CB, COPA, WSC, BoolQ, WiC, MultiRC, ReCoRD, MNLI; or all alone"),
        (["--task", "RTE,"], "--task RTE,: '' is none of RTE"),
        (["--seeds", "0"], "command line: training.seeds = 0"),
        (["--training.global_batch_size", "none"], "command line: training.global_batch_size"),
        (["--training.epoch", "3"], "unknown key training.epoch; did you mean training.epochs"),
        (["--parallel.pipeline_parallel_size", "2"], "must be 1: fine-tuning has tensor and data parallelism"),
        (["--parallel.sequence_parallel", "true"], "must be false: fine-tuning has no sequence parallelism"),
        (["--parallel.tensor_parallel_size", "2"], "does not divide 1 processes"),
        (["--parallel.tensor_parallel_size", "3", "--world", "3"], "--world"),
        (["--data.window_overlap", "40"], "more than a quarter of data.max_seq_length = 48"),
        (["--schedule.warmup_steps", "50"], "schedule.warmup_steps = 50 is more than the 6 steps"),
        (["--intermediate", "MNLI", "--task", "WSC"], "would serve nothing: of MNLI, WSC none has"),
        (["--intermediate", "SNLI"], "invalid choice: 'SNLI'"),
        (["--world-size", "2"], "is for --dry-run only"),
        (["--mnli", "somewhere"], "--mnli belongs to --intermediate MNLI or --task MNLI"),
        (["--task", "COPA", "--sift", "--sift.loss", "mse"], "choices take kl or symmetric_kl"),
        (["RTE"], "'RTE' is not of the form --section.key value"),
    ],
)
def test_command_line_and_settings(words: list[str], message: str, start_directory: Path, tmp_path: Path) -> None:
    if "--intermediate" in words:
        words += ["--mnli", str(write_mnli(tmp_path / "MNLI"))]
    with pytest.raises(ConfigError) as caught:
        plans(start_directory, *words)
    assert message in str(caught.value)


def test_absolute_positions_have_to_reach_as_far_as_padding(start_directory: Path) -> None:
    arguments = parse(["--task", "CB", "--data", str(DATA), "--init", "x", "--recipe", str(start_directory / "recipes.toml")])
    start = open_starting_point(start_directory / "dropout-0", tokenizer=None, verify=True)
    for most, words in ((50, ["--data.max_seq_length", "49"]), (50, []), (47, [])):
        config = dataclasses.replace(start.config, position_biased_input=True, max_position_embeddings=most)
        given = dataclasses.replace(arguments, overrides=tuple(words))
        made = partial(
            make_plans,
            given,
            toml=start_directory / "finetune.toml",
            start=dataclasses.replace(start, config=config),
            world_size=1,
        )
        if most == 50 and not words:
            made()
            continue
        with pytest.raises(
            ConfigError, match=r"max_seq_length = 4[89], but .* absolute positions for 4[80] tokens \(a multiple of 8\)"
        ):
            made()


def test_what_labels_the_starting_point_had_is_left_behind(start_directory: Path) -> None:
    """The export would say that classes of the task are the other's multi-hot labels."""
    arguments = parse(["--task", "CB", "--data", str(DATA), "--init", "x", "--recipe", str(start_directory / "recipes.toml")])
    start = open_starting_point(start_directory / "dropout-0", tokenizer=None, verify=True)
    start = dataclasses.replace(start, config=dataclasses.replace(start.config, problem_type="multi_label_classification"))
    (plan,) = make_plans(arguments, toml=start_directory / "finetune.toml", start=start, world_size=1)
    assert plan.model_config.problem_type is None


def test_required_words() -> None:
    with pytest.raises(ConfigError, match="--task, --data, --init"):
        parse([])


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda d: (d / "RTE/val.jsonl").unlink(), "RTE/val.jsonl is missing: RTE needs the split val"),
        (lambda d: (d / "RTE/test.jsonl").unlink(), "RTE/test.jsonl is missing: RTE needs the split test"),
        (lambda d: edit(d, 3, lambda line: line[:-5]), "RTE/train.jsonl, line 3: not valid JSON"),
        (lambda d: edit(d, 2, lambda line: line.replace("entailment", "neutral")), "line 2: label is"),
        (lambda d: edit(d, 5, lambda line: edit_idx(line, 0)), "line 5: idx 0 stands in line 1 already"),
        (lambda d: shutil.copy(d / "CB/train.jsonl", d / "RTE/train.jsonl"), 'RTE has "entailment", "not_entailment"'),
    ],
    ids=["no-val", "no-test", "torn-line", "foreign-label", "duplicate-idx", "other-task"],
)
def test_data(break_it, message: str, start_directory: Path, tmp_path: Path) -> None:
    for name in ("RTE", "CB"):
        shutil.copytree(DATA / name, tmp_path / name)
    break_it(tmp_path)
    with pytest.raises(DataError) as caught:
        plans(start_directory, data=tmp_path)
    assert message in str(caught.value)


def edit(data: Path, number: int, change) -> None:
    """Changes a line of RTE's training file."""
    path = data / "RTE" / "train.jsonl"
    lines = path.read_text().splitlines()
    lines[number - 1] = change(lines[number - 1])
    path.write_text("\n".join(lines))


def edit_idx(line: str, idx: int) -> str:
    return json.dumps({**json.loads(line), "idx": idx})


def open_with(directory: Path, **options) -> StartingPoint:
    return open_starting_point(directory, tokenizer=options.get("tokenizer"), verify=True)


def test_tokenizer_of_another_model(start_directory: Path, tmp_path: Path) -> None:
    from deberta_dist.data.tokenizer import train_tokenizer
    from deberta_dist.preparation.reading.texts import read_texts

    texts = read_texts([ROOT / "launchers" / "demo_text" / "valid.jsonl"])
    train_tokenizer(texts, tmp_path / "small.model", vocab_size=300)
    with pytest.raises(DataError, match="it is another model's"):
        open_with(start_directory / "dropout-0", tokenizer=tmp_path / "small.model")
    shutil.copytree(start_directory / "dropout-0", tmp_path / "weights")
    (tmp_path / "weights" / "spm.model").unlink()
    with pytest.raises(ConfigError, match="--tokenizer"):
        open_with(tmp_path / "weights")
    assert open_with(tmp_path / "weights", tokenizer=start_directory / "spm.model").tokenizer.num_tokens == 701
    texts = read_texts([ROOT / "launchers" / "demo_text" / "valid.jsonl"])
    train_tokenizer(texts, tmp_path / "large.model", vocab_size=900)
    with pytest.raises(DataError, match="901 tokens, the model 703"):
        open_with(tmp_path / "weights", tokenizer=tmp_path / "large.model")


@pytest.mark.parametrize("what", ["missing", "empty", "run"])
def test_init_that_is_no_checkpoint(what: str, tmp_path: Path) -> None:
    path = tmp_path / "init"
    if what != "missing":
        path.mkdir()
    if what == "run":
        (path / "checkpoints").mkdir()
    with pytest.raises(DebertaDistError, match="init"):
        open_with(path)


def test_shipped_recipes_cover_every_task_and_size() -> None:
    sizes = {recipe_size(config) for config in PRESETS.values()}
    assert sizes == {"1.5b", "large", "base", "tiny"}
    folder = ROOT / "launchers" / RECIPES
    assert {path.stem for path in folder.glob("*")} == sizes
    from deberta_dist.config import FineTuneConfig, load_config

    toml = ROOT / "launchers" / "finetune_superglue.toml"
    ranges = {
        "1.5b": ((1e-6, 3e-6, 5e-6), (16, 32, 64, 24), (0, 0.15, 0.3, 0.1)),
        "large": ((5e-6, 8e-6, 9e-6, 1e-5), (16, 32, 48, 64), (0, 0.1, 0.15)),
        "base": ((1.5e-5, 2e-5, 3e-5, 4e-5), (16, 32, 48, 64), (0, 0.1, 0.15)),
    }
    for size in sizes:
        for name in SUPERGLUE.trainable:
            recipes = read_recipes(folder / f"{size}.toml", name, known=tuple(SUPERGLUE.trainable))
            config = load_config(toml, [], schema=FineTuneConfig, recipes=recipes)
            if size in ranges:  # table 9 of the paper; batch 24, warm-up 30 and dropout 0.1 of COPA: the released script
                rates, batches, dropouts = ranges[size]
                assert config.optimizer.learning_rate in rates and config.training.epochs <= 10
                assert config.training.global_batch_size in batches
                assert config.training.classifier_dropout in dropouts
                assert config.schedule.warmup_steps in (50, 100, 500, 1000, 30)
    for path in folder.glob("*.toml"):
        lines = [line for line in path.read_text().splitlines() if "=" in line and not line.startswith("#")]
        assert path.stem == "tiny" or all(" # " in line for line in lines), "each value has its source"
