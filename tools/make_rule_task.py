#!/usr/bin/env python
"""Makes a task whose answers follow a rule, in the layout of one of inference: does fine-tuning learn anything at all?

    tools/make_rule_task.py --train launchers/demo_text/train.jsonl --heldout launchers/demo_text/valid.jsonl --out DIR

A premise is a stretch of the text; the hypothesis is six successive words of it, in their order (entailment) or in the
reverse order (not_entailment). The words are the same under both labels, so that only their order tells. Rows of val and
test are from the held-out text. Chance is 50%.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

# A checkout works without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deberta_dist.errors import DataError, with_exit_code
from deberta_dist.files.atomic import new_file, refuse_existing
from deberta_dist.preparation.reading.inputs import find_inputs
from deberta_dist.preparation.reading.texts import read_texts
from deberta_dist.tasks.superglue.pairs import RTE

PREMISE_WORDS, HYPOTHESIS_WORDS = 16, 6


def premises_of(texts: Sequence[str]) -> list[list[str]]:
    """Successive stretches of ``PREMISE_WORDS`` words."""
    words = [text.split() for text in texts]
    return [w[i : i + PREMISE_WORDS] for w in words for i in range(0, len(w) - PREMISE_WORDS + 1, PREMISE_WORDS)]


def rows(texts: Sequence[str], *, count: int, draw: random.Random) -> Iterator[dict[str, object]]:
    """``count`` rows, half of them of each label."""
    premises = premises_of(texts)
    if len(premises) < count:
        raise DataError(f"the text has {len(premises)} stretches of {PREMISE_WORDS} words, {count} are needed")
    draw.shuffle(premises)
    for idx, premise in enumerate(premises[:count]):
        start = draw.randrange(PREMISE_WORDS - HYPOTHESIS_WORDS + 1)
        hypothesis = premise[start : start + HYPOTHESIS_WORDS]
        is_in_order = idx % 2 == 0
        yield {
            "premise": " ".join(premise),
            "hypothesis": " ".join(hypothesis if is_in_order else hypothesis[::-1]),
            "label": "entailment" if is_in_order else "not_entailment",
            "idx": idx,
        }


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=f"Make a task whose answers follow a rule, in {RTE.name}'s layout.")
    parser.add_argument("--train", type=Path, required=True, help="text that training rows are made of")
    parser.add_argument("--heldout", type=Path, required=True, help="text that val and test rows are made of")
    parser.add_argument("--out", type=Path, required=True, help=f"folder to make {RTE.name}/ in; nothing is replaced")
    parser.add_argument("--rows", type=int, default=4000, help="training rows; a tenth of it for val, and for test")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


@with_exit_code
def main() -> int:
    """Runs the tool; the exit code is 0, or that of the error printed."""
    arguments = parse_arguments()
    draw = random.Random(arguments.seed)
    few = max(2, arguments.rows // 10)
    if passed_over := find_inputs([arguments.heldout, arguments.train]).passed_over:
        print(f"passed over beside the inputs: {passed_over}")
    heldout = list(rows(list(read_texts([arguments.heldout])), count=2 * few, draw=draw))
    splits = {
        "train": list(rows(list(read_texts([arguments.train])), count=arguments.rows, draw=draw)),
        "val": heldout[:few],
        "test": [{key: value for key, value in row.items() if key != "label"} for row in heldout[few:]],
    }
    paths = {name: arguments.out / RTE.data_file(name) for name in splits}
    for path in paths.values():
        refuse_existing(path)
    for name, some in splits.items():
        with new_file(paths[name]) as file:
            for row in some:
                file.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8"))
        print(f"{paths[name]}: {len(some):,} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
