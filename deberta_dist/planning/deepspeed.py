"""A run's DeepSpeed JSON, checked with DeepSpeed's own classes: the way in for the dry run, the search and the start."""

from deberta_dist.config.deepspeed_json import AnyConfig, DeepSpeedJson, read_deepspeed
from deberta_dist.parallel.zero.settings import examine


def checked_deepspeed(config: AnyConfig) -> DeepSpeedJson:
    """The JSON that ``run.deepspeed`` names, completed and checked.

    Args:
        config: Resolved.

    Raises:
        ConfigError: all that is wrong with it, in one message.
    """
    return read_deepspeed(config.run.deepspeed, config, examine=examine)
