"""Runs pytest twice: with several workers what may share the machine, and by itself what is marked ``serial``.

    python tests/two_parts.py [--workers N] [pytest arguments]

Slow tests are left out unless -m says otherwise. The second part runs whatever the first one found; the exit code is
the first that is not 0, and --junitxml holds both. ``--workers 1`` is one ordinary run of pytest.
"""

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

NOTHING_COLLECTED = 5  # pytest's exit code where it found no test


def parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """This script's own arguments, and pytest's."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--junitxml", "--junit-xml", type=Path)
    parser.add_argument("-m", dest="marks", default="not slow")
    parsed, rest = parser.parse_known_args(words)
    if parsed.workers < 1:
        parser.error(f"--workers {parsed.workers}: expected 1 or more")
    return parsed, rest


def run_pytest(arguments: list[str], *, marks: str, junit: Path | None) -> int:
    command = [sys.executable, "-m", "pytest", "-m", marks, *arguments]
    return subprocess.run(command + ([f"--junitxml={junit}"] if junit else []), check=False).returncode


def combined(codes: list[int]) -> int:
    """The first failure; that one part has no tests is none, unless neither has."""
    if all(code == NOTHING_COLLECTED for code in codes):
        return NOTHING_COLLECTED
    return next((code for code in codes if code not in (0, NOTHING_COLLECTED)), 0)


def merge(parts: list[Path], target: Path) -> None:
    """Writes one file with the suites of all parts that wrote one."""
    suites = ElementTree.Element("testsuites", name="pytest tests")
    for part in parts:
        if part.exists():
            suites.extend(ElementTree.parse(part).getroot())
    ElementTree.ElementTree(suites).write(target, encoding="utf-8", xml_declaration=True)


def main(words: list[str]) -> int:
    own, arguments = parse(words)
    if own.workers == 1:
        return run_pytest(arguments, marks=own.marks, junit=own.junitxml)
    # "-m ''" is everything.
    chosen = f"({own.marks}) and " if own.marks.strip() else ""
    spread = ["-n", str(own.workers), "--dist", "worksteal"]
    with tempfile.TemporaryDirectory() as folder:
        parts = [Path(folder) / "shared.xml", Path(folder) / "serial.xml"]
        junit = parts if own.junitxml else [None, None]
        codes = [
            run_pytest([*spread, *arguments], marks=f"{chosen}not serial", junit=junit[0]),
            run_pytest(arguments, marks=f"{chosen}serial", junit=junit[1]),
        ]
        if own.junitxml:
            merge(parts, own.junitxml)
    return combined(codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
