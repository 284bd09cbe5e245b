"""Legal values of the keys that more than one room reads: each is spelled here, and nowhere else as a set.

The configuration checks keys against the types, command lines offer the tuples, the rooms that do the work refuse what is
not in them. Values of a key that one room alone knows are defined there.
"""

from typing import Final, Literal, get_args

AUTO: Final = "auto"
"""Follows from other keys, or is the best that this machine can do."""
Auto = Literal["auto"]

Recompute = Literal["none", "full", "selective"]
"""Activations: save all; save the input of each layer; save all but the attention's own intermediates."""
RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute)

Attention = Literal["auto", "fused", "portable", "reference"]
"""Who computes attention: whatever is fastest, or one of `kernels`' implementations."""
ATTENTION: tuple[Attention, ...] = get_args(Attention)

PipelineSchedule = Literal["1f1b", "gpipe", "interleaved_1f1b"]
"""Order of a pipeline's passes. Only the last has several stages a rank."""
SCHEDULES: tuple[PipelineSchedule, ...] = get_args(PipelineSchedule)
INTERLEAVED: Final = "interleaved_1f1b"

Precision = Literal["fp32", "bf16", "fp16"]
"""Of the passes, in DeepSpeed's words; master weights are float32."""
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

Offload = Literal["none", "cpu"]
"""Where DeepSpeed keeps optimizer states, in its own words."""
OFFLOAD: tuple[Offload, ...] = get_args(Offload)

MaskingMethod = Literal["official", "uniform"]
"""How tokens are chosen for masking: as the published code does, or every token with the same probability."""
MASKING_METHODS: tuple[MaskingMethod, ...] = get_args(MaskingMethod)

SiftLoss = Literal["symmetric_kl", "kl", "mse"]
"""What compares the predictions with and without perturbation; `finetuning.sift.LOSSES` has a function for each."""

OptimizerName = Literal["auto", "torch_adamw", "apex_fused_adam"]
"""Whose AdamW: apex's where it works and else torch's, or one by name."""

Resume = Literal["auto", "required", "never"]
"""Whether a run continues from its checkpoints: if there are any, it has to, it must not."""

FineTuneStart = Literal["init", "intermediate"]
"""Where a task's weights come from: the given checkpoint, or the model trained on the intermediate task."""

HeadKind = Literal["sequence", "choice", "token", "span"]
"""Heads of fine-tuning. Models build them, conversion names and counts their weights, a task says which it answers with."""

ConversionFormat = Literal["huggingface", "official", "deberta_dist", "onnx"]
"""What a checkpoint can be converted to."""
CONVERSION_FORMATS: tuple[ConversionFormat, ...] = get_args(ConversionFormat)
