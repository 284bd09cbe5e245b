"""What is refused before any process group exists, by key and value; and which held-out rows count."""

import json
import shutil
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from deberta_dist import preset
from deberta_dist.checkpoint.errors import CheckpointError
from deberta_dist.data.token_writer import TokenFileWriter
from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.errors import ConfigError, DataError
from deberta_dist.models.masked_lm import DebertaForMaskedLM
from deberta_dist.parallel.mesh import Mesh, MeshShape
from deberta_dist.planning.plan import check_plan, read_model_config
from deberta_dist.training.evaluation import num_evaluation_sequences, rank_batch
from deberta_dist.training.inputs import InitialWeights, open_data, open_initial_weights
from deberta_dist.training.resume import changed_settings
from tests.training.conftest import VOCABULARY, MakeRun


def test_a_good_run_is_resolved(make_run: MakeRun) -> None:
    plan = check_plan(make_run(), world_size=2)
    assert plan.config.parallel.data_parallel_size == 2
    assert plan.config.training.num_micro_batches == 2
    assert plan.model_config == preset("tiny-v2", vocab_size=VOCABULARY)
    assert plan.deepspeed["train_batch_size"] == 2
    assert open_data(plan).tokenizer.num_tokens <= VOCABULARY


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {"max_seq_length": 4096}}, ["data.max_seq_length = 4096", "model.max_position_embeddings = "]),
        ({"model": {"preset": "tiny-v9"}}, ["'tiny-v9'", "tiny-v2"]),
        ({"model": {"hiden_size": 3}}, ["'hiden_size'", "'hidden_size'"]),
        ({"model": {"hidden_size": 30}}, ["num_attention_heads = 4", "hidden_size = 30"]),
        ({"model": {"num_hidden_layers": 1}}, ["num_hidden_layers = 1", "at least 2"]),
        ({"model": {"decoder": "none"}}, ["decoder = 'none'", "'plain'"]),
        ({"model": {"decoder": "emd", "position_biased_input": True}}, ["decoder = 'emd'", "position_biased_input = true"]),
        ({"parallel": {"tensor_parallel_size": 8}}, ["tensor_parallel_size = 8", "num_attention_heads = 4"]),
        ({"parallel": {"pipeline_parallel_size": 8}}, ["8 pipeline stages", "num_hidden_layers = "]),
        ({"parallel": {"layers_per_stage": (1,)}}, ["layers_per_stage = [1]", "num_hidden_layers = "]),
        ({"training": {"global_batch_size": 9}}, ["global_batch_size = 9"]),
        (
            {"parallel": {"tensor_parallel_size": 4, "sequence_parallel": True}, "model": {"conv_kernel_size": 35}},
            [
                "8 of 32 tokens on each of parallel.tensor_parallel_size = 4 ranks",
                "fewer than the 17",
                "model.conv_kernel_size = 35",
            ],
        ),
    ],
)
def test_plan_is_refused(make_run: MakeRun, changes: dict[str, Any], words: list[str]) -> None:
    config = make_run(**changes)
    sizes = config.parallel.tensor_parallel_size * config.parallel.pipeline_parallel_size
    with pytest.raises(ConfigError) as refusal:
        check_plan(config, world_size=sizes)
    for word in [config.source, *words]:
        assert word in str(refusal.value)


def test_a_published_configuration_is_a_model(make_run: MakeRun, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(preset("tiny-v1").to_dict()))
    config = make_run()
    section = type(config.model)(config=file, num_hidden_layers=3)
    found = read_model_config(config.model_copy(update={"model": section}))
    assert found == preset("tiny-v1", num_hidden_layers=3)
    # Of Hugging Face's: what it lacks means what their classes take it to mean, not what the published code does.
    theirs = {"model_type": "deberta-v2", "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
    file.write_text(json.dumps(theirs))
    found = read_model_config(config.model_copy(update={"model": section}))
    assert (found.hidden_size, found.vocab_size, found.num_hidden_layers) == (1536, 128100, 3)
    file.write_text(json.dumps({**theirs, "pos_att_type": None}))
    with pytest.raises(ConfigError, match="means neither"):
        read_model_config(config.model_copy(update={"model": section}))
    assert read_model_config(
        config.model_copy(update={"model": type(config.model)(config=file, pos_att_type="c2p")})
    ).pos_att_type == ("c2p",)
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"model\.config = .*config\.json"):
        read_model_config(config.model_copy(update={"model": section}))
    file.unlink()
    with pytest.raises(ConfigError, match=r"model\.config = .*config\.json"):
        read_model_config(config.model_copy(update={"model": section}))


