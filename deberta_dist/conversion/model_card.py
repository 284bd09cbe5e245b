"""The README.md of a Hugging Face directory: where the weights come from, and what their classes do not use."""

from collections.abc import Mapping, Sequence

from deberta_dist.conversion import hub, official
from deberta_dist.conversion.canonical import CanonicalCheckpoint
from deberta_dist.conversion.heads import SUFFIXES
from deberta_dist.conversion.report import dtype_names
from deberta_dist.conversion.source import CheckpointSource
from deberta_dist.conversion.target import Target
from deberta_dist.conversion.tokenizer_export import TokenizerResult
from deberta_dist.conversion.training_facts import training_facts
from deberta_dist.conversion.weights import POSITION_TABLE

_DIVIDER = "\n\n"
_BACKBONE = "Model"
_CODE_TEXT = """`modeling_deberta_emd.py` holds DeBERTa's enhanced mask decoder for transformers 5.x, and nothing else is needed:

```python
from transformers import pipeline

fill = pipeline("fill-mask", model="PATH OR NAME OF THIS DIRECTORY", trust_remote_code=True)
```

Without `trust_remote_code` the class of the same name in transformers computes other logits."""


def model_card(
    source: CheckpointSource,
    published: CanonicalCheckpoint,
    *,
    target: Target,
    tokenizer: TokenizerResult,
    for_hub: Mapping[str, str | Sequence[str]],
) -> str:
    """The text of the card.

    Args:
        source: Where the weights come from.
        published: The model in canonical form: what the class leaves unused is found in its names.
        target: What is written beside it: class, number formats, configuration.
        tokenizer: What was done about the tokenizer.
        for_hub: Licence and languages, as fields of `hub.front_matter`.
    """
    config, architecture = published.config, target.architecture
    has_code = "auto_map" in target.config
    dtype = "/".join(dtype_names(target.weights))
    origin = f"Converted by `tools/convert_checkpoint.py` of deberta_dist from: {source.description}"
    parts = [
        hub.front_matter(
            {
                **for_hub,
                "library_name": "transformers",
                "pipeline_tag": hub.pipeline_tag(architecture if _predicts(published) else _BACKBONE),
                "tags": ["deberta"],
            }
        ),
        f"# {architecture}",
        f"{origin}. Numbers are {dtype}. {config.num_hidden_layers} layers, hidden size {config.hidden_size}, "
        f"{config.num_attention_heads} heads, vocabulary {config.vocab_size}."
        + (f" {target.why_class}." if target.why_class else ""),
        "`conversion_report.json` says what became of every key and has the SHA-256 of every file.",
        *(["## Masked language modelling", _CODE_TEXT] if has_code else []),
        *_training(source),
        "## What these classes do not use, and why it is in the file",
        "\n".join(_unused(published, architecture=architecture, has_code=has_code)),
        "## Tokenizer",
        tokenizer.message
        + (
            " Use `AutoTokenizer`: `DebertaV2Tokenizer` replaces the normalisation rules by others and splits some text "
            "differently."
            if "tokenizer.json" in tokenizer.files
            else ""
        ),
    ]
    return _DIVIDER.join(parts) + "\n"


def _predicts(published: CanonicalCheckpoint) -> bool:
    """Whether what the class computes is what its head was trained for."""
    return bool(published.head) or not official.is_discriminator(published.weights)


def _training(source: CheckpointSource) -> list[str]:
    if source.manifest is None:
        return []
    # checkpoints/step-N/ of a run's directory.
    facts = training_facts(source.manifest, run=source.directory.parent.parent)
    rows = [f"| {name} | {value} |" for name, value in facts.items()]
    return ["## Training", "\n".join(["| | |", "|---|---|", *rows])]


def _unused(published: CanonicalCheckpoint, *, architecture: str, has_code: bool) -> list[str]:
    config, names = published.config, published.weights
    found = _decoder(published, has_code=has_code)
    if POSITION_TABLE in names and not config.position_biased_input:
        found.append(
            "- `deberta.embeddings.position_embeddings.weight`: absolute positions, added by DeBERTa's enhanced mask "
            "decoder after the encoder. Hugging Face's own classes have no such decoder: they ignore the table, and drop "
            "it when they save. It stays here because the masked language modelling head was trained with it, so that pre-training "
            "can go on from this file."
        )
    if any(name.startswith("mask_predictions.") for name in names):
        found.append(
            "- `mask_predictions.*`: the head that detects replaced tokens. No Hugging Face class has it; "
            "`AutoModelForMaskedLM` ignores it, others report it as unexpected."
        )
    if published.head:
        keys = sorted({f"`{name.split('.')[0]}.*`" for name in names if name.startswith(("pooler", "classifier", "qa_"))})
        found.append(
            f"- {', '.join(reversed(keys))}: used by `AutoModel{SUFFIXES[published.head]}`; other classes report them as "
            "unexpected."
        )
    else:
        found.append(
            "- There is no classifier: `AutoModelForSequenceClassification` reports `pooler.*` and `classifier.*` as "
            "missing and starts them at random, for fine-tuning."
        )
    if not any(name.startswith("lm_predictions.") for name in names):
        found.append("- There is no masked language modelling head: `AutoModelForMaskedLM` would start one at random.")
    if config.position_buckets >= 1:
        found.append(
            f"- Sequences longer than {config.max_relative_distance} tokens: Hugging Face does not limit the distance "
            "before it looks up a bucket, and uses a row of `rel_embeddings` that was never trained. Stay below."
        )
    return found


def _decoder(published: CanonicalCheckpoint, *, has_code: bool) -> list[str]:
    """What is known of the masked language modelling head and of how it decodes."""
    if published.decoder is None:
        return []
    head = (
        "- `lm_predictions.lm_head.*` or, by its older name, `cls.predictions.*`: the head of masked language modelling; "
        "only `AutoModelForMaskedLM` uses it, other classes report it as unexpected."
    )
    if official.is_discriminator(published.weights):
        return [
            head + " It was trained by the generator, whose encoder it belongs to, and lies beside the discriminator as in "
            "the releases: on this encoder it predicts no words. To predict words, convert the generator."
        ]
    if not published.knows_decoder:
        return [
            head + " The file that it comes from does not say whether it was trained by Hugging Face's classes, which "
            "compute its logits as they stand, or with DeBERTa's enhanced mask decoder, which they do not have and without "
            "which its logits are others."
        ]
    if published.config.uses_enhanced_mask_decoder and has_code:
        return [
            head + " It was trained with DeBERTa's enhanced mask decoder, which is in the code beside it; without that code "
            "its logits are others."
        ]
    if published.config.uses_enhanced_mask_decoder:
        return [
            head + " It was trained with DeBERTa's enhanced mask decoder. Its logits differ from DeBERTa's own there, "
            "because that decoder is missing: do not judge the model by them, and do not continue pre-training with that "
            "class."
        ]
    return [head + " It was trained without an enhanced mask decoder, and that class computes its own logits."]
