"""Stages by arithmetic and owners by bookkeeping: no process is started here."""

import dataclasses
import random
from functools import cache
from itertools import combinations, pairwise

import pytest

from deberta_dist import DebertaConfig, preset
from deberta_dist.config import Parallel
from deberta_dist.errors import ConfigError
from deberta_dist.models.flops import forward_flops
from deberta_dist.parallel.layout import Layout, plan_layout
from deberta_dist.parallel.mesh import MeshShape
from deberta_dist.parallel.pipeline.stages import balance_stages, explicit_stages, stages_of_rank
from deberta_dist.parallel.pipeline.ties import Tie, find_ties, owned_names, tie_ranks
from deberta_dist.parallel.tensor import sharding_rules
from deberta_dist.training.objectives.masked_lm import MaskedLMNetwork


def stage_costs(costs: list[float], stages: list[range]) -> list[float]:
    return [sum(costs[unit] for unit in stage) for stage in stages]


def every_cut(num_units: int, num_stages: int) -> list[list[range]]:
    return [
        [range(start, stop) for start, stop in pairwise([0, *inner, num_units])]
        for inner in combinations(range(1, num_units), num_stages - 1)
    ]


@pytest.mark.parametrize("seed", range(60))
def test_balance_equals_brute_force(seed: int) -> None:
    draw = random.Random(seed)
    num_units = draw.randint(1, 10)
    num_stages = draw.randint(1, num_units)
    # Small whole numbers, so that there are many equal maxima and no rounding.
    costs = [float(draw.choice([0, 1, 1, 2, 3, 9])) for _ in range(num_units)]
    found = balance_stages(costs, num_stages=num_stages)

    assert [unit for stage in found for unit in stage] == list(range(num_units))
    assert len(found) == num_stages and all(len(stage) >= 1 for stage in found)
    best = min(
        (max(stage_costs(costs, cut)), sum(c * c for c in stage_costs(costs, cut))) for cut in every_cut(num_units, num_stages)
    )
    mine = stage_costs(costs, found)
    assert max(mine) == best[0]
    assert sum(c * c for c in mine) == best[1]


def test_equal_costs_give_even_stages() -> None:
    assert [len(stage) for stage in balance_stages([1.0] * 12, num_stages=4)] == [3, 3, 3, 3]
    assert sorted(len(stage) for stage in balance_stages([1.0] * 10, num_stages=4)) == [2, 2, 3, 3]


def test_a_dear_last_unit_gets_a_short_stage() -> None:
    assert [len(stage) for stage in balance_stages([1.0] * 7 + [5.0], num_stages=2)] == [6, 2]


def test_more_stages_than_layers_are_refused_with_numbers() -> None:
    with pytest.raises(ConfigError, match="5 pipeline stages .*num_hidden_layers = 4 layers"):
        balance_stages([1.0] * 4, num_stages=5)


def test_explicit_stages() -> None:
    assert explicit_stages((1, 4, 2), num_layers=7, num_stages=3) == [range(1), range(1, 5), range(5, 7)]
    assert explicit_stages((7,), num_layers=7, num_stages=1) == [range(7)]


@pytest.mark.parametrize("counts", [(3, 3), (3, 5), (7,), (2, 2, 3), (0, 7), (7, 0), (-1, 8), ()])
def test_explicit_stages_refuse_what_does_not_fit(counts: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError) as refusal:
        explicit_stages(counts, num_layers=7, num_stages=2)
    assert f"parallel.layers_per_stage = {list(counts)}" in str(refusal.value)
    assert "2 positive counts" in str(refusal.value) and "num_hidden_layers = 7" in str(refusal.value)


@pytest.mark.parametrize(("ranks", "loops"), [(1, 1), (4, 1), (2, 2), (3, 4)])
def test_looped_stages_are_dealt_once_each(ranks: int, loops: int) -> None:
    dealt = [stages_of_rank(r, pipeline_parallel_size=ranks, stages_per_rank=loops) for r in range(ranks)]
    assert sorted(stage for stages in dealt for stage in stages) == list(range(ranks * loops))
    for rank, stages in enumerate(dealt):
        assert stages == sorted(stages) and {stage % ranks for stage in stages} == {rank}


def config(model: str, num_layers: int) -> DebertaConfig:
    changes: dict[str, object] = {"num_hidden_layers": num_layers}
    if model == "v1-biased":  # no enhanced mask decoder: the absolute table is added at the input
        changes["position_biased_input"] = True
    return dataclasses.replace(preset("tiny-v2" if model == "v2" else "tiny-v1"), **changes)


@cache
def layout(model: str, *, tensor: int, pipeline: int, stages_per_rank: int = 1, num_layers: int = 8) -> Layout:
    model_config = config(model, num_layers)
    parallel = Parallel(
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
        data_parallel_size=1,
        schedule="interleaved_1f1b" if stages_per_rank > 1 else "1f1b",
        stages_per_rank=stages_per_rank,
    )
    flops = forward_flops(model_config, max_seq_length=32, micro_batch_size=2, mask_probability=0.15)
    return plan_layout(MaskedLMNetwork(config=model_config), parallel=parallel, flops=flops)


LAYOUTS = [
    (tensor, pipeline, loops)
    for tensor in (1, 2, 4)
    for pipeline, loops in ((1, 1), (2, 1), (3, 1), (4, 1), (8, 1), (2, 2), (2, 4), (4, 2))
]