def test_weights_that_do_not_say_how_they_decode_are_told_by_the_run(make_run: MakeRun, tmp_path: Path) -> None:
    """As transformers saves a masked language model: no position table, and no word on the decoder."""
    source = DebertaForMaskedLM(preset("tiny-v2", vocab_size=VOCABULARY, decoder="plain"))
    (tmp_path / "theirs").mkdir()
    config = {k: v for k, v in source.config.to_dict().items() if k not in ("decoder", "padding_idx")}
    (tmp_path / "theirs/config.json").write_text(json.dumps({**config, "model_type": "deberta-v2"}))
    save_file(dict(source.named_parameters()), tmp_path / "theirs/model.safetensors")
    words = "deberta.embeddings.word_embeddings.weight"
    for decoder, note in (
        ("plain", "plain, as model.decoder says"),
        ("emd", "has no deberta.embeddings.position_embeddings.weight"),
    ):
        run = make_run(training={"init": tmp_path / "theirs"}, model={"decoder": decoder})
        found = open_initial_weights(check_plan(run, world_size=1), tokenizer_sha256="", verify=True)
        assert torch.equal(found.read(words), source.state_dict()[words]) and note in "; ".join(found.notes)
    # What says how it decodes is not taken for the other.
    (tmp_path / "theirs/config.json").write_text(json.dumps(source.config.to_dict()))
    with pytest.raises(ConfigError, match="decoder = plain there, emd here"):
        open_initial_weights(check_plan(run, world_size=1), tokenizer_sha256="", verify=True)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(make_run: MakeRun) -> None:
    tokens = open_data(check_plan(make_run(), world_size=1)).tokenizer.num_tokens
    exact = make_run(model={"vocab_size": tokens})
    open_data(check_plan(exact, world_size=1))
    plan = check_plan(make_run(model={"vocab_size": tokens - 1}), world_size=1)
    with pytest.raises(DataError, match=rf"vocab_size = {tokens - 1} .*{tokens} tokens"):
        open_data(plan)


def test_tokens_of_another_tokenizer_are_refused(make_run: MakeRun, corpus: Path) -> None:
    plan = check_plan(make_run(data={"tokenizer": corpus / "another.model"}), world_size=1)
    with pytest.raises(DataError, match=r"text\.tokens was made with .*another\.model"):
        open_data(plan)


