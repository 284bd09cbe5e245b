#!/usr/bin/env python
"""Trains a sentencepiece vocabulary with DeBERTa's special pieces.

    tools/train_tokenizer.py --input corpus/ --output spm.model --vocab-size 128000
"""

import argparse
import sys
from pathlib import Path

# A checkout works without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deberta_dist.errors import with_exit_code  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train a sentencepiece vocabulary for DeBERTa.")
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        help=".jsonl files (one object per line), .txt files (documents separated by an empty line), folders",
    )
    parser.add_argument("--output", required=True, help="model file to make, spm.model; never replaced")
    parser.add_argument(
        "--vocab-size",
        type=int,
        required=True,
        help="pieces, [PAD] [CLS] [SEP] [UNK] included, without [MASK]",
    )
    parser.add_argument("--text-field", default="text", help="field of .jsonl objects (default: text)")
    parser.add_argument(
        "--max-bytes",
        type=int,
        help="train on an even sample of about so many bytes of the input (default: all; kept in memory)",
    )
    return parser.parse_args()


@with_exit_code
def main() -> int:
    """Runs the tool; the exit code is 0, or that of the error printed."""
    arguments = parse_arguments()
    from deberta_dist.corpus.text_files import read_texts
    from deberta_dist.data.new_file import refuse_existing
    from deberta_dist.data.tokenizer import Tokenizer, train_tokenizer

    # Said before the work, not after it.
    refuse_existing(arguments.output)
    texts = read_texts(arguments.input, text_field=arguments.text_field, max_bytes=arguments.max_bytes)
    train_tokenizer(texts, arguments.output, vocab_size=arguments.vocab_size)
    tokenizer = Tokenizer(arguments.output)
    print(f"{arguments.output}: {tokenizer.num_tokens:,} tokens with [MASK], SHA-256 {tokenizer.sha256}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
