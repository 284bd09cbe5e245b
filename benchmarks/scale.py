"""Communication of one optimizer step, counted, beside the formula and beside DeepSpeed's own ZeRO-3 engine.

Every layout of the processes runs a small model with every number of micro-batches; what each rank hands to its
process groups is counted below DeepSpeed and below the pipeline schedule, and must equal what the dry run predicts for
that rank, byte for byte and kind by kind. Peer: DeepSpeed's ZeRO-3 engine around the same plain model, data parallel,
which gathers and reduces in every micro-batch. Gloo on the CPU; nothing is timed.
"""

import argparse
import itertools
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deberta_dist.errors import ConfigError
from deberta_dist.operations.measure import BenchmarkError, machine
from deberta_dist.operations.ranks import start_ranks, store_settings

if TYPE_CHECKING:  # torch is loaded where it is needed
    from benchmarks.scale_rank import TrafficCase

SIZES = (1, 2, 4, 8)
KINDS = (
    "zero_gather",
    "zero_reduce",
    "tie_broadcast",
    "tie_reduce",
    "tensor",
    "pipeline_activations",
    "pipeline_gradients",
    "scalars",
)
# Title -> size of the model that DeepSpeed's windows are scaled to (see ``scale_rank.count_deepspeed``).
PEERS = {"windows hold the model": None, "windows as beside 1.5e9 parameters": 1.5e9}
COLUMNS = {
    "weights": ("zero_gather",),
    "gradients": ("zero_reduce",),
    "ties": ("tie_broadcast", "tie_reduce"),
    "tensor": ("tensor",),
    "pipeline": ("pipeline_activations", "pipeline_gradients"),
    "scalars": ("scalars",),
    "DeepSpeed's norms": ("deepspeed_norms",),
}
MAX_LOSS_ERROR = 1e-5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this verb."""
    parser.add_argument("--processes", type=int, choices=SIZES[1:], default=8, help="how many (default: 8)")
    help_text = "tensor x pipeline x data: 2x2x2,1x1x8 (default: all); 2x2x2+sp is sequence parallel"
    parser.add_argument("--layouts", metavar="TxPxD,...", help=help_text)
    parser.add_argument("--micro-batches", default="1,2,4,8,16", metavar="M,...", help="default: 1,2,4,8,16")
    parser.add_argument("--timeout", type=float, default=3600, metavar="SECONDS", help="for everything (default: 3600)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Counts, compares, prints a table and returns the counts as JSON.

    Raises:
        ConfigError: a layout or number of micro-batches that there is not.
        BenchmarkError: a rank failed or hung, a count is not what the formula says, or the peer's loss is not ours.
    """
    layouts = parse_layouts(arguments.layouts, processes=arguments.processes)
    micro_batches = parse_micro_batches(arguments.micro_batches)
    from benchmarks.scale_rank import TrafficCase, model_config

    cases = [
        TrafficCase(*sizes, count, sequence_parallel=is_sequence) for *sizes, is_sequence in layouts for count in micro_batches
    ]
    data_parallel = [TrafficCase(1, 1, arguments.processes, count) for count in micro_batches]
    peers = [(title, case) for title in PEERS for case in data_parallel]
    found = count_all(cases, peers, processes=arguments.processes, timeout=arguments.timeout)

    counted = [[rank["bytes_by_kind"] for rank in ranks] for ranks in found["ours"]]
    check_losses(cases, found["ours"], [case for _, case in peers], found["deepspeed"])
    rows = [_row(case.layout, case, ranks) for case, ranks in zip(cases, counted, strict=True)]
    peer_rows = [
        _row(f"DeepSpeed, {title}", case, [rank["bytes_by_kind"] for rank in ranks])
        for (title, case), ranks in zip(peers, found["deepspeed"], strict=True)
    ]
    config = model_config()
    title = f"tiny model, {config.num_hidden_layers} layers, hidden size {config.hidden_size}, float32"
    print(f"{title}: bytes per optimizer step, all {arguments.processes} ranks together; tensor x pipeline x data")
    print(describe([*rows, *peer_rows]))
    print(f"  counted = formula to the byte: {len(cases)} cases, {arguments.processes} ranks, {len(KINDS)} kinds")
    return {"machine": machine(), "model": title, "rows": rows, "deepspeed": peer_rows}


def parse_layouts(text: str | None, *, processes: int) -> list[tuple[int, int, int, bool]]:
    """(tensor, pipeline, data) sizes and whether sequence parallel; without text all that make ``processes``, and not.

    Raises:
        ConfigError: not three sizes whose product is ``processes``.
    """
    layouts = [
        (tensor, pipeline, data, False)
        for data in SIZES
        for pipeline in SIZES
        for tensor in SIZES
        if tensor * pipeline * data == processes
    ]
    if text is None:
        return layouts
    by_name = {"x".join(map(str, sizes)): (*sizes, False) for *sizes, _ in layouts}
    there_are = ", ".join(by_name)
    by_name |= {f"{name}+sp": (*sizes, True) for name, (*sizes, _) in by_name.items() if sizes[0] > 1}
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in by_name:
            raise ConfigError(
                f"--layouts: {name!r} is no layout of --processes {processes}; there are {there_are}, with +sp "
                "behind one of several tensor ranks for sequence parallelism"
            )
    return [by_name[name] for name in names]


