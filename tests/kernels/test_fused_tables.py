"""The tables of the fused attention, what it refuses, and where it says that it can run; none of it needs Triton."""

import pytest
import torch
from deberta_dist.kernels.fused_tables import order_of_positions, position_tables

from deberta_dist.errors import ConfigError
from deberta_dist.kernels.fused import fused_attention, is_available, unavailable_reason
from deberta_dist.models.positions import position_row_of_distance, relative_index

CPU = torch.device("cpu")
ROWS = position_row_of_distance(4, 8)


def tables(rows: tuple[int, ...] = ROWS, **changes):
    sizes = {"max_distance": 8, "num_positions": 6, "num_keys": 5, "table_rows": 8, "device": CPU, **changes}
    return position_tables(rows, **sizes)


@pytest.mark.parametrize(
    ("buckets", "max_distance", "queries", "keys"), [(4, 8, 20, 20), (0, 5, 9, 3), (0, 64, 7, 12), (256, 512, 512, 512)]
)
def test_every_pair_has_its_row_and_every_row_its_distances(buckets, max_distance, queries, keys):
    rows = position_row_of_distance(buckets, max_distance)
    table_rows = 2 * (buckets or max_distance)
    made = tables(rows, max_distance=max_distance, num_positions=queries, num_keys=keys, table_rows=table_rows)
    expected = relative_index(queries, key_length=keys, num_buckets=buckets, max_distance=max_distance, device=CPU)
    distance = torch.arange(queries)[:, None] - torch.arange(keys)
    found = made.row_of_distance[distance + keys - 1].long()
    assert torch.equal(found + made.first_row, expected)
    assert (made.lowest_distance[found] <= distance).all() and (distance <= made.highest_distance[found]).all()
    # Together the ranges are the distances, once each.
    lengths = (made.highest_distance - made.lowest_distance + 1).clamp_min(0)
    assert lengths.sum() == queries + keys - 1
    assert {made.first_end, made.last_end} == {int(found.min()), int(found.max())}
    assert made.num_rows == len(lengths) and (made.num_rows % 8 == 0 or made.num_rows == table_rows)
    assert 0 <= made.first_row and made.first_row + made.num_rows <= table_rows


def test_positions_in_order_and_where_each_starts():
    positions = torch.tensor([[4, 0, 4, 2], [1, 1, 1, 1]])
    order, starts = order_of_positions(positions, num_positions=5)
    assert order.tolist() == [[1, 3, 0, 2], [0, 1, 2, 3]]
    assert starts.tolist() == [[0, 1, 1, 2, 2, 4], [0, 0, 4, 4, 4, 4]]


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (ROWS[:-1], {}, "has 16 entries; expected one for each distance of -8 .. 8, 17"),
        (ROWS[::-1], {}, "falls as the distance grows"),
        (ROWS, {"table_rows": 7}, "the relative table has 7"),
    ],
)
def test_bad_tables_are_refused(rows, changes, message):
    with pytest.raises(ConfigError, match=message):
        tables(rows, **changes)


def attend(**changes) -> torch.Tensor:
    zeros = torch.zeros(2, 2, 5, 32)
    tensors = {"query_BNQH": zeros, "key_BNSH": zeros, "value_BNSH": zeros, **changes}
    query, key, value = (tensors.pop(name) for name in ("query_BNQH", "key_BNSH", "value_BNSH"))
    return fused_attention(query, key, value, row_of_distance=ROWS, max_distance=8, **tensors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_BNQH": torch.zeros(2, 2, 5, 32, dtype=torch.float64)}, "given torch.float64"),
        ({"query_BNQH": torch.zeros(2, 2, 5, 48)}, "heads of 32, 64, 128; given 48"),
        ({"key_BNSH": torch.zeros(2, 1, 5, 32)}, r"key_BNSH is torch.float32 \(2, 1, 5, 32\).*expected.*\(2, 2, 5, 32\)"),
        ({"value_BNSH": torch.zeros(2, 2, 5, 32).half()}, "value_BNSH is torch.float16"),
        ({"rel_key_NRH": torch.zeros(3, 8, 32)}, r"rel_key_NRH is.*\(3, 8, 32\).*expected.*\(2, 8, 32\)"),
        ({"key_mask_BS": torch.ones(2, 4, dtype=torch.bool)}, r"key_mask_BS is \(2, 4\); expected \(2, 5\)"),
        ({"document_ids_BS": torch.ones(5)}, r"document_ids_BS is \(5,\); expected \(2, 5\)"),
        ({"query_positions_BQ": torch.zeros(2, 4)}, r"query_positions_BQ is \(2, 4\); expected \(2, 5\)"),
        ({"dropout_p": 1.0}, r"dropout_p is 1.0; expected a probability in \[0, 1\)"),
        (
            {"query_BNQH": torch.zeros(2, 2, 6, 32), "key_mask_BS": torch.ones(2, 5, dtype=torch.bool)},
            "6 queries and a mask of 5 keys.*give query_positions_BQ",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        attend(**changes)


def test_without_a_gpu_it_says_so_even_where_the_interpreter_would_do():
    reason = unavailable_reason(device=CPU, dtype=torch.bfloat16, head_size=64)
    assert reason == "the fused attention needs an NVIDIA GPU; the tensors are on cpu"
    assert not is_available(device=CPU, dtype=torch.bfloat16, head_size=64)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"head_size": 96}, "given 96"),
        ({"dtype": torch.float64}, "given torch.float64"),
        ({"needs_probabilities": True}, "never holds the probabilities"),
        ({"needs_pair_mask": True}, "not one of [queries, keys]"),
    ],
)
def test_reasons_on_a_gpu(monkeypatch, changes, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("deberta_dist.kernels.fused._triton_missing", lambda: None)
    wanted = {"device": torch.device("cuda"), "dtype": torch.float16, "head_size": 64, **changes}
    reason = unavailable_reason(**wanted)
    assert (reason is None) if expected is None else (expected in reason)


def test_older_gpus_and_other_triton_are_reasons(monkeypatch):
    wanted = {"device": torch.device("cuda"), "dtype": torch.float16, "head_size": 64}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert unavailable_reason(**wanted) == "the fused attention needs compute capability 8.0 or more; V100 has 7.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'deberta_dist[triton]'" in unavailable_reason(**wanted)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "3.1.0")
    assert "needs Triton 3.7 or newer; installed is 3.1.0" in unavailable_reason(**wanted)
