"""The keys of a run's TOML: one frozen section per table, a docstring with units under each field.

Read by everything above this room. Sections are strict: an unknown key, a string where a number is
expected, NaN and infinity are errors (``1`` is accepted where ``1.0`` is meant). Checks that need the
number of processes are in ``resolve.py``. ``[data]`` has its own file, ``data.py``.
"""

from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, model_validator

from deberta_dist.config.data import Data
from deberta_dist.config.section import (
    Betas,
    Count,
    CountOrNone,
    Few,
    File,
    Layers,
    Minutes,
    NotNegative,
    Patterns,
    Ranks,
    Rate,
    Section,
    Sequences,
    WholeFile,
)
from deberta_dist.values import AUTO, Attention, Auto, OptimizerName, PipelineSchedule, Recompute, Resume


class Model(Section):
    """``[model]``: a published configuration and what differs from it.

    Any further key is a field of the published ``config.json`` (``hidden_size``, ``num_hidden_layers``,
    ...). This room does not know those fields; the models room checks names and values.

    ``vocab_size`` (rows of the word embeddings) may also be ``"auto"``: the rows of ``training.init`` where that is given,
    else the tokens of ``data.tokenizer`` rounded up to a multiple of 128. So it is with a ``preset`` and no ``vocab_size``,
    except that a preset's own number stays where the tokenizer fills it (the released 128,001 tokens in 128,100 rows).
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


class Training(Section):
    """``[training]``: batch sizes, length of the run, recomputation, start."""

    global_batch_size: Sequences
    """Sequences per optimizer step = micro_batch_size x num_micro_batches x data_parallel_size. With dynamic batching
    these are sequences of ``data.max_seq_length``; of shorter ones there are as many more."""
    micro_batch_size: Sequences
    """Sequences of one micro-batch on one pipeline."""
    num_micro_batches: Few | Auto = AUTO
    """Micro-batches per optimizer step of each pipeline."""
    max_steps: Count
    """Optimizer steps; the learning rate reaches 0 here. A finished run that is started again with more steps resumes."""
    seed: CountOrNone = 42
    """Decides initial weights, order of the data, masks and dropout."""
    recompute: Recompute = "none"
    """Activations recomputed in the backward pass: none, whole layers (``full``), or the attention only (``selective``)."""
    compile: bool = False
    """Dropout, residual and LayerNorm as one kernel made by torch.compile in the first step (up to a minute). Needs Triton
    on a GPU, a C++ compiler on a CPU. The dry run's memory is that without it."""
    attention: Attention = AUTO
    """Implementation of the attention: ``fused`` (Triton kernels for NVIDIA GPUs), ``portable`` (torch, any device) or
    ``reference`` (the formula, slow); a start is refused where it is not available. ``auto`` takes the fastest that is, with a
    warning on a GPU that does not use the fused one."""
    vocabulary_chunks: Annotated[int, Field(ge=1, le=128)] = 1
    """Chunks of the vocabulary for which the head computes the logits one after another. With more than one they are recomputed
    in the backward pass: their memory is divided by as much, for a third more matrix products in the head."""
    init: File | None = None
    """Weights to start from instead of random ones, head and decoder included: a directory that
    ``tools/convert_checkpoint.py --to deberta_dist`` made, or anything it can read. Ignored by a run that
    resumes from a checkpoint of its own."""
    init_allow_unmapped: Patterns = ()
    """Keys of ``init`` that may be left out although nothing explains them: patterns as in file names, ``["student.*"]``."""
    init_prefix: str | None = None
    """Prefix of the model's own names in ``init``; by default none, or that of a known wrapper."""
    log_every_steps: Count = 10
    """Optimizer steps between two lines of metrics."""

    @property
    def micro_batches(self) -> int:
        """``num_micro_batches`` of a configuration that ``resolve`` has completed."""
        assert self.num_micro_batches != AUTO, "the configuration is not resolved"
        return self.num_micro_batches

    @model_validator(mode="after")
    def _how_to_read_init(self) -> Self:
        for key in ("init_allow_unmapped", "init_prefix"):
            if getattr(self, key) and self.init is None:
                raise ValueError(f"training.{key} = {getattr(self, key)!r} has no effect without training.init")
        return self


