"""The words of a run's TOML: one frozen section per table, a docstring with units under each field.

Read by everything above this room. Sections are strict: an unknown key, a string where a number is
expected, NaN and infinity are errors (``1`` is accepted where ``1.0`` is meant). Checks that need the
number of processes are in ``resolve.py``.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

AUTO = "auto"

Auto = Literal["auto"]
Count = Annotated[int, Field(ge=1)]
CountOrNone = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
# TOML has no paths and no tuples: these two kinds alone are converted.
File = Annotated[Path, Field(strict=False)]
Betas = Annotated[tuple[Fraction, Fraction], Field(strict=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
Layers = Annotated[tuple[Count, ...], Field(strict=False, min_length=1)]
Lengths = Annotated[tuple[Annotated[int, Field(ge=3)], ...], Field(strict=False, min_length=1)]


class Section(BaseModel):
    """Base of all tables: immutable, strict, no unknown keys, finite numbers."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
    )


class Model(Section):
    """``[model]``: a published configuration and what differs from it.

    Any further key is a field of the published ``config.json`` (``hidden_size``, ``num_hidden_layers``,
    ...). This room does not know those fields; the models room checks names and values.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, bool | int | float | str]

    preset: str | None = None
    """Name of a published configuration, e.g. ``v2-xxlarge``. Exactly one of ``preset`` and ``config``."""
    config: File | None = None
    """A published ``config.json``."""

    @property
    def overrides(self) -> dict[str, bool | int | float | str]:
        """Model fields given in the TOML or on the command line, by published name."""
        return dict(self.__pydantic_extra__ or {})

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.preset is None) == (self.config is None):
            given = "both are given" if self.preset else "neither is given"
            raise ValueError(f"exactly one of model.preset and model.config is needed; {given}")
        return self


class Source(Section):
    """``[data.sources.NAME]``: one of the corpora that a run blends.

    Either all sources of a run have a proportion, or all have epochs. Order and masks of a source depend on its name
    and on ``training.seed``.
    """

    path: File
    """A token file, or a directory of them, as ``data.train``."""
    proportion: Positive | None = None
    """Its share of the samples is this over the sum of all proportions, in any stretch of the run."""
    epochs: Positive | None = None
    """How often it is read while the others are read as often as theirs say. ``training.max_steps`` decides where the
    run ends."""


class Data(Section):
    """``[data]``: what is read, and how tokens are masked."""

    train: File | None = None
    """Corpus to train on: a token file (written by ``tools/prepare_corpus.py``), or a directory of them with an
    ``index.json``, read as one. Takes the place of ``sources``."""
    sources: dict[Name, Source] = Field(default_factory=dict)
    """Corpora to blend, one table ``[data.sources.NAME]`` each."""
    validation: File
    """Corpus to evaluate on."""
    tokenizer: File
    """SentencePiece model (``spm.model``) that all of them were made with."""
    max_seq_length: Annotated[int, Field(ge=3)] = 512
    """Tokens per sequence, [CLS] and [SEP] included."""
    document_boundaries: bool = False
    """Documents that share a sequence are separated by [SEP], do not see each other, and each has the positions from 0
    on. ``false``: they follow each other without a mark, as published."""
    bucket_lengths: Lengths | None = None
    """Dynamic batching: every document is a sequence, padded to the shortest of these lengths that holds it (tokens,
    ascending, the last one ``max_seq_length``; longer documents are cut), and all micro-batches have as many tokens.
    Absent: documents follow each other, and every sequence has ``max_seq_length`` tokens."""
    index_directory: File | None = None
    """Where dynamic batching keeps its list of sequences; by default beside the corpus."""
    masking: Literal["official", "uniform"] = "official"
    """``official``: the released sampling, which masks less towards the end of a sequence. ``uniform``: the same
    n-grams of whole words, without that bias."""
    mask_probability: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the tokens to predict."""
    max_ngram: Count = 3
    """Longest masked span (words)."""

    @model_validator(mode="after")
    def _something_to_train_on(self) -> Self:
        if (self.train is None) == (not self.sources):
            given = "both are given" if self.sources else "neither is given"
            raise ValueError(f"exactly one of data.train and tables [data.sources.NAME] is needed; {given}")
        kinds = {}
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
                raise ValueError(
                    f"data.index_directory = {self.index_directory} is of no use without data.bucket_lengths"
                )
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


class Training(Section):
    """``[training]``: batch sizes, length of the run, what is recomputed."""

    global_batch_size: Count
    """Sequences per optimizer step = micro_batch_size x num_micro_batches x data_parallel_size. With dynamic batching
    these are sequences of ``data.max_seq_length``; of shorter ones there are as many more."""
    micro_batch_size: Count
    """Sequences of one micro-batch on one pipeline."""
    num_micro_batches: Count | Auto = AUTO
    """Micro-batches per optimizer step of each pipeline."""
    max_steps: Count
    """Optimizer steps; the learning rate reaches 0 here."""
    seed: CountOrNone = 42
    """Decides initial weights, order of the data, masks and dropout."""
    recompute: Literal["none", "full", "selective"] = "none"
    """Activations computed again in the backward pass: none, whole layers, or the attention only."""
    init: File | None = None
    """Weights to start from instead of random ones, head and decoder included: a directory that
    ``tools/convert_checkpoint.py --to deberta_dist`` made, or anything it can read. Not looked at by a run that
    continues from a checkpoint of its own."""
    log_every_steps: Count = 10
    """Optimizer steps between two lines of metrics."""


