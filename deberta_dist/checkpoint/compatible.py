"""Whether a checkpoint may be continued by this run: asked by training before anything is loaded."""

import json
from collections.abc import Mapping
from typing import Any

from deberta_dist.checkpoint import strict_json
from deberta_dist.checkpoint.manifest import Manifest, differing_keys
from deberta_dist.errors import ConfigError


def compatible(manifest: Manifest, *, model_config: Mapping[str, Any], tokenizer_sha256: str) -> None:
    """Refuses to go on with another model or vocabulary than the checkpoint's.

    Args:
        manifest: Of the checkpoint.
        model_config: Published configuration of the model that is to be loaded.
        tokenizer_sha256: Of the SentencePiece model in use.

    Raises:
        ConfigError: they differ; the message has every difference.
    """
    mine, theirs = strict_json.plain(model_config), manifest.model_config
    found = [
        f"model.{key} is {json.dumps(mine[key]) if key in mine else 'absent'}, in the checkpoint "
        f"{json.dumps(theirs[key]) if key in theirs else 'absent'}"
        for key in differing_keys(mine, theirs)
    ]
    if tokenizer_sha256 != manifest.tokenizer_sha256:
        found.append(
            f"data.tokenizer has sha256 {tokenizer_sha256[:12]}..., in the checkpoint "
            f"{manifest.tokenizer_sha256[:12]}...: another vocabulary"
        )
    if found:
        raise ConfigError(f"the checkpoint of step {manifest.step} is of another model: {'; '.join(found)}")
