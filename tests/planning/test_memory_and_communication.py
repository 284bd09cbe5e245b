"""The dry run's bytes against what a real run holds and sends."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, schedules

from deberta_dist.models.flops import forward_flops
from deberta_dist.parallel.layout import Layout, plan_layout
from deberta_dist.planning.activations import StageCase, local_model, stage_activations
from deberta_dist.planning.communication import MicroBatchTargets, rank_communication
from deberta_dist.planning.memory import micro_batches_in_flight, rank_memory
from deberta_dist.training.objectives.masked_lm import MaskedLMNetwork
from tests.harness import run_ranks
from tests.integration.parallel_run import (
    LEARNING_RATE,
    LENGTH,
    Case,
    deepspeed_settings,
    make_trainer,
    own_batch,
)
from tests.planning.live_peak import step_peaks

# Functions of torch.distributed -> kind; one may be written on top of another, the outermost call is the message. In the
# tensor-parallel group all are "tensor".
FUNCTIONS = {
    "all_gather_single": "zero_gather",
    "all_gather_into_tensor": "zero_gather",
    "reduce_scatter_single": "zero_reduce",
    "reduce_scatter_tensor": "zero_reduce",
    "broadcast": "tie_broadcast",
    "reduce": "tie_reduce",
    "all_reduce": "tensor",
}


def run_and_count(case: Case) -> dict[str, Any]:
    """Bytes of the third step by kind, what the store holds while it runs and after it, the step's targets; peaks."""
    counts: Counter[str] = Counter()
    is_inside = False
    tensor_group: list[Any] = [None]

    def counting(name: str, original: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal is_inside
            group = options.get("group")
            is_tensor = group is not None and group is tensor_group[0]
            is_ours = FUNCTIONS[name] != "tensor" or is_tensor
            if not is_inside and is_ours and dist.get_world_size(group) > 1:
                tensors = [a for a in [*arguments, *options.values()] if torch.is_tensor(a)]
                num_bytes = max(t.nbytes for t in tensors)
                counts["tensor" if is_tensor else FUNCTIONS[name]] += num_bytes
                counts["tensor_halves"] += num_bytes * (is_tensor and name != "all_reduce")
            outer, is_inside = is_inside, True
            try:
                return original(*arguments, **options)
            finally:
                is_inside = outer

        return call

    for name in FUNCTIONS:  # before DeepSpeed looks them up
        if hasattr(dist, name):  # torch 2.11 and 2.12 lack the "single" names
            setattr(dist, name, counting(name, getattr(dist, name)))

    def counting_sends(kind: str, make_operations: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> list[dist.P2POp]:
            operations = make_operations(*arguments, **options)
            counts[kind] += sum(operation.tensor.nbytes for operation in operations)
            return operations

        return call

    for kind, name in (("pipeline_activations", "get_fwd_send_ops"), ("pipeline_gradients", "get_bwd_send_ops")):
        setattr(PipelineStage, name, counting_sends(kind, getattr(PipelineStage, name)))

    trainer = make_trainer(case)
    model, mesh = trainer.parts.sharded_model, trainer._mesh
    tensor_group[0] = mesh.groups["tensor"]
    gathered = {}
    collect = model.reduce_ties

    def look_and_collect() -> None:
        gathered.update(model.store.resident_bytes())
        gathered["borrowed"] = sum(
            model.model.get_parameter(n).nbytes for n in model._parameters if n not in model.store.layout.places
        )
        collect()

    model.reduce_ties = look_and_collect
    for step in range(3):  # DeepSpeed compares its trace between ranks in the first two
        counts.clear()
        batch = own_batch(case, step)
        trainer.step(batch, step=step, learning_rate=LEARNING_RATE)
    schedules = trainer.parts.runner._schedules.values()
    stages = [s for made in schedules for s in (made._stages if case.stages_per_rank > 1 else [made._stage])]
    received = [i for stage in stages for i in (*stage.args_recv_info.values(), *stage.grad_recv_info.values())]
    store_optimizer = model.store._engine.optimizer
    masters = {flat.untyped_storage().data_ptr() for flat in store_optimizer.fp32_partitioned_groups_flat}
    at_rest = {parameter.ds_tensor.untyped_storage().data_ptr() for parameter in model.store._parameters}
    per_sequence = (batch.labels > 0).sum(dim=1).view(case.micro_batches, case.micro_batch_size)
    found = {
        "counts": dict(counts),
        "resident": model.store.resident_bytes(),
        "gathered": gathered,
        "receive_buffers": sum(
            {i.buffer.data_ptr(): i.buffer.nbytes for infos in received for i in infos if i.buffer is not None}.values()
        ),
        "bucket": sum(bucket.buffer.nbytes for bucket in store_optimizer.ipg_buckets.values()),
        "gradient_shard": store_optimizer.grad_partitions_flat_buffer.nbytes,
        "shares_master": bool(masters & at_rest),
        "targets": [(int(row.sum()), int(row.max())) for row in per_sequence],
        "place": (mesh.mesh_rank.pipeline, mesh.mesh_rank.tensor),
    }
    model.reduce_ties = collect
    return {**found, "peaks": step_peaks(trainer, case)}


def layout_of(case: Case) -> Layout:
    flops = forward_flops(
        case.model_config(), max_seq_length=LENGTH, micro_batch_size=case.micro_batch_size, mask_probability=0.15
    )
    return plan_layout(MaskedLMNetwork(config=case.model_config()), parallel=case.run_config().parallel, flops=flops)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(tensor=2, micro_batches=3), marks=pytest.mark.slow),
        pytest.param(Case(pipeline=2, micro_batches=3), marks=pytest.mark.slow),
        Case(data=2),
        Case(tensor=2, pipeline=2, data=2, micro_batches=3),
        pytest.param(Case(tensor=2, recompute="full", dropout=0.1), marks=pytest.mark.slow),
        Case(tensor=2, recompute="selective", model="v1", decoder="plain"),
        Case(pipeline=2, data=2, precision="bf16", dropout=0.1),
        Case(pipeline=2, schedule="interleaved_1f1b", stages_per_rank=2),
        Case(pipeline=2, buckets=(8, 12, LENGTH)),
        pytest.param(Case(tensor=2, sequence=True, dropout=0.1), marks=pytest.mark.slow),
        Case(tensor=2, pipeline=2, sequence=True, recompute="full"),
        pytest.param(Case(tensor=2, sequence=True, decoder="plain"), marks=pytest.mark.slow),
        pytest.param(Case(tensor=4, sequence=True, model="v1", recompute="selective"), marks=pytest.mark.slow),
    ],
    ids=lambda case: (
        f"{'sp' * case.sequence}tp{case.tensor}-pp{case.pipeline}-dp{case.data}-{case.recompute}-{case.precision}-{case.schedule}-{case.decoder}"
    ),
)
def test_prediction_equals_a_real_step(case: Case) -> None:
    layout, settings = layout_of(case), deepspeed_settings(case)
    for rank in run_ranks(case.world_size, run_and_count, case):
        pipeline_rank, tensor_rank = rank["place"]
        place = {"pipeline_rank": pipeline_rank, "tensor_rank": tensor_rank}
        memory = rank_memory(layout, config=case.run_config(), deepspeed_config=settings, **place)
        resident, gathered = rank["resident"], rank["gathered"]
        assert memory.weights == resident["weights"]
        assert memory.master_weights == resident["master_weights"]
        assert memory.moments == resident["optimizer_states"]
        assert memory.gathered == (gathered["gathered"] if case.data > 1 else 0)
        assert memory.borrowed_weights == gathered["borrowed"]
        assert memory.gradient_shard == rank["gradient_shard"]
        assert memory.reduce_bucket == rank["bucket"]
        assert not rank["shares_master"]
        assert memory.receive_buffers == rank["receive_buffers"]
        # Scalars, masks and the like are not in the model.
        peaks = rank["peaks"]
        assert (memory.in_micro_batches - memory.at_rest) / peaks["in_micro_batches"] == pytest.approx(1, abs=0.02)
        # A tie's message is counted, but gone in time unless the network is slow.
        assert 0.98 < (memory.in_reduction - memory.at_rest) / peaks["in_reduction"] < 1.15

        message = rank_communication(
            layout,
            config=case.run_config(),
            deepspeed_config=settings,
            targets=[MicroBatchTargets(total=total, widest=widest) for total, widest in rank["targets"]],
            **place,
        )
        kinds = [*FUNCTIONS.values(), "tensor_halves", "pipeline_activations", "pipeline_gradients"]
        predicted = {kind: getattr(message, kind) for kind in kinds}
        assert predicted == {kind: rank["counts"].get(kind, 0) for kind in kinds}


