"""Makes a benchmark's submission from predictions, or validates any submission.

deberta-dist make-submission --predictions runs/superglue/ --data superglue/ --out submission.zip
deberta-dist make-submission --validate theirs.zip --data superglue/
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

from deberta_dist.errors import ConfigError, DataError, encodable, with_exit_code
from deberta_dist.files.atomic import new_file, refuse_existing
from deberta_dist.tasks.assemble import assemble, read_zip, zip_bytes
from deberta_dist.tasks.base import Release, Verdict
from deberta_dist.tasks.predictions import predictions_file
from deberta_dist.tasks.registry import DEFAULT

NOTICE = "NOT_FOR_SUBMISSION.txt"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=f"Make or validate a {DEFAULT.name} submission.")
    parser.add_argument("--data", type=Path, required=True, help="official data: a folder, or combined.zip")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--predictions",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="run directories, with TASK/test.jsonl or with seed-* folders; several runs of a task are averaged",
    )
    what.add_argument("--validate", type=Path, metavar="FILE.zip", help="check this submission and write nothing")
    parser.add_argument("--out", type=Path, help="zip to make; an existing one is refused. A manifest is written beside it")
    parser.add_argument(
        "--partial",
        action="store_true",
        help="make X.partial.zip, marked as not for submission, from the tasks that have predictions",
    )
    return parser.parse_args()


def report(verdict: Verdict, *, what: object) -> None:
    """Prints warnings and errors; raises DataError if there are errors."""
    for warning in verdict.warnings:
        print(f"warning: {warning}")
    for error in verdict.errors:
        print(f"wrong: {error}", file=sys.stderr)
    if verdict.errors:
        raise DataError(f"{what} is not a valid submission: {len(verdict.errors)} errors")


@with_exit_code
def main() -> int:
    """Runs the tool; the exit code is 0, or that of the error printed."""
    arguments = parse_arguments()
    benchmark, submission = DEFAULT, DEFAULT.submission
    assert submission is not None
    names = {task.name: submission.file_name(task) for task in benchmark.tasks.values()}
    release = Release(arguments.data, benchmark)
    if arguments.validate is not None:
        if arguments.out is not None or arguments.partial:
            raise ConfigError("--out and --partial belong to --predictions; --validate makes nothing")
        files, errors = read_zip(arguments.validate, names.values())
        verdict = submission.validate(files, release)
        report(Verdict(errors + verdict.errors, verdict.warnings), what=arguments.validate)
        print(f"{arguments.validate} is a valid submission for {arguments.data}")
        return 0

    if arguments.out is None or arguments.out.suffix != ".zip":
        raise ConfigError("--out is needed, the name of a .zip file to make")
    out = arguments.out.with_suffix(".partial.zip") if arguments.partial else arguments.out
    manifest_path = out.with_suffix(".manifest.json")
    for path in (out, manifest_path):
        refuse_existing(path)

    found = assemble(arguments.predictions, release)
    verdict = submission.validate(found.files, release)
    verdict.warnings += found.warnings
    where = found.directories[0]
    lacking = {
        names[task.name]: encodable(
            f"no {predictions_file(where, task, 'test')}, which is made by: {benchmark.command_for(task)}"
        )
        for task in found.missing
    }
    files = dict(found.files)
    absent = {submission.missing(name): line for name, line in lacking.items()}
    if arguments.partial:
        verdict.errors = [error for error in verdict.errors if error not in absent]
        listed = "".join(f"missing {name}: {line}\n" for name, line in lacking.items())
        files[NOTICE] = f"Made with --partial: a grader would refuse it.\n{listed}".encode()
        print(listed, end="")
    verdict.errors = [f"{error}; {absent[error]}" if error in absent else error for error in verdict.errors]
    report(verdict, what="this")
    content = zip_bytes(files)
    manifest = {
        "zip": {"name": out.name, "sha256": hashlib.sha256(content).hexdigest(), "is_partial": arguments.partial},
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())},
        "missing": {task.name: benchmark.command_for(task) for task in found.missing},
        "warnings": verdict.warnings,
        "tasks": found.sources,
    }
    with new_file(out) as file:
        file.write(content)
    with new_file(manifest_path) as file:
        file.write((json.dumps(manifest, indent=1) + "\n").encode("utf-8"))
    kind = "not for submission" if arguments.partial else "valid"
    print(f"{out}: {len(found.files)} of {len(names)} files, {len(content):,} bytes, {kind}; {manifest_path.name} beside it")
    return 0
