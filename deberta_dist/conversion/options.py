"""Options for reading a checkpoint, the same for tools, training, fine-tuning and Python."""

import argparse
from dataclasses import dataclass

from deberta_dist.errors import ConfigError
from deberta_dist.models.config import DECODERS

DTYPE_NAMES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class CheckpointReadOptions:
    """What a user says about a checkpoint that it does not say itself.

    Attributes:
        allow_unmapped: fnmatch patterns of keys, of weights or of the configuration, that may be left out.
        prefix: What stands before the model's names; None: nothing, or wrappers that are known.
        dtype: One of ``DTYPE_NAMES`` to round to; None keeps what the file has. Training and fine-tuning have no use
            for it: they start from float32, whatever the file has.
        decoder: How its masked language model decodes, one of ``DECODERS``, where it does not say so itself.

    Raises:
        ConfigError: no such ``dtype`` or ``decoder``.
    """

    allow_unmapped: tuple[str, ...] = ()
    prefix: str | None = None
    dtype: str | None = None
    decoder: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in (None, *DTYPE_NAMES):
            raise ConfigError(f"dtype = {self.dtype!r} is none of {', '.join(DTYPE_NAMES)}")
        if self.decoder not in (None, *DECODERS):
            raise ConfigError(f"decoder = {self.decoder!r} is none of {', '.join(DECODERS)}")


AS_IT_IS = CheckpointReadOptions()


def add_options(parser: argparse.ArgumentParser, *, dtype_help: str | None, decodes: bool = False) -> None:
    """Adds them to a command line; ``dtype_help`` None leaves --dtype out, ``decodes`` False --decoder."""
    if dtype_help is not None:
        parser.add_argument("--dtype", choices=DTYPE_NAMES, help=dtype_help)
    parser.add_argument(
        "--allow-unmapped",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave out keys that match this shell-style pattern; repeatable",
    )
    parser.add_argument(
        "--prefix",
        metavar="PREFIX",
        help="prefix of the model's parameter names in the file, such as 'student.' (default: none, or a known "
        "wrapper: module., _orig_mod., model., encoder., backbone., base_model., ...)",
    )
    if decodes:
        parser.add_argument(
            "--decoder",
            choices=DECODERS,
            help="how a masked language model was trained to decode, where the checkpoint does not say: with DeBERTa's "
            "enhanced mask decoder, or plainly, as Hugging Face's classes do",
        )


def options_of(arguments: argparse.Namespace) -> CheckpointReadOptions:
    """The options of a command line that has them. Raises ConfigError."""
    return CheckpointReadOptions(
        allow_unmapped=tuple(arguments.allow_unmapped),
        prefix=arguments.prefix,
        dtype=getattr(arguments, "dtype", None),
        decoder=getattr(arguments, "decoder", None),
    )
