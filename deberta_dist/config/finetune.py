"""The keys of a fine-tuning TOML; tables that pre-training has, too, are the same.

A recipe (``launchers/finetune_recipes/``) sets any of them per task; the command line comes last.
"""

from typing import Annotated, Self

from pydantic import Field, model_validator

from deberta_dist.config.schema import Optimizer, Parallel, Run, Schedule
from deberta_dist.config.section import (
    MOST_TOKENS,
    Count,
    CountOrNone,
    Few,
    Fraction,
    NotNegative,
    Section,
    Sequences,
    WholeFile,
)
from deberta_dist.values import AUTO, Attention, FineTuneStart, Recompute, SiftLoss


class TaskData(Section):
    """``[data]``: how rows become sequences (``deberta_dist/tasks/encoding.py``)."""

    max_seq_length: Annotated[int, Field(ge=16, le=MOST_TOKENS)] = 256
    """Tokens per sequence, [CLS] and [SEP] included."""
    window_overlap: CountOrNone = 64
    """Tokens that neighbouring windows of a long passage share; at most a quarter of max_seq_length."""
    max_windows: Few = 4
    """Windows of a passage at most; a longer one is read with gaps."""
    max_train_choices: Annotated[int, Field(ge=2, le=10_000)] = 8
    """Choices of a decision with many of its own that training compares, a right one among them; predictions compare all."""

    @model_validator(mode="after")
    def _windows_advance(self) -> Self:
        if self.window_overlap > self.max_seq_length // 4:
            raise ValueError(
                f"data.window_overlap = {self.window_overlap} is more than a quarter of data.max_seq_length = "
                f"{self.max_seq_length}"
            )
        return self


class FineTuning(Section):
    """``[training]``: batch sizes, length of the run, where it starts."""

    epochs: Annotated[float, Field(ge=1e-3, le=10_000)]
    """Passes over the training rows; need not be a whole number."""
    global_batch_size: Sequences
    """Decisions (rows, answers, queries) per optimizer step over all ranks."""
    micro_batch_size: Sequences = 8
    """Decisions that a rank computes at once; a row with choices is a sequence per choice, a long passage one per window."""
    seed: CountOrNone = 42
    """Decides a new classifier's weights, the order of the rows and dropout; further runs take the next numbers."""
    seeds: Few = 1
    """Runs of every task, each with its own seed."""
    classifier_dropout: Fraction | None = None
    """Dropout before the classifier; absent = the checkpoint's."""
    start: FineTuneStart = "init"
    """``intermediate``: with --intermediate, start from the model that it trained."""
    recompute: Recompute = "none"
    """Activations recomputed in the backward pass: none, whole layers (``full``), or the attention only (``selective``)."""
    attention: Attention = AUTO
    """Implementation of the attention: ``fused`` (Triton kernels for NVIDIA GPUs), ``portable`` (torch, any device) or
    ``reference`` (the formula, slow); a start is refused where it is not available. ``auto`` takes the fastest that is, with a
    warning on a GPU that does not use the fused one."""
    log_every_steps: Count = 10
    """Optimizer steps between two lines of metrics."""


class TaskEvaluation(Section):
    """``[evaluation]``: scores on the validation split while training; the best weights are saved."""

    per_epoch: Few = 1
    """Evaluations per epoch; one more follows the last step."""
    batch_size: Sequences = 32
    """Sequences per forward pass of a rank."""


class SiftSection(Section):
    """``[sift]``: adversarial training (``deberta_dist/finetuning/sift.py``); defaults are the published code's."""

    enabled: bool = False
    """``--sift`` on the command line is the same as true."""
    step_size: NotNegative = 1e-4
    """Step of the perturbation, in units of normalised embeddings (standard deviation 1)."""
    noise: NotNegative = 1e-2
    """Standard deviation of the initial perturbation."""
    num_steps: Few = 1
    """Inner passes."""
    weight: NotNegative = 5.0
    """Weight of the adversarial loss, added to the task's."""
    loss: SiftLoss = "symmetric_kl"
    """Loss between clean and perturbed predictions."""
    same_dropout: bool = False
    """Use one dropout mask for all passes instead of one per pass."""


class FineTuneRun(Run):
    """``[run]``: where the run writes and how DeepSpeed runs it."""

    keep_weights: bool = True
    """Write the best weights of every task and seed (float32, published names)."""
    keep_state: bool = True
    """With keep_weights, also the last weights and their moments, from which a run of more epochs continues: three times
    the size of the weights."""


class FineTuneConfig(WholeFile):
    """Everything a fine-tuning TOML says for one task. ``source`` names the file in messages."""

    data: TaskData = TaskData()
    training: FineTuning
    optimizer: Optimizer
    schedule: Schedule = Schedule()
    evaluation: TaskEvaluation = TaskEvaluation()
    sift: SiftSection = SiftSection()
    parallel: Parallel = Parallel()
    run: FineTuneRun

    @model_validator(mode="after")
    def _no_pipeline(self) -> Self:
        if self.parallel.pipeline_parallel_size != 1 or self.parallel.stages_per_rank != 1:
            raise ValueError(
                f"parallel.pipeline_parallel_size = {self.parallel.pipeline_parallel_size} must be 1: fine-tuning has "
                "tensor and data parallelism"
            )
        if self.parallel.sequence_parallel:
            raise ValueError("parallel.sequence_parallel = true must be false: fine-tuning has no sequence parallelism")
        return self
