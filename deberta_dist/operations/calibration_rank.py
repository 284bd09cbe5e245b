"""One rank of a calibration or of the layouts benchmark: executes commands with its peers and answers with the times.

Started by ``calibration_world.py`` as ``python -m deberta_dist.operations.calibration_rank FOLDER`` with a launcher's variables.
Commands come as JSON, one per line, the same for all ranks of a world; each rank answers with one line. Ranks that wait for a
command use no processor time.
"""

import dataclasses
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from deberta_dist.config import Data, Model, Optimizer, Parallel, Run, RunConfig, Training
from deberta_dist.data.loader import Batch
from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.presets import preset
from deberta_dist.operations.random_batch import masked_batch
from deberta_dist.operations.ranks import store_settings
from deberta_dist.parallel.mesh import make_mesh, start_process_group
from deberta_dist.planning.activations import local_config
from deberta_dist.planning.memory import expected_targets
from deberta_dist.planning.plan import Plan, plan_networks
from deberta_dist.training.build import build, mesh_shape
from deberta_dist.training.objectives.masked_lm import masked_lm
from deberta_dist.training.step_batch import pack
from deberta_dist.training.trainer import Trainer

SEED, LENGTH, GLOBAL_BATCH, MICRO_BATCH, LEARNING_RATE = 7, 64, 16, 2, 1e-3
# DeepSpeed records its order of modules in the first step and compares it between ranks in the second.
WARM_UP_STEPS = 2
# All-reduces between two readings of the clock.
REDUCES = 8
# Kind of message -> bytes of the two messages from which latency and bandwidth follow.
MESSAGES = {
    "all_reduce": (1024, 1 << 18),
    "send": (1024, 1 << 18),
    "all_gather": (1024, 1 << 22),
    "reduce_scatter": (1024, 1 << 22),
    "broadcast": (1024, 1 << 20),
    "reduce": (1024, 1 << 20),
}


@dataclass(frozen=True)
class LayoutCase:
    """A layout: (tensor, pipeline, data) sizes and sequences of a micro-batch."""

    tensor: int
    pipeline: int
    data: int
    micro_batch: int = MICRO_BATCH

    @property
    def name(self) -> str:
        """The three sizes as on the command line, e.g. 2x1x2."""
        return f"{self.tensor}x{self.pipeline}x{self.data}"

    @property
    def processes(self) -> int:
        """World size of the layout."""
        return self.tensor * self.pipeline * self.data


def model_config() -> DebertaConfig:
    """A model of eight layers with four heads each, large enough that products and not Python take most of a step."""
    return dataclasses.replace(
        preset("tiny-v2"),
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=8,
        vocab_size=1024,
    )


def plan_of(case: LayoutCase) -> Plan:
    """The plan of a run with this layout.

    Raises:
        ConfigError: the model cannot be divided like this.
    """
    model = model_config()
    config = RunConfig(
        model=Model(preset="tiny-v2"),
        data=Data(train=Path("unused"), validation=Path("unused"), tokenizer=Path("unused"), max_seq_length=LENGTH),
        training=Training(
            global_batch_size=GLOBAL_BATCH,
            micro_batch_size=case.micro_batch,
            num_micro_batches=GLOBAL_BATCH // case.data // case.micro_batch,
            max_steps=1,
            seed=SEED,
        ),
        optimizer=Optimizer(learning_rate=LEARNING_RATE),
        parallel=Parallel(tensor_parallel_size=case.tensor, pipeline_parallel_size=case.pipeline, data_parallel_size=case.data),
        run=Run(directory=Path("unused"), deepspeed=Path("unused")),
    )
    deepspeed = store_settings(case.data, reduce_bucket_size=10_000_000)
    return plan_networks(config, deepspeed, model_config=model, objective=masked_lm(config, model))


def batch_of(plan: Plan, sequences: int) -> Batch:
    """Random tokens; every sequence has the expected number of targets."""
    return masked_batch(
        (sequences, LENGTH),
        vocab_size=plan.model_config.vocab_size,
        num_targets=expected_targets(plan.config),
        seed=SEED,
    )


