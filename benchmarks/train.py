"""Whole optimizer steps of a model on several processes, beside DeepSpeed's own ZeRO-3 engine.

Gather of the weights, micro-batches, reduction of gradients, clipping and AdamW. Contestants: this package in the layout
asked for; DeepSpeed's ZeRO-3 engine around the same plain model; the same engine around Hugging Face's model, which has no
enhanced mask decoder and makes logits of all tokens. All of them live in the same processes, steps are interleaved, and
their losses without dropout are compared first. GPUs where there are any (one process each, bf16), else gloo in float32.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.scale import parse_layouts
from deberta_dist.errors import ConfigError
from deberta_dist.operations.measure import BenchmarkError, add_attention_argument, machine
from deberta_dist.operations.ranks import start_ranks

OURS, SAME_MODEL, HUGGING_FACE = "ours", "deepspeed", "huggingface"
TITLES = {OURS: "ours", SAME_MODEL: "DeepSpeed, same model", HUGGING_FACE: "DeepSpeed, Hugging Face"}
TOLERANCE = {"cpu": 1e-5, "cuda": 1e-2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this verb."""
    parser.add_argument("--preset", default="tiny-v2", help="model, with random weights (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="layers (default: the preset's)")
    parser.add_argument(
        "--layout", metavar="TxPxD", help="tensor x pipeline x data of ours, +sp as in scale (default: all data)"
    )
    parser.add_argument("--processes", type=int, default=2, choices=(1, 2, 4, 8), help="default: %(default)s")
    parser.add_argument("--micro-batch-size", type=int, default=4, help="sequences (default: %(default)s)")
    parser.add_argument("--micro-batches", type=int, default=4, metavar="M", help="of a step (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence (default: %(default)s)")
    parser.add_argument("--recompute", default="none", help="activations that ours computes again")
    parser.add_argument("--compile", action="store_true", help="ours with training.compile")
    add_attention_argument(parser)
    help_text = "ours from other random weights, made on the device: the 1.5B's own take minutes. For ours alone"
    parser.add_argument("--device-weights", action="store_true", help=help_text)
    parser.add_argument("--contestants", default=",".join(TITLES), metavar="NAME,...", help="default: %(default)s")
    parser.add_argument("--timeout", type=float, default=3600, metavar="SECONDS", help="for everything (default: 3600)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compares, times and returns figures as JSON.

    Raises:
        ConfigError: no such layout or contestant.
        BenchmarkError: a rank failed or hung, or the contestants' losses differ.
    """
    import torch

    from deberta_dist.models.attention_dispatch import require_attention
    from deberta_dist.models.presets import preset

    names = _contestants(arguments)
    kind, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    wish = {"dtype": dtype, "device": torch.device(kind), "where": "--attention"}
    require_attention(arguments.attention, preset(arguments.preset), **wish)
    layout_name = arguments.layout or f"1x1x{arguments.processes}"
    [layout] = parse_layouts(layout_name, processes=arguments.processes)
    plan = {
        **{key: value for key, value in vars(arguments).items() if key not in ("json", "verb", "timeout", "layout")},
        "layout": layout,
        "contestants": names,
    }
    ranks = start_ranks(
        "benchmarks.train_rank",
        plan,
        processes=arguments.processes,
        timeout=arguments.timeout,
        uses_gpus=torch.cuda.is_available(),
    )
    figures, first = _figures(ranks, names), ranks[0]
    if OURS in names:
        print(first["attention"])
    _require_equal_losses(figures, tolerance=TOLERANCE[first["device_type"]])
    title = (
        f"optimizer steps of {arguments.preset} with {first['layers']} layers on {arguments.processes} x {first['device']}: "
        f"{first['tokens']:,} tokens in {arguments.micro_batches} micro-batches a rank, {first['dtype']}, ours "
        f"{layout_name}"
    )
    print(title)
    print(_table(figures))
    return {"machine": machine(), "title": title, "figures": figures, "flops_per_token": first["flops_per_token"]}


def _contestants(arguments: argparse.Namespace) -> list[str]:
    names = arguments.contestants.split(",")
    if unknown := set(names) - TITLES.keys():
        raise ConfigError(f"--contestants: {', '.join(sorted(unknown))}; there are {', '.join(TITLES)}")
    if arguments.device_weights and names != [OURS]:
        raise ConfigError(f"--device-weights is for --contestants {OURS}: the others would start from other weights")
    return names


def _figures(ranks: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Contestant -> its figures over all ranks; ``mfu`` only where the device's peak is known."""
    first, figures = ranks[0], {}
    for name in names:
        # A step ends when its last rank does.
        steps = [max(times) for times in zip(*(rank["seconds"][name] for rank in ranks), strict=True)]
        seconds = statistics.median(steps)
        figures[name] = {
            "seconds": seconds,
            "range": [min(steps), max(steps)],
            "loss": sum(rank["losses"][name] for rank in ranks) / len(ranks),
            "peak_bytes": max(rank["peak_bytes"][name] for rank in ranks),
            "tokens_per_second": first["tokens"] / seconds,
        }
        if first["peak_flops"] is not None:
            figures[name]["mfu"] = first["flops_per_token"] * first["tokens"] / seconds / (first["peak_flops"] * len(ranks))
    return figures


def _table(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """One line per contestant, with its speed beside the first one's."""
    names, lines = list(figures), []
    for name, row in figures.items():
        ratio = figures[names[0]]["seconds"] / row["seconds"]
        line = (
            f"  {TITLES[name]:<26}{row['seconds'] * 1e3:10.1f} ms ({row['range'][0] * 1e3:.1f} to {row['range'][1] * 1e3:.1f})"
            f"{row['tokens_per_second']:12,.0f} tokens/s  {ratio:.2f}x the speed of {TITLES[names[0]]}"
        )
        if "mfu" in row:
            line += f"  {row['mfu']:.1%} MFU"
            # Several contestants on one device count each other's memory.
            line += f"  peak {row['peak_bytes'] / 2**30:.1f} GiB" if len(names) == 1 else ""
        lines.append(line)
    return "\n".join(lines)


def _require_equal_losses(figures: dict[str, Any], *, tolerance: float) -> None:
    losses = {name: figures[name]["loss"] for name in (OURS, SAME_MODEL) if name in figures}
    if len(losses) == 2 and abs(losses[OURS] / losses[SAME_MODEL] - 1) > tolerance:
        raise BenchmarkError(f"the same model has the losses {losses}: the contestants do not do the same")
