"""One rank of the benchmark of optimizer steps.

Started by ``train.py`` as ``python -m benchmarks.train_rank FOLDER`` with a launcher's variables. FOLDER holds
``plan.json`` and is where the ranks meet and leave ``rank-N.json``.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import engines, peers
from benchmarks.device_models import fill_
from benchmarks.train import HUGGING_FACE, OURS, SAME_MODEL
from deberta_dist.config import Data, Model, Optimizer, Parallel, Run, RunConfig, Training
from deberta_dist.data.loader import Batch
from deberta_dist.models.attention_dispatch import describe_attention
from deberta_dist.models.flops import device_peak_flops, forward_flops
from deberta_dist.models.presets import preset
from deberta_dist.operations.random_batch import masked_batch
from deberta_dist.parallel.layout import Layout, plan_layout
from deberta_dist.parallel.mesh import Mesh, make_mesh, start_process_group
from deberta_dist.training.build import build, mesh_shape, own_flat_layout
from deberta_dist.training.objectives.masked_lm import MaskedLMNetwork
from deberta_dist.training.trainer import Trainer

SEED, LEARNING_RATE, MASK_PROBABILITY, WARM_UP_STEPS = 7, 1e-4, 0.15, 2


@dataclass(frozen=True)
class TrainingContestant:
    """A model in training on this rank.

    Attributes:
        loss: Returns the mean loss of the first batch without dropout (nats).
        step: Takes the optimizer step with the given number, from 0.
    """

    loss: Callable[[], float]
    step: Callable[[int], Any]


class ContestSetting:
    """Model, batches and settings that all contestants share.

    Args:
        plan: Arguments of ``train.py``, from ``plan.json``.
        device: This rank's GPU, or the CPU.
    """

    def __init__(self, plan: dict[str, Any], *, device: torch.device) -> None:
        self.plan, self.device = plan, device
        layers = {} if plan["layers"] is None else {"num_hidden_layers": plan["layers"]}
        self.model_config = preset(plan["preset"], **layers)
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.world_size = dist.get_world_size()
        self.rows_of_rank = plan["micro_batch_size"] * plan["micro_batches"]

    @property
    def tokens(self) -> int:
        """Tokens of a step over all ranks; the data-parallel size of our layout decides the number of rows."""
        return self.rows_of_rank * self.replicas * self.plan["length"]

    @property
    def replicas(self) -> int:
        """Data-parallel size of our layout; the peers' ranks divide the same rows."""
        return self.plan["layout"][2]

    def json_config(self, *, batch: int, micro_batch: int, accumulation: int) -> dict[str, Any]:
        """DeepSpeed's JSON."""
        return {
            "train_batch_size": batch,
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 3},
            "bf16": {"enabled": self.dtype == torch.bfloat16},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }

    def batch(self, step: int, *, part: int, parts: int) -> Batch:
        """Rows of one of ``parts`` ranks that share a step."""
        sequences, length = self.rows_of_rank * self.replicas, self.plan["length"]
        return masked_batch(
            (sequences, length),
            vocab_size=self.model_config.vocab_size,
            num_targets=max(round(MASK_PROBABILITY * length), 1),
            seed=1000 + step,
            rows=slice(part * sequences // parts, (part + 1) * sequences // parts),
        )


def ours(setting: ContestSetting) -> TrainingContestant:
    """As ``training/pretrain.py`` builds it. Collective."""
    plan = setting.plan
    tensor, pipeline, data, is_sequence = plan["layout"]
    config = RunConfig(
        model=Model(preset=plan["preset"]),
        data=Data(train="unused", validation="unused", tokenizer="unused", max_seq_length=plan["length"]),
        training=Training(
            global_batch_size=setting.rows_of_rank * data,
            micro_batch_size=plan["micro_batch_size"],
            num_micro_batches=plan["micro_batches"],
            max_steps=1000,
            seed=SEED,
            recompute=plan["recompute"],
            compile=plan["compile"],
            attention=plan["attention"],
        ),
        optimizer=Optimizer(learning_rate=LEARNING_RATE),
        parallel=Parallel(
            tensor_parallel_size=tensor,
            pipeline_parallel_size=pipeline,
            data_parallel_size=data,
            sequence_parallel=is_sequence,
        ),
        run=Run(directory="unused", deepspeed="unused"),
    )
    mesh = make_mesh(mesh_shape(config), device=setting.device, timeout_minutes=config.run.timeout_minutes)
    layout = plan_layout(MaskedLMNetwork(config=setting.model_config), parallel=config.parallel, flops=flops(setting))
    json_config = setting.json_config(batch=data, micro_batch=1, accumulation=1)
    shards = device_shards(layout, mesh=mesh) if plan["device_weights"] else None
    parts = build(config, layout=layout, deepspeed_config=json_config, mesh=mesh, shards=shards)
    del shards
    trainer = Trainer(parts, mesh=mesh, seed=SEED)

    def batch(step: int) -> Batch:
        return setting.batch(step, part=mesh.mesh_rank.data, parts=data)

    return TrainingContestant(
        loss=lambda: trainer.evaluate([batch(0)]).loss,
        step=lambda step: trainer.step(batch(step), step=step, learning_rate=LEARNING_RATE),
    )


def device_shards(layout: Layout, *, mesh: Mesh) -> list[Tensor]:
    """This rank's shards of random weights drawn on its device."""
    flats = own_flat_layout(layout, mesh=mesh)
    whole = [torch.zeros(size, device=mesh.device) for size in flats.sizes]
    fill_(flats.views(whole).items(), std=layout.config.initializer_range)
    return [flat.view(mesh.shape.data, -1)[mesh.mesh_rank.data] for flat in whole]


def deepspeed(setting: ContestSetting, *, of_hugging_face: bool) -> TrainingContestant:
    """DeepSpeed's engine around the plain model, or around theirs; data parallel over all ranks. Collective."""
    plan, ranks = setting.plan, setting.world_size
    model = engines.LossOnly(setting.model_config, seed=SEED)
    if of_hugging_face:
        model = engines.HuggingFaceLoss(peers.hugging_face_masked_lm(setting.model_config, model.state_dict()))
    rows, micro_batch = setting.rows_of_rank * setting.replicas // ranks, plan["micro_batch_size"]
    micro_batch = min(micro_batch, rows)
    settings = setting.json_config(batch=rows * ranks, micro_batch=micro_batch, accumulation=rows // micro_batch)
    engine = engines.zero3_engine(model, settings, learning_rate=LEARNING_RATE)

    def tensors(step: int) -> tuple[Tensor, Tensor, Tensor]:
        batch = setting.batch(step, part=dist.get_rank(), parts=ranks)
        return tuple(x.to(setting.device) for x in (batch.input_ids, batch.attention_mask, batch.labels))

    @torch.no_grad()
    def loss() -> float:
        engine.eval()
        ids, mask, labels = tensors(0)
        parts = [slice(first, first + micro_batch) for first in range(0, rows, micro_batch)]
        found = torch.stack([engine(ids[part], mask[part], labels[part]) for part in parts]).mean()
        engine.train()
        return found.item()

    return TrainingContestant(
        loss=loss, step=lambda step: engines.take_step(engine, *tensors(step), micro_batch_size=micro_batch)
    )


def flops(setting: ContestSetting) -> Any:
    """FLOPs of the model per token."""
    return forward_flops(
        setting.model_config,
        max_seq_length=setting.plan["length"],
        micro_batch_size=setting.plan["micro_batch_size"],
        mask_probability=MASK_PROBABILITY,
    )


def main(folder: Path) -> None:
    """Runs what ``plan.json`` asks for and writes the times."""
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    device = start_process_group(timeout_minutes=plan["timeout_seconds"] / 60, init_method=f"file://{folder}/meeting")
    setting = ContestSetting(plan, device=device)
    makers = {
        # DeepSpeed first: its globals keep the groups of an engine that was given an ``mpu``, as ours is.
        SAME_MODEL: lambda: deepspeed(setting, of_hugging_face=False),
        HUGGING_FACE: lambda: deepspeed(setting, of_hugging_face=True),
        OURS: lambda: ours(setting),
    }
    contestants = {name: make() for name, make in makers.items() if name in plan["contestants"]}
    losses = {name: contestant.loss() for name, contestant in contestants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    peaks = dict.fromkeys(contestants, 0)
    for step in range(WARM_UP_STEPS + plan["rounds"]):
        for name, contestant in contestants.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            dist.barrier()
            begun = time.monotonic()
            contestant.step(step)
            if device.type == "cuda":
                torch.cuda.synchronize()
                peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated())
            if step >= WARM_UP_STEPS:
                seconds[name].append(time.monotonic() - begun)
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    found = {
        "attention": describe_attention(plan["attention"], setting.model_config, dtype=setting.dtype, device=device),
        "losses": losses,
        "seconds": seconds,
        "peak_bytes": peaks,
        "tokens": setting.tokens,
        "layers": setting.model_config.num_hidden_layers,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "device": device_name,
        "device_type": device.type,
        "flops_per_token": flops(setting).training,
        "peak_flops": device_peak_flops(device_name),
    }
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # as in ``scale_rank``: a rank that closes its connections early looks like a dead one to the others


if __name__ == "__main__":
    main(Path(sys.argv[1]))
