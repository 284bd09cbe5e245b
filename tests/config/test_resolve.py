"""The batch equation, the world's size and the schedules."""

from pathlib import Path

import pytest

from deberta_dist.config import load_config, resolve, smallest_world_size
from deberta_dist.errors import ConfigError


def refusal(toml: Path, world_size: int, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(load_config(toml, overrides), world_size)
    assert str(toml) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("world_size", "data", "micro_batches"), [(4, 1, 8), (8, 2, 4), (16, 4, 2)])
def test_auto(toml: Path, world_size: int, data: int, micro_batches: int) -> None:
    resolved = resolve(load_config(toml), world_size)
    assert (resolved.parallel.data_parallel_size, resolved.training.num_micro_batches) == (data, micro_batches)
    assert resolved.source == str(toml)
    assert resolve(resolved, world_size) == resolved


def test_given_numbers_are_checked(toml: Path) -> None:
    words = ["--parallel.data_parallel_size", "2", "--training.num_micro_batches", "4"]
    assert resolve(load_config(toml, words), 8).training.num_micro_batches == 4
    assert smallest_world_size(load_config(toml, words)) == 8
    assert smallest_world_size(load_config(toml)) == 4


@pytest.mark.parametrize(
    ("world_size", "overrides", "expected"),
    [
        (6, [], ["tensor_parallel_size = 2 x pipeline_parallel_size = 2 = 4 does not divide 6 processes", "start 4 or 8"]),
        (2, [], ["does not divide 2 processes; start 4 of them"]),
        (8, ["--parallel.data_parallel_size=4"], ["makes 16 processes, but there are 8", 'data_parallel_size = 2 or "auto"']),
        (6, ["--parallel.data_parallel_size=2"], ["makes 8 processes, but there are 6; start 8 of them"]),
        (8, ["--training.global_batch_size=36"], ["global_batch_size = 36 is not a multiple", "= 8; a global_batch_size of 32 or 40 fits"]),
        (8, ["--training.global_batch_size=4"], ["a global_batch_size of 8 fits"]),
        (8, ["--training.num_micro_batches=3"], ["num_micro_batches = 3 x micro_batch_size = 4 x data_parallel_size = 2 = 24", 'num_micro_batches = 4 or "auto" fits']),
        (8, ["--training.num_micro_batches=3", "--training.global_batch_size=30"], ["a global_batch_size of 24 fits"]),
        (8, ["--parallel.stages_per_rank=2"], ['stages_per_rank = 2 needs parallel.schedule = "interleaved_1f1b"']),
        (8, ["--parallel.layers_per_stage=[1,1,2]"], ["has 3 entries", "makes 2 stages"]),
        (4, ["--parallel.pipeline_parallel_size=1", "--parallel.schedule=interleaved_1f1b", "--parallel.stages_per_rank=2"], ["needs a pipeline_parallel_size of 2 or more"]),
        (8, ["--parallel.schedule=interleaved_1f1b", "--training.global_batch_size=40"], ["num_micro_batches = 5 does not fill", "4 or 6 does"]),
        (2, ["--parallel.sequence_parallel=true", "--parallel.tensor_parallel_size=1"], ["sequence_parallel = true splits sequences", "which is 1; make that 2 or more, or sequence_parallel false"]),
        (4, ["--parallel.sequence_parallel=true", "--data.max_seq_length=513"], ["tensor_parallel_size = 2 does not divide data.max_seq_length = 513", "take multiples of 2"]),
        (16, ["--parallel.sequence_parallel=true", "--parallel.tensor_parallel_size=8", "--data.bucket_lengths=[4,16,512]"], ["tensor_parallel_size = 8 does not divide data.bucket_lengths = 4,", "take multiples of 8, or tensor_parallel_size 2 or 4"]),
    ],
)  # fmt: skip
def test_refused(toml: Path, world_size: int, overrides: list[str], expected: list[str]) -> None:
    message = refusal(toml, world_size, *overrides)
    for part in expected:
        assert part in message


def test_interleaved(toml: Path) -> None:
    words = ["--parallel.schedule=interleaved_1f1b", "--parallel.stages_per_rank=2"]
    resolved = resolve(load_config(toml, [*words, "--parallel.layers_per_stage=[1,1,1,1]"]), 8)
    assert resolved.parallel.layers_per_stage == (1, 1, 1, 1)


def test_all_problems_in_one_message(toml: Path) -> None:
    message = refusal(
        toml, 8, "--parallel.data_parallel_size=3", "--training.global_batch_size=31", "--parallel.stages_per_rank=2",
        "--parallel.layers_per_stage=[4]",
    )  # fmt: skip
    assert message.count("\n") == 4
    for part in ("makes 12 processes", "global_batch_size = 31", "stages_per_rank = 2 needs", "has 1 entries"):
        assert part in message


def test_every_solution_multiplies(toml: Path) -> None:
    for world_size in range(1, 33):
        for batch in range(8, 65, 4):
            try:
                resolved = resolve(load_config(toml, [f"--training.global_batch_size={batch}"]), world_size)
            except ConfigError:
                continue
            training, parallel = resolved.training, resolved.parallel
            replicas = parallel.data_parallel_size
            assert training.micro_batch_size * training.num_micro_batches * replicas == batch
            assert parallel.tensor_parallel_size * parallel.pipeline_parallel_size * replicas == world_size
