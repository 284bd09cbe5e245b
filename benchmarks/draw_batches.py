"""Draws batches from a token file and prints its memory; run as a process of its own.

python -m benchmarks.draw_batches SPM.MODEL FILE.tokens REPORT.json --batches 2000 [--mapped]
"""

import argparse
import json
import re
import time
from pathlib import Path

from deberta_dist.data.loader import MaskedLMDataset
from deberta_dist.data.masking import MaskingConfig
from deberta_dist.data.token_corpus import open_corpus
from deberta_dist.data.tokenizer import Tokenizer

BATCH_SIZE, SEQUENCE_LENGTH = 32, 512


def memory(mapped: Path) -> dict[str, int]:
    """Memory of this process, bytes.

    Args:
        mapped: A file whose mapping is looked at.

    Returns:
        ``resident``; of it ``anonymous`` (the process's own) and ``mapped`` (pages of that file, which can be
        reclaimed; the rest are libraries); and ``peak_resident`` since the program started, which unlike ``ru_maxrss``
        holds nothing of the process that started it.
    """
    rollup = _kilobytes(Path("/proc/self/smaps_rollup").read_text(encoding="utf-8"))
    pages = 0
    mappings = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(encoding="utf-8"), flags=re.M)
    # A mapping's first line ends with its file, the lines after it have its figures.
    for mapping in mappings:
        if mapping.partition("\n")[0].endswith(str(mapped.resolve())):
            pages += _kilobytes(mapping)["Rss"]
    return {
        "resident": rollup["Rss"],
        "anonymous": rollup["Anonymous"],
        "mapped": pages,
        "peak_resident": _kilobytes(Path("/proc/self/status").read_text(encoding="utf-8"))["VmHWM"],
    }


def _kilobytes(text: str) -> dict[str, int]:
    return {name: int(value) * 1024 for name, value in re.findall(r"^(\w+):\s+(\d+) kB$", text, flags=re.M)}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("report", type=Path)
    parser.add_argument("--batches", type=int, required=True)
    parser.add_argument("--mapped", action="store_true", help="touch the same windows through the mapping instead")
    arguments = parser.parse_args()
    tokenizer = Tokenizer(arguments.tokenizer)
    begin = time.perf_counter()
    corpus = open_corpus(arguments.tokens)
    data = MaskedLMDataset(corpus, tokenizer, max_seq_length=SEQUENCE_LENGTH, masking=MaskingConfig(), seed=1)
    data.batch(0, 1)
    opened = time.perf_counter()
    before = memory(arguments.tokens)
    drawing = time.perf_counter()
    length, file = SEQUENCE_LENGTH - 2, next(corpus.files())
    for start in range(0, arguments.batches * BATCH_SIZE, BATCH_SIZE):
        if arguments.mapped:
            for _, sample in data.samples_at(start, BATCH_SIZE):
                file.ids[sample * length : (sample + 1) * length].max()
        else:
            data.batch(start, BATCH_SIZE)
    drawn = time.perf_counter()
    seconds = {"open_seconds": opened - begin, "draw_seconds": drawn - drawing}
    figures = {**seconds, "before": before, "after": memory(arguments.tokens)}
    arguments.report.write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
