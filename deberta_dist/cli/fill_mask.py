"""Fills the masks of a text: the quickest look at what a masked language model has learned.

tools/fill_mask.py runs/pretrain_demo "The [MASK] of the program is in the file ."
tools/fill_mask.py hf/ "..." --library transformers
"""

import argparse
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from deberta_dist.errors import ConfigError, DataError, with_exit_code

if TYPE_CHECKING:
    import torch

MASK = "[MASK]"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    from deberta_dist.conversion.options import add_options

    parser = argparse.ArgumentParser(description="Fill the masks of a text.")
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="run directory, checkpoint directory or weights file"
    )
    parser.add_argument("text", metavar="TEXT", help=f"text with {MASK} where a piece is missing")
    parser.add_argument("--tokenizer", type=Path, help="SentencePiece model (default: the one beside the checkpoint)")
    add_options(parser, dtype_help="number format to compute in (default: what the checkpoint has)", decodes=True)
    parser.add_argument("--top", type=int, default=5, help="guesses per mask (default: 5)")
    parser.add_argument(
        "--library",
        choices=("deberta_dist", "transformers"),
        default="deberta_dist",
        help="whose model runs: ours, with the decoder it was trained with, or Hugging Face's, on a directory that convert "
        "--to huggingface has written; theirs decodes plainly unless convert was given --with-code",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="with --library transformers: run the code beside the checkpoint",
    )
    return parser.parse_args()


def ours(arguments: argparse.Namespace) -> list[list[tuple[str, float]]]:
    """(piece, probability) of the best guesses, for every mask in order."""
    import torch

    from deberta_dist.conversion.load import load_masked_lm
    from deberta_dist.data.tokenizer import Tokenizer

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        model, tokenizer = load_masked_lm(
            arguments.checkpoint,
            dtype=arguments.dtype,
            allow_unmapped=arguments.allow_unmapped,
            prefix=arguments.prefix,
            decoder=arguments.decoder,
        )
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    if arguments.tokenizer is not None:
        tokenizer = Tokenizer(arguments.tokenizer)
    if tokenizer is None:
        raise ConfigError(f"no spm.model lies with {arguments.checkpoint}: give --tokenizer")
    ids = [tokenizer.cls_id]
    for number, part in enumerate(arguments.text.split(MASK)):
        ids += [tokenizer.mask_id] * (number > 0) + tokenizer.encode(part)
    input_ids = torch.tensor([[*ids, tokenizer.sep_id]])
    labels = torch.where(input_ids == tokenizer.mask_id, input_ids, 0)
    with torch.inference_mode():
        logits = model(input_ids, labels=labels).logits
    return [list(zip(tokenizer.pieces(ids), scores, strict=True)) for ids, scores in best(logits, top=arguments.top)]


def theirs(arguments: argparse.Namespace) -> list[list[tuple[str, float]]]:
    """The same by Hugging Face's classes."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import transformers
    except ImportError:
        raise ConfigError("--library transformers: it is not installed (pip install transformers)") from None
    import torch

    trusts = arguments.trust_remote_code
    config = arguments.checkpoint / "config.json"
    if not trusts and config.is_file() and b'"auto_map"' in config.read_bytes():
        print(
            f"warning: {arguments.checkpoint} has code of its own, which does not run: the guesses are those of transformers' "
            "own class (--trust-remote-code runs it)",
            file=sys.stderr,
        )
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.checkpoint)
    # False, not None: that would ask, or run code where transformers has no class of its own.
    model = transformers.AutoModelForMaskedLM.from_pretrained(arguments.checkpoint, trust_remote_code=trusts).eval()
    inputs = tokenizer(arguments.text, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**inputs).logits[inputs["input_ids"] == tokenizer.mask_token_id]
    found = best(logits, top=arguments.top)
    return [list(zip(tokenizer.convert_ids_to_tokens(ids), scores, strict=True)) for ids, scores in found]


def best(logits: "torch.Tensor", *, top: int) -> list[tuple[list[int], list[float]]]:
    """Ids and probabilities of the largest logits of every row."""
    scores, ids = logits.float().softmax(dim=-1).topk(top, dim=-1)
    return list(zip(ids.tolist(), scores.tolist(), strict=True))


@with_exit_code
def main() -> int:
    """Runs the tool; the exit code is 0, or that of the error printed."""
    arguments = parse_arguments()
    if arguments.trust_remote_code and arguments.library != "transformers":
        raise ConfigError("--trust-remote-code is for --library transformers; this package runs no code of a checkpoint")
    if MASK not in arguments.text:
        raise DataError(f"the text has no {MASK} to fill: {arguments.text[:80]!r}")
    if arguments.decoder is not None and arguments.library != "deberta_dist":
        raise ConfigError(f"--decoder is for --library deberta_dist: {arguments.library} has only the plain one")
    guesses = ours(arguments) if arguments.library == "deberta_dist" else theirs(arguments)
    for number, mask in enumerate(guesses, start=1):
        words = "  ".join(f"{piece.replace(chr(0x2581), ' ').strip() or repr(piece)} {score:.1%}" for piece, score in mask)
        print(f"mask {number}: {words}")
    return 0