@pytest.mark.parametrize("documents", [False, True], ids=["one-text", "documents"])
def test_measured_activations_are_what_autograd_saves(documents: bool) -> None:
    config, batch, length = Case().model_config(), 2, LENGTH
    layers = range(1, 3)
    model = local_model(MaskedLMNetwork(config=config), layers=layers, tensor_parallel_size=2, dtype=torch.bfloat16)
    hidden = torch.empty(batch, length, config.hidden_size, dtype=torch.bfloat16, device="meta", requires_grad=True)
    saved: dict[int, torch.Tensor] = {}
    known = {tensor.untyped_storage()._cdata for tensor in (hidden, *model.parameters())}

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        output = model.forward_stage(
            hidden,
            input_ids=None,
            attention_mask=torch.empty(batch, length, dtype=torch.int64, device="meta"),
            labels=torch.zeros(batch, length, dtype=torch.int64),
            document_ids=torch.empty(batch, length, dtype=torch.int64, device="meta") if documents else None,
            layers=layers,
            dropout_key=1,
        )
    remember(output)
    found = sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in known)
    measured = stage_activations(
        MaskedLMNetwork(config=config),
        StageCase(
            layers=layers,
            tensor_parallel_size=2,
            batch_shape=(batch, length),
            targets_per_sequence=4,
            dtype=torch.bfloat16,
            recompute="none",
            document_boundaries=documents,
        ),
    )
    # Of documents the segments are kept by reference, int64 [B, S].
    found += 8 * batch * length if documents else 0
    # The comparison labels > 0, bool [B, S], is alive at the end of the forward pass as well.
    assert found <= measured.saved <= found + batch * length


