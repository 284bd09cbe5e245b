"""Which layers each pipeline stage runs: consecutive layers, stages of about equal cost.

Arithmetic only; layouts are made with it. Embeddings and convolution belong to layer 0 (the convolution needs the embeddings'
output beside that of layer 0); the enhanced mask decoder and the head belong to the last layer.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

from deberta_dist.errors import ConfigError


def balance_stages(costs: Sequence[float], *, num_stages: int) -> list[range]:
    """Cuts layers into ``num_stages`` stages so that the most expensive stage is as cheap as possible.

    Exact, by dynamic programming. Of all cuts with that maximum the one with the smallest sum of squared stage costs is
    taken: it evens out the other stages.

    Args:
        costs: Cost of each layer, in any measure (FLOPs per token here).
        num_stages: Number of stages, at least 1.

    Raises:
        ConfigError: more stages than layers.
    """
    num_layers = len(costs)
    if num_stages > num_layers:
        raise ConfigError(
            f"{num_stages} pipeline stages (parallel.pipeline_parallel_size x parallel.stages_per_rank) cannot share "
            f"model.num_hidden_layers = {num_layers} layers: every stage needs at least one"
        )
    total = [0.0, *accumulate(costs)]
    limit = _cut(total, num_stages=num_stages, limit=float("inf"), weigh=max)[0]
    # A second pass over the cuts within that limit: the smallest sum of squares.
    starts = _cut(total, num_stages=num_stages, limit=limit, weigh=lambda so_far, cost: so_far + cost * cost)[1]
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], num_layers], strict=True)]


def _cut(
    total: Sequence[float], *, num_stages: int, limit: float, weigh: Callable[[float, float], float]
) -> tuple[float, list[int]]:
    """The cheapest cut by ``weigh(so far, cost of the next stage)`` with no stage over ``limit``, and where stages start.

    Args:
        total: Sum of the costs before each layer, and of all.
    """
    num_layers = len(total) - 1
    best: list[tuple[float, list[int]] | None] = [(0.0, []), *[None] * num_layers]
    for _ in range(num_stages):
        longer: list[tuple[float, list[int]] | None] = [None] * (num_layers + 1)
        for stop in range(1, num_layers + 1):
            options = [
                (weigh(before[0], total[stop] - total[start]), [*before[1], start])
                for start, before in enumerate(best[:stop])
                if before is not None and total[stop] - total[start] <= limit
            ]
            longer[stop] = min(options, default=None)
        best = longer
    cheapest = best[num_layers]
    assert cheapest is not None, "the limit lets one cut through"
    return cheapest


def explicit_stages(layers_per_stage: Sequence[int], *, num_layers: int, num_stages: int) -> list[range]:
    """Stages from the user's ``parallel.layers_per_stage``.

    Raises:
        ConfigError: the counts are not ``num_stages`` positive numbers that sum to ``num_layers``.
    """
    if len(layers_per_stage) != num_stages or sum(layers_per_stage) != num_layers or min(layers_per_stage) < 1:
        raise ConfigError(
            f"parallel.layers_per_stage = {list(layers_per_stage)} must be {num_stages} positive counts "
            f"(pipeline_parallel_size x stages_per_rank) that sum to model.num_hidden_layers = {num_layers}"
        )
    stops = list(accumulate(layers_per_stage))
    return [range(stop - count, stop) for stop, count in zip(stops, layers_per_stage, strict=True)]


def stages_of_rank(pipeline_rank: int, *, pipeline_parallel_size: int, stages_per_rank: int) -> list[int]:
    """Stage indices that a pipeline rank runs: looped, rank, rank + size, ... (one for non-interleaved schedules)."""
    return [pipeline_rank + loop * pipeline_parallel_size for loop in range(stages_per_rank)]