def test_initial_weights_with_names_of_their_own(make_run: MakeRun, corpus: Path, tmp_path: Path) -> None:
    model = DebertaForMaskedLM(preset("tiny-v2", vocab_size=VOCABULARY))
    tensors = {name: value.detach() for name, value in model.named_parameters()}
    state = {f"student.{name}": value for name, value in tensors.items()} | {"loss.weight": torch.ones(1)}
    torch.save({"state_dict": state, "where": Path("x")}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    shutil.copy(corpus / "spm.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true}')

    def opened(**options: object) -> InitialWeights | None:
        plan = check_plan(make_run(training={"init": tmp_path, **options}), world_size=1)
        return open_initial_weights(plan, tokenizer_sha256=Tokenizer(corpus / "spm.model").sha256, verify=True)

    with pytest.raises(CheckpointError, match=r"training\.init = .*asks for code to be run \(pathlib") as refusal:
        opened()
    assert "weights_only" not in str(refusal.value)
    torch.save({"state_dict": state}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"begin with 'student\.'.* give training\.init_prefix student\."):
        opened()
    with pytest.raises(CheckpointError, match=r"loss\.weight; .*give training\.init_allow_unmapped"):
        opened(init_prefix="student.")
    found = opened(init_prefix="student", init_allow_unmapped=["loss.*"])
    assert found is not None and all(torch.equal(found.read(name), value) for name, value in tensors.items())
    notes = " ".join(found.notes)
    assert "left out of it: loss.weight" in notes and "do_lower_case = true" in notes
    with pytest.raises(ValueError, match=r"training\.init_prefix = 'student' has no effect without training\.init"):
        make_run(training={"init_prefix": "student"})


def test_a_missing_token_file_is_named(make_run: MakeRun, corpus: Path, tmp_path: Path) -> None:
    # The file of the other key is there: the right one of the two is named.
    shutil.copy(corpus / "text.tokens", tmp_path / "there.tokens")
    changes = {"train": tmp_path / "there.tokens", "validation": tmp_path / "absent.tokens"}
    with pytest.raises(DataError, match=r"absent\.tokens"):
        open_data(check_plan(make_run(data=changes), world_size=1))


def test_held_out_text_without_a_target_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    tokenizer = open_data(check_plan(make_run(), world_size=1)).tokenizer
    for number, ids in enumerate((np.full(9000, tokenizer.unk_id), np.append(np.full(8999, tokenizer.unk_id), 7))):
        path = tmp_path / f"{number}.tokens"
        with TokenFileWriter(path, tokenizer_sha256=tokenizer.sha256, vocab_size=tokenizer.num_tokens) as writer:
            writer.add_document(ids)
        plan = check_plan(make_run(data={"validation": path}, evaluation={"num_sequences": 10**6}), world_size=1)
        if number == 0:
            with pytest.raises(DataError, match=r"0\.tokens: 300 of its sequences .* all their tokens are \[UNK\]"):
                open_data(plan)
        else:  # one in the last of them
            open_data(plan)


@pytest.mark.parametrize(("data_parallel_size", "count"), [(1, 11), (2, 11), (4, 11), (4, 8), (2, 3), (4, 1)])
def test_every_held_out_sequence_counts_once(make_run: MakeRun, data_parallel_size: int, count: int) -> None:
    """Also where their number is no multiple of the batch, and where a rank has none."""
    plan = check_plan(make_run(evaluation={"num_sequences": count}), world_size=data_parallel_size)
    validation = open_data(plan).validation
    assert validation.num_samples > 16, "otherwise there is less to count than was asked for"
    assert num_evaluation_sequences(plan, validation) == count
    rows = []
    for start in range(0, count, 8):
        for rank in range(data_parallel_size):
            shape = MeshShape(data=data_parallel_size)
            mesh = Mesh(shape=shape, rank=rank, device=torch.device("cpu"), groups={}, timeout=timedelta(minutes=1))
            batch = rank_batch(validation, plan=plan, mesh=mesh, start=start, stop=count)
            assert batch.input_ids.shape == (8 // data_parallel_size, 32), "every rank runs the same shapes"
            rows.append(batch.labels)
    labels, expected = torch.cat(rows), validation.batch(0, count).labels
    assert torch.equal(labels[:count], expected)
    assert (expected > 0).any(dim=1).all()
    assert not labels[count:].any()


def test_a_larger_batch_goes_on_with_a_whole_step(make_run: MakeRun) -> None:
    """Buckets are of steps: one that the smaller batch had begun is passed over; a run without them goes on exactly."""
    for lengths, expected in (((8, 16, 32), [0, 8, 8, 16]), (None, [0, 1, 8, 9])):
        data = open_data(check_plan(make_run(data={"bucket_lengths": lengths}), world_size=1))
        assert [data.resume_at(consumed) for consumed in (0, 1, 8, 9)] == expected
        data.train.batch(expected[-1], 8)


@pytest.mark.parametrize(
    ("table", "key", "value", "told"),
    [
        ("data", "bucket_lengths", (16, 32), "order of the samples"),
        ("data", "bucket_lengths", None, "order of the samples"),
        ("training", "seed", 7, "order of the samples"),
        ("training", "global_batch_size", 16, "order of the buckets"),
        ("training", "log_every_steps", 3, None),
    ],
)
def test_another_order_is_told(make_run: MakeRun, table: str, key: str, value: object, told: str | None) -> None:
    """Of other samples any may come again, of another batch those of a few steps."""
    before, after = make_run(data={"bucket_lengths": (8, 16, 32)}), {"data": {"bucket_lengths": (8, 16, 32)}}
    after.setdefault(table, {})[key] = value
    plans = [check_plan(config, world_size=1) for config in (before, make_run(**after))]
    data = open_data(plans[1])
    manifest = SimpleNamespace(
        run_config=plans[0].config.model_dump(mode="json"), precision="fp32", data_sha256=data.checksums()
    )
    changed = changed_settings(plans[1], data, manifest=manifest)
    assert any(change.startswith(f"{table}.{key}: ") for change in changed)
    assert [change.split(":")[0] for change in changed if change.startswith("order")] == ([told] if told else [])


def test_keys_younger_than_a_checkpoint_had_their_defaults(make_run: MakeRun) -> None:
    plan = check_plan(make_run(training={"attention": "portable"}), world_size=1)
    data, before = open_data(plan), plan.config.model_dump(mode="json")
    for key in ("attention", "vocabulary_chunks", "compile"):
        del before["training"][key]
    manifest = SimpleNamespace(run_config=before, precision="fp32", data_sha256=data.checksums())
    assert changed_settings(plan, data, manifest=manifest) == ["training.attention: auto -> portable"]


def test_more_held_out_sequences_than_there_are_means_all(make_run: MakeRun) -> None:
    plan = check_plan(make_run(evaluation={"num_sequences": 10**9}), world_size=1)
    validation = open_data(plan).validation
    assert num_evaluation_sequences(plan, validation) == validation.num_samples


def test_limited_validation_is_the_same_sample_of_all(make_run: MakeRun) -> None:
    """Not the beginning of the file, and not another one for another seed of the run."""
    found = []
    for seed in (1, 2):
        validation = open_data(check_plan(make_run(training={"seed": seed}), world_size=1)).validation
        found.append([sample for _, sample in validation.samples_at(0, validation.num_samples)])
    assert found[0] == found[1] and sorted(found[0]) == list(range(len(found[0])))
    assert max(found[0][:11]) > len(found[0]) // 2
