"""The cost model's counts against what is counted elsewhere, and a machine's numbers."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from deberta_dist.config import load_config
from deberta_dist.errors import ConfigError
from deberta_dist.parallel.layout import names_of_layers
from deberta_dist.planning.activations import local_model
from deberta_dist.planning.communication import rank_communication
from deberta_dist.planning.machine import GPUS, Link, calibrated, read_calibration
from deberta_dist.planning.pass_work import stage_work
from deberta_dist.planning.plan import NetworkPlan, Plan, check_plan
from deberta_dist.planning.step_cost import around_pipeline, least_seconds, stage_all_reduces, step_cost, work_seconds
from deberta_dist.training.objectives.masked_lm import MaskedLMNetwork

DEMO = Path(__file__).parents[2] / "launchers" / "pretrain_demo.toml"
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"}
EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view", "_reshape_alias"}
H100 = GPUS["h100"]


def plan_of(world_size: int = 8, *overrides: str) -> Plan:
    return check_plan(load_config(DEMO, overrides), world_size=world_size)


class Counter(TorchDispatchMode):
    """Bytes that operations which are no products and no views read and write, and how many operations there are."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output, name = func(*args, **(kwargs or {})), func._schema.name.partition("::")[2]
        if func.is_view or name in EMPTY:
            return output
        read = [x for x in tree_iter((args, kwargs)) if torch.is_tensor(x)]
        known = {x.untyped_storage()._cdata for x in read}
        written = [x for x in tree_iter(output) if torch.is_tensor(x)]
        written = [x for x in written if name.endswith("_") or x.untyped_storage()._cdata not in known]
        self.calls += 1
        self.bytes += (name not in PRODUCTS) * sum(x.nbytes for x in (*read, *written))
        return output


def counted(plan: NetworkPlan, layers: range) -> list[tuple[int, int]]:
    """(bytes, calls) of a middle stage, forward and backward, on the meta device."""
    tensor, batch = plan.config.parallel.tensor_parallel_size, plan.config.training.micro_batch_size
    shape = (batch, plan.config.data.max_seq_length, plan.model_config.hidden_size)
    model = local_model(
        MaskedLMNetwork(config=plan.model_config), layers=layers, tensor_parallel_size=tensor, dtype=torch.float32
    )
    model.recompute = plan.config.training.recompute
    model.deberta.encoder.relative_positions(torch.device("meta"))
    with torch.device("meta"):
        hidden, mask = torch.empty(shape, requires_grad=True), torch.empty(shape[:2], dtype=torch.int64)
    labels = torch.zeros(shape[:2], dtype=torch.int64)
    with Counter() as forward:
        output = model.forward_stage(hidden, input_ids=None, attention_mask=mask, labels=labels, layers=layers, dropout_key=1)
    with Counter() as backward:
        output.backward(torch.empty(shape, device="meta"))
    return [(one.bytes, one.calls) for one in (forward, backward)]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(("tensor", "dropout"), [(1, 0.1), (2, 0.1), (2, 0.0)])