class Optimizer(Section):
    """``[optimizer]``: AdamW."""

    name: Literal["auto", "torch_adamw", "apex_fused_adam"] = AUTO
    """``auto``: apex's FusedAdam where NVIDIA apex works, else torch's AdamW. Decided on each start."""
    learning_rate: Positive
    """Peak, reached after ``schedule.warmup_steps``."""
    betas: Betas = (0.9, 0.999)
    """Decay of the first and second moment per step."""
    eps: Positive = 1e-6
    """Added to the root of the second moment."""
    weight_decay: NotNegative = 0.01
    """Decoupled; not applied to biases and LayerNorms."""
    gradient_clipping: NotNegative = 1.0
    """Largest L2 norm of the gradient of the whole model; 0 = no clipping."""


class Schedule(Section):
    """``[schedule]``: linear warm-up, then linear decay to 0 at ``training.max_steps``."""

    warmup_steps: CountOrNone = 0
    """Optimizer steps from 0 to the peak learning rate."""


class Evaluation(Section):
    """``[evaluation]``: loss on ``data.validation``."""

    every_steps: CountOrNone = 0
    """Optimizer steps between evaluations; 0 = only at the end."""
    num_sequences: Count = 1024
    """Held-out sequences that are read each time, at most what there are: always the same, drawn from all of them."""


class Checkpoint(Section):
    """``[checkpoint]``: what an interrupted run continues from; written below ``run.directory``."""

    every_steps: CountOrNone = 0
    """Optimizer steps between two checkpoints; 0 = only one, at the end."""
    keep_last: Count = 2
    """Newest checkpoints that stay."""
    keep_every: CountOrNone = 0
    """Checkpoints of every so many steps stay for ever; 0 = none does."""
    resume: Literal["auto", "required", "never"] = "auto"
    """``auto``: continue from the newest complete checkpoint, from the start where there is none.
    ``required``: none is an error. ``never``: a run directory that holds a run is an error."""


class Parallel(Section):
    """``[parallel]``: world = tensor x pipeline x data parallel size."""

    tensor_parallel_size: Count = 1
    """Ranks that share every layer (attention heads and FFN are cut)."""
    pipeline_parallel_size: Count = 1
    """Ranks along the layers."""
    data_parallel_size: Count | Auto = AUTO
    """Replicas that read different data and own ZeRO-3 shards; ``auto`` = what the world leaves."""
    schedule: Literal["1f1b", "gpipe", "interleaved_1f1b"] = "1f1b"
    """Order of forward and backward passes in the pipeline. torch's zero-bubble schedules split the backward
    pass, which the relative table that all layers share does not allow (torch 2.13)."""
    stages_per_rank: Count = 1
    """Stages held by one pipeline rank; more than 1 with the interleaved schedules only."""
    layers_per_stage: Auto | Layers = AUTO
    """Encoder layers of each stage, first to last; ``auto`` = balanced when the model is built."""


class Run(Section):
    """``[run]``: where the run writes and how DeepSpeed runs it."""

    directory: File
    """Run directory: resolved configuration, metrics, checkpoints, result."""
    deepspeed: File
    """The DeepSpeed JSON (precision, offload, buckets, monitors)."""
    timeout_minutes: Positive = 10.0
    """A collective that waits longer (minutes) ends the run."""


class RunConfig(Section):
    """Everything a pre-training TOML says. ``source`` names the file in messages."""

    model: Model
    data: Data
    training: Training
    optimizer: Optimizer
    schedule: Schedule = Schedule()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    parallel: Parallel = Parallel()
    run: Run

    _source: Path | None = PrivateAttr(default=None)

    @property
    def source(self) -> str:
        """The TOML's path as given, or ``configuration`` for one that was made in Python."""
        return str(self._source) if self._source else "configuration"

    @property
    def micro_batch_shapes(self) -> tuple[tuple[int, int], ...]:
        """(sequences, tokens of each) of a micro-batch, for every bucket; the longest sequences last."""
        tokens = self.training.micro_batch_size * self.data.max_seq_length
        lengths = self.data.bucket_lengths or (self.data.max_seq_length,)
        return tuple((tokens // length, length) for length in lengths)

    @model_validator(mode="after")
    def _buckets_divide(self) -> Self:
        micro, length = self.training.micro_batch_size, self.data.max_seq_length
        for bucket in self.data.bucket_lengths or ():
            if micro * length % bucket:
                raise ValueError(
                    f"data.bucket_lengths: {bucket} does not divide training.micro_batch_size = {micro} x "
                    f"data.max_seq_length = {length} = {micro * length} tokens of a micro-batch, which are the same for "
                    "all lengths"
                )
        return self

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        warmup, steps = self.schedule.warmup_steps, self.training.max_steps
        if warmup > steps:
            raise ValueError(f"schedule.warmup_steps = {warmup} is more than training.max_steps = {steps}")
        return self
