"""Errors a user can cause, and the exit code each ends the process with.

Everything the package refuses is one of these, raised with what was given, what was expected and where
to change it. ``main`` of every entry point prints the message as one line and exits with ``exit_code``;
any other exception is a fault of ours and keeps its traceback.
"""


class DebertaDistError(Exception):
    """Base of all errors with a message meant for the user."""

    exit_code = 1


class ConfigError(DebertaDistError, ValueError):
    """A configuration file, an override or a combination of sizes that cannot be run."""

    exit_code = 2


class DataError(DebertaDistError, ValueError):
    """An input file (text, token file, tokenizer) that is missing, damaged or does not fit the run."""

    exit_code = 65