def test_passes_are_those_of_a_real_layer(recompute: str, tensor: int, dropout: float) -> None:
    plan = plan_of(4 * tensor, f"--training.recompute={recompute}", f"--parallel.tensor_parallel_size={tensor}")
    changed = {"num_hidden_layers": 6, "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    network = dataclasses.replace(plan.layout.network, config=dataclasses.replace(plan.model_config, **changed))
    part = dataclasses.replace(plan.main, layout=dataclasses.replace(plan.layout, network=network))
    one, two = (counted(part, range(1, stop)) for stop in (2, 3))
    few, many = (stage_work(part, range(1, stop), has_fused_attention=False) for stop in (2, 3))
    for number in range(2):
        assert many[number].bytes - few[number].bytes == pytest.approx(two[number][0] - one[number][0], rel=0.08)
        assert many[number].calls - few[number].calls == pytest.approx(two[number][1] - one[number][1], rel=0.15)


def test_products_are_the_models_and_what_is_recomputed() -> None:
    plans = {mode: plan_of(8, f"--training.recompute={mode}") for mode in ("none", "selective", "full")}
    tokens = plans["none"].config.training.micro_batch_size * plans["none"].config.data.max_seq_length
    backward = {}
    for mode, plan in plans.items():
        works = [stage_work(plan.main, layers, has_fused_attention=False) for layers in plan.layout.stages]
        forward, backward[mode] = (sum(work[number].products for work in works) for number in range(2))
        assert 2 * forward == pytest.approx(plan.flops.forward * tokens), "two tensor-parallel ranks"
    assert backward["none"] == pytest.approx(2 * forward)
    assert backward["none"] < backward["selective"] < backward["full"] < 3 * forward
    fused = [stage_work(plans["none"].main, layers, has_fused_attention=True) for layers in plans["none"].layout.stages]
    assert sum(work.bytes for work, _ in fused) < sum(work[0].bytes for work in works)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_all_reduces_are_those_of_the_dry_run(recompute: str) -> None:
    plan = plan_of(8, f"--training.recompute={recompute}")
    for pipeline_rank, stages in enumerate(plan.layout.stages_by_rank):
        sent = sum(sum(map(sum, stage_all_reduces(plan.main, plan.layout.stages[index]))) for index in stages)
        expected = rank_communication(
            plan.layout, config=plan.config, deepspeed_config=plan.deepspeed, pipeline_rank=pipeline_rank, tensor_rank=0
        ).tensor
        assert sent * plan.config.training.num_micro_batches == expected > 0


def test_weights_of_ranks_are_those_of_the_flat_layout() -> None:
    plan = plan_of()
    for pipeline_rank, weights in enumerate(plan.layout.rank_weights):
        names = plan.layout.names_by_rank[pipeline_rank]
        sizes = {name: torch.Size(plan.layout.local_shape(name)).numel() for name in names}
        assert weights.used == sum(sizes.values())
        assert weights.owned == sum(sizes[name] for name in plan.layout.owned(pipeline_rank, 0))
    for layers in ((0,), (1,), (1, 2), (0, 3), (3,), (2, 3), (0, 1, 2, 3)):
        model = plan.layout.network.meta_model()
        model.keep_layers(layers)
        assert names_of_layers(plan.layout.network, layers) == tuple(name for name, _ in model.named_parameters())


def test_a_step_is_the_sum_of_its_terms_and_never_less_than_the_least() -> None:
    for schedule in (("1f1b", 1), ("gpipe", 1), ("interleaved_1f1b", 2)):
        plan = plan_of(8, f"--parallel.schedule={schedule[0]}", f"--parallel.stages_per_rank={schedule[1]}")
        cost = step_cost(plan, H100)
        assert cost.seconds == cost.before + cost.pipeline + cost.after + cost.once
        assert (cost.before, cost.after) == around_pipeline(plan.main, H100)
        assert least_seconds(plan, H100) <= cost.seconds
        assert 0 < cost.tensor < cost.ideal < cost.pipeline
    slow = dataclasses.replace(H100, product_rate=H100.product_rate / 1e6, calls_overlap=False)
    assert step_cost(plan, slow).seconds > 10 * cost.seconds
    shared = dataclasses.replace(H100, cores=2, calls_overlap=False)
    alone = dataclasses.replace(H100, calls_overlap=False)
    assert step_cost(plan, shared).pipeline > 2 * step_cost(plan, alone).pipeline, "eight processes, two cores"


def test_messages_take_the_links_they_cross() -> None:
    link = Link(latency=1e-5, bandwidth=1e9)
    machine = dataclasses.replace(H100, node_size=8, node=link, network=Link(1e-4, 1e8))
    assert machine.seconds("all_reduce", 10**9, size=4, stride=2) == pytest.approx(1.5 + 4e-5)
    assert machine.seconds("all_gather", 10**9, size=8, stride=1) == pytest.approx(7 / 8 + 3e-5)
    # Two of sixteen are on each node: they share the work of two network cards.
    assert machine.seconds("reduce_scatter", 10**9, size=16, stride=4) == pytest.approx(15 / 16 * 5 + 4e-4)
    assert machine.seconds("send", 10**8, size=2, stride=8) == pytest.approx(1 + 1e-4)
    assert machine.seconds("all_reduce", 10**9, size=1, stride=1) == 0
    measured = dataclasses.replace(machine, kinds={"send": link})
    assert measured.seconds("send", 10**8, size=2, stride=8) == pytest.approx(0.1 + 1e-5)


def test_a_calibration_replaces_numbers(tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    by_number = {"2": {"product_rate": 2e9}, "8": {"product_rate": 1e9, "kinds": {"send": {"latency": 1e-3, "bandwidth": 1e9}}}}
    file.write_text(json.dumps({"cores": 2, "calls_overlap": False, "processes": by_number, "about": {"date": "today"}}))
    measured = read_calibration(file)
    rates = [calibrated(H100, measured, processes=n, source="it").product_rate for n in (1, 2, 4, 8, 16)]
    assert rates == [2e9, 2e9, 1e9, 1e9, 1e9]
    machine = calibrated(H100, measured, processes=8, source="it")
    assert machine.kinds["send"].latency == 1e-3 and machine.cores == 2 and machine.peak == 0
    assert step_cost(plan_of(), machine).utilisation == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "expected an object"),
        ('{"processes": {"two": {}}}', "by number of processes"),
        ('{"speed": 1}', "unknown key speed; known are"),
        ('{"product_rate": -1}', "product_rate = -1; expected a positive number"),
        ('{"node": 5}', 'node must be {"latency"'),
        ('{"kinds": {"shout": {}}}', "kinds.shout is not a kind of message"),
        ('{"calls_overlap": 1}', "calls_overlap = 1; expected true or false"),
        ('{"cores": 0}', "cores = 0; expected a positive integer"),
    ],
)
def test_a_wrong_calibration_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        calibrated(H100, read_calibration(file), processes=8, source=str(file))
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_work_on_a_device_and_on_a_core() -> None:
    plan = plan_of()
    _, work = stage_work(plan.main, plan.layout.stages[0], has_fused_attention=True)
    device = work.products / H100.product_rate + work.bytes / H100.memory_bandwidth
    calls = work.calls * H100.seconds_per_call
    assert work_seconds(work, H100) == max(device, calls)
    assert work_seconds(work, dataclasses.replace(H100, calls_overlap=False)) == pytest.approx(device + calls)
