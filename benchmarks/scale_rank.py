"""One rank of the communication benchmark: small models in many layouts, counted, and DeepSpeed's own engine.

Started by ``scale.py`` as ``python -m benchmarks.scale_rank FOLDER`` with a launcher's variables. FOLDER
holds ``plan.json`` and is where the ranks meet and leave ``rank-N.json``.
"""

import gc
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.engines import LossOnly, take_step, zero3_engine
from benchmarks.traffic import Traffic
from deberta_dist.config import Data, Model, Optimizer, Parallel, Run, RunConfig, Training
from deberta_dist.data.loader import Batch
from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.flops import forward_flops
from deberta_dist.models.presets import preset
from deberta_dist.operations.random_batch import masked_batch
from deberta_dist.operations.ranks import store_settings
from deberta_dist.parallel.layout import Layout, plan_layout
from deberta_dist.parallel.mesh import make_mesh, start_process_group
from deberta_dist.planning.memory import expected_targets
from deberta_dist.training.build import build, mesh_shape
from deberta_dist.training.objectives.masked_lm import MaskedLMNetwork
from deberta_dist.training.trainer import Trainer

SEED, LENGTH, MICRO_BATCH_SIZE, LEARNING_RATE = 7, 16, 1, 1e-3
# DeepSpeed records its order of modules in the first step and compares it between ranks in the second.
WARM_UP_STEPS = 2
# Elements: how far DeepSpeed looks ahead and what it keeps, by default.
WINDOWS = {
    "stage3_max_reuse_distance": 1e9,
    "stage3_max_live_parameters": 1e9,
    "stage3_prefetch_bucket_size": 5e7,
}


@dataclass(frozen=True)
class TrafficCase:
    """One layout and number of micro-batches; sequence parallelism splits what the tensor ranks would all hold."""

    tensor: int
    pipeline: int
    data: int
    micro_batches: int
    sequence_parallel: bool = False

    @property
    def layout(self) -> str:
        """``tensor x pipeline x data``, as on the command line; ``+sp`` with sequence parallelism."""
        return f"{self.tensor}x{self.pipeline}x{self.data}{'+sp' if self.sequence_parallel else ''}"


@dataclass(frozen=True)
class Counted:
    """What one rank sent in one optimizer step.

    Attributes:
        bytes_by_kind: Kind of communication (``scale.KINDS``) -> bytes, counted by ``Traffic``.
        first_loss: Mean over the targets of the first step (nats): of all ranks, or (DeepSpeed's engine) of this one.
    """

    bytes_by_kind: dict[str, int]
    first_loss: float


