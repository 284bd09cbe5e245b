"""One layer, or its attention, forward and backward, beside a floor and other implementations.

Of the attention (the default) the projections of hidden states and relative table and the attention between them are
measured, with all gradients; the floor does the products of the formula, forward and backward, and nothing else. With
``--part whole`` the floor of the whole layer is the same one with torch's attention and without positions. Values and
gradients are compared first.
For steady times on a CPU set MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from deberta_dist.errors import ConfigError
from deberta_dist.operations.measure import add_attention_argument, add_model_arguments, machine

FUSED, PORTABLE, RECOMPUTED, REFERENCE = "fused", "portable", "portable, recomputed", "reference"
FLOOR, NO_POSITIONS = "products alone", "SDPA without positions"
TOLERANCE = 1e-5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this verb."""
    parser.add_argument("--part", choices=("attention", "whole"), default="attention", help="default: %(default)s")
    add_model_arguments(parser, batch_size=4)
    parser.add_argument("--heads", type=int, default=12, help="attention heads of 64")
    parser.add_argument("--dropout", type=float, default=0.1, help="of probabilities; the table has none")
    add_attention_argument(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compares, times and counts; returns figures as JSON."""
    import torch

    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # On a GPU float32 would be measured without tensor cores.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    run_part = _run_attention if arguments.part == "attention" else _run_whole
    return run_part(arguments, device=device, dtype=dtype)


def _run_attention(arguments: argparse.Namespace, *, device: Any, dtype: Any) -> dict[str, Any]:
    import torch

    from benchmarks import attention_contestants, peers, stopwatch

    case = attention_contestants.AttentionCase(
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
    if (reason := case.no_fused_reason) is None:
        forwards[FUSED] = case.ours("fused")
    elif arguments.attention == FUSED:
        raise ConfigError(f"--attention {FUSED} is not available: {reason}")
    else:
        print(f"{'warning' if device.type == 'cuda' else 'note'}: {FUSED} is not measured: {reason}")
    if peers.has_disentangled_flash():
        forwards[peers.DISENTANGLED_FLASH] = case.disentangled_flash()
    else:
        print("note: disentangled-flash is not measured: pip install 'deberta_dist[peers]'")
    if arguments.official is not None:
        forwards[peers.PUBLISHED] = case.published(arguments.official)
    agreement = _agreement(case, forwards, tolerance=TOLERANCE if dtype == torch.float32 else 0.05)
    forwards[NO_POSITIONS] = case.without_positions()
    contestants = {name: case.contestant(forward) for name, forward in forwards.items()}
    contestants[FLOOR] = stopwatch.TimedPass(case.products_alone())
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
    print("whole layer of the 1.5B model, bfloat16, dropout 0.1, saved per sequence of 512 tokens:")
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


def _run_whole(arguments: argparse.Namespace, *, device: Any, dtype: Any) -> dict[str, Any]:
    import torch

    from benchmarks import peers, stopwatch, whole_layer
    from benchmarks.device_models import attend_by

    layer = whole_layer.WholeLayer(
        heads=arguments.heads,
        shape=(arguments.batch_size, arguments.length),
        dropout=arguments.dropout,
        device=device,
        dtype=dtype,
    )
    attend_by(arguments.attention, layer.ours, layer.config, dtype=dtype, device=device)
    forwards = layer.contestants(arguments.official)
    same = {name: layer.values(forward) for name, forward in forwards.items() if name != whole_layer.NO_POSITIONS}
    tolerance = TOLERANCE if dtype == torch.float32 else 0.05
    agreement = stopwatch.require_agreement(same, oracle=whole_layer.OURS, tolerance=tolerance)
    contestants = {name: layer.contestant(forward) for name, forward in forwards.items()}
    figures = stopwatch.race(contestants, rounds=arguments.rounds, warm_up=2, device=device)
    for name, forward in forwards.items():
        figures[name]["saved_bytes"] = stopwatch.saved_bytes(forward, without=layer.leaves)
    used = stopwatch.settings(device, arguments.threads)
    title = (
        f"a whole layer, forward and backward: {arguments.batch_size} x {arguments.length} tokens, {arguments.heads} heads "
        f"of 64, dropout {arguments.dropout}, {str(dtype).removeprefix('torch.')}, {used['device']}"
    )
    print(stopwatch.describe(title, figures, against=(whole_layer.NO_POSITIONS, peers.HUGGING_FACE, peers.PUBLISHED)))
    return {"machine": machine(), "settings": used, "layer": title, "agreement": agreement, "figures": figures}


def _agreement(case: Any, forwards: dict[str, Callable[[], Any]], *, tolerance: float) -> dict[str, float]:
    """Context and gradients of all contestants without dropout."""
    from benchmarks import stopwatch

    found = {}
    with case.no_dropout():
        for name, forward in forwards.items():
            found[name] = case.values(forward)
    return stopwatch.require_agreement(found, oracle=REFERENCE, tolerance=tolerance)
