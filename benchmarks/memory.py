"""Activation memory with each kind of recomputation: what the dry run predicts beside what a stage holds.

Of each layout the first, a middle and the last stage of one tensor-parallel rank run one micro-batch forward and
backward, alone in this process. On a CPU the bytes of live storages are counted, with attention in chunks as large as
a GPU's, which the prediction is for; on a GPU it is the allocator's peak. The parameters and their gradients are there
before. Peers: what whole layers of the 1.5B model keep for the backward pass.
"""

import argparse
import re
from collections.abc import Sequence
from typing import Any

from deberta_dist.errors import ConfigError
from deberta_dist.operations.measure import add_model_arguments, machine

LAYOUTS = "v3-xsmall:1x2,v2-xxlarge:8x24"
MODES = ("none", "selective", "full")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this verb."""
    parser.add_argument(
        "--layouts", default=LAYOUTS, metavar="PRESET:TxP,...", help=f"model, tensor x pipeline (default: {LAYOUTS})"
    )
    add_model_arguments(parser, batch_size=2)
    parser.set_defaults(length=256)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Predicts and measures; returns figures as JSON.

    Raises:
        ConfigError: a layout that there is not.
    """
    layouts = parse_layouts(arguments.layouts)
    import torch

    from benchmarks import attention_contestants, stage_memory, stopwatch

    torch.set_num_threads(arguments.threads)
    # First, so that a path that is not a checkout is refused at once.
    saved = attention_contestants.layer_saved_bytes(arguments.official)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = (arguments.batch_size, arguments.length)
    kind = str(dtype).removeprefix("torch.")
    print(f"activations of a micro-batch of {shape[0]} x {shape[1]} tokens, {kind}, on {device.type}, MiB")
    print(f"{'':45}saved for backward{'':15}peak")
    print(f"  {'layout':<20} {'layers':<10} {'recompute':<10}" + 2 * "   predicted   measured    diff.")
    rows = []
    for preset_name, tensor, pipeline in layouts:
        for stage in stage_memory.stages(preset_name, tensor=tensor, pipeline=pipeline, shape=shape):
            for mode in MODES:
                found = stage_memory.compare(stage, shape=shape, recompute=mode, device=device, dtype=dtype)
                name, layers = f"{preset_name}:{tensor}x{pipeline}", f"{stage.layers.start}..{stage.layers.stop - 1}"
                rows.append({"layout": name, "layers": layers, "recompute": mode, **found})
                print(_line(rows[-1]), flush=True)
    print(f"  largest difference {max(_differences(rows)):.1%}")
    print("whole layer of the 1.5B model, bfloat16, dropout 0.1, saved per sequence of 512 tokens:")
    for name, count in saved.items():
        print(f"  {name:<30} {count / 2**20:6.1f} MiB")
    return {
        "machine": machine(),
        "settings": stopwatch.settings(device, arguments.threads),
        "shape": shape,
        "dtype": kind,
        "stages": rows,
        "layer_saved_bytes": saved,
    }


def parse_layouts(text: str) -> Sequence[tuple[str, int, int]]:
    """(preset, tensor-parallel size, pipeline-parallel size) of each.

    Raises:
        ConfigError: it is written otherwise.
    """
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"([\w.-]+):([1-9]\d*)x([1-9]\d*)", part)
        if match is None:
            raise ConfigError(f"--layouts: {part!r} is no layout; expected PRESET:TENSORxPIPELINE, such as v3-base:2x2")
        found.append((match[1], int(match[2]), int(match[3])))
    return found


def _line(row: dict[str, Any]) -> str:
    figures = "".join(
        f"  {row[f'predicted_{name}_bytes'] / 2**20:10.1f} {row[f'{name}_bytes'] / 2**20:10.1f} "
        f"{row[f'{name}_difference']:+7.1%}"
        for name in ("kept", "peak")
    )
    return f"  {row['layout']:<20} {row['layers']:<10} {row['recompute']:<10}{figures}"


def _differences(rows: Sequence[dict[str, Any]]) -> list[float]:
    return [abs(row[f"{name}_difference"]) for row in rows for name in ("kept", "peak")]