@pytest.mark.parametrize("model", ["v1", "v1-biased", "v2"])
@pytest.mark.parametrize(("tensor", "pipeline", "loops"), LAYOUTS)
def test_every_slice_has_one_owner_and_it_is_the_first_user(model: str, tensor: int, pipeline: int, loops: int) -> None:
    found = layout(model, tensor=tensor, pipeline=pipeline, stages_per_rank=loops)
    owners: dict[tuple[str, int], list[tuple[int, int]]] = {}
    users: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for p in range(pipeline):
        assert set(found.owned(p, 0)) <= set(found.names_by_rank[p])
        for t in range(tensor):
            owned = set(found.owned(p, t))
            for name in found.names_by_rank[p]:
                # A replicated weight is one slice, whoever holds it.
                part = t if sharding_rules.parameter_sharding(name).dim is not None else 0
                users.setdefault((name, part), []).append((p, t))
                if name in owned:
                    owners.setdefault((name, part), []).append((p, t))
    expected = {
        (name, part)
        for name in found.full_shapes
        for part in range(tensor if sharding_rules.parameter_sharding(name).dim is not None else 1)
    }
    assert users.keys() == expected, "a slice that nobody uses, or one of no parameter"
    for piece, places in users.items():
        assert owners.get(piece) == [min(places)], piece


@pytest.mark.parametrize("model", ["v1", "v1-biased", "v2"])
@pytest.mark.parametrize(("tensor", "pipeline", "loops"), LAYOUTS)
def test_ties_sum_exactly_where_gradients_are_parts(model: str, tensor: int, pipeline: int, loops: int) -> None:
    found = layout(model, tensor=tensor, pipeline=pipeline, stages_per_rank=loops)
    for tie in found.ties:
        assert len(tie.users) > 1 and len(set(tie.users)) == len(tie.users) and tie.users[0] == min(tie.users)
        assert list(tie.names) == sorted(tie.names)
        for name in tie.names:
            cut = sharding_rules.parameter_sharding(name)
            stages = {p for p, _ in tie.users}
            if cut.kind == sharding_rules.REPLICATE:
                assert len(stages) == 1 and not tie.is_sum, name
            elif cut.kind == sharding_rules.PARTIAL:
                assert tie.is_sum and {t for _, t in tie.users} == set(range(tensor)), name
            else:  # its own slice on each tensor rank: shared along the pipeline only
                assert tie.is_sum and len(stages) > 1 and len({t for _, t in tie.users}) == 1, name
    pairs = [(name, user) for tie in found.ties for name in tie.names for user in tie.users]
    assert len(pairs) == len(set(pairs)), "a rank has one weight in two ties"


@pytest.mark.parametrize("model", ["v1-biased", "v2"])
@pytest.mark.parametrize("pipeline", [1, 3])
def test_under_sequence_parallelism_gradients_of_tokens_are_parts(model: str, pipeline: int) -> None:
    without = layout(model, tensor=2, pipeline=pipeline)
    found = dataclasses.replace(without, sequence_parallel=True)
    assert [found.owned(p, t) for p in range(pipeline) for t in range(2)] == [
        without.owned(p, t) for p in range(pipeline) for t in range(2)
    ]
    sums = {name for tie in found.ties if tie.is_sum for name in tie.names}
    copies = {name for tie in found.ties if not tie.is_sum for name in tie.names}
    parts = {"layer.0.output.dense.bias", "layer.6.attention.output.LayerNorm.weight"}
    assert {f"deberta.encoder.{name}" for name in parts} | {"deberta.embeddings.LayerNorm.bias"} <= sums
    last = {"deberta.encoder.layer.7.output.dense.bias", "deberta.embeddings.position_embeddings.weight"}
    head = {"lm_predictions.lm_head.dense.weight", "lm_predictions.lm_head.LayerNorm.bias"}
    if model == "v2":  # the last layer decodes: its rows are targets, on all ranks
        assert head | last <= copies and "deberta.encoder.conv.conv.weight" in sums
    else:
        assert head <= copies and last <= sums


def test_word_embeddings_are_shared_by_first_and_last_stage() -> None:
    found = layout("v2", tensor=2, pipeline=3)
    name = "deberta.embeddings.word_embeddings.weight"
    assert sorted(tie.users for tie in found.ties if name in tie.names) == [((0, 0), (2, 0)), ((0, 1), (2, 1))]
    table = [tie for tie in found.ties if "deberta.encoder.rel_embeddings.weight" in tie.names]
    assert [len(tie.users) for tie in table] == [6]
    assert "deberta.encoder.LayerNorm.weight" in table[0].names, "same users, one message"


def test_one_rank_has_no_ties() -> None:
    assert layout("v2", tensor=1, pipeline=1).ties == []


def test_a_replicated_weight_on_two_stages_is_refused() -> None:
    with pytest.raises(AssertionError, match="w"):
        find_ties([["w"], ["w"]], kinds={"w": "replicate"}, tensor_parallel_size=1)


def test_order_of_ties_does_not_depend_on_order_of_names() -> None:
    kinds = {"a": "split", "b": "partial", "c": "split", "d": "replicate"}
    one = find_ties([["a", "b", "c", "d"], ["a", "b", "c"]], kinds=kinds, tensor_parallel_size=2)
    other = find_ties([["d", "c", "b", "a"], ["c", "b", "a"]], kinds=kinds, tensor_parallel_size=2)
    assert one == other
    assert Tie(("a", "c"), ((0, 1), (1, 1)), True) in one
    assert owned_names(["d", "b", "a"], ties=one, rank=(0, 1)) == ["a"]
    assert owned_names(["c", "b", "a"], ties=one, rank=(1, 0)) == []


def test_ranks_of_a_tie_stay_in_their_replica() -> None:
    shape = MeshShape(pipeline=2, data=3, tensor=2)
    tie = Tie(("w",), ((0, 1), (1, 1)), True)
    ranks = [tie_ranks(tie, shape=shape, data=data) for data in range(3)]
    assert ranks == [(1, 7), (3, 9), (5, 11)]
