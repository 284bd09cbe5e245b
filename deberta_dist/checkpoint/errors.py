"""Errors about checkpoints that a user can act on."""

from deberta_dist.errors import DataError
from deberta_dist.files.strict_json import StrictJson


class CheckpointError(DataError):
    """A checkpoint that is missing, torn, damaged or not understood. The message names the file."""


class CheckpointVersionError(CheckpointError):
    """A sound checkpoint of a newer format: not to be skipped, let alone replaced."""


class CheckpointWriteError(CheckpointError):
    """A checkpoint that could not be written (disk full, permissions). Older ones are as they were."""

    exit_code = 74


strict_json = StrictJson(CheckpointError)
"""Reads manifests, and whatever else describes a checkpoint."""
