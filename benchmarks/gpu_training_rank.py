"""The one rank that ``gpu_training`` compares: ``python -m benchmarks.gpu_training_rank FOLDER``.

Started with a launcher's variables; FOLDER holds ``plan.json`` and is where the rank leaves ``rank-0.json``.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.random_checkpoints import make_manifest
from deberta_dist.checkpoint.find import step_name
from deberta_dist.checkpoint.reader import CheckpointReader
from deberta_dist.checkpoint.writer import CheckpointWriter
from deberta_dist.config import Data, Model, Optimizer, Parallel, Run, RunConfig, Training
from deberta_dist.data.loader import Batch
from deberta_dist.models.attention_dispatch import describe_attention
from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.flops import forward_flops
from deberta_dist.models.presets import preset
from deberta_dist.operations.random_batch import masked_tokens
from deberta_dist.operations.ranks import store_settings
from deberta_dist.parallel.flat_layout import ShardState
from deberta_dist.parallel.layout import DTYPES, plan_layout
from deberta_dist.parallel.mesh import Mesh, make_mesh, start_process_group
from deberta_dist.training.build import build, mesh_shape, own_flat_layout
from deberta_dist.training.objectives.masked_lm import MaskedLMNetwork
from deberta_dist.training.resume import load_state
from deberta_dist.training.trainer import Trainer

PRESET, LENGTH, MICRO_BATCH_SIZE, MICRO_BATCHES, SEED = "tiny-v2", 64, 4, 2, 7
STEPS, SAVED = 4, 2
# With an eps far above the gradients AdamW's step is in proportion to them. With a small one it is their sign, of which a
# gradient near zero is a matter of rounding.
COMPARED = {"learning_rate": 1.0, "eps": 1.0}
RESUMED = {"learning_rate": 1e-3, "eps": 1e-6}


def model_config(*, hidden_dropout: float) -> DebertaConfig:
    """Heads of 64, as in every release: the fused attention takes them."""
    return preset(
        PRESET,
        hidden_size=128,
        num_attention_heads=2,
        attention_head_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        hidden_dropout_prob=hidden_dropout,
        attention_probs_dropout_prob=0.1,
    )


class Runs:
    """Trainers of one precision on this rank's device.

    Args:
        precision: "fp32" or "bf16", the compute dtype.
        device: The GPU, or the CPU that it is compared with.
    """

    def __init__(self, precision: str, *, device: torch.device) -> None:
        self.dtype, self._device = DTYPES[precision], device
        self._deepspeed = store_settings(1)
        if precision != "fp32":
            self._deepspeed[precision] = {"enabled": True}
        self._mesh: Mesh | None = None

    def trainer(
        self, config: DebertaConfig, *, learning_rate: float, eps: float, shards: list[ShardState] | None = None
    ) -> Trainer:
        """As ``training/pretrain.py`` builds it."""
        run = RunConfig(
            model=Model(preset=PRESET),
            data=Data(train="unused", validation="unused", tokenizer="unused", max_seq_length=LENGTH),
            training=Training(
                global_batch_size=MICRO_BATCH_SIZE * MICRO_BATCHES,
                micro_batch_size=MICRO_BATCH_SIZE,
                num_micro_batches=MICRO_BATCHES,
                max_steps=STEPS,
                seed=SEED,
            ),
            optimizer=Optimizer(learning_rate=learning_rate, eps=eps),
            parallel=Parallel(data_parallel_size=1),
            run=Run(directory="unused", deepspeed="unused"),
        )
        self._mesh = self._mesh or make_mesh(mesh_shape(run), device=self._device, timeout_minutes=run.run.timeout_minutes)
        flops = forward_flops(config, max_seq_length=LENGTH, micro_batch_size=MICRO_BATCH_SIZE, mask_probability=0.15)
        layout = plan_layout(MaskedLMNetwork(config=config), parallel=run.parallel, flops=flops)
        weights = None if shards is None else [shard.weight for shard in shards]
        parts = build(run, layout=layout, deepspeed_config=self._deepspeed, mesh=self._mesh, shards=weights)
        return Trainer(parts, mesh=self._mesh, seed=SEED)

    def compared(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Losses, norms, held-out losses, and what the steps change, by name; nothing here depends on the device.

        Dropout of hidden states draws from the device's own generator, so there is none; that of attention is the same
        everywhere.
        """
        config = model_config(hidden_dropout=0.0)
        trainer = self.trainer(config, **COMPARED)
        store = trainer.parts.sharded_model.store
        before = store.copy_weights()
        evaluations = [trainer.evaluate([batch(STEPS)]).loss]
        results = [trainer.step(batch(step), step=step, learning_rate=COMPARED["learning_rate"]) for step in range(STEPS)]
        evaluations.append(trainer.evaluate([batch(STEPS)]).loss)
        moved = [now - then for now, then in zip(store.copy_weights(), before, strict=True)]
        views = own_flat_layout(trainer.parts.layout, mesh=self._mesh).views(moved)
        store.close()
        found = {
            "losses": [result.loss for result in results],
            "norms": [result.grad_norm for result in results],
            "evaluations": evaluations,
            "attention": describe_attention("auto", config, dtype=self.dtype, device=self._device),
        }
        return found, {name: view.clone() for name, view in views.items()}

    def resumed_differs(self, folder: Path) -> list[str]:
        """What differs between an uninterrupted run and one resumed from its checkpoint; all dropout is on."""
        config, rate = model_config(hidden_dropout=0.1), RESUMED["learning_rate"]
        trainer = self.trainer(config, **RESUMED)
        layout, store = trainer.parts.layout, trainer.parts.sharded_model.store
        writer = CheckpointWriter(folder, rank=0)
        ends = []
        for step in range(STEPS):
            if step == SAVED:
                writer.begin(SAVED, shards=store.copy_shards(), token="gpu")
                state = writer.wait()
                assert state.status == "written", state.error
                shape = self._mesh.shape
                writer.commit(make_manifest(layout, shape=shape, step=SAVED, optimizer_steps=SAVED), keep_last=1)
            ends.append(trainer.step(batch(step), step=step, learning_rate=rate))
        last = [store.copy_shards(), ends[SAVED:], trainer.evaluate([batch(STEPS)])]
        store.close()

        reader = CheckpointReader(folder / step_name(SAVED))
        flats = own_flat_layout(layout, mesh=self._mesh)
        shards = reader.read_shards(flats, shape=self._mesh.shape, mesh_rank=self._mesh.mesh_rank)
        resumed = self.trainer(config, **RESUMED, shards=shards)
        load_state(resumed.parts.sharded_model, shards, manifest=reader.manifest)
        results = [resumed.step(batch(step), step=step, learning_rate=rate) for step in range(SAVED, STEPS)]
        store = resumed.parts.sharded_model.store
        again = [store.copy_shards(), results, resumed.evaluate([batch(STEPS)])]
        store.close()

        pairs = list(zip(last[0], again[0], strict=True))
        differs = [
            name
            for name in ("weight", "exp_avg", "exp_avg_sq")
            if not all(torch.equal(getattr(one, name), getattr(other, name)) for one, other in pairs)
        ]
        differs += ["losses and norms"] * (last[1] != again[1])
        return differs + ["evaluation"] * (last[2] != again[2])