def model_config() -> DebertaConfig:
    """Eight heads and layers, so that any axis can have eight ranks; no dropout, so that losses can be compared."""
    return preset(
        "tiny-v2",
        num_attention_heads=8,
        num_hidden_layers=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def run_config(case: TrafficCase) -> RunConfig:
    """The resolved configuration of a case."""
    return RunConfig(
        model=Model(preset="tiny-v2"),
        data=Data(train="unused", validation="unused", tokenizer="unused", max_seq_length=LENGTH),
        training=Training(
            global_batch_size=MICRO_BATCH_SIZE * case.micro_batches * case.data,
            micro_batch_size=MICRO_BATCH_SIZE,
            num_micro_batches=case.micro_batches,
            max_steps=WARM_UP_STEPS + 1,
            seed=SEED,
        ),
        optimizer=Optimizer(learning_rate=LEARNING_RATE),
        parallel=Parallel(
            tensor_parallel_size=case.tensor,
            pipeline_parallel_size=case.pipeline,
            data_parallel_size=case.data,
            sequence_parallel=case.sequence_parallel,
        ),
        run=Run(directory="unused", deepspeed="unused"),
    )


def layout_of(case: TrafficCase) -> Layout:
    """Who holds what.

    Raises:
        ConfigError: the model cannot be cut like this.
    """
    config = model_config()
    flops = forward_flops(config, max_seq_length=LENGTH, micro_batch_size=MICRO_BATCH_SIZE, mask_probability=0.15)
    return plan_layout(MaskedLMNetwork(config=config), parallel=run_config(case).parallel, flops=flops)


def own_batch(case: TrafficCase, *, step: int, replica: int) -> Batch:
    """The micro-batches of one replica, stacked; every sequence has the expected number of targets."""
    per_replica = MICRO_BATCH_SIZE * case.micro_batches
    return masked_batch(
        (per_replica * case.data, LENGTH),
        vocab_size=model_config().vocab_size,
        num_targets=expected_targets(run_config(case)),
        seed=1000 + step,
        rows=slice(replica * per_replica, (replica + 1) * per_replica),
    )


def count_ours(case: TrafficCase, *, device: torch.device) -> Counted:
    """Builds a layout, as training does, and counts one step of it. Collective."""
    config, json_config = run_config(case), store_settings(case.data)
    mesh = make_mesh(mesh_shape(config), device=device, timeout_minutes=config.run.timeout_minutes)
    parts = build(config, layout=layout_of(case), deepspeed_config=json_config, mesh=mesh)
    trainer = Trainer(parts, mesh=mesh, seed=SEED)

    def take(step: int) -> float:
        batch = own_batch(case, step=step, replica=mesh.mesh_rank.data)
        return trainer.step(batch, step=step, learning_rate=LEARNING_RATE).loss

    counted = _count(take)
    parts.sharded_model.store.close()
    return counted


def count_deepspeed(case: TrafficCase, *, parameters: float | None) -> Counted:
    """One step of DeepSpeed's ZeRO-3 engine around the plain model, data parallel, accumulating gradients. Collective.

    Args:
        case: Tensor and pipeline sizes are 1.
        parameters: Size of a model to which DeepSpeed's default windows have the proportion that those used here have
            to this one; None takes the defaults, which hold all of it.
    """
    assert case.tensor == case.pipeline == 1
    settings = store_settings(case.data)
    settings["train_batch_size"] = MICRO_BATCH_SIZE * case.micro_batches * case.data
    settings["train_micro_batch_size_per_gpu"] = MICRO_BATCH_SIZE
    settings["gradient_accumulation_steps"] = case.micro_batches
    model = LossOnly(model_config(), seed=SEED)
    if parameters is not None:
        share = sum(parameter.numel() for parameter in model.parameters()) / parameters
        settings["zero_optimization"] |= {key: round(value * share) for key, value in WINDOWS.items()}
    engine = zero3_engine(model, settings, learning_rate=LEARNING_RATE)

    def take(step: int) -> float:
        batch = own_batch(case, step=step, replica=dist.get_rank())
        return take_step(engine, batch.input_ids, batch.attention_mask, batch.labels, micro_batch_size=MICRO_BATCH_SIZE)

    counted = _count(take)
    engine.destroy()
    return counted


def _count(take: Callable[[int], float]) -> Counted:
    losses = [take(step) for step in range(WARM_UP_STEPS)]
    with Traffic() as traffic:
        take(WARM_UP_STEPS)
    return Counted(bytes_by_kind=dict(traffic.bytes_by_kind), first_loss=losses[0])


def main(folder: Path) -> None:
    """Counts what ``plan.json`` lists and writes it."""
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    device = start_process_group(timeout_minutes=plan["timeout_seconds"] / 60, init_method=f"file://{folder}/meeting")
    found: dict[str, list[dict[str, Any]]] = {"deepspeed": [], "ours": []}
    # DeepSpeed first: it remembers the groups of an engine that had a grid.
    for one in plan["deepspeed"]:
        print(f"counting DeepSpeed {one}", flush=True)
        found["deepspeed"].append(asdict(count_deepspeed(TrafficCase(**one["case"]), parameters=one["parameters"])))
        gc.collect()
    for one in plan["ours"]:
        print(f"counting {one}", flush=True)
        found["ours"].append(asdict(count_ours(TrafficCase(**one), device=device)))
        gc.collect()
    rank = dist.get_rank()
    (folder / f"rank-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    # No shutdown: a rank that closes its connections early would look like a dead one to the others.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
