"""The attention of one layer, forward and backward, beside its products alone and other implementations.

Measured are the projections of hidden states and relative table and the attention between them, with all gradients. The
floor does the products of the formula, forward and backward, and nothing else. Values and gradients are compared first.
For steady times on a CPU set MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from deberta_dist.benchmark.measure import add_model_arguments, machine

FUSED, PORTABLE, RECOMPUTED, REFERENCE = "fused", "portable", "portable, recomputed", "reference"
FLOOR, NO_POSITIONS = "products alone", "SDPA without positions"
TOLERANCE = 1e-5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this verb."""
    add_model_arguments(parser, batch_size=4)
    parser.add_argument("--heads", type=int, default=12, help="attention heads of 64")
    parser.add_argument("--dropout", type=float, default=0.1, help="of probabilities; the table has none")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compares, times and counts; returns figures as JSON."""
    import torch

    from deberta_dist.benchmark import attention_contestants, peers, stopwatch

    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # On a GPU float32 would be measured without tensor cores.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    case = attention_contestants.Case(
        batch_size=arguments.batch_size,
        length=arguments.length,
        heads=arguments.heads,
        dropout=arguments.dropout,
        device=device,
        dtype=dtype,
    )
    forwards = {
        PORTABLE: case.ours("portable"),
        RECOMPUTED: case.ours("portable", recompute=True),
        REFERENCE: case.ours("reference"),
        peers.HUGGING_FACE: case.hugging_face(),
    }
    if case.has_fused:
        forwards[FUSED] = case.ours("fused")
    if peers.has_disentangled_flash():
        forwards[peers.DISENTANGLED_FLASH] = case.disentangled_flash()
    else:
        print("note: disentangled-flash is not measured: pip install 'deberta_dist[peers]'")
    if arguments.official is not None:
        forwards[peers.PUBLISHED] = case.published(arguments.official)
    agreement = _agreement(case, forwards, tolerance=TOLERANCE if dtype == torch.float32 else 0.05)
    forwards[NO_POSITIONS] = case.without_positions()
    contestants = {name: case.contestant(forward) for name, forward in forwards.items()}
    contestants[FLOOR] = stopwatch.Contestant(case.products_alone())
    figures = stopwatch.race(contestants, rounds=arguments.rounds, warm_up=2, device=device)
    for name, forward in forwards.items():
        figures[name]["saved_bytes"] = stopwatch.saved_bytes(forward, without=case.leaves)
        figures[name]["share_of_floor"] = figures[FLOOR]["seconds"] / figures[name]["seconds"]
    shape = f"{case.batch_size} x {case.length} tokens, {case.heads} heads of 64, dropout {case.dropout}"
    used = stopwatch.settings(device, arguments.threads)
    title = f"attention, forward and backward: {shape}, {str(dtype).removeprefix('torch.')}, {used['device']}"
    against = (FLOOR, peers.HUGGING_FACE, peers.PUBLISHED, peers.DISENTANGLED_FLASH)
    print(stopwatch.describe(title, figures, against=against))
    layers = attention_contestants.layer_saved_bytes(arguments.official)
    print("whole layer of the 1.5B model, bfloat16, dropout 0.1, kept per sequence of 512 tokens:")
    for name, count in layers.items():
        print(f"  {name:<28} {count / 2**20:6.1f} MiB")
    sizes = {k: v for k, v in dataclasses.asdict(case).items() if k not in ("device", "dtype")}
    return {
        "machine": machine(),
        "settings": used,
        "case": {**sizes, "dtype": str(dtype)},
        "agreement": agreement,
        "figures": figures,
        "layer_saved_bytes": layers,
    }


def _agreement(case: Any, forwards: dict[str, Callable[[], Any]], *, tolerance: float) -> dict[str, float]:
    """Context and gradients of all contestants without dropout."""
    from deberta_dist.benchmark import stopwatch

    found = {}
    with case.no_dropout():
        for name, forward in forwards.items():
            found[name] = case.values(forward)
    return stopwatch.require_agreement(found, oracle=REFERENCE, tolerance=tolerance)
