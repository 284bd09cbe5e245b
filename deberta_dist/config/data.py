"""``[data]`` and ``[data.sources.NAME]``; the other tables are in ``schema.py``."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from deberta_dist.config.section import File, Length, Lengths, Name, Positive, Section
from deberta_dist.values import MaskingMethod


class SourceSection(Section):
    """``[data.sources.NAME]``: one of the corpora that a run blends.

    Either all sources of a run have a proportion, or all have epochs. Order and masks of a source depend on its name
    and on ``training.seed``.
    """

    path: File
    """A token file, or a directory of them, as ``data.train``."""
    proportion: Positive | None = None
    """Its share of the samples: this over the sum of all proportions, in any stretch of the run."""
    epochs: Positive | None = None
    """Passes over it while the other sources make theirs. ``training.max_steps`` decides where the run ends."""


class Data(Section):
    """``[data]``: what is read, and how tokens are masked."""

    train: File | None = None
    """Corpus to train on: a token file (written by ``tools/prepare_corpus.py``), or a directory of them with an
    ``index.json``, read as one. Takes the place of ``sources``."""
    sources: dict[Name, SourceSection] = Field(default_factory=dict)
    """Corpora to blend, one table ``[data.sources.NAME]`` each."""
    validation: File
    """Corpus to evaluate on."""
    tokenizer: File
    """SentencePiece model (``spm.model``) that all of them were made with."""
    max_seq_length: Length = 512
    """Tokens per sequence, [CLS] and [SEP] included."""
    document_boundaries: bool = False
    """Documents that share a sequence are separated by [SEP], do not see each other, and have positions from 0 on each.
    ``false``: they follow each other without a separator, as published."""
    bucket_lengths: Lengths | None = None
    """Dynamic batching: every document is a sequence, padded to the shortest of these lengths that holds it (tokens,
    ascending, up to ``max_seq_length``; longer ones are cut), and all micro-batches have as many tokens. Absent:
    documents follow each other, and every sequence has ``max_seq_length`` tokens."""
    index_directory: File | None = None
    """Where dynamic batching keeps its list of sequences; by default beside the corpus."""
    masking: MaskingMethod = "official"
    """``official``: the released sampling, which masks less towards the end of a sequence; its share of targets holds at any
    length, where the released code never masks more than 80. ``uniform``: the same n-grams of whole words, without that bias."""
    mask_probability: Annotated[float, Field(ge=1e-6, lt=1)] = 0.15
    """Share of the tokens to predict."""
    max_ngram: Annotated[int, Field(ge=1, le=100)] = 3
    """Longest masked span (words)."""

    @model_validator(mode="after")
    def _something_to_train_on(self) -> Self:
        if (self.train is None) == (not self.sources):
            given = "both are given" if self.sources else "neither is given"
            raise ValueError(f"exactly one of data.train and tables [data.sources.NAME] is needed; {given}")
        kinds: dict[str, str] = {}
        for name, source in self.sources.items():
            if (source.proportion is None) == (source.epochs is None):
                given = "neither is given" if source.epochs is None else "both are given"
                raise ValueError(f"data.sources.{name} needs exactly one of proportion and epochs; {given}")
            kinds.setdefault("epochs" if source.proportion is None else "proportion", name)
        if len(kinds) > 1:
            raise ValueError(
                f"data.sources.{kinds['proportion']} has a proportion and data.sources.{kinds['epochs']} has epochs; all "
                "sources of a run need the same of the two"
            )
        return self

    @model_validator(mode="after")
    def _buckets_are_ascending(self) -> Self:
        lengths = self.bucket_lengths
        if lengths is None:
            if self.index_directory is not None:
                raise ValueError(f"data.index_directory = {self.index_directory} has no effect without data.bucket_lengths")
            return self
        given = f"data.bucket_lengths = {list(lengths)}"
        if sorted(set(lengths)) != list(lengths) or lengths[-1] != self.max_seq_length:
            raise ValueError(f"{given} must ascend to data.max_seq_length = {self.max_seq_length}")
        if self.document_boundaries:
            raise ValueError(
                f"{given} makes every document a sequence of its own: data.document_boundaries = true has nothing to "
                "separate, leave one of them out"
            )
        return self
