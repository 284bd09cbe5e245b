"""What the ranks of the parity tests do, and the one plain process they are compared with."""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from deberta_dist import DebertaConfig, DebertaForMaskedLM
from deberta_dist.config import Data, Model, Optimizer, Parallel, Run, RunConfig, Training
from deberta_dist.data.loader import Batch
from deberta_dist.models.flops import forward_flops
from deberta_dist.parallel import sharded_model
from deberta_dist.parallel.layout import plan_layout
from deberta_dist.parallel.mesh import make_mesh, start_process_group
from deberta_dist.parallel.network import is_decayed
from deberta_dist.training.build import build, mesh_shape
from deberta_dist.training.export import gather_full_weights
from deberta_dist.training.objectives.masked_lm import MaskedLMNetwork
from deberta_dist.training.step_batch import StepBatch, pack
from deberta_dist.training.target_sizes import TargetSizes
from deberta_dist.training.trainer import Trainer

LENGTH = 24
LEARNING_RATE = 1e-3
SEED = 7

DEEPSPEED = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


@dataclass(frozen=True)
class Case:
    """One layout on one small model.

    Attributes:
        tensor, pipeline, data: Parallel sizes.
        micro_batches: Per pipeline; the global batch is micro_batch_size x micro_batches x data.
        clipping: Small enough to be active in every step.
        documents: Sequences hold several documents, which do not see each other.
        sequence: Sequence parallelism.
        attention_dropout: Of probabilities, which is drawn per tensor rank; None as ``dropout``.
        buckets: Lengths of sequences, ending with ``LENGTH``: a step of each in turn, as many tokens in all of them.
        as_on_a_gpu: Products add weights' gradients, and targets are padded to few sizes.
        decoder: How the masked language model decodes.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    micro_batches: int = 2
    micro_batch_size: int = 2
    schedule: str = "1f1b"
    stages_per_rank: int = 1
    layers_per_stage: Any = "auto"
    dropout: float = 0.0
    recompute: str = "none"
    vocabulary_chunks: int = 1
    compile: bool = False
    precision: str = "fp32"
    steps: int = 5
    clipping: float = 0.05
    model: str = "v2"
    num_layers: int = 5
    offload: bool = False
    documents: bool = False
    buckets: tuple[int, ...] = (LENGTH,)
    sequence: bool = False
    attention_dropout: float | None = None
    as_on_a_gpu: bool = False
    decoder: str = "emd"

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def global_batch_size(self) -> int:
        return self.micro_batch_size * self.micro_batches * self.data

    def model_config(self) -> DebertaConfig:
        common = {
            "vocab_size": 203,  # divides by nothing: padding is always at work
            "hidden_size": 32,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": 32,
            "relative_attention": True,
            "position_biased_input": False,
            "decoder": self.decoder,
            "pos_att_type": "p2c|c2p",
            "hidden_dropout_prob": self.dropout,
            "attention_probs_dropout_prob": self.dropout if self.attention_dropout is None else self.attention_dropout,
        }
        if self.model == "v2":
            common |= {
                "position_buckets": 8,
                "share_att_key": True,
                "norm_rel_ebd": "layer_norm",
                "conv_kernel_size": 3,
                "conv_act": "gelu",
            }
        return DebertaConfig.from_dict(common)

    def run_config(self) -> RunConfig:
        return RunConfig(
            model=Model(preset="unused"),
            data=Data(
                train="unused", validation="unused", tokenizer="unused", max_seq_length=LENGTH, bucket_lengths=self.buckets
            ),
            training=Training(
                global_batch_size=self.global_batch_size,
                micro_batch_size=self.micro_batch_size,
                num_micro_batches=self.micro_batches,
                max_steps=self.steps,
                seed=SEED,
                recompute=self.recompute,
                vocabulary_chunks=self.vocabulary_chunks,
                compile=self.compile,
            ),
            optimizer=Optimizer(learning_rate=LEARNING_RATE, gradient_clipping=self.clipping),
            parallel=Parallel(
                tensor_parallel_size=self.tensor,
                sequence_parallel=self.sequence,
                pipeline_parallel_size=self.pipeline,
                data_parallel_size=self.data,
                schedule=self.schedule,
                stages_per_rank=self.stages_per_rank,
                layers_per_stage=self.layers_per_stage,
            ),
            run=Run(directory="unused", deepspeed="unused"),
        )


def global_batch(case: Case, step: int) -> Batch:
    """The whole batch of a step; the last sequence is padded and the number of targets differs per sequence."""
    generator = torch.Generator().manual_seed(1000 + step)
    length = case.buckets[step % len(case.buckets)]
    shape = (case.global_batch_size * LENGTH // length, length)
    ids = torch.randint(4, 203, shape, generator=generator)
    is_target = torch.rand(shape, generator=generator) < torch.linspace(0.05, 0.4, shape[0])[:, None]
    mask = torch.ones(shape, dtype=torch.int64)
    mask[-1, length // 2 :] = 0
    labels = torch.where(is_target & (mask > 0), ids, 0)
    documents = None
    if case.documents:
        is_first = torch.rand(shape, generator=generator) < 0.15
        documents = (1 + is_first.cumsum(dim=1)) * mask
    return Batch(input_ids=torch.where(labels > 0, 202, ids) * mask, attention_mask=mask, labels=labels, document_ids=documents)


def rows(batch: Batch, start: int, stop: int) -> Batch:
    return Batch(
        input_ids=batch.input_ids[start:stop],
        attention_mask=batch.attention_mask[start:stop],
        labels=batch.labels[start:stop],
        document_ids=None if batch.document_ids is None else batch.document_ids[start:stop],
    )


def deepspeed_settings(case: Case) -> dict[str, Any]:
    settings = {**DEEPSPEED, "train_batch_size": case.data, "gradient_clipping": case.clipping}
    settings["zero_optimization"] = dict(DEEPSPEED["zero_optimization"])
    if case.precision != "fp32":
        settings[case.precision] = {"enabled": True}
    if case.offload:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    return settings


def make_trainer(case: Case) -> Trainer:
    """Everything a rank builds, from the process group on."""
    if case.as_on_a_gpu:
        sharded_model.DEVICES_WHOSE_PRODUCTS_ADD = ("cpu",)  # in this rank's process
    device = start_process_group(timeout_minutes=3, init_method=f"file://{os.environ['RENDEZVOUS_FILE']}")
    config, model_config = case.run_config(), case.model_config()
    flops = forward_flops(model_config, max_seq_length=LENGTH, micro_batch_size=case.micro_batch_size, mask_probability=0.15)
    layout = plan_layout(MaskedLMNetwork(config=model_config), parallel=config.parallel, flops=flops)
    mesh = make_mesh(mesh_shape(config), device=device, timeout_minutes=3)
    parts = build(config, layout=layout, deepspeed_config=deepspeed_settings(case), mesh=mesh)
    return Trainer(parts, mesh=mesh, seed=SEED)


def own_batch(case: Case, step: int) -> Batch | StepBatch:
    """The rows of this data-parallel rank; packed with padded targets as on a GPU."""
    batch = _own_rows(case, step)
    if not case.as_on_a_gpu:
        return batch
    sizes = {(case.micro_batch_size * LENGTH // length, length): [length] * 64 for length in case.buckets}
    sizes = TargetSizes(sizes)
    packed = pack(batch, num_micro_batches=case.micro_batches, device=torch.device("cpu"), sizes=sizes)
    assert all(targets.is_padded for targets in packed.targets)
    return packed


def _own_rows(case: Case, step: int) -> Batch:
    batch = global_batch(case, step)
    per_rank = len(batch.labels) // case.data
    data = mesh_shape(case.run_config()).mesh_rank(dist.get_rank()).data
    return rows(batch, data * per_rank, (data + 1) * per_rank)


def train(case: Case) -> dict[str, Any]:
    """Trains on this rank; returns losses, norms and (on rank 0) full gradients of step 0 and final weights."""
    trainer = make_trainer(case)
    model = trainer.parts.sharded_model
    gradients: dict[str, torch.Tensor] = {}
    collect = model.reduce_ties

    def collect_and_remember() -> None:
        collect()
        if not gradients:
            scale = trainer.parts.sharded_model.store.loss_scale * case.data
            gradients.update({n: g.detach().clone() / scale for n, g in model._owned_gradients.items()})

    model.reduce_ties = collect_and_remember
    history = []
    for step in range(case.steps):
        result = trainer.step(own_batch(case, step), step=step, learning_rate=LEARNING_RATE)
        history.append((result.loss, result.grad_norm))
    for _name, gradient in gradients.items():
        dist.all_reduce(gradient, group=trainer._mesh.groups["data"])
    weights = gather_full_weights(trainer.parts.sharded_model, layout=trainer.parts.layout, mesh=trainer._mesh)
    full_gradients = gather_full_weights(
        trainer.parts.sharded_model, layout=trainer.parts.layout, mesh=trainer._mesh, owned=gradients
    )
    return {
        "history": history,
        "weights": {n: w.numpy() for n, w in weights.items()},
        "gradients": {n: g.numpy() for n, g in full_gradients.items()},
        "resident": model.store.resident_bytes(),
    }


def train_plain(case: Case) -> dict[str, Any]:
    """The same training by one process of plain PyTorch: the oracle."""
    torch.set_num_threads(1)
    model = DebertaForMaskedLM(case.model_config(), seed=SEED)
    model.train()
    named = list(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in named if is_decayed(n)], "weight_decay": 0.01},
            {"params": [p for n, p in named if not is_decayed(n)], "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        betas=(0.9, 0.999),
        eps=1e-6,
    )
    history, gradients = [], {}
    for step in range(case.steps):
        batch = global_batch(case, step)
        optimizer.zero_grad()
        loss = model(batch.input_ids, batch.attention_mask, batch.labels, document_ids=batch.document_ids).loss
        loss.backward()
        if step == 0:
            gradients = {n: p.grad.numpy().copy() for n, p in named}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), case.clipping)
        optimizer.step()
        history.append((loss.item(), norm.item()))
    return {
        "history": history,
        "weights": {n: p.detach().numpy().copy() for n, p in named},
        "gradients": gradients,
    }


def relative_error(value: np.ndarray, reference: np.ndarray) -> float:
    """Norm of the difference over the norm of the reference."""
    return float(np.linalg.norm(value - reference) / max(np.linalg.norm(reference), 1e-30))
