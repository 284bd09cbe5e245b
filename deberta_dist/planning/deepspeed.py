"""A run's DeepSpeed JSON, checked with DeepSpeed's own classes; called by the dry run, the search and the start."""

from deberta_dist.config.deepspeed_json import AnyConfig, DeepSpeedJson, read_deepspeed
from deberta_dist.parallel.zero.settings import examine


def checked_deepspeed(config: AnyConfig) -> DeepSpeedJson:
    """The JSON that ``run.deepspeed`` names, with "auto" filled in and checked.

    Args:
        config: Resolved; "auto" values follow from it.

    Raises:
        ConfigError: lists all problems of the file in one message.
    """
    return read_deepspeed(config.run.deepspeed, config, examine=examine)
