"""Large checkpoints with random weights, for benchmarks; run as a process of its own.

python -m benchmarks.random_checkpoints v2-xxlarge DIRECTORY [--run]
"""

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor

from deberta_dist.checkpoint.manifest import Manifest, WrittenLayout
from deberta_dist.checkpoint.slices import tensor_table
from deberta_dist.checkpoint.writer import CheckpointWriter
from deberta_dist.config import Parallel
from deberta_dist.conversion.safetensors_files import write_safetensors
from deberta_dist.conversion.weights import Weight
from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.flops import forward_flops
from deberta_dist.models.presets import preset
from deberta_dist.parallel.flat_layout import ShardState
from deberta_dist.parallel.layout import Layout, flat_layouts, plan_layout
from deberta_dist.parallel.mesh import MeshShape
from deberta_dist.training.objectives.masked_lm import MaskedLMNetwork


def write_weights(config: DebertaConfig, directory: Path) -> None:
    """``config.json`` and ``model.safetensors``, one tensor in memory at a time."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    weights = {
        name: Weight(tuple(p.shape), torch.float32, lambda shape=tuple(p.shape): random_tensor(shape), (name,))
        for name, p in MaskedLMNetwork(config=config).meta_model().named_parameters()
    }
    with open(directory / "model.safetensors", "wb") as file:
        write_safetensors(file, weights)


def write_run(config: DebertaConfig, directory: Path) -> None:
    """A run's checkpoint as eight ranks write it, one rank in memory at a time; the moments are zero."""
    shape = MeshShape(pipeline=4, data=1, tensor=2)
    flops = forward_flops(config, max_seq_length=128, micro_batch_size=1, mask_probability=0.15)
    sizes = {"tensor_parallel_size": shape.tensor, "pipeline_parallel_size": shape.pipeline}
    layout = plan_layout(MaskedLMNetwork(config=config), parallel=Parallel(**sizes, data_parallel_size=shape.data), flops=flops)
    layouts = flat_layouts(layout, data_parallel_size=shape.data)
    writers = [CheckpointWriter(directory / "checkpoints", rank=rank) for rank in range(shape.world_size)]
    for rank, writer in enumerate(writers):
        here = shape.mesh_rank(rank)
        shards = [
            ShardState(random_tensor((size,)), torch.zeros(size), torch.zeros(size))
            for size in layouts[here.pipeline, here.tensor].sizes
        ]
        writer.begin(1, shards=shards, token="benchmark")
        state = writer.wait()
        assert state.status == "written", state.error
    writers[0].commit(make_manifest(layout, shape=shape, step=1), keep_last=1)


def make_manifest(layout: Layout, *, shape: MeshShape, step: int, optimizer_steps: int = 1) -> Manifest:
    """Manifest of a checkpoint of a layout, without a run's data."""
    layouts = flat_layouts(layout, data_parallel_size=shape.data)
    return Manifest(
        step=step,
        consumed_samples=step,
        optimizer_steps=optimizer_steps,
        seed=1,
        loss_scale=None,
        run_config={},
        model_config=layout.config.to_dict(),
        tokenizer_sha256="0" * 64,
        data_sha256={},
        precision="fp32",
        layout=WrittenLayout(tensor=shape.tensor, pipeline=shape.pipeline, data=shape.data, schedule="1f1b"),
        tensors=tensor_table(layouts, shape=shape, full_shapes=layout.full_shapes),
    )


def random_tensor(shape: tuple[int, ...]) -> Tensor:
    """Small numbers of random bits: a normal distribution costs ten times as much and is copied no differently."""
    bits = torch.randint(-(2**63), 2**63 - 1, ((math.prod(shape) + 1) // 2,)).view(torch.int32)
    return (bits[: math.prod(shape)].float() * 2.0**-36).view(shape)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--run", action="store_true", help="a run directory with one checkpoint")
    arguments = parser.parse_args()
    write = write_run if arguments.run else write_weights
    write(preset(arguments.preset), arguments.directory)


if __name__ == "__main__":
    main()