def parse_micro_batches(text: str) -> list[int]:
    """Numbers of micro-batches, ascending.

    Raises:
        ConfigError: not positive integers.
    """
    words = text.split(",")
    if not all(word.isascii() and word.isdigit() and int(word) > 0 for word in words):
        raise ConfigError(f"--micro-batches {text!r}: expected positive integers with commas between them, e.g. 1,2,4")
    return sorted({int(word) for word in words})


def formula(case: "TrafficCase") -> list[dict[str, int]]:
    """Bytes by kind of every rank, as the dry run has them."""
    from benchmarks.scale_rank import layout_of, run_config
    from deberta_dist.planning.communication import rank_communication
    from deberta_dist.training.build import mesh_shape

    config, layout = run_config(case), layout_of(case)
    shape = mesh_shape(config)
    ranks = []
    for rank in range(shape.world_size):
        here = shape.mesh_rank(rank)
        found = rank_communication(
            layout,
            config=config,
            deepspeed_config=store_settings(case.data),
            pipeline_rank=here.pipeline,
            tensor_rank=here.tensor,
        )
        ranks.append({kind: getattr(found, kind) for kind in KINDS})
    return ranks


def check(case: "TrafficCase", *, counted: Sequence[Mapping[str, int]], expected: Sequence[Mapping[str, int]]) -> None:
    """Compares all ranks of a case, kind by kind; a kind that the formula does not know counts as 0 of it.

    Raises:
        BenchmarkError: the first difference.
    """
    from benchmarks.traffic import NORMS

    for rank, (found, wanted) in enumerate(zip(counted, expected, strict=True)):
        for kind in sorted({*found, *wanted} - {NORMS}):
            if found.get(kind, 0) != wanted.get(kind, 0):
                raise BenchmarkError(
                    f"{case.layout} with {case.micro_batches} micro-batches, rank {rank}, {kind}: counted "
                    f"{found.get(kind, 0):,} bytes, planning/communication.py says {wanted.get(kind, 0):,}"
                )


def check_losses(
    cases: Sequence["TrafficCase"],
    ours: Sequence[Sequence[Mapping[str, Any]]],
    peer_cases: Sequence["TrafficCase"],
    peers: Sequence[Sequence[Mapping[str, Any]]],
) -> None:
    """The peer trains the same model on the same tokens: equal losses of the first step wherever there is one of ours.

    Raises:
        BenchmarkError: they differ.
    """
    losses = {case: ranks[0]["first_loss"] for case, ranks in zip(cases, ours, strict=True)}
    for case, ranks in zip(peer_cases, peers, strict=True):
        loss = sum(rank["first_loss"] for rank in ranks) / len(ranks)
        if case in losses and abs(loss / losses[case] - 1) > MAX_LOSS_ERROR:
            raise BenchmarkError(
                f"{case.micro_batches} micro-batches: DeepSpeed's engine has the loss {loss}, ours is {losses[case]}; "
                "the two do not run the same model"
            )


def count_all(
    cases: Sequence["TrafficCase"], peers: Sequence[tuple[str, "TrafficCase"]], *, processes: int, timeout: float
) -> dict[str, list[list[dict[str, Any]]]]:
    """Runs everything and checks each layout when it is counted; returns [case][rank] for ``ours`` and ``deepspeed``.

    Every layout has processes of its own: the groups of a process stay until it ends, each with threads that poll, and
    those of ten layouts leave no time for the model.

    Raises:
        BenchmarkError: a rank ended with an error, there was no end in ``timeout`` seconds, or a count is not the
            formula's.
    """
    formulas = {case: formula(case) for case in cases}
    deadline = time.monotonic() + timeout

    def count(name: str, kind: str, plan: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
        print(f"counting {name}", file=sys.stderr, flush=True)
        plans = {"ours": [], "deepspeed": [], kind: plan}
        left = deadline - time.monotonic()
        found = start_ranks("benchmarks.scale_rank", plans, processes=processes, timeout=left)
        return [list(of_case) for of_case in zip(*(rank[kind] for rank in found), strict=True)]

    engines = [{"case": vars(case), "parameters": PEERS[title]} for title, case in peers]
    results = {"ours": [], "deepspeed": count("DeepSpeed", "deepspeed", engines)}
    for layout, group in itertools.groupby(cases, key=lambda case: case.layout):
        of_layout = list(group)
        counted = count(layout, "ours", [vars(case) for case in of_layout])
        for case, ranks in zip(of_layout, counted, strict=True):
            check(case, counted=[rank["bytes_by_kind"] for rank in ranks], expected=formulas[case])
        results["ours"] += counted
    return results


def _row(name: str, case: "TrafficCase", ranks: Iterable[Mapping[str, int]]) -> dict[str, Any]:
    ranks = [dict(rank) for rank in ranks]
    totals: Counter[str] = Counter()
    for rank in ranks:
        totals.update(rank)
    return {"name": name, **vars(case), "bytes": dict(totals), "ranks": ranks}


def describe(rows: Sequence[Mapping[str, Any]]) -> str:
    """One row a line: bytes of all ranks together by kind."""
    width = max(len(row["name"]) for row in rows)
    lines = [f"  {'layout':<{width}}   M" + "".join(f"{column:>18}" for column in COLUMNS)]
    for row in rows:
        cells = [sum(row["bytes"].get(kind, 0) for kind in kinds) for kinds in COLUMNS.values()]
        lines.append(f"  {row['name']:<{width}} {row['micro_batches']:>3}" + "".join(f"{cell:>18,}" for cell in cells))
    return "\n".join(lines)