class Optimizer(Section):
    """``[optimizer]``: AdamW."""

    name: OptimizerName = AUTO
    """``auto``: apex's FusedAdam where NVIDIA apex works, else torch's AdamW. Decided on each start."""
    learning_rate: Rate
    """Peak, reached after ``schedule.warmup_steps``."""
    betas: Betas = (0.9, 0.999)
    """Decay of the first and second moment per step."""
    eps: Rate = 1e-6
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
    """Held-out sequences per evaluation (at most all there are): a fixed random sample of the validation corpus."""


class Checkpoint(Section):
    """``[checkpoint]``: what an interrupted run resumes from; written below ``run.directory``."""

    every_steps: CountOrNone = 0
    """Optimizer steps between two checkpoints; 0 = one at the end only."""
    keep_last: Count = 2
    """Number of newest checkpoints to keep."""
    keep_every: CountOrNone = 0
    """Checkpoints at multiples of this many steps are never removed; 0 = none."""
    resume: Resume = AUTO
    """``auto``: resume from the newest complete checkpoint, or start from scratch if there is none.
    ``required``: a missing checkpoint is an error. ``never``: a run directory that holds a run is an error."""


class Parallel(Section):
    """``[parallel]``: world = tensor x pipeline x data parallel size."""

    tensor_parallel_size: Ranks = 1
    """Ranks that divide every layer by attention heads and FFN columns."""
    sequence_parallel: bool = False
    """Split the rest of every layer (LayerNorm, dropout, residuals) over the same ranks by tokens: fewer activations.
    Pre-training only; tensor_parallel_size must be 2 or more and divide all lengths of sequences."""
    pipeline_parallel_size: Ranks = 1
    """Ranks along the layers."""
    data_parallel_size: Ranks | Auto = AUTO
    """Replicas that read different data and own ZeRO-3 shards; ``auto`` = what the world leaves."""
    schedule: PipelineSchedule = "1f1b"
    """Order of forward and backward passes in the pipeline. torch's zero-bubble schedules split the backward
    pass, which the relative table that all layers share does not allow (torch 2.13)."""
    stages_per_rank: Few = 1
    """Stages held by one pipeline rank; more than 1 with the interleaved schedules only."""
    layers_per_stage: Auto | Layers = AUTO
    """Encoder layers of each stage, first to last; ``auto`` = balanced when the model is built."""

    @property
    def replicas(self) -> int:
        """``data_parallel_size`` of a configuration that ``resolve`` has completed."""
        assert self.data_parallel_size != AUTO, "the configuration is not resolved"
        return self.data_parallel_size

    @property
    def world_size(self) -> int:
        """Ranks of a configuration that ``resolve`` has completed."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.replicas


class Run(Section):
    """``[run]``: where the run writes and how DeepSpeed runs it."""

    directory: File
    """Run directory: resolved configuration, metrics, checkpoints, result."""
    deepspeed: File
    """The DeepSpeed JSON (precision, offload, buckets, monitors)."""
    timeout_minutes: Minutes = 10.0
    """Longest wait of a collective (minutes); a longer one ends the run."""


class RunConfig(WholeFile):
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
                    f"data.max_seq_length = {length} = {micro * length} tokens of a micro-batch, the same for all lengths"
                )
        return self

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        warmup, steps = self.schedule.warmup_steps, self.training.max_steps
        if warmup > steps:
            raise ValueError(f"schedule.warmup_steps = {warmup} is more than training.max_steps = {steps}")
        return self


def default_values() -> dict[str, Any]:
    """``section.key`` -> default, as JSON has it, of every key of a pre-training TOML that may be left out."""
    defaults: dict[str, Any] = {}
    for section, table in RunConfig.model_fields.items():
        assert isinstance(table.annotation, type) and issubclass(table.annotation, Section)
        for key, field in table.annotation.model_fields.items():
            if not field.is_required():
                value = field.get_default(call_default_factory=True)
                defaults[f"{section}.{key}"] = list(value) if isinstance(value, tuple) else value
    return defaults
