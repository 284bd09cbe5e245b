"""One stage of one rank, run for real: what `memory` compares with the dry run's prediction."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.device_models import fill_, sum_in_float32
from deberta_dist.config import Data, Parallel
from deberta_dist.kernels import portable
from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.flops import forward_flops
from deberta_dist.models.fused_qkv import add_gradients_
from deberta_dist.models.masked_lm import DebertaForMaskedLM
from deberta_dist.models.presets import preset
from deberta_dist.models.targets import find_targets
from deberta_dist.parallel.layout import plan_layout
from deberta_dist.parallel.sharded_model import DEVICES_WHOSE_PRODUCTS_ADD
from deberta_dist.planning.activations import LiveBytes, StageCase, local_config, stage_activations
from deberta_dist.training.objectives.masked_lm import MaskedLMNetwork


@dataclass(frozen=True)
class MeasuredStage:
    """Layers of one pipeline stage, and what a tensor-parallel rank has of them."""

    config: DebertaConfig
    layers: range
    tensor_parallel_size: int


def stages(name: str, *, tensor: int, pipeline: int, shape: tuple[int, int]) -> list[MeasuredStage]:
    """The first, the second and the last stage of a layout, as a run has them.

    Raises:
        ConfigError: there is no such preset, or it cannot be cut like this.
    """
    config = preset(name)
    flops = forward_flops(config, max_seq_length=shape[1], micro_batch_size=shape[0], mask_probability=_mask_probability())
    parallel = Parallel(tensor_parallel_size=tensor, pipeline_parallel_size=pipeline, data_parallel_size=1)
    found = plan_layout(MaskedLMNetwork(config=config), parallel=parallel, flops=flops).stages
    chosen = sorted({0, min(1, pipeline - 1), pipeline - 1})
    return [MeasuredStage(config, found[index], tensor) for index in chosen]


def compare(
    stage: MeasuredStage, *, shape: tuple[int, int], recompute: str, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Bytes predicted and measured: saved from forward to backward, and at the peak, with the difference as a share."""
    targets = max(1, round(_mask_probability() * shape[1]))
    predicted = stage_activations(
        MaskedLMNetwork(config=stage.config),
        StageCase(
            layers=stage.layers,
            tensor_parallel_size=stage.tensor_parallel_size,
            batch_shape=shape,
            targets_per_sequence=targets,
            dtype=dtype,
            recompute=recompute,
        ),
    )
    model = _real_model(stage, device=device, dtype=dtype)
    model.recompute = recompute
    passes = _passes(model, stage, shape=shape, targets=targets)
    saved, peak = _allocated(passes, device) if device.type == "cuda" else _live(passes)
    predicted_saved = predicted.saved + predicted.logits
    predicted_peak = predicted_saved + predicted.working
    return {
        "predicted_kept_bytes": predicted_saved,
        "kept_bytes": saved,
        "kept_difference": predicted_saved / saved - 1,
        "predicted_peak_bytes": predicted_peak,
        "peak_bytes": peak,
        "peak_difference": predicted_peak / peak - 1,
    }


def _real_model(stage: MeasuredStage, *, device: torch.device, dtype: torch.dtype) -> DebertaForMaskedLM:
    """One rank's shapes with random weights, and gradients in place as in a run."""
    local = local_config(stage.config, tensor_parallel_size=stage.tensor_parallel_size)
    model = MaskedLMNetwork(config=local).meta_model().to(dtype)
    model.keep_layers(stage.layers)
    model.to_empty(device=device).train()
    fill_(model.named_parameters(), std=stage.config.initializer_range)
    sum_in_float32(model, products_add=device.type in DEVICES_WHOSE_PRODUCTS_ADD)
    model.deberta.encoder.relative_positions(device)  # saved for all micro-batches
    return model


def _passes(
    model: DebertaForMaskedLM, stage: MeasuredStage, *, shape: tuple[int, int], targets: int
) -> tuple[Callable[[], Tensor], Callable[[Tensor], None]]:
    """Forward and backward of one micro-batch; its inputs are there already."""
    like = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.config.vocab_size, shape, generator=generator)
    is_target = (torch.arange(shape[1]) < targets).expand(shape)
    found, ids = find_targets(is_target, ids).to(like.device), ids.to(like.device)
    mask = torch.ones_like(ids)
    mask[:, -1] = 0  # without padding a CPU leaves the mask out
    received, gradient = (
        torch.randn(*shape, stage.config.hidden_size, generator=generator).to(like.device, like.dtype) for _ in range(2)
    )

    def forward() -> Tensor:
        hidden: Tensor | None = None if stage.layers.start == 0 else received.detach().requires_grad_()
        return model.forward_stage(
            hidden, input_ids=ids, attention_mask=mask, targets=found, layers=stage.layers, dropout_key=1
        )

    def backward(output: Tensor) -> None:
        if stage.layers.stop == stage.config.num_hidden_layers:
            output[0, 0].backward()
        else:
            output.backward(gradient)
        if like.device.type in DEVICES_WHOSE_PRODUCTS_ADD:
            add_gradients_(model)

    return forward, backward


def _live(passes: tuple[Callable[[], Tensor], Callable[[Tensor], None]]) -> tuple[int, int]:
    forward, backward = passes
    gc.collect()
    with _chunks_as_on_a_gpu(), LiveBytes() as live:
        output = forward()
        saved = live.now
        backward(output)
    return saved, live.peak


def _allocated(passes: tuple[Callable[[], Tensor], Callable[[Tensor], None]], device: torch.device) -> tuple[int, int]:
    forward, backward = passes
    backward(forward())  # libraries take their workspaces, kernels are compiled
    gc.collect()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    output = forward()
    saved = torch.cuda.memory_allocated(device) - before
    backward(output)
    return saved, torch.cuda.max_memory_allocated(device) - before


@contextmanager
def _chunks_as_on_a_gpu() -> Iterator[None]:
    own = portable.CHUNK_BYTES.pop("cpu")
    try:
        yield
    finally:
        portable.CHUNK_BYTES["cpu"] = own


def _mask_probability() -> float:
    return Data.model_fields["mask_probability"].default
