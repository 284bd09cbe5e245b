"""Conversion beside its floor: copying the same bytes with ``cp`` and hashing them.

Floor: a conversion reads every byte, writes every byte and hashes what it wrote. Everything is in the page cache
before the clock starts, and every contestant writes into the same file system.
"""

import argparse
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from deberta_dist.operations.measure import Sample, describe, interleaved, machine, run_command, summary, warm

TOOL = Path(__file__).resolve().parents[1] / "tools" / "convert_checkpoint.py"
CP_AND_HASH, AND_FSYNC = "cp + SHA-256", "cp + SHA-256 + fsync"
_HASH = "import hashlib,pathlib,sys;[hashlib.file_digest(p.open('rb'),'sha256') for p in pathlib.Path(sys.argv[1]).iterdir()]"
_FORMS = ("deberta_dist", "huggingface", "official")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this verb."""
    parser.add_argument("--preset", default="v2-xxlarge", help="model whose checkpoint is made, with random weights")
    parser.add_argument("--with-run", action="store_true", help="also from a run's checkpoint (three times the bytes)")
    parser.add_argument("--directory", type=Path, help="where to work (default: the system's temporary directory)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Makes the checkpoints, converts them round by round, and returns figures as JSON."""
    with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="benchmark-convert-") as folder:
        home = Path(folder)
        make = [sys.executable, "-m", "benchmarks.random_checkpoints", arguments.preset]
        run_command([*make, str(home / "deberta_dist")])
        # Every form is the source of the next conversion, so each is made once more here.
        for source, target in zip(_FORMS, _FORMS[1:], strict=False):
            _convert(home / source, home / target, to=target)
        sources = {form: home / form for form in _FORMS}
        pairs = [(_FORMS[i], _FORMS[(i + 1) % len(_FORMS)]) for i in range(len(_FORMS))]
        if arguments.with_run:
            # Its moments are not converted, but they are verified: the floor copies and hashes them as well.
            run_command([*make, str(home / "run"), "--run"])
            sources["run"] = next((home / "run" / "checkpoints").glob("step-*"))
            pairs.append(("run", "huggingface"))
        found: dict[str, Any] = {"machine": machine(), "preset": arguments.preset, "conversions": {}}
        for source, target in pairs:
            num_bytes = warm(sources[source])
            samples = interleaved(
                {
                    "convert": partial(_convert, sources[source], home / "target", to=target),
                    CP_AND_HASH: partial(copy_and_hash, sources[source], home / "target", fsync=False),
                    AND_FSYNC: partial(copy_and_hash, sources[source], home / "target", fsync=True),
                },
                rounds=arguments.rounds,
            )
            figures = summary(samples, against=(CP_AND_HASH, AND_FSYNC))
            found["conversions"][f"{source} -> {target}"] = {"bytes": num_bytes, **figures}
            print(describe(f"{source} -> {target}, {num_bytes / 1e9:.2f} GB", figures), flush=True)
    return found


def _convert(source: Path, target: Path, *, to: str) -> Sample:
    sample = run_command([sys.executable, str(TOOL), str(source), str(target), "--to", to])
    if target.name == "target":
        shutil.rmtree(target)
    return sample


def copy_and_hash(source: Path, target: Path, *, fsync: bool) -> Sample:
    """``cp`` of a directory of files, hashed where they arrive, and removed outside of the clock."""
    then = f"&& sync {target}/*" if fsync else ""
    hashing = f'&& {sys.executable} -c "{_HASH}" {target}'
    sample = run_command(["sh", "-c", f"cp -r {source} {target} {then} {hashing}"])
    shutil.rmtree(target)
    return sample
