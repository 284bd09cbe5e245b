"""The tables of the fused attention, what it refuses, and where it says that it can run; none of it needs Triton."""

import importlib.metadata
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from deberta_dist.errors import ConfigError
from deberta_dist.kernels import AttentionMask, RelativePositions, disentangled_attention, prefers_position_scores
from deberta_dist.kernels.fused import availability, fused_attention, unavailable_reason
from deberta_dist.kernels.fused.tables import order_of_positions, position_tables
from deberta_dist.kernels.inputs import AttentionCall
from deberta_dist.kernels.rows import fuses_rows
from deberta_dist.models.layers import require_compiler
from deberta_dist.models.positions import position_row_of_distance, relative_positions

CPU = torch.device("cpu")
ROWS = position_row_of_distance(4, 8)
POSITIONS = RelativePositions(torch.tensor(ROWS))
TOKENS = torch.zeros(2, 2, 5, 32)


def tables(rows: tuple[int, ...] = ROWS, **changes):
    return position_tables(rows, **{"num_positions": 6, "num_keys": 5, "table_rows": 8, "device": CPU, **changes})


@pytest.mark.parametrize(
    ("buckets", "max_distance", "queries", "keys"), [(4, 8, 20, 20), (0, 5, 9, 3), (0, 64, 7, 12), (256, 512, 512, 512)]
)
def test_every_pair_has_its_row_and_every_row_its_distances(buckets, max_distance, queries, keys):
    positions = relative_positions(num_buckets=buckets, max_distance=max_distance, device=CPU)
    assert positions.host_rows == tuple(positions.row_of_distance.tolist())
    table_rows = 2 * (buckets or max_distance)
    made = tables(positions.host_rows, num_positions=queries, num_keys=keys, table_rows=table_rows)
    distance = torch.arange(queries)[:, None] - torch.arange(keys)
    found = made.row_of_distance[distance + keys - 1].long()
    assert torch.equal(found + made.first_row, positions.index(queries, keys))
    assert (made.lowest_distance[found] <= distance).all() and (distance <= made.highest_distance[found]).all()
    # Together the ranges are the distances, once each.
    lengths = (made.highest_distance - made.lowest_distance + 1).clamp_min(0)
    assert lengths.sum() == queries + keys - 1
    assert {made.first_end, made.last_end} == {int(found.min()), int(found.max())}
    assert made.num_rows == len(lengths) and (made.num_rows % 8 == 0 or made.num_rows == table_rows)
    assert made.first_row >= 0 and made.first_row + made.num_rows <= table_rows


def test_positions_in_order_and_where_each_starts():
    positions = torch.tensor([[4, 0, 4, 2], [1, 1, 1, 1]])
    order, starts = order_of_positions(positions, num_positions=5)
    assert order.tolist() == [[1, 3, 0, 2], [0, 1, 2, 3]]
    assert starts.tolist() == [[0, 1, 1, 2, 2, 4], [0, 0, 4, 4, 4, 4]]


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [(ROWS[::-1], {}, "falls as the distance grows"), (ROWS, {"table_rows": 7}, "the relative table has 7")],
)
def test_bad_tables_are_refused(rows, changes, message):
    with pytest.raises(ConfigError, match=message):
        tables(rows, **changes)


def attend(**changes) -> torch.Tensor:
    given = {"query": TOKENS, "key": TOKENS, "value": TOKENS, "rel_key": None, "mask": None, "queries": None, **changes}
    positions = RelativePositions(given.get("rows", POSITIONS.row_of_distance), given["queries"])
    call = AttentionCall(scale=1.0, positions=positions, mask=given["mask"], dropout_p=0.0, dropout_seed=0, recompute=False)
    return fused_attention(given["query"], given["key"], given["value"], given["rel_key"], None, call)


def segments(keys: int, queries: int | None = None) -> AttentionMask:
    of_queries = None if queries is None else torch.ones(2, queries)
    return AttentionMask(key_segments_BS=torch.ones(2, keys), query_segments_BQ=of_queries)


