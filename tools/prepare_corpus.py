#!/usr/bin/env python
"""Turns text files into one token file for pre-training.

    tools/prepare_corpus.py --input corpus/ more.jsonl --output corpus.tokens --tokenizer spm.model
"""

import argparse
import sys
from pathlib import Path

# A checkout works without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deberta_dist.errors import with_exit_code  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    from deberta_dist.corpus import filters

    parser = argparse.ArgumentParser(description="Turn text files into one token file for pre-training.")
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        help=".jsonl files (one object per line), .txt files (documents separated by an empty line), folders",
    )
    parser.add_argument("--output", required=True, help="token file to make, X.tokens; never replaced")
    parser.add_argument("--tokenizer", required=True, help="sentencepiece model, spm.model")
    parser.add_argument("--text-field", default="text", help="field of .jsonl objects (default: text)")
    filters.add_arguments(parser)
    parser.add_argument(
        "--benchmark",
        nargs="+",
        metavar="PATH",
        help="files or folders of a benchmark: documents that share --benchmark-ngram words in a row with it are left out",
    )
    parser.add_argument(
        "--near-duplicates",
        type=float,
        metavar="J",
        help="leave out documents whose word 5-grams are this similar to an earlier document's, 0.8 for example (MinHash; "
        "needs rensa, and 2 to 3 KB of memory for every document kept)",
    )
    parser.add_argument("--benchmark-ngram", type=int, default=13, metavar="N", help="words in a row (default: 13)")
    return parser.parse_args()


@with_exit_code
def main() -> int:
    """Runs the tool; the exit code is 0, or that of the error printed."""
    arguments = parse_arguments()
    from deberta_dist.corpus import filters
    from deberta_dist.corpus.contamination import benchmark_ngrams
    from deberta_dist.corpus.near_duplicates import NearDuplicates
    from deberta_dist.corpus.prepare import prepare_corpus
    from deberta_dist.data.tokenizer import Tokenizer

    report = prepare_corpus(
        arguments.input,
        arguments.output,
        tokenizer=Tokenizer(arguments.tokenizer),
        text_field=arguments.text_field,
        filters=filters.from_arguments(arguments),
        near_duplicates=None if arguments.near_duplicates is None else NearDuplicates(arguments.near_duplicates),
        contamination=benchmark_ngrams(arguments.benchmark, n=arguments.benchmark_ngram) if arguments.benchmark else None,
        progress=lambda progress: print(progress, file=sys.stderr, flush=True),
    )
    print(
        f"{arguments.output}: {report.num_tokens:,} tokens in {report.num_documents:,} documents, from "
        f"{report.num_files:,} files of {report.num_bytes / 1e6:,.1f} MB in {report.seconds:.1f} s "
        f"({report.num_bytes / 1e6 / max(report.seconds, 1e-9):.1f} MB/s); "
        f"{report.num_empty_documents:,} empty documents skipped, {report.num_cleaned_documents:,} cleaned"
    )
    for rule, number in sorted(report.num_filtered_documents.items()):
        print(f"{number:,} documents left out by {rule.replace('_', '-')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
