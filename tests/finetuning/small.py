"""A small checkpoint, settings for it, and what the ranks of the fine-tuning tests do."""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from deberta_dist import DebertaConfig, DebertaForMaskedLM
from deberta_dist.data.tokenizer import train_tokenizer
from deberta_dist.finetuning.arguments import parse
from deberta_dist.finetuning.batches import batch_key, collate, dealt
from deberta_dist.finetuning.finetuner import FineTuner, decision_loss
from deberta_dist.finetuning.plan import TaskPlan, make_plans
from deberta_dist.finetuning.sift import Sift
from deberta_dist.finetuning.starting_point import StartingPoint, open_starting_point
from deberta_dist.models.classification import DebertaForSequenceClassification
from deberta_dist.parallel.layout import meta_classifier
from deberta_dist.parallel.mesh import Mesh, make_mesh, start_process_group
from deberta_dist.parallel.network import is_decayed
from deberta_dist.preparation.reading.texts import read_texts
from deberta_dist.training.build import build_sharded_model, mesh_shape, shards_of
from deberta_dist.training.export import gather_full_weights, write_weights

ROOT = Path(__file__).parents[2]
DATA = ROOT / "launchers" / "demo_superglue"
TOML = """
[optimizer]
gradient_clipping = 0.05
[run]
directory = "run"
deepspeed = "deepspeed.json"
timeout_minutes = 3
"""
CLIPPING = 0.05  # active in every step
NAMES = "MNLI RTE CB COPA WSC BoolQ WiC MultiRC ReCoRD".split()
RECIPES = """
[default]
training.seed = 7
training.epochs = 2
optimizer.learning_rate = 1e-3
training.global_batch_size = 12
training.micro_batch_size = 3
training.classifier_dropout = 0.0
data.max_seq_length = 48
data.window_overlap = 8
data.max_windows = 2
data.max_train_choices = 3
[RTE]
training.start = "intermediate"
""" + "".join(f"[{name}]\n" for name in NAMES if name != "RTE")


def write_start(directory: Path, *, dropout: float, hidden_size: int = 32, vocab_size: int = 700) -> Path:
    """A masked language model at random with its tokenizer, under ``dropout-RATE/``; settings beside it."""
    model_file = directory / "spm.model"
    if not model_file.exists():
        train_tokenizer(read_texts([ROOT / "launchers" / "demo_text" / "valid.jsonl"]), model_file, vocab_size=vocab_size)
        (directory / "finetune.toml").write_text(TOML)
        (directory / "recipes.toml").write_text(RECIPES)
        (directory / "deepspeed.json").write_text('{"zero_optimization": {"stage": 3}}')
    config = DebertaConfig.from_dict(
        {
            "vocab_size": vocab_size + 3,
            "hidden_size": hidden_size,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 2 * hidden_size,
            "max_position_embeddings": 64,
            "relative_attention": True,
            "position_biased_input": False,
            "pos_att_type": "p2c|c2p",
            "position_buckets": 8,
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "conv_kernel_size": 3,
            "conv_act": "gelu",
            "hidden_dropout_prob": dropout,
            "attention_probs_dropout_prob": dropout,
            "initializer_range": 0.2,  # small ones hardly tell choices apart: gradients of the size of rounding
        }
    )
    weights = {n: p.detach().clone() for n, p in DebertaForMaskedLM(config, seed=3).named_parameters()}
    return write_weights(weights, config=config.to_dict(), tokenizer=model_file, directory=directory / f"dropout-{dropout:g}")


@dataclass(frozen=True)
class Case:
    """One task on one layout.

    Attributes:
        steps: Two: the second has moments and weights that the first has made.
        predicts: Predictions for the validation rows before and after the steps, too.
    """

    task: str
    tensor: int = 1
    data: int = 1
    sift: bool = False
    dropout: float = 0.0
    steps: int = 2
    predicts: bool = False
    overrides: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        return self.tensor * self.data

    def plan(self, directory: Path) -> tuple[TaskPlan, StartingPoint]:
        """Through the same door as the launcher."""
        words = ["--task", self.task, "--data", str(DATA), "--init", str(directory / f"dropout-{self.dropout:g}")]
        words += ["--recipe", str(directory / "recipes.toml"), "--parallel.tensor_parallel_size", str(self.tensor)]
        arguments = parse([*words, *(["--sift"] if self.sift else []), *self.overrides])
        start = open_starting_point(arguments.init, tokenizer=None, verify=True)
        (plan,) = make_plans(arguments, toml=directory / "finetune.toml", start=start, world_size=self.world_size)
        return plan, start