def time_layout(tensor: int, pipeline: int, data: int, steps: int, device: torch.device) -> list[tuple[float, float]]:
    """(seconds, processor seconds of this process) of each step of a layout, built as training builds it. Collective."""
    plan = plan_of(LayoutCase(tensor, pipeline, data))
    mesh = make_mesh(mesh_shape(plan.config), device=device, timeout_minutes=plan.config.run.timeout_minutes)
    parts = [build(plan.config, layout=layout, deepspeed_config=plan.deepspeed, mesh=mesh) for layout in plan.layouts]
    trainer = Trainer(*parts, mesh=mesh, seed=SEED, objective=plan.objective)
    batch, times = batch_of(plan, GLOBAL_BATCH // data), []
    for step in range(WARM_UP_STEPS + steps):
        dist.barrier()
        begun = time.perf_counter(), time.process_time()
        trainer.step(batch, step=step, learning_rate=LEARNING_RATE)
        times.append((time.perf_counter() - begun[0], time.process_time() - begun[1]))
    for one in parts:
        one.sharded_model.store.close()
    return times[WARM_UP_STEPS:]


def time_stage(tensor: int, start: int, stop: int, micro_batch: int, repeats: int) -> float:
    """Processor seconds of one micro-batch forward and backward on layers [start, stop), on a rank's share of ``tensor``.

    All ranks of the world do it at the same time, and nobody sends anything. What the thread takes of a core is what
    the model wants to know, and does not change when others want the core as well.
    """
    plan = plan_of(LayoutCase(tensor, 1, 1, micro_batch))
    model, layers = plan.model_config, range(start, stop)
    # What one tensor-parallel rank has, without its all-reduces.
    network = dataclasses.replace(plan.main.network, config=local_config(model, tensor_parallel_size=tensor))
    local = network.make()
    local.keep_layers(layers)
    for parameter in local.parameters():
        parameter.grad = torch.zeros_like(parameter)
    batch = batch_of(plan, micro_batch)
    batch = dataclasses.replace(batch, input_ids=batch.input_ids // tensor, labels=batch.labels // tensor)
    packed = pack(batch, num_micro_batches=1, device=torch.device("cpu"))
    gradient = torch.randn(micro_batch, LENGTH, model.hidden_size)

    def once(key: int) -> None:
        hidden = torch.randn(micro_batch, LENGTH, model.hidden_size, requires_grad=True) if start else None
        made = network.micro_batches(packed, dropout_keys=[key], handed=None)
        ids = None if start else made.input_ids
        output = local.forward_stage(hidden, input_ids=ids, layers=layers, **made.fields[0])
        if stop == model.num_hidden_layers:
            output[0, 0].backward()
        else:
            output.backward(gradient)

    return _median(once, repeats, clock=time.thread_time)


def products(count: int) -> Callable[[int], None]:
    """The layer's largest product with a micro-batch, ``count`` times."""
    model = model_config()
    x, weight = torch.randn(MICRO_BATCH * LENGTH, model.hidden_size), torch.randn(model.intermediate_size, model.hidden_size)

    def run(_: int) -> None:
        for _ in range(count):
            torch.nn.functional.linear(x, weight)

    return run


def time_product(repeats: int) -> float:
    """Processor seconds per FLOP of the layer's largest product. All ranks do it at the same time."""
    model = model_config()
    flops = 2 * MICRO_BATCH * LENGTH * model.hidden_size * model.intermediate_size
    return _median(products(50), repeats, clock=time.thread_time) / (50 * flops)


def time_messages(repeats: int) -> dict[str, list[float]]:
    """Kind -> seconds of its two messages, between pairs of ranks, all pairs at the same time. Collective.

    All-reduces come between products, as in a layer, where ranks are never ready at the same moment; of those with and
    those without the difference is taken.
    """
    work = products(4)
    rank, world = dist.get_rank(), dist.get_world_size()
    groups = [dist.new_group([first, first + 1]) for first in range(0, world, 2)]
    group, owner = groups[rank // 2], rank - rank % 2

    def message(kind: str, num_bytes: int) -> Callable[[int], None]:
        whole, half = torch.zeros(num_bytes // 4), torch.zeros(num_bytes // 8)

        def reduce_between_products(number: int) -> None:
            for _ in range(REDUCES):
                work(number)
                dist.all_reduce(whole, group=group)

        def send_and_return(_: int) -> None:
            for sender in (owner, owner + 1):
                if rank == sender:
                    dist.send(whole, dst=2 * owner + 1 - rank)
                else:
                    dist.recv(whole, src=2 * owner + 1 - rank)

        return {
            "all_reduce": reduce_between_products,
            "all_gather": lambda _: dist.all_gather_into_tensor(whole, half, group=group),
            "reduce_scatter": lambda _: dist.reduce_scatter_tensor(half, whole, group=group),
            "broadcast": lambda _: dist.broadcast(whole, src=owner, group=group),
            "reduce": lambda _: dist.reduce(whole, dst=owner, group=group),
            "send": send_and_return,
        }[kind]

    def only_products(number: int) -> None:
        for _ in range(REDUCES):
            work(number)

    often = {"send": 2, "all_reduce": REDUCES}
    found = {
        kind: [_median(message(kind, size), repeats) / often.get(kind, 1) for size in sizes] for kind, sizes in MESSAGES.items()
    }
    without = _median(only_products, repeats) / REDUCES
    found["all_reduce"] = [max(seconds - without, 1e-6) for seconds in found["all_reduce"]]
    return found


def _median(run: Callable[[int], None], repeats: int, *, clock: Callable[[], float] = time.perf_counter) -> float:
    run(0)
    times = []
    for number in range(repeats):
        dist.barrier()
        begun = clock()
        run(number + 1)
        times.append(clock() - begun)
    return statistics.median(times)


def main(folder: Path) -> None:
    """Answers commands until there are no more."""
    # Libraries print: answers have a way of their own.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    world = os.environ["WORLD_SIZE"]
    device = start_process_group(timeout_minutes=30, init_method=f"file://{folder}/meeting-{world}")
    functions: dict[str, Callable[..., Any]] = {
        "layout": lambda **options: time_layout(**options, device=device),
        "product": time_product,
        "stage": time_stage,
        "messages": time_messages,
    }
    for line in sys.stdin:
        command = json.loads(line)
        found = functions[command.pop("do")](**command)
        gc.collect()
        answers.write(json.dumps(found) + "\n")
        answers.flush()
    # No shutdown: a rank that closes its connections early would look like a dead one to the others.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
