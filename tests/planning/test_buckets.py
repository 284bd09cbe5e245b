"""What a dry run says of dynamic batching, with and without a text, and the memory of the worst bucket."""

from pathlib import Path

import pytest

from deberta_dist.config import load_config
from deberta_dist.data.bucketed_dataset import BucketMixture
from deberta_dist.data.chunks import count_chunks
from deberta_dist.data.sources import CorpusSource
from deberta_dist.data.token_corpus import open_corpus
from deberta_dist.data.token_file import TokenFile
from deberta_dist.planning.dry_run import describe, rank_reports
from deberta_dist.planning.plan import Plan, check_plan
from deberta_dist.planning.reading import describe_reading
from tests.small_corpus import texts, token_file, tokenizer

__all__ = ["texts", "token_file", "tokenizer"]

DEMO = Path(__file__).parents[2] / "launchers" / "pretrain_demo.toml"
BUCKETS = ("--data.bucket_lengths", "[32, 64, 128]")


def plan_of(*overrides: str) -> Plan:
    return check_plan(load_config(DEMO, ["--parallel.schedule=gpipe", *overrides]), world_size=8)


def test_shapes_are_told_before_there_is_a_text() -> None:
    assert "each step of one of them: 32 x 32, 16 x 64, 8 x 128" in describe(plan_of(*BUCKETS, "--data.train=/none"))


def test_buckets_of_a_text(token_file: TokenFile) -> None:
    text = describe(plan_of(*BUCKETS, f"--data.train={token_file.path}"))
    sizes = count_chunks(open_corpus(token_file.path), (32, 64, 128))
    lines = [line.split() for line in text[text.index("DATA") :].splitlines()[1:6]]
    assert lines[0] == ["bucket", "in", "a", "micro-batch", "sequences/epoch", "padding", "epochs"]
    expected = 500 * 32 * 128 / sum(sizes.room)
    for number, (length, rows) in enumerate(((32, 32), (64, 16), (128, 8))):
        *told, epoch = lines[1 + number]
        assert told == [str(length), str(rows), f"{sizes.num_chunks[number]:,}", f"{sizes.padding(number):.1%}"]
        # All buckets are used up together, up to a step's sequences.
        assert abs(float(epoch) - expected) * sizes.num_chunks[number] <= 32 * 128 / length
    shares = ", ".join(
        f"{length}: {room / sum(sizes.room):.1%}" for length, room in zip((32, 64, 128), sizes.room, strict=True)
    )
    # [CLS] and [SEP] of every sequence are no padding.
    padding = 1 - (sum(sizes.num_tokens) + 2 * sum(sizes.num_chunks)) / sum(sizes.room)
    assert f"steps of each length: {shares}; padding in all: {padding:.1%}" in text
    assert sizes.num_chunks[0] < 128 < sizes.num_chunks[2]
    assert f"32: a step takes 128 sequences, an epoch has {sizes.num_chunks[0]}," in text and "128: a step" not in text
    assert not list(token_file.path.parent.glob("*.pieces")), "a dry run writes nothing"


def test_sources_have_their_own_lines_and_a_wrong_length_of_the_run_is_told(token_file: TokenFile) -> None:
    config, corpus = plan_of(*BUCKETS, "--training.max_steps=90").config, open_corpus(token_file.path)
    sizes = count_chunks(corpus, (32, 64, 128))
    sources = [CorpusSource(corpus=corpus, name=name, epochs=epochs) for name, epochs in (("b", 2), ("a", 0.5))]
    text = describe_reading(config, BucketMixture(sources, [sizes, sizes], samples_per_step=32))
    names = [line.split()[0] for line in text.splitlines()[2:8]]
    assert names == [f"{name}/{length}" for length in (32, 64, 128) for name in "ab"]
    wanted = 2.5 * sum(sizes.room) / 128
    assert f"training.max_steps = 90 reads {90 * 32 / wanted:.3g} times what the epochs asked for hold ({wanted:,.0f}" in text


def test_memory_is_that_of_the_worst_bucket_and_receive_buffers_are_shared() -> None:
    whole, buckets = rank_reports(plan_of()), rank_reports(plan_of(*BUCKETS))
    small = rank_reports(
        plan_of("--data.max_seq_length=32", "--training.micro_batch_size=32", "--training.global_batch_size=128")
    )
    for one, other, short in zip(whole, buckets, small, strict=True):
        assert short.memory.activations < one.memory.activations, "otherwise the worst is not told from the first"
        assert other.memory.activations == one.memory.activations
        assert other.memory.receive_buffers == one.memory.receive_buffers > 0


def test_a_bucket_takes_less_attention() -> None:
    plan = plan_of(*BUCKETS)
    costs = [plan.flops_of_bucket(length).training for length in (32, 64, 128)]
    assert costs == sorted(costs) and len(set(costs)) == 3 and costs[-1] == plan.flops.training
    with pytest.raises(KeyError):
        plan.flops_of_bucket(48)