def make_tuner(plan: TaskPlan, start: StartingPoint) -> tuple[FineTuner, Mesh]:
    """Everything a rank builds, from the process group on."""
    device = start_process_group(timeout_minutes=3, init_method=f"file://{os.environ['RENDEZVOUS_FILE']}")
    mesh = make_mesh(mesh_shape(plan.config), device=device, timeout_minutes=3)
    load = start.reader(plan.layout.full_shapes, labels=plan.labels, seed=7)
    model = build_sharded_model(
        meta_classifier(plan.model_config, num_outputs=plan.task.num_outputs),
        layout=plan.layout,
        optimizer=plan.config.optimizer,
        deepspeed_config=plan.deepspeed,
        mesh=mesh,
        shards=shards_of(plan.layout, mesh=mesh, load=load),
    )
    ids = {"pad_id": start.tokenizer.pad_id, "sep_id": start.tokenizer.sep_id}
    return FineTuner(model, mesh=mesh, sift=plan.sift, seed=7, **ids), mesh


def train(case: Case, directory: Path) -> dict[str, Any]:
    """Some steps on this rank: (loss, adversarial loss, norm) of each, collectives, final weights, predictions."""
    plan, start = case.plan(directory)
    tuner, mesh = make_tuner(plan, start)
    order, features = plan.order(7), plan.features
    before = tuner.predict(features["val"], batch_size=3) if case.predicts else None
    history, traffic = [], Counter()
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce", "broadcast", "reduce"):
        count_calls(name, traffic)
    for step in range(case.steps):
        picks = order.micro_batches(step)
        own = dealt(len(picks), rank=mesh.mesh_rank.data, size=mesh.shape.data)
        pad = {"pad_id": start.tokenizer.pad_id, "sep_id": start.tokenizer.sep_id}
        batches = [(i, collate(features["train"], picks[i], **pad)) for i in own]
        result = tuner.step(batches, num_decisions=sum(map(len, picks)), step=step, learning_rate=1e-3)
        history.append((result.loss, result.sift_loss or 0.0, result.grad_norm))
    traffic = dict(traffic)
    after = tuner.predict(features["val"], batch_size=5) if case.predicts else None
    weights = gather_full_weights(tuner.model, layout=plan.layout, mesh=mesh)
    dist.barrier()
    weights = {n: w.numpy() for n, w in weights.items()}
    return {"history": history, "weights": weights, "before": before, "after": after, "traffic": traffic}


def count_calls(name: str, traffic: Counter) -> None:
    """Counts the collectives of that name that this process starts, DeepSpeed's included."""
    original = getattr(dist, name)

    def counted(*arguments: Any, **options: Any) -> Any:
        traffic[name] += 1
        return original(*arguments, **options)

    for module in (dist, dist.distributed_c10d):
        setattr(module, name, counted)


def train_plain(case: Case, directory: Path) -> dict[str, Any]:
    """The same by one process of plain PyTorch: the oracle."""
    torch.set_num_threads(1)
    plan, start = Case(case.task, sift=case.sift, dropout=case.dropout, overrides=case.overrides).plan(directory)
    model = DebertaForSequenceClassification(plan.model_config, num_labels=plan.task.num_outputs)
    model.deberta.embeddings.position_embeddings = None
    load = start.reader(plan.layout.full_shapes, labels=plan.labels, seed=7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(load(name))
    model.train()
    named = list(model.named_parameters())
    decayed = [p for n, p in named if is_decayed(n)]
    others = [p for n, p in named if not is_decayed(n)]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.999), eps=1e-6)
    sift = Sift(model.deberta.embeddings.LayerNorm, plan.sift) if plan.sift else None
    history = []
    for step in range(case.steps):
        optimizer.zero_grad()
        picks = plan.order(7).micro_batches(step)
        total, adversarial_total, count = 0.0, 0.0, sum(map(len, picks))
        for number, some in enumerate(picks):
            ids = {"pad_id": start.tokenizer.pad_id, "sep_id": start.tokenizer.sep_id}
            batch = collate(plan.features["train"], some, **ids)

            def forward(key: int | None, batch=batch) -> torch.Tensor:
                return batch.decision_logits(model(batch.input_ids, batch.attention_mask, dropout_key=key).logits)

            key = batch_key(7, step, number)
            logits, adversarial = sift.passes(forward, key=key) if sift else (forward(key), torch.zeros(len(some)))
            losses = decision_loss(logits, batch.gold)
            loss = losses.sum() + (plan.sift.weight if plan.sift else 0.0) * adversarial.sum()
            (loss / count).backward()
            total, adversarial_total = total + losses.sum().item(), adversarial_total + adversarial.sum().item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
        optimizer.step()
        history.append((total / count, adversarial_total / count, norm.item()))
    return {"history": history, "weights": {n: p.detach().numpy().copy() for n, p in named}}


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Of the norms."""
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-12))
