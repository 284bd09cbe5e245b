"""Shows what a checkpoint is, and how two differ. The exit code is 1 where --diff finds a difference.

tools/inspect_checkpoint.py runs/demo
tools/inspect_checkpoint.py hf/ --diff start/
"""

import argparse
import json
from pathlib import Path

from deberta_dist.errors import DataError, with_exit_code


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    from deberta_dist.conversion.options import add_options

    parser = argparse.ArgumentParser(description="Show what a checkpoint is, and how two differ.")
    parser.add_argument("path", type=Path, metavar="PATH", help="run directory, checkpoint directory or weights file")
    parser.add_argument("--diff", type=Path, metavar="OTHER", help="compare with this checkpoint; formats may differ")
    add_options(parser, dtype_help="compare after rounding to this number format (default: as they are)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args()


@with_exit_code
def main() -> int:
    """Runs the tool; the exit code is 0, 1 for differences, 65 for damage, or that of the error printed."""
    arguments = parse_arguments()
    from deberta_dist.conversion import inspect
    from deberta_dist.conversion.options import options_of

    if arguments.diff is None:
        found = inspect.inspect(arguments.path, options_of(arguments))
        text, code = inspect.describe(found), DataError.exit_code if found["is_damaged"] else 0
    else:
        found = inspect.difference(arguments.path, arguments.diff, options_of(arguments))
        text, code = inspect.describe_difference(found), int(inspect.differs(found))
    print(json.dumps(found, indent=1, allow_nan=False) if arguments.json else text)
    return code