def measure(layers: range, *, recompute: str = "none", tensor_parallel_size: int = 1) -> tuple[int, int, int]:
    found = stage_activations(
        MaskedLMNetwork(config=Case().model_config()),
        StageCase(
            layers=layers,
            tensor_parallel_size=tensor_parallel_size,
            batch_shape=(2, LENGTH),
            targets_per_sequence=4,
            dtype=torch.float32,
            recompute=recompute,
        ),
    )
    return found.saved, found.logits, found.working


def test_activations_grow_by_layer_and_shrink_by_recomputation_and_split() -> None:
    one, two, three = (measure(range(1, stop))[0] for stop in (2, 3, 4))
    assert three - two == two - one > 0
    hidden = 2 * LENGTH * 32 * 4
    full = [measure(range(1, stop), recompute="full")[0] for stop in (2, 3, 4)]
    assert full[2] - full[1] == full[1] - full[0] == hidden, "one hidden state per layer"
    assert full[1] < measure(range(1, 3), recompute="selective")[0] < two
    assert measure(range(1, 3), recompute="full")[2] > measure(range(1, 3))[2], "recomputing a layer takes room"
    assert two / 2 < measure(range(1, 3), tensor_parallel_size=2)[0] < two
    assert measure(range(1, 3))[1] == 0
    assert measure(range(3, 5))[1] > 8 * 203 * 4, "8 targets, float32"


@pytest.mark.parametrize("micro_batches", [2, 4, 6, 8, 12])
@pytest.mark.parametrize(("ranks", "loops"), [(2, 2), (4, 2), (2, 3)])
def test_interleaved_schedule_is_torchs(ranks: int, loops: int, micro_batches: int) -> None:
    rounds = max(1, micro_batches // ranks)
    if micro_batches % rounds:
        pytest.skip("torch refuses it")
    schedule = object.__new__(schedules.ScheduleInterleaved1F1B)
    schedule.pp_group_size, schedule.n_local_stages = ranks, loops
    schedule._n_microbatches, schedule.microbatches_per_round = micro_batches, micro_batches // rounds
    for rank in range(ranks):
        counts, moments = [0] * loops, []
        for action in schedule._calculate_single_rank_operations(rank):
            if action is None:
                continue
            is_forward, stage = action.computation_type == schedules.FORWARD, action.stage_index // ranks
            counts[stage] += is_forward
            moments.append((tuple(counts), stage))
            counts[stage] -= not is_forward
        assert counts == [0] * loops
        assert moments == micro_batches_in_flight(
            "interleaved_1f1b",
            pipeline_rank=rank,
            pipeline_parallel_size=ranks,
            stages_per_rank=loops,
            num_micro_batches=micro_batches,
        )


@pytest.mark.parametrize(
    ("schedule", "micro_batches", "expected"),
    [
        ("1f1b", 8, [4, 3, 2, 1]),
        ("1f1b", 4, [4, 3, 2, 1]),
        ("1f1b", 3, [3, 3, 3, 3]),  # too few to reach the steady state: run as GPipe
        ("gpipe", 8, [8, 8, 8, 8]),
    ],
)
def test_micro_batches_in_flight(schedule: str, micro_batches: int, expected: list[int]) -> None:
    found = [
        micro_batches_in_flight(
            schedule, pipeline_rank=rank, pipeline_parallel_size=4, stages_per_rank=1, num_micro_batches=micro_batches
        )
        for rank in range(4)
    ]
    assert found == [[((count,), 0)] for count in expected]
