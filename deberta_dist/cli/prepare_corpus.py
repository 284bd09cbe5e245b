"""Turns text into a corpus of token files for pre-training, with one process or many, on one node or many.

    tools/prepare_corpus.py --input text/ --output corpus --tokenizer spm.model --workers 16
    mpirun -n 32 python tools/prepare_corpus.py --input 'wiki=text/wiki/**' 'news=text/news/*.jsonl.zst' \
        --output corpus --tokenizer spm.model --workers 4

Run the same command again to resume. corpus/train (or corpus/train/NAME) and corpus/heldout are what data.train and
data.validation name; corpus/report.md says what was read, left out and written.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from deberta_dist.errors import encodable, with_exit_code

if TYPE_CHECKING:
    from deberta_dist.preparation.pipeline.ranks import PreparationRanks


def parse_arguments() -> argparse.Namespace | int:
    """The command line; an exit code where argparse has printed help or an error: all ranks have to end with it."""
    try:
        return _parse_arguments()
    except SystemExit as end:
        return int(end.code or 0)


def _parse_arguments() -> argparse.Namespace:
    from deberta_dist.preparation.filtering import filters
    from deberta_dist.preparation.reading.arguments import add_reading_arguments

    parser = argparse.ArgumentParser(
        description="Turn text into a corpus of token files for pre-training.",
        epilog="Under mpirun all nodes have to see inputs, output and tokenizer under the same paths.",
    )
    add_reading_arguments(parser)
    parser.add_argument("--output", required=True, help="directory to make; an unfinished one is resumed")
    parser.add_argument("--tokenizer", required=True, help="sentencepiece model, spm.model")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="worker processes on each rank (default: 1)")
    group = parser.add_argument_group("held-out split")
    group.add_argument(
        "--held-out",
        type=float,
        default=5.0,
        metavar="PERCENT",
        help="share of the documents to hold out, chosen by a hash of their text (default: 5)",
    )
    group.add_argument("--held-out-input", nargs="+", default=[], metavar="PATH", help="inputs to hold out entirely")
    group = parser.add_argument_group("duplicates")
    group.add_argument("--keep-duplicates", action="store_true", help="keep exact duplicates")
    group.add_argument(
        "--near-duplicates",
        type=float,
        metavar="J",
        help="drop documents whose word 5-grams have at least this Jaccard similarity with an earlier document's, such as 0.8 "
        "(MinHash; needs rensa, and 2 to 3 KB of memory per remaining document in one process)",
    )
    group.add_argument(
        "--duplicates-memory",
        type=int,
        default=1 << 30,
        metavar="BYTES",
        help="memory per process for finding exact duplicates (default: 1 GiB)",
    )
    filters.add_arguments(parser)
    group = parser.add_argument_group("benchmarks")
    group.add_argument(
        "--benchmark",
        nargs="+",
        metavar="PATH",
        help="files or folders of a benchmark (.json, .jsonl, .tsv, .csv, .txt, .parquet, compressed or not): documents "
        "that share --benchmark-ngram consecutive words with it are dropped",
    )
    group.add_argument("--benchmark-ngram", type=int, metavar="N", help="consecutive words (default: 13)")
    group = parser.add_argument_group("sizes")
    group.add_argument(
        "--shard-bytes", type=int, default=1 << 30, metavar="BYTES", help="largest token file (default: 1 GiB of ids)"
    )
    group.add_argument(
        "--piece-bytes",
        type=int,
        default=1 << 23,
        metavar="BYTES",
        help="input per work item (default: 8 MiB); does not change the output",
    )
    arguments = parser.parse_args()
    if arguments.benchmark_ngram is not None and not arguments.benchmark:
        parser.error("--benchmark-ngram says how to compare with --benchmark, which is missing")
    return arguments


@with_exit_code
def main() -> int:
    """Runs the tool; the exit code is 0, or that of the error printed."""
    from deberta_dist.preparation.pipeline.ranks import PreparationRanks

    ranks = PreparationRanks.of_environment()
    return ranks.run(with_exit_code(lambda: prepare(ranks)))


def prepare(ranks: "PreparationRanks") -> int:
    """One rank's work."""
    arguments = ranks.first(parse_arguments)
    if isinstance(arguments, int):
        return arguments
    from deberta_dist.data.tokenizer import Tokenizer
    from deberta_dist.preparation.filtering import filters
    from deberta_dist.preparation.filtering.contamination import NgramSet, benchmark_ngrams
    from deberta_dist.preparation.pipeline.prepare import prepare_corpus
    from deberta_dist.preparation.pipeline.recipe import PreparationRecipe
    from deberta_dist.preparation.reading.arguments import read_options

    def check() -> tuple[PreparationRecipe, NgramSet | None]:
        """On one rank: an error is printed once."""
        recipe = PreparationRecipe.of(
            Tokenizer(arguments.tokenizer),
            reading=read_options(arguments),
            filters=filters.from_arguments(arguments),
            held_out_percent=arguments.held_out,
            deduplicate=not arguments.keep_duplicates,
            near_duplicates=arguments.near_duplicates,
            shard_bytes=arguments.shard_bytes,
            piece_bytes=arguments.piece_bytes,
        )
        n = 13 if arguments.benchmark_ngram is None else arguments.benchmark_ngram
        ngrams = benchmark_ngrams(arguments.benchmark, n=n) if arguments.benchmark else None
        return recipe, ngrams

    recipe, ngrams = ranks.first(check)
    if ranks.rank == 0 and (hint := ranks.unused_cores(num_workers=arguments.workers)):
        print(f"note: {hint}", file=sys.stderr, flush=True)
    outcome = prepare_corpus(
        arguments.input,
        arguments.output,
        tokenizer=Tokenizer(arguments.tokenizer),
        recipe=recipe,
        held_out_inputs=arguments.held_out_input,
        ngrams=ngrams,
        num_workers=arguments.workers,
        ranks=ranks,
        memory_bytes=arguments.duplicates_memory,
        progress=lambda progress: print(progress, file=sys.stderr, flush=True),
    )
    if outcome is not None:
        print(encodable(outcome.summary(Path(arguments.output))))
    return 0