def alike(*shape: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return dict.fromkeys(("query", "key", "value"), torch.zeros(1, dtype=dtype).expand(shape))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (alike(2, 2, 5, 32, dtype=torch.float64), "given torch.float64"),
        (alike(2, 2, 5, 48), "heads of 32, 64, 128; given 48"),
        (alike(70000, 2, 5, 32), "takes at most 65535 of each"),
        ({"key": torch.zeros(2, 1, 5, 32)}, r"key_BNSH is torch.float32 \(2, 1, 5, 32\).*expected.*\(2, 2, 5, 32\)"),
        ({"value": TOKENS.half()}, "value_BNSH is torch.float16"),
        ({"rel_key": torch.zeros(3, 8, 32)}, r"rel_key_NRH is.*\(3, 8, 32\).*expected.*\(2, 8, 32\)"),
        ({"mask": segments(4)}, r"key_segments_BS is \(2, 4\); expected \(2, 5\)"),
        ({"mask": segments(5, 4)}, r"query_segments_BQ is \(2, 4\); expected \(2, 5\)"),
        ({"query": torch.zeros(2, 2, 6, 32), "mask": segments(5)}, r"query_segments_BQ is \(2, 5\); expected \(2, 6\)"),
        ({"mask": AttentionMask(pairs_BQS=torch.ones(2, 5, 5).bool())}, r"not one of \[queries, keys\]"),
        ({"queries": torch.zeros(2, 4)}, r"query_positions_BQ is \(2, 4\); expected \(2, 5\)"),
        ({"rows": POSITIONS.row_of_distance.flip(0)}, "falls as the distance grows"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        attend(**changes)


def test_without_a_gpu_it_says_so_even_where_the_interpreter_would_do():
    reason = unavailable_reason(TOKENS, positions=POSITIONS, mask=None)
    assert reason == "the fused attention needs an NVIDIA GPU; the tensors are on cpu"
    with pytest.raises(ValueError, match="'fused' is not available: the fused attention needs an NVIDIA GPU"):
        disentangled_attention(TOKENS, TOKENS, TOKENS, positions=POSITIONS, implementation="fused")
    assert prefers_position_scores(TOKENS, positions=POSITIONS, mask=None)


def reason_on_a_gpu(*, dtype=torch.float16, shape=(2, 2, 5, 64), positions=POSITIONS, mask=None, **needs) -> str | None:
    keys = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=shape)
    return unavailable_reason(keys, positions=positions, mask=mask, **needs)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"mask": segments(5)}, None),
        ({"shape": (2, 2, 5, 96)}, "given 96"),
        ({"dtype": torch.float64}, "given torch.float64"),
        ({"needs_probabilities": True}, "never holds the probabilities"),
        ({"has_position_scores": True}, "give it rel_query_NRH"),
        ({"mask": AttentionMask(pairs_BQS=torch.ones(2, 5, 5).bool())}, "not one of [queries, keys]"),
        ({"positions": RelativePositions(torch.tensor([1, 0, 1]))}, "falls as the distance grows"),
    ],
)
def test_reasons_on_a_gpu(monkeypatch, changes, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("deberta_dist.kernels.fused.availability.triton_version", lambda: "3.6.0")
    reason = reason_on_a_gpu(**changes)
    assert (reason is None) if expected is None else (expected in reason)


def test_older_gpus_and_other_triton_are_reasons(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert reason_on_a_gpu() == "the fused attention needs compute capability 8.0 or more; V100 has 7.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr("deberta_dist.kernels.fused.availability.triton_version", lambda: None)
    assert "pip install 'deberta_dist[triton]'" in reason_on_a_gpu()
    monkeypatch.setattr("deberta_dist.kernels.fused.availability.triton_version", lambda: "3.1.0")
    assert "needs Triton 3.6 or newer; installed is 3.1.0" in reason_on_a_gpu()


@pytest.fixture
def asked_anew() -> Iterator[None]:
    """What is found of this machine is kept; not beyond this test."""
    functions = availability.triton_version, availability.compiler_reason
    for function in functions:
        function.cache_clear()
    yield
    for function in functions:
        function.cache_clear()


@pytest.mark.usefixtures("asked_anew")
def test_a_vendors_triton_goes_by_another_name(monkeypatch):
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    triton = pytest.importorskip("triton", reason="Triton is not installed: pip install 'deberta_dist[triton]'")
    monkeypatch.setattr(triton, "__version__", "3.6.0+git9844da95.nv26.2")
    assert availability.triton_reason() is None


@pytest.mark.usefixtures("asked_anew")
def test_no_compiler_is_a_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(availability, "triton_version", lambda: "3.6.0")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    assert "needs a C compiler" in reason_on_a_gpu()
    assert not fuses_rows(SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, shape=(2, 8)))
    with pytest.raises(ConfigError, match="training.compile = true is not available: Triton needs a C compiler"):
        require_compiler("cuda")
    monkeypatch.setenv("CC", "/opt/cc")
    availability.compiler_reason.cache_clear()
    assert reason_on_a_gpu() is None
