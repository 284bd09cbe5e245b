"""Corpus preparation beside raw sentencepiece on the same text and cores, and what 160 GB of text cost.

Ours is the whole command, from the start of the interpreter to the report: reading JSON, cleaning, encoding, hashing,
exact duplicates, the held-out split, token files on disk. The peer (``raw_encoding.py``) is timed for its encoding alone.
"""

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.data_inputs import DataInputs
from deberta_dist.files.disk import num_usable_cores
from deberta_dist.operations.measure import BenchmarkError, Contestant, Sample, interleaved, run_command, summary

RAW, OURS = "raw sentencepiece", "prepare_corpus.py"
CORPUS_BYTES = 160e9  # of the paper
DOCUMENT_CHARACTERS = 4000


def add_arguments(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Flags of this part."""
    parser.add_argument("--megabytes", type=float, default=100.0, help="text to prepare, made here (default: 100)")
    parser.add_argument("--cores", type=int, help="the larger number of workers and threads (default: all cores)")


def run(arguments: argparse.Namespace, inputs: DataInputs) -> dict[str, Any]:
    """Makes the text, prepares and encodes it round by round with one core and with several; returns figures as JSON.

    Raises:
        BenchmarkError: a process failed, or the two disagree on the number of tokens.
    """
    cores = arguments.cores or num_usable_cores()
    text = inputs.directory / "text.jsonl"
    num_bytes = write_text(text, source=inputs.text, num_bytes=int(arguments.megabytes * 1e6))
    tokens: dict[str, int] = {}
    counts = sorted({1, cores})
    contestants: dict[str, Contestant] = {}
    for count in counts:
        contestants[_name(RAW, count)] = _raw(inputs, text, threads=count, tokens=tokens)
        contestants[_name(OURS, count)] = _ours(inputs, text, workers=count, tokens=tokens)
    samples = interleaved(contestants, rounds=arguments.rounds)
    if len(set(tokens.values())) != 1:
        raise BenchmarkError(f"the contestants make other numbers of tokens of the same text: {tokens}")
    found = summary(samples)
    for name, rounds in samples.items():
        found[name]["bytes_per_second"] = num_bytes / statistics.median(sample.wall_seconds for sample in rounds)
        found[name]["bytes_per_cpu_second"] = num_bytes / statistics.median(sample.cpu_seconds for sample in rounds)
    figures = {
        "bytes": num_bytes,
        "tokens": next(iter(tokens.values())),
        "contestants": found,
        "share_of_raw": {count: _ratio(found, _name(OURS, count), _name(RAW, count)) for count in counts},
        "share_of_raw_by_cpu_time": {
            count: _ratio(found, _name(OURS, count), _name(RAW, count), rate="bytes_per_cpu_second") for count in counts
        },
        "scaling": {name: _ratio(found, _name(name, counts[-1]), _name(name, 1)) for name in (RAW, OURS)},
        "core_hours_of_160_gb": {
            count: count * CORPUS_BYTES / found[_name(OURS, count)]["bytes_per_second"] / 3600 for count in counts
        },
    }
    print(_describe(figures, counts=counts), flush=True)
    return figures


def write_text(path: Path, *, source: Path, num_bytes: int) -> int:
    """A .jsonl file of documents of about 4,000 characters, no two of them equal.

    Args:
        path: Where the .jsonl file is written.
        source: .jsonl file whose documents are cut at line ends, and repeated with another first line.
        num_bytes: Least bytes of text.

    Returns:
        Bytes of text written, without JSON's own.
    """
    documents: list[str] = []
    with open(source, encoding="utf-8") as file:
        for line in file:
            kept: list[str] = []
            for part in json.loads(line)["text"].splitlines(keepends=True):
                kept.append(part)
                if sum(map(len, kept)) >= DOCUMENT_CHARACTERS:
                    documents.append("".join(kept))
                    kept = []
            if kept:
                documents.append("".join(kept))
    written = copy = 0
    with open(path, "w", encoding="utf-8") as file:
        while written < num_bytes:
            for document in documents:
                text = f"Copy {copy}\n{document}"
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                written += len(text.encode("utf-8"))
            copy += 1
    return written


def _name(contestant: str, count: int) -> str:
    return f"{contestant}, {count} core{'s' if count > 1 else ''}"


def _raw(inputs: DataInputs, text: Path, *, threads: int, tokens: dict[str, int]) -> Contestant:
    report = inputs.directory / "raw.json"
    module = [sys.executable, "-m", "benchmarks.raw_encoding"]

    def contestant() -> Sample:
        whole = run_command([*module, *map(str, (inputs.tokenizer, text, report)), "--threads", str(threads)])
        found = json.loads(report.read_text(encoding="utf-8"))
        tokens[_name(RAW, threads)] = found["tokens"]
        return Sample(found["wall_seconds"], found["cpu_seconds"], whole.peak_bytes)

    return contestant


def _ours(inputs: DataInputs, text: Path, *, workers: int, tokens: dict[str, int]) -> Contestant:
    output = inputs.directory / "prepared"
    tool = [sys.executable, str(ROOT / "tools" / "prepare_corpus.py"), "--workers", str(workers)]

    def contestant() -> Sample:
        sample = run_command([*tool, "--input", str(text), "--output", str(output), "--tokenizer", str(inputs.tokenizer)])
        total = json.loads((output / "report.json").read_text(encoding="utf-8"))["total"]
        if total["dropped"]:
            raise BenchmarkError(f"documents were left out of the measured text: {total['dropped']}")
        tokens[_name(OURS, workers)] = total["train"]["tokens"] + total["heldout"]["tokens"]
        shutil.rmtree(output)
        return sample

    return contestant


def _ratio(found: dict[str, dict[str, Any]], one: str, other: str, *, rate: str = "bytes_per_second") -> float:
    return found[one][rate] / found[other][rate]


def _describe(figures: dict[str, Any], *, counts: list[int]) -> str:
    lines = [f"preparation of {figures['bytes'] / 1e6:,.0f} MB of text ({figures['tokens']:,} tokens), wall time"]
    for name, row in figures["contestants"].items():
        low, high = row["wall_seconds_range"]
        lines.append(
            f"  {name:<28} {row['wall_seconds']:7.2f} s ({low:.2f} to {high:.2f})  {row['bytes_per_second'] / 1e6:6.1f} MB/s  "
            f"peak {row['peak_bytes'] / 2**20:,.0f} MiB"
        )
    for count in counts:
        lines.append(
            f"  with {count}: {100 * figures['share_of_raw'][count]:.0f}% of raw by the clock, "
            f"{100 * figures['share_of_raw_by_cpu_time'][count]:.0f}% by processor time; 160 GB cost "
            f"{figures['core_hours_of_160_gb'][count]:.1f} core-hours"
        )
    if len(counts) > 1:
        scaling = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in figures["scaling"].items())
        lines.append(f"  from {counts[0]} to {counts[-1]} cores: {scaling}")
    return "\n".join(lines)
