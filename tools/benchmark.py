#!/usr/bin/env python
"""Measures speed, memory and communication beside a floor or a peer: interleaved rounds, medians, ratios, counts.

tools/benchmark.py convert --rounds 3 --json convert.json
tools/benchmark.py sift --rounds 5
tools/benchmark.py data --part masking --json data.json
tools/benchmark.py layer --rounds 7 --official ~/DeBERTa-checkout
tools/benchmark.py memory --layouts v3-xsmall:1x2
tools/benchmark.py save --preset v3-small --rounds 5
tools/benchmark.py step --layers 4 --rounds 5
tools/benchmark.py train --processes 2 --rounds 5
tools/benchmark.py head --rounds 7
tools/benchmark.py pipeline --micro-batches 4,16
tools/benchmark.py scale --layouts 2x2x2,1x1x8 --micro-batches 1,16
tools/benchmark.py layouts --rounds 3 --calibration this_machine.json
"""

import argparse
import json
import sys
from pathlib import Path

# A checkout works without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import convert, data, head, layer, layouts, memory, pipeline, save, scale, sift, step, train
from deberta_dist.errors import with_exit_code

VERBS = {
    "convert": convert,
    "data": data,
    "head": head,
    "layer": layer,
    "layouts": layouts,
    "memory": memory,
    "pipeline": pipeline,
    "save": save,
    "scale": scale,
    "sift": sift,
    "step": step,
    "train": train,
}
COUNTED = ("memory", "scale")
"""Verbs that are exact the first time and have no rounds."""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure speed, memory and communication beside a floor or a peer.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, module in VERBS.items():
        summary, _, details = module.__doc__.partition("\n\n")
        verb = verbs.add_parser(name, help=summary, description=f"{summary} {details}")
        if name not in COUNTED:
            verb.add_argument("--rounds", type=int, default=3, help="times that every contestant runs (default: 3)")
        verb.add_argument("--json", type=Path, metavar="FILE", help="write all figures here; replaced if it is there")
        module.add_arguments(verb)
    return parser.parse_args()


@with_exit_code
def main() -> int:
    """Runs the tool; the exit code is 0, or that of the error printed."""
    arguments = parse_arguments()
    found = VERBS[arguments.verb].run(arguments)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
