#!/usr/bin/env python
"""Trains a sentencepiece vocabulary with DeBERTa's special pieces, or takes a published one; tells how it fits.

    tools/train_tokenizer.py --input corpus/ --output spm.model --vocab-size 128000
    tools/train_tokenizer.py --input corpus/ --output spm.model --published deberta-v3-base/spm.model
"""

import argparse
import sys
from pathlib import Path

# A checkout works without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deberta_dist.corpus.arguments import add_reading_arguments, read_options  # noqa: E402
from deberta_dist.errors import with_exit_code  # noqa: E402

VOCAB_SIZE = 128_000
# The trainer takes about 17 bytes of memory per byte of text, here 4.5 GB; in much less there may be no 128,000 pieces.
MAX_BYTES = 1 << 28


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make or take a sentencepiece vocabulary for DeBERTa.")
    add_reading_arguments(parser)
    parser.add_argument("--output", required=True, help="model file to make, spm.model; never replaced")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--vocab-size",
        type=int,
        default=VOCAB_SIZE,
        help=f"pieces, [PAD] [CLS] [SEP] [UNK] included, without [MASK] (default: {VOCAB_SIZE:,})",
    )
    kind.add_argument("--published", metavar="FILE", help="copy this spm.model instead of training one")
    parser.add_argument(
        "--max-bytes",
        type=int,
        default=MAX_BYTES,
        metavar="BYTES",
        help=f"use an even sample of about so much of the input (default: {MAX_BYTES:,})",
    )
    return parser.parse_args()


@with_exit_code
def main() -> int:
    """Runs the tool; the exit code is 0, or that of the error printed."""
    arguments = parse_arguments()
    from deberta_dist.corpus.inputs import find_inputs
    from deberta_dist.corpus.vocabulary import take_published, train_vocabulary
    from deberta_dist.data.tokenizer import Tokenizer

    options = read_options(arguments)
    inputs, output, max_bytes = arguments.input, arguments.output, arguments.max_bytes
    if arguments.published:
        fit = take_published(inputs, output, model=arguments.published, options=options, max_bytes=max_bytes)
    else:
        fit = train_vocabulary(inputs, output, options=options, vocab_size=arguments.vocab_size, max_bytes=max_bytes)
    if passed_over := find_inputs(inputs, format=options.format).passed_over:
        print(f"passed over beside the inputs: {passed_over}")
    tokenizer = Tokenizer(output)
    print(f"{output}: {tokenizer.num_tokens:,} tokens with [MASK], SHA-256 {tokenizer.sha256}")
    if fit.num_documents:
        print(f"{'text of the input' if arguments.published else 'held-out text'}: {fit}")
    else:
        print("no text to measure it on: 2% of the documents are held out, and there are too few of them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
