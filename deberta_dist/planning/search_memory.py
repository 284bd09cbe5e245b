"""Which candidates of a search fit: the dry run's memory, computed as seldom as possible.

Computing a peak takes a second if its activations have not been measured yet. So a candidate is skipped if it cannot fit
because of its weights, of one layer's activations, or of a smaller candidate that did not. Called by ``search.py``.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deberta_dist.config import offload_device, precision
from deberta_dist.parallel.layout import DTYPES
from deberta_dist.planning.activations import StageCase, stage_activations
from deberta_dist.planning.dry_run import rank_reports
from deberta_dist.planning.memory import FLOAT32, micro_batches_in_flight, rank_memory
from deberta_dist.planning.plan import MakeObjective, NetworkPlan, Plan, check_plan
from deberta_dist.planning.step_cost import StepCost


@dataclass(frozen=True)
class RankedLayout:
    """A layout that can run and fits.

    Attributes:
        plan: Passes the checks of a run.
        cost: Seconds of a step, by part.
        peak: Peak bytes on the device, of the fullest rank.
        host: Bytes of the optimizer on the host, of the fullest rank; 0 without offload.
        sent: Bytes that the busiest rank communicates per step, counted as in the dry run.
    """

    plan: Plan
    cost: StepCost
    peak: int
    host: int
    sent: int


class MemorySearch:
    """Finds peaks, and remembers what did not fit: a larger micro-batch of the same will not either.

    Args:
        limit: Bytes.
        make_objective: What the run trains.
    """

    def __init__(self, limit: float, *, make_objective: MakeObjective) -> None:
        self._limit, self._make_objective = limit, make_objective
        self.measured = 0
        self.smallest: int | None = None
        self._too_large: dict[tuple[Any, ...], list[tuple[int, int]]] = {}

    def may_fit(self, plan: Plan) -> bool:
        """Whether nothing is known that forbids it: weights, gradients and optimizer, or a smaller one that was too large."""
        floors = [_floors(plan, rank) for rank in range(len(plan.layout.stages_by_rank))]
        if max(map(max, floors)) > self._limit:
            return False
        size, kept = _room(plan)
        known = [one for key in _keys(plan) for one in self._too_large.get(key, [])]
        if any(size >= other and kept >= other_saved for other, other_saved in known):
            return False
        activations = [_activation_floor(part) for part in plan.networks]
        return max(map(sum, zip(floors[0], activations, strict=True))) <= self._limit

    def find(self, plan: Plan, cost: StepCost, *, world_size: int) -> RankedLayout | None:
        """The plan with its peak, or None if it does not fit."""
        self.measured += 1
        # Before all ranks of all networks, the first rank while the first network runs.
        first, *others = plan.layouts
        place = {"config": plan.config, "deepspeed_config": plan.deepspeed, "pipeline_rank": 0, "tensor_rank": 0}
        peak = rank_memory(first, **place, others=others).peak
        if peak <= self._limit:
            checked = check_plan(plan.config, world_size=world_size, make_objective=self._make_objective)
            # By pipeline rank, one report of each network: they run one after the other, and keep what they own.
            ranks = list(zip(*(rank_reports(checked, number) for number in range(len(checked.layouts))), strict=True))
            peak = max(report.memory.peak for reports in ranks for report in reports)
            if peak <= self._limit:
                hosts = [sum(report.memory.optimizer for report in reports) for reports in ranks]
                sent = max(sum(report.communication.total for report in reports) for reports in ranks)
                host = max(hosts) if _offloads(plan.deepspeed) else 0
                return RankedLayout(plan=checked, cost=cost, peak=peak, host=host, sent=sent)
        self.smallest = peak if self.smallest is None else min(self.smallest, peak)
        self._too_large.setdefault(_keys(plan)[0], []).append(_room(plan))
        return None


def _offloads(deepspeed: Mapping[str, Any]) -> bool:
    return offload_device(deepspeed, "optimizer") != "none"


def _keys(plan: Plan) -> list[tuple[Any, ...]]:
    """Keys of candidates that are never larger: if one does not fit, this one does not. Offload only makes one smaller."""
    parallel = plan.config.parallel
    same = (
        parallel.tensor_parallel_size,
        parallel.pipeline_parallel_size,
        parallel.schedule,
        parallel.stages_per_rank,
        plan.config.training.recompute,
    )
    return [(*same, _offloads(plan.deepspeed)), *([] if _offloads(plan.deepspeed) else [(*same, True)])]


def _room(plan: Plan) -> tuple[int, int]:
    """(sequences in a micro-batch, sequences in flight on all stages of the first rank)."""
    size = plan.config.training.micro_batch_size
    return size, size * max(sum(counts) for counts, _ in _moments(plan))


def _moments(plan: Plan | NetworkPlan) -> list[tuple[tuple[int, ...], int]]:
    """What the first rank keeps, see ``micro_batches_in_flight``."""
    parallel = plan.config.parallel
    return micro_batches_in_flight(
        parallel.schedule,
        pipeline_rank=0,
        pipeline_parallel_size=parallel.pipeline_parallel_size,
        stages_per_rank=parallel.stages_per_rank,
        num_micro_batches=plan.config.training.num_micro_batches,
    )


def _floors(plan: Plan, pipeline_rank: int) -> list[float]:
    """Bytes that a rank holds while each network runs beside activations and buffers, at least."""
    replicas, width = plan.config.parallel.data_parallel_size, DTYPES[precision(plan.deepspeed)].itemsize
    optimizer = 0 if _offloads(plan.deepspeed) else 3 * FLOAT32 + width
    ranks = [layout.rank_weights[pipeline_rank] for layout in plan.layouts]
    at_rest = sum(weights.owned / replicas * (width + optimizer) for weights in ranks)
    gathered = [weights.used if replicas > 1 else weights.used - weights.owned for weights in ranks]
    return [at_rest + size * width + weights.used * FLOAT32 for size, weights in zip(gathered, ranks, strict=True)]


def _activation_floor(part: NetworkPlan) -> float:
    """Bytes that the first pipeline rank keeps for a network's backward passes, at least.

    One layer's, measured with four sequences; with more of them a sequence keeps up to 3% less.
    """
    run = part.config
    case = StageCase(
        layers=range(1, 4),
        tensor_parallel_size=run.parallel.tensor_parallel_size,
        batch_shape=(4, run.data.max_seq_length),
        targets_per_sequence=1,
        dtype=DTYPES[precision(part.deepspeed)],
        recompute=run.training.recompute,
        document_boundaries=run.data.document_boundaries,
    )
    config = dataclasses.replace(part.model_config, num_hidden_layers=6)
    network = dataclasses.replace(part.network, config=config)
    cases = (case, dataclasses.replace(case, layers=range(1, 5)))
    three, four = (stage_activations(network, one).saved for one in cases)
    layers = [len(part.layout.stages[index]) for index in part.layout.stages_by_rank[0]]
    kept = max(sum(n * count for n, count in zip(counts, layers, strict=True)) for counts, _ in _moments(part))
    return 0.95 * (four - three) / 4 * run.training.micro_batch_size * kept
