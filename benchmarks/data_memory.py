"""Memory of a process that draws batches from a large token file, beside a small one.

Both files are sparse: a right header and document index around ids that are a hole, which reads as zeros ([PAD], so
there is nothing to mask in them). Each contestant is a process of its own (``draw_batches.py``). The third touches the
same samples through the mapping, to show what reading spares: such pages can be reclaimed, but count as resident until
they are.
"""

import argparse
import json
import statistics
import struct
import sys
from pathlib import Path
from typing import Any

from benchmarks.data_inputs import DataInputs
from deberta_dist.data.token_corpus import open_corpus
from deberta_dist.data.token_file import FIXED, PAYLOAD_START, pack_header
from deberta_dist.operations.measure import Contestant, Sample, interleaved, run_command

SMALL, LARGE, MAPPED = "read, small file", "read, large file", "mapped, large file"
SMALL_BYTES = 100_000_000


def add_arguments(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Flags of this part."""
    parser.add_argument("--gigabytes", type=float, default=10.0, help="size of the large token file (default: 10)")
    parser.add_argument("--batches", type=int, default=2000, help="batches of 32 samples (default: 2000)")


def run(arguments: argparse.Namespace, inputs: DataInputs) -> dict[str, Any]:
    """Makes the files, draws batches from each round by round, and returns figures as JSON.

    Raises:
        BenchmarkError: a process failed.
    """
    large_bytes = int(arguments.gigabytes * 1e9)
    small, large = inputs.directory / "small.tokens", inputs.directory / "large.tokens"
    like = next(open_corpus(inputs.tokens).files()).path
    for path, num_bytes in ((small, SMALL_BYTES), (large, large_bytes)):
        write_sparse(path, like=like, num_bytes=num_bytes)
    reports: dict[str, list[dict[str, Any]]] = {SMALL: [], LARGE: [], MAPPED: []}

    def contestant(name: str, path: Path, *flags: str) -> Contestant:
        report = inputs.directory / "report.json"
        module = [sys.executable, "-m", "benchmarks.draw_batches"]

        def draw() -> Sample:
            files = [str(inputs.tokenizer), str(path), str(report)]
            sample = run_command([*module, *files, "--batches", str(arguments.batches), *flags])
            reports[name].append(json.loads(report.read_text(encoding="utf-8")))
            return sample

        return draw

    interleaved(
        {
            SMALL: contestant(SMALL, small),
            LARGE: contestant(LARGE, large),
            MAPPED: contestant(MAPPED, large, "--mapped"),
        },
        rounds=arguments.rounds,
    )
    found = {
        name: {
            "bytes": (small if name == SMALL else large).stat().st_size,
            "open_seconds": statistics.median(row["open_seconds"] for row in rows),
            "draw_seconds": statistics.median(row["draw_seconds"] for row in rows),
            "peak_resident": max(row["after"]["peak_resident"] for row in rows),
            "rounds": rows,
        }
        for name, rows in reports.items()
    }
    difference = found[LARGE]["peak_resident"] - found[SMALL]["peak_resident"]
    print(_describe(found, batches=arguments.batches, difference=difference), flush=True)
    return {"batches": arguments.batches, "contestants": found, "large_minus_small_bytes": difference}


def write_sparse(path: Path, *, like: Path, num_bytes: int) -> None:
    """A token file of one document whose ids are a hole in the file.

    Args:
        path: Where the token file is written.
        like: Token file whose header is copied, except for the numbers. The checksum, which only ``verify`` reads, does not
            fit.
        num_bytes: Approximate bytes of the ids.
    """
    with open(like, "rb") as file:
        _, _, length, _ = FIXED.unpack(file.read(FIXED.size))
        header = json.loads(file.read(length))
    item_bytes = 2 if header["dtype"] == "uint16" else 4
    num_tokens = num_bytes // 8 * 8 // item_bytes  # what follows the ids is aligned to 8 bytes
    header |= {"num_tokens": num_tokens, "num_documents": 1, "max_token_id": 0}
    with open(path, "wb") as file:
        file.write(pack_header(header))
        file.seek(PAYLOAD_START + num_tokens * item_bytes)
        file.write(struct.pack("<2q", 0, num_tokens))


def _describe(found: dict[str, dict[str, Any]], *, batches: int, difference: int) -> str:
    """One contestant a line, and the difference that matters."""
    lines = [f"memory after {batches:,} batches of 32 samples at random places"]
    for name, row in found.items():
        after = row["rounds"][-1]["after"]
        lines.append(
            f"  {name:<18} {row['bytes'] / 1e9:6.2f} GB  open {row['open_seconds'] * 1e3:6.1f} ms  "
            f"draw {row['draw_seconds']:5.2f} s  peak {row['peak_resident'] / 2**20:7.1f} MiB; last: "
            f"resident {after['resident'] / 2**20:.1f}, "
            f"anonymous {after['anonymous'] / 2**20:.1f}, of the file {after['mapped'] / 2**20:.1f} MiB"
        )
    lines.append(f"  peak of the large file's process less the small one's: {difference / 2**20:+.1f} MiB")
    return "\n".join(lines)
