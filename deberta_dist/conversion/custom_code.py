"""The enhanced mask decoder for transformers: a code file beside the weights, and the configuration that names it."""

import dataclasses
from pathlib import Path

from deberta_dist.checkpoint.errors import CheckpointError
from deberta_dist.conversion import huggingface, official
from deberta_dist.conversion.canonical import CanonicalCheckpoint, require_decoder
from deberta_dist.conversion.output import OutputDirectory
from deberta_dist.conversion.target import Target
from deberta_dist.conversion.weights import POSITION_TABLE
from deberta_dist.errors import ConfigError

CODE_NAME = "modeling_deberta_emd.py"
_CODE = Path(__file__).with_name(CODE_NAME)


def with_code(target: Target, model: CanonicalCheckpoint, *, where: object) -> Target:
    """A Hugging Face target whose masked language model decodes as it was trained to.

    Where their own class computes the model it stays as it is, and the report says so.

    Args:
        target: What would be written without the code.
        model: Where the weights come from; the code needs the position table among them.

    Raises:
        CheckpointError: the decoder's position table is missing.
        ConfigError: the embeddings are narrower than the hidden states, or nothing says how the model decodes.
    """
    if not any(name.startswith("lm_predictions.") for name in model.weights):
        return _told(target, "--with-code: there is no masked language model here, so no code was written")
    if not model.config.uses_enhanced_mask_decoder:
        return _told(
            target,
            "--with-code: the masked language model has no enhanced mask decoder, transformers' own class computes it, so no "
            "code was written",
        )
    if official.is_discriminator(model.weights):
        return _told(target, f"--with-code: {official.GENERATORS_HEAD}, so no code was written")
    require_decoder(model, where=where)
    if POSITION_TABLE in model.lacking:
        raise CheckpointError(
            f"--with-code: {where} lacks {POSITION_TABLE}, without which nothing decodes: convert from a checkpoint that has it"
        )
    if target.config["legacy"]:
        raise ConfigError(
            f"--with-code: embedding_size = {model.config.embedding_size} differs from hidden_size = "
            f"{model.config.hidden_size}, which the code does not compute: leave --with-code out"
        )
    stem = "DebertaV2" if target.config["model_type"] == huggingface.V2 else "Deberta"
    auto_map = {"AutoModelForMaskedLM": f"{Path(CODE_NAME).stem}.{stem}ForMaskedLM"}

    def write(output: OutputDirectory) -> list[str]:
        output.copy(_CODE, name=CODE_NAME)
        return target.write(output)

    return dataclasses.replace(target, write=write, config={**target.config, "masked_lm_decoder": "emd", "auto_map": auto_map})


def _told(target: Target, note: str) -> Target:
    return dataclasses.replace(target, write=lambda output: [*target.write(output), note])