def batch(step: int) -> Batch:
    """The micro-batches of a step: two documents in every sequence, padding at the end of the last one."""
    ids, labels = masked_tokens((MICRO_BATCH_SIZE * MICRO_BATCHES, LENGTH), vocab_size=512, num_targets=10, seed=1000 + step)
    mask = torch.ones_like(ids)
    mask[-1, LENGTH * 3 // 4 :] = 0
    documents = (1 + (torch.arange(LENGTH) >= LENGTH // 3).long()) * mask
    return Batch(input_ids=ids * mask, attention_mask=mask, labels=labels * mask, document_ids=documents)


def main(folder: Path) -> None:
    """Trains and writes what was found."""
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    # The convolution would round float32 to 10 bits on a GPU, which nothing else here does.
    torch.backends.cudnn.allow_tf32 = False
    device = start_process_group(timeout_minutes=plan["timeout_seconds"] / 60, init_method=f"file://{folder}/meeting")
    runs = Runs(plan["precision"], device=device)
    found, moved = runs.compared()
    torch.save(moved, plan["changes"])
    found["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    found["resumed_differs"] = runs.resumed_differs(folder / "checkpoints")
    (folder / "rank-0.json").write_text(json.dumps(found), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # nothing waits for a group's end


if __name__ == "__main__":
    main(Path(sys.argv[1]))
