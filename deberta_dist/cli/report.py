"""Reports the scores of fine-tuning runs on a benchmark's labelled rows: every run, their spread, their ensemble.

deberta-dist report --predictions runs/superglue/ --data superglue/ --markdown scores.md
deberta-dist report --predictions runs/sift/ --against runs/plain/ --data superglue/
"""

import argparse
from pathlib import Path

from deberta_dist.errors import with_exit_code
from deberta_dist.files.atomic import new_file, refuse_existing
from deberta_dist.tasks.base import Release
from deberta_dist.tasks.registry import DEFAULT
from deberta_dist.tasks.report import make_report


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=f"Report scores of fine-tuning runs on {DEFAULT.name}.")
    parser.add_argument(
        "--predictions",
        type=Path,
        nargs="+",
        required=True,
        metavar="DIR",
        help="run directories, with TASK/val.jsonl or with seed-* folders",
    )
    parser.add_argument("--data", type=Path, required=True, help="official data: a folder, or combined.zip")
    parser.add_argument("--against", type=Path, nargs="+", default=[], metavar="DIR", help="runs of another model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to this new file")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables to this new file")
    return parser.parse_args()


@with_exit_code
def main() -> int:
    """Runs the tool; the exit code is 0, or that of the error printed."""
    arguments = parse_arguments()
    wanted = [path for path in (arguments.json, arguments.markdown) if path is not None]
    for path in wanted:
        refuse_existing(path)
    found = make_report(arguments.predictions, Release(arguments.data, DEFAULT), arguments.against)
    print(found.text())
    for path, content in ((arguments.json, found.json()), (arguments.markdown, found.markdown())):
        if path is not None:
            with new_file(path) as file:
                file.write(content.encode("utf-8"))
    return 0
