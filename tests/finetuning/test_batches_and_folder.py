"""Order and micro-batches; the folder of a run; what a classifier starts from."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from deberta_dist.errors import ConfigError
from deberta_dist.finetuning.arguments import parse
from deberta_dist.finetuning.batches import TaskBatch, collate, dealt
from deberta_dist.finetuning.finetuner import decision_loss
from deberta_dist.finetuning.folder import IDENTITY, TaskFolder
from deberta_dist.finetuning.starting_point import open_starting_point
from deberta_dist.tasks.predictions import predictions_file, read_predictions, run_file
from deberta_dist.tasks.superglue.tasks import TASKS
from tests.finetuning.small import Case

IDS = {"pad_id": 0, "sep_id": 2}


def test_every_decision_once_per_epoch_in_an_order_of_its_own(start_directory: Path) -> None:
    plan, _ = Case("RTE", overrides=("--training.epochs", "2.5")).plan(start_directory)
    order = plan.order(7)
    assert (order.num_decisions, order.num_steps, order.steps_per_epoch) == (80, 7, 3)
    seen = [example.key for step in range(order.num_steps) for some in order.micro_batches(step) for example, _ in some]
    assert [len(some) for some in order.micro_batches(6)] == [3, 3, 2]
    for epoch in (seen[:32], seen[32:64]):
        assert sorted(epoch) == [example.key for example in plan.features["train"].examples]
    assert seen[:32] != seen[32:64] and max(Counter(seen).values()) == 3
    other = plan.order(8)
    assert [e.key for some in other.micro_batches(0) for e, _ in some] != seen[:12]


def test_training_compares_few_candidates_and_a_right_one(start_directory: Path) -> None:
    plan, _ = Case("ReCoRD").plan(start_directory)
    order, drawn = plan.order(7), set()
    for step in range(order.num_steps):
        for some in order.micro_batches(step):
            for example, choices in some:
                assert 2 <= len(choices) <= 3 and len(set(choices)) == len(choices)
                assert set(choices) & set(example.gold)
                drawn.add((example.key, tuple(choices)))
    assert len(drawn) > len(plan.features["train"].examples), "other candidates in another epoch"


@pytest.mark.parametrize("count", [0, 1, 3, 8])
def test_micro_batches_are_dealt_once(count: int) -> None:
    for size in (1, 2, 3, 8):
        parts = [dealt(count, rank=rank, size=size) for rank in range(size)]
        assert [number for part in parts for number in part] == list(range(count))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_decision_logits_are_means_over_windows(start_directory: Path) -> None:
    plan, start = Case("ReCoRD").plan(start_directory)
    features = plan.features["train"]
    picks = [(features.examples[0], [1, 0]), (features.examples[1], [0, 2, 1])]
    batch = collate(features, picks, **IDS)
    scores = torch.arange(len(batch.slots), dtype=torch.float32)
    found = batch.decision_logits(scores[:, None])
    row = 0
    for number, (example, choices) in enumerate(picks):
        for place, choice in enumerate(choices):
            windows = features.sequences(example, choice)
            assert found[number, place] == scores[row : row + len(windows)].mean()
            for window, ids in enumerate(windows):
                assert batch.input_ids[row + window, : len(ids)].tolist() == ids.tolist()
                assert batch.attention_mask[row + window].sum() == len(ids)
                second = ids.tolist().index(start.tokenizer.sep_id) + 1
                assert batch.token_type_ids[row + window].nonzero().flatten().tolist() == list(range(second, len(ids)))
            assert bool(batch.gold[number, place]) == (choice in example.gold)
            row += len(windows)
    assert row == len(scores) and batch.is_choice.tolist() == [[True, True, False], [True] * 3]
    assert found[0, 2].softmax(0) == 1 and found[0].softmax(0)[2] == 0, "no choice, no probability"


def test_loss_is_cross_entropy_and_right_ones_share_credit() -> None:
    logits = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]], dtype=torch.float64)
    gold = torch.tensor([[False, True, False], [True, False, True]])
    probabilities = logits.softmax(1)
    expected = -torch.stack([probabilities[0, 1].log(), (probabilities[1, 0] + probabilities[1, 2]).log()])
    torch.testing.assert_close(decision_loss(logits, gold), expected)
    for other in (gold[:1], gold[:, :1], gold.float(), gold.long()):
        with pytest.raises(ValueError, match=f"^gold: shape .* takes shape .{gold.shape[0]}, {gold.shape[1]}. of bool"):
            decision_loss(logits, other)


def test_classes_have_one_slot_per_decision() -> None:
    batch = TaskBatch(*[torch.zeros(3, 4, dtype=torch.int64)] * 3, torch.tensor([0, 0, 1]), torch.ones(2, 2).bool(),
                      torch.zeros(2, 2).bool(), False)  # fmt: skip
    logits = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 0.0]])
    assert batch.decision_logits(logits).tolist() == [[2.0, 4.0], [5.0, 0.0]]


def test_a_folder_is_complete_or_absent(tmp_path: Path) -> None:
    folder = TaskFolder(tmp_path, TASKS["RTE"], 42)
    made_from = {"init": "a", "settings": {"epochs": 3.0}}
    assert not folder.is_done(made_from)
    folder.begin()
    with pytest.raises(ConfigError, match="in use by another run"):
        TaskFolder(tmp_path, TASKS["RTE"], 42).begin()
    TaskFolder(tmp_path, TASKS["CB"], 42).begin()  # another task may run beside it
    (folder.unfinished / "left").mkdir()
    probabilities = {(1,): {"entailment": 0.5, "not_entailment": 0.5}, (0,): {"entailment": 1.0, "not_entailment": 0.0}}
    for split in ("val", "test"):
        folder.write_predictions(probabilities, split)
    assert not folder.is_done(made_from)
    folder.finish({IDENTITY: made_from, "score": 1.0}, {"AX-b": (TASKS["AX-b"], probabilities)})
    assert not folder.unfinished.exists()
    assert list(read_predictions(folder.final / "val.jsonl")) == [(0,), (1,)]
    assert read_predictions(predictions_file(folder.seed_directory, TASKS["AX-b"], "test")) == probabilities
    assert json.loads(run_file(folder.seed_directory, "RTE").read_text())["score"] == 1.0
    assert folder.is_done(made_from)
    with pytest.raises(ConfigError, match=r"settings.epochs was 3.0, is 4.0.*another run.directory"):
        folder.is_done({"init": "a", "settings": {"epochs": 4.0}})
    (folder.final / "test.jsonl").unlink()
    with pytest.raises(ConfigError, match="has lost its test.jsonl"):
        folder.is_done(made_from)


def test_what_an_unfinished_run_left_is_cleared(tmp_path: Path) -> None:
    folder = TaskFolder(tmp_path, TASKS["RTE"], 1)
    (folder.unfinished / "weights").mkdir(parents=True)
    (folder.unfinished / "val.jsonl").write_text("old")
    folder.begin()
    assert sorted(path.name for path in folder.unfinished.iterdir()) == [".lock"]
    other = TaskFolder(tmp_path, TASKS["CB"], 1)
    other.final.mkdir(parents=True)
    (other.final / "mine.txt").write_text("a user's")
    with pytest.raises(ConfigError, match="is not a finished run"):
        other.is_done({})
    assert (other.final / "mine.txt").read_text() == "a user's"


def test_diagnostics_of_another_run_are_not_replaced(tmp_path: Path) -> None:
    folder = TaskFolder(tmp_path, TASKS["RTE"], 42)
    theirs = predictions_file(folder.seed_directory, TASKS["AX-b"], "test")
    theirs.parent.mkdir(parents=True)
    theirs.write_text("another model's")
    with pytest.raises(ConfigError, match=r"AX-b is there without .*seed-42/RTE, whose model answers it: move it away"):
        folder.is_done({})
    assert not TaskFolder(tmp_path, TASKS["CB"], 42).is_done({})
    folder.unfinished.mkdir()  # of a start that was killed between the diagnostics and the task
    assert not folder.is_done({}) and theirs.read_text() == "another model's"


def test_a_folder_that_another_run_has_just_finished_is_left_alone(tmp_path: Path) -> None:
    folder = TaskFolder(tmp_path, TASKS["CB"], 42)
    assert not folder.is_done({})
    other = TaskFolder(tmp_path, TASKS["CB"], 42)
    other.begin()
    for split in ("val", "test"):
        other.write_predictions({}, split)
    other.finish({IDENTITY: {}}, {})
    with pytest.raises(ConfigError, match="has just been finished by another run"):
        folder.begin()
    assert folder.is_done({}) and not folder.unfinished.exists()


def test_a_folder_is_held_until_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = TaskFolder(tmp_path, TASKS["CB"], 42)
    folder.begin()
    rename = os.rename

    def meanwhile(source: Path, target: Path) -> None:
        with pytest.raises(ConfigError, match="in use by another run"):
            TaskFolder(tmp_path, TASKS["CB"], 42).begin()
        rename(source, target)

    monkeypatch.setattr(os, "rename", meanwhile)
    folder.finish({IDENTITY: {}}, {})
    assert sorted(path.name for path in folder.final.iterdir()) == ["run.json"]


def test_classifier_is_carried_over_by_the_names_of_its_labels(start_directory: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = start_directory / "dropout-0"
    config = json.loads((source / "config.json").read_text())
    weights = load_file(source / "model.safetensors")
    weights["pooler.dense.weight"] = torch.full((32, 32), 0.5)
    weights["pooler.dense.bias"] = torch.full((32,), 0.25)
    weights["classifier.weight"] = torch.arange(3.0)[:, None].expand(3, 32).contiguous()
    weights["classifier.bias"] = torch.tensor([10.0, 11.0, 12.0])
    names = ["NEUTRAL", "ENTAILMENT", "contradiction"]
    config |= {"id2label": {str(i): name for i, name in enumerate(names)}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "model.safetensors")
    start = open_starting_point(tmp_path, tokenizer=start_directory / "spm.model", verify=True)
    labels = ("entailment", "contradiction", "neutral")
    shapes = {"classifier.weight": (3, 32), "classifier.bias": (3,), "pooler.dense.weight": (32, 32)}
    same = start.reader(shapes, labels=labels, seed=1)
    assert same("classifier.bias").tolist() == [11.0, 12.0, 10.0] and same("classifier.weight")[:, 0].tolist() == [1, 2, 0]
    assert (same("pooler.dense.weight") == 0.5).all() and "by the names" in start.origin(labels)
    new = start.reader(
        {**shapes, "classifier.weight": (2, 32), "classifier.bias": (2,)}, labels=("entailment", "not_entailment"), seed=1
    )
    assert new("classifier.bias").tolist() == [0, 0] and new("classifier.weight").shape == (2, 32)
    assert np.isclose(new("classifier.weight").std(), 0.2, rtol=0.3), "random, of the model's range"
    assert (new("pooler.dense.weight") == 0.5).all() and "new classifier" in start.origin(("a", "b"))
    other = open_starting_point(source, tokenizer=None, verify=True)
    assert start.fingerprint != other.fingerprint == open_starting_point(source, tokenizer=None, verify=True).fingerprint


def test_true_of_one_task_is_not_true_of_another(start_directory: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = start_directory / "dropout-0"
    config = json.loads((source / "config.json").read_text()) | {"id2label": {"0": "true", "1": "false"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = load_file(source / "model.safetensors")
    weights |= {"pooler.dense.weight": torch.ones(32, 32), "pooler.dense.bias": torch.ones(32)}
    save_file(
        weights | {"classifier.weight": torch.ones(2, 32), "classifier.bias": torch.ones(2)}, tmp_path / "model.safetensors"
    )
    start = open_starting_point(tmp_path, tokenizer=start_directory / "spm.model", verify=True)
    assert "new classifier" in start.origin(("true", "false"))


def test_a_start_with_names_and_a_tokenizer_of_its_own(start_directory: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = start_directory / "dropout-0"
    weights = {f"student.{name}": value for name, value in load_file(source / "model.safetensors").items()}
    save_file(weights | {"loss.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    shutil.copy(source / "config.json", tmp_path)
    shutil.copy(start_directory / "spm.model", tmp_path)
    given = ["--task", "RTE", "--data", "x", "--init", str(tmp_path), "--prefix", "student.", "--allow-unmapped", "loss.*"]
    options = parse(given).read_options
    expected = open_starting_point(source, tokenizer=start_directory / "spm.model", verify=True)
    start = open_starting_point(tmp_path, tokenizer=None, verify=True, options=options)
    assert start.fingerprint == expected.fingerprint and not any("lower" in note for note in start.notes)
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    start = open_starting_point(tmp_path, tokenizer=None, verify=True, options=options)
    assert any("do_lower_case = true: spm.model alone, which is read here, does not do it" in note for note in start.notes)
    # Another vocabulary is what the model was trained with, whatever lies beside it.
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    (tmp_path / "vocab.txt").write_text("[PAD]")
    with pytest.raises(ConfigError, match=r"its tokenizer is BertTokenizer \(.*vocab\.txt\).* give --tokenizer"):
        open_starting_point(tmp_path, tokenizer=None, verify=True, options=options)
