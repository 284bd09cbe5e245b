"""Real steps of small models on a pretended device, and what is measured of them."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from deberta_dist import DebertaConfig
from deberta_dist.finetuning.batches import collate
from deberta_dist.kernels.fused import availability
from deberta_dist.models import layers
from tests.finetuning import small as fine_tuning
from tests.integration import parallel_run
from tests.pretend_device.compiled import Kernels
from tests.pretend_device.device import PretendDevice
from tests.pretend_device.record import Event, Events, Record
from tests.pretend_device.zero_stand_in import deepspeed_on_device, replaced_deepspeed

# The last of each: the first one also makes what is kept.
STEP, EVALUATION = "last step", "evaluation 1"

COLUMNS = (
    "host waits per micro-batch",
    "host waits per step",
    "host waits per evaluation",
    "host waits per checkpoint",
    "launches per layer",
    "launches per step",
    "unpinned copies per step",
)
"""What is measured, by `Run.measures`."""


@dataclass(frozen=True, kw_only=True)
class Case(parallel_run.Case):
    """A layout on a small model that is built like the 1.5B: convolution, buckets, shared projections, decoder.

    Attributes:
        head_size: 32 for the fused attention; it does not take 16, so the portable one does.
        deepspeed: With DeepSpeed itself instead of its stand-in.
        triton: Whether Triton is there. Its kernels are recorded and not run: without it the numbers are right.
    """

    head_size: int = 32
    deepspeed: bool = False
    triton: bool = True
    micro_batches: int = 1
    precision: str = "bf16"
    num_layers: int = 3
    steps: int = 2
    dropout: float = 0.1

    def model_config(self) -> DebertaConfig:
        heads = 2
        sizes = {"hidden_size": heads * self.head_size, "num_attention_heads": heads, "intermediate_size": 128}
        return DebertaConfig.from_dict({**super().model_config().to_dict(), **sizes})


@dataclass(frozen=True)
class Run:
    """What a case did on one rank.

    Attributes:
        record: All of it: "step N" and "last step", "evaluation N", and "checkpoint", a checkpoint's copies.
        history: Of every step, losses and the gradient norm.
        num_layers: Of the model.
        num_micro_batches: Of a step.
    """

    record: Record
    history: list[tuple[float, ...]]
    num_layers: int
    num_micro_batches: int

    def measures(self) -> dict[str, Events]:
        """By column: of the last micro-batch of a step, and of its layers the busiest, forward and backward."""
        record, last = self.record, f"micro-batch {self.num_micro_batches - 1}"
        # Beside layer 0 is the convolution, and the last one may decode.
        ordinary = [f"layer {number}" for number in range(1, self.num_layers - 1)]
        micro_batch = record.launches().where(within=(STEP, last))
        measures = (
            record.host_waits().where(within=(STEP, last)),
            record.host_waits().where(_is_outside_of_micro_batches, within=STEP),
            record.host_waits().where(within=EVALUATION),
            record.host_waits().where(within="checkpoint"),
            max((micro_batch.where(within=layer) for layer in ordinary), key=len),
            record.launches().where(within=STEP),
            record.copies_to_device().where(lambda event: not event.is_pinned, within=STEP),
        )
        return dict(zip(COLUMNS, measures, strict=True))


def _is_outside_of_micro_batches(event: Event) -> bool:
    return not any(phase.startswith("micro-batch") for phase in event.phases)


def check(name: str, runs: Iterable[Run], bounds: Sequence[int]) -> None:
    """Fails where a rank's device would refuse something, or a measure is above its bound; prints all of them.

    Args:
        name: Of the case.
        runs: Of its ranks.
        bounds: By column.
    """
    for rank, run in enumerate(runs):
        mismatches = run.record.mismatches()
        assert not mismatches, mismatches.report()
        measures = run.measures()
        # What is marked under another name has no events, which is within any bound.
        launches, copies = run.record.launches(), run.record.copies_to_host()
        seen = (measures["launches per layer"], launches.where(within=EVALUATION), copies.where(within="checkpoint"))
        assert all(seen), f"{name}, rank {rank}: nothing happened in one of {[events.report() for events in seen]}"
        print(f"{name}, rank {rank}: {', '.join(f'{column} {len(events)}' for column, events in measures.items())}")
        for (column, events), bound in zip(measures.items(), bounds, strict=True):
            assert len(events) <= bound, f"{name}, rank {rank}: {column}: more than {bound}\n{events.report()}"


def run_cases(cases: Mapping[str, Case], kernels: Mapping[str, Kernels]) -> dict[str, Run]:
    """Runs cases of one world size on this rank, one after the other.

    Args:
        cases: By name.
        kernels: Of what training.compile compiles, by name.
    """
    meeting = os.environ["RENDEZVOUS_FILE"]
    runs = {}
    for number, (name, case) in enumerate(cases.items()):
        os.environ["RENDEZVOUS_FILE"] = f"{meeting}-{number}"  # a rendezvous serves once
        runs[name] = _pretrain(case, kernels)
        dist.destroy_process_group()
    return runs


def _pretrain(case: Case, kernels: Mapping[str, Kernels]) -> Run:
    history = []
    compiled = {getattr(layers, name): numbers for name, numbers in kernels.items()}
    with (
        _triton(case.triton),
        PretendDevice(count=case.world_size, compiled=compiled) as device,
        deepspeed_on_device() if case.deepspeed else replaced_deepspeed(device.paused),
    ):
        trainer = parallel_run.make_trainer(case)
        model: Any = trainer.parts.sharded_model.model
        device.mark(model, "micro-batch {}", method="forward_stage")
        _mark_layers(device, model)
        for step in range(case.steps):
            batch = parallel_run.own_batch(case, step)
            with device.phase(STEP if step == case.steps - 1 else f"step {step}"):
                result = trainer.step(batch, step=step, learning_rate=parallel_run.LEARNING_RATE)
            history.append((result.loss, result.grad_norm))
        for number in range(2):
            with device.phase(f"evaluation {number}"):
                trainer.evaluate([batch])
        with device.phase("checkpoint"):
            trainer.parts.sharded_model.store.copy_shards()
    # What stands for a compiled function would outlive its device.
    layers._joined.cache_clear()
    return Run(device.record, history, case.num_layers, case.micro_batches)


def fine_tune(cases: Mapping[str, tuple[fine_tuning.Case, bool]], directory: Path) -> dict[str, Run]:
    """Runs cases of fine-tuning on one rank.

    Args:
        cases: By name, and whether Triton is there (see `Case.triton`).
        directory: That `fine_tuning.write_start` has written.
    """
    meeting = os.environ["RENDEZVOUS_FILE"]
    runs = {}
    for number, (name, (case, triton)) in enumerate(cases.items()):
        os.environ["RENDEZVOUS_FILE"] = f"{meeting}-{number}"
        with _triton(triton):
            runs[name] = _fine_tune(case, directory)
        dist.destroy_process_group()
    return runs


def _fine_tune(case: fine_tuning.Case, directory: Path) -> Run:
    plan, start = case.plan(directory)
    ids = {"pad_id": start.tokenizer.pad_id, "sep_id": start.tokenizer.sep_id}
    order, features, history = plan.order(7), plan.features, []
    with PretendDevice() as device, replaced_deepspeed(device.paused):
        tuner, _ = fine_tuning.make_tuner(plan, start)
        device.mark(tuner, "micro-batch {}", method="_one")
        _mark_layers(device, tuner.model.model)
        for step in range(case.steps):
            picks = order.micro_batches(step)
            batches = [(number, collate(features["train"], some, **ids)) for number, some in enumerate(picks)]
            with device.phase(STEP if step == case.steps - 1 else f"step {step}"):
                result = tuner.step(batches, num_decisions=sum(map(len, picks)), step=step, learning_rate=1e-3)
            history.append((result.loss, result.sift_loss or 0.0, result.grad_norm))
        for number in range(2):
            with device.phase(f"evaluation {number}"):
                tuner.predict(features["val"], batch_size=16)
        with device.phase("checkpoint"):
            tuner.model.store.copy_weights()
    return Run(device.record, history, plan.model_config.num_hidden_layers, len(batches))


@contextlib.contextmanager
def _triton(is_there: bool) -> Iterator[None]:
    with contextlib.nullcontext() if is_there else mock.patch.object(availability, "triton_version", lambda: None):
        yield


def _mark_layers(device: PretendDevice, model: Any) -> None:
    for number, layer in enumerate(model.deberta.encoder.layer):
        if layer is not None:
            device.mark(layer, f"layer {number}")
            device.mark(layer, f"layer {number}", method="decode")
