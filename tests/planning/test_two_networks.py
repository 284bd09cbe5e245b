"""Time and layouts of an objective of several networks, which run one after the other."""

import dataclasses
from pathlib import Path

import pytest

from deberta_dist.config import RunConfig, load_config
from deberta_dist.models.config import DebertaConfig
from deberta_dist.planning.communication import rank_communication
from deberta_dist.planning.dry_run import rank_reports
from deberta_dist.planning.machine import GPUS
from deberta_dist.planning.pipeline_timeline import ZERO_BUBBLE
from deberta_dist.planning.plan import Plan, check_plan
from deberta_dist.planning.search import Space, candidates, search
from deberta_dist.planning.step_cost import (
    around_pipeline,
    least_seconds,
    network_cost,
    play_step,
    stage_all_reduces,
    step_cost,
)
from deberta_dist.training.objectives.base import Objective
from deberta_dist.training.objectives.masked_lm import MaskedLMNetwork, masked_lm
from tests.two_networks import two_networks

ROOT = Path(__file__).parents[2]
DEMO, JSON = ROOT / "launchers" / "pretrain_demo.toml", ROOT / "ds_configs" / "zero3_bf16.json"
OVERRIDES = ("--data.max_seq_length", "64", "--run.deepspeed", str(JSON))
H100 = GPUS["h100"]
CPU = dataclasses.replace(H100, cores=2, calls_overlap=False)
SPACE = Space(deepspeed=(JSON,), micro_batch=(1, 4), recompute=("none",), schedules=("1f1b",))


def twins(config: RunConfig, model: DebertaConfig) -> Objective:
    """The network of masked language modelling, and another that is equal to it."""
    (network,) = masked_lm(config, model).networks
    return Objective((dataclasses.replace(network, name="twin"), network))


@pytest.mark.parametrize("machine", [H100, CPU], ids=["H100", "two cores"])
def test_two_equal_networks_take_twice_the_time_of_one(machine) -> None:
    one, two = (check_plan(load_config(DEMO), world_size=8, make_objective=make) for make in (masked_lm, twins))
    cost, both = step_cost(one, machine), step_cost(two, machine)
    for term in ("before", "pipeline", "after", "once", "ideal", "tensor", "seconds"):
        assert getattr(both, term) == pytest.approx(2 * getattr(cost, term), rel=1e-12) and getattr(both, term) > 0
    assert (both.bubble, both.utilisation) == pytest.approx((cost.bubble, cost.utilisation), rel=1e-12)
    assert least_seconds(two, machine) == pytest.approx(2 * least_seconds(one, machine), rel=1e-12)
    single, double = (play_step(plan, machine, schedule=ZERO_BUBBLE) for plan in (one, two))
    assert (double.seconds, double.bubble) == pytest.approx((2 * single.seconds, single.bubble), rel=1e-12)


def test_networks_that_differ_add_up_and_ids_are_handed_on_between_them() -> None:
    plan = check_plan(load_config(DEMO), world_size=8, make_objective=two_networks)
    drafter, detector = plan.networks
    costs = [network_cost(part, H100) for part in plan.networks]
    cost = step_cost(plan, H100)
    assert cost.seconds == pytest.approx(costs[0].seconds + costs[1].seconds, rel=1e-12)
    assert min(one.bubble for one in costs) <= cost.bubble <= max(one.bubble for one in costs)
    assert least_seconds(plan, H100) <= cost.seconds
    silent = MaskedLMNetwork(config=drafter.model_config, name="silent")
    alone = dataclasses.replace(drafter, layout=dataclasses.replace(drafter.layout, network=silent))
    rows = plan.config.training.micro_batch_size * plan.config.training.num_micro_batches
    message = H100.seconds("broadcast", 8 * rows * plan.config.data.max_seq_length, size=2, stride=4)
    befores, afters = zip(*(around_pipeline(part, H100) for part in (drafter, alone)), strict=True)
    assert befores[0] == befores[1] and afters[0] - afters[1] == pytest.approx(message, rel=1e-6) and message > 0
    assert detector.network.head_rows == 0 and drafter.network.head_rows == plan.model_config.vocab_size


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_all_reduces_of_every_network_are_those_of_the_dry_run(recompute: str) -> None:
    config = load_config(DEMO, [f"--training.recompute={recompute}"])
    plan = check_plan(config, world_size=8, make_objective=two_networks)
    for part in plan.networks:
        for pipeline_rank, stages in enumerate(part.layout.stages_by_rank):
            sent = sum(sum(map(sum, stage_all_reduces(part, part.layout.stages[index]))) for index in stages)
            place = {"pipeline_rank": pipeline_rank, "tensor_rank": 0}
            expected = rank_communication(part.layout, config=plan.config, deepspeed_config=plan.deepspeed, **place).tensor
            assert sent * plan.config.training.num_micro_batches == expected > 0


def peak_of(plan: Plan) -> int:
    checked = check_plan(plan.config, world_size=4, make_objective=two_networks)
    reports = [report for number in range(2) for report in rank_reports(checked, number)]
    assert all(report.memory.others_at_rest > 0 for report in reports)
    return max(report.memory.peak for report in reports)


def test_the_search_finds_the_fastest_layouts_that_hold_both_networks() -> None:
    config = load_config(DEMO, OVERRIDES)
    options = {"world_size": 4, "machine": H100, "space": SPACE}
    found = search(config, **options, memory_limit=1e9, count=100, make_objective=two_networks)
    shallow = min(network.config.num_hidden_layers for network in found.choices[0].plan.objective.networks)
    assert len(found.choices) > 3
    for choice in found.choices:
        assert choice.plan.config.parallel.pipeline_parallel_size <= shallow < choice.plan.model_config.num_hidden_layers
        assert choice.peak == peak_of(choice.plan)
        reports = [rank_reports(choice.plan, number) for number in range(2)]
        sent = [sum(report.communication.total for report in both) for both in zip(*reports, strict=True)]
        assert choice.sent == max(sent) > max(report.communication.total for report in reports[0])
    # Against every candidate looked at by itself, under a limit that some do not keep to.
    peaks = [choice.peak for choice in found.choices]
    limit = (min(peaks) + max(peaks)) / 2
    best = search(config, **options, memory_limit=limit, count=100, make_objective=two_networks).choices
    model = found.choices[0].plan.model_config
    start = Plan(config, {}, model, two_networks(config, model), layouts=(), network_flops=())
    machine = dataclasses.replace(H100, has_fused_attention=True)
    fastest: dict[tuple[int, int, int], float] = {}
    for candidate in candidates(start, **options | {"machine": machine}):
        if peak_of(candidate.plan) <= limit:
            seconds = step_cost(candidate.plan, machine).seconds
            fastest[candidate.sizes] = min(seconds, fastest.get(candidate.sizes, seconds))
    assert fastest and max(peaks) > limit
    assert sorted(fastest.values()) == [choice.cost.seconds for choice in best]
