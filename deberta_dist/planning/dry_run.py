"""A description of a run before it starts: what each rank holds, sends and computes. Needs no GPU and no processes.

``describe`` is what ``--dry-run`` prints; ``rank_reports`` are its numbers.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deberta_dist.config import offload_device, precision
from deberta_dist.models.flops import PEAK_FLOPS
from deberta_dist.parallel.layout import Layout
from deberta_dist.parallel.tensor.sharding_rules import padded_vocabulary
from deberta_dist.planning.communication import RankCommunication, layer_messages, rank_communication
from deberta_dist.planning.memory import RankMemory, expected_targets, rank_memory
from deberta_dist.planning.plan import Plan
from deberta_dist.planning.reading import reading_block, training_paths

# The step time shown is a rough guide: this device, at this share of its peak.
REFERENCE_GPU, REFERENCE_UTILISATION = "H100", 0.4

COLUMN_WIDTH, LABEL_WIDTH, COLUMNS_PER_TABLE = 9, 26, 8


@dataclass(frozen=True)
class RankReport:
    """One pipeline rank; each number is the largest over its tensor ranks.

    Attributes:
        flops: Forward FLOPs per token of its stages.
        owned: Number of parameters it owns.
        borrowed: Number of parameters it uses and another rank owns.
        memory: Memory of the tensor rank with the highest peak.
        peak_of_first: Peak memory (bytes) of tensor rank 0, which owns the replicated weights.
        communication: Communication of the tensor rank that communicates most.
    """

    flops: float
    owned: int
    borrowed: int
    memory: RankMemory
    peak_of_first: int
    communication: RankCommunication


def rank_reports(plan: Plan, number: int | None = None) -> list[RankReport]:
    """The numbers of every pipeline rank, first to last, while one network runs.

    Args:
        plan: A checked run.
        number: Index of the network; None for the one whose weights are the run's result.
    """
    number = plan.objective.main if number is None else number
    layout, flops, reports = plan.layouts[number], plan.network_flops[number], []
    others = [*plan.layouts[:number], *plan.layouts[number + 1 :]]
    for pipeline_rank in range(len(layout.stages_by_rank)):
        # Tensor rank 0 owns the replicated weights and rank 1 borrows them; all further ranks are like rank 1.
        tensor_ranks = range(min(layout.tensor_parallel_size, 2))
        memories = [
            rank_memory(
                layout,
                config=plan.config,
                deepspeed_config=plan.deepspeed,
                pipeline_rank=pipeline_rank,
                tensor_rank=tensor_rank,
                others=others,
            )
            for tensor_rank in tensor_ranks
        ]
        messages = [
            rank_communication(
                layout,
                config=plan.config,
                deepspeed_config=plan.deepspeed,
                pipeline_rank=pipeline_rank,
                tensor_rank=tensor_rank,
            )
            for tensor_rank in tensor_ranks
        ]
        reports.append(
            RankReport(
                flops=sum(flops.by_layer[layer] for layer in layout.layers_of_rank(pipeline_rank)),
                owned=max(memory.owned for memory in memories),
                borrowed=max(memory.borrowed for memory in memories),
                memory=max(memories, key=lambda memory: memory.peak),
                peak_of_first=memories[0].peak,
                communication=max(messages, key=lambda message: message.total),
            )
        )
    return reports


def count_parameters(layout: Layout) -> tuple[int, int]:
    """(whole model, backbone as Hugging Face counts it: no head, no absolute positions where the input has none)."""
    sizes = {name: torch.Size(shape).numel() for name, shape in layout.full_shapes.items()}
    backbone = sum(size for name, size in sizes.items() if name.startswith("deberta."))
    if layout.config.uses_enhanced_mask_decoder:
        backbone -= sizes["deberta.embeddings.position_embeddings.weight"]
    return sum(sizes.values()), backbone


def bubble_fraction(plan: Plan) -> float:
    """Share of a step in which a pipeline rank waits: (P - 1) / (v M + P - 1), stages of equal cost assumed."""
    parallel = plan.config.parallel
    waits = parallel.pipeline_parallel_size - 1
    return waits / (parallel.stages_per_rank * plan.config.training.micro_batches + waits)


def step_seconds(plan: Plan) -> float:
    """Seconds per optimizer step on the reference GPU, with an assumed utilisation that covers everything else."""
    world = plan.world_size
    return plan.training_flops * _tokens_per_step(plan) / (world * REFERENCE_UTILISATION * PEAK_FLOPS[REFERENCE_GPU])


def describe(plan: Plan) -> str:
    """The dry run's text."""
    tables = []
    for number, layout in enumerate(plan.layouts):
        reports = rank_reports(plan, number)
        if len(plan.layouts) > 1:
            tables.append(f"NETWORK     {layout.network.name or 'whose weights are the result'}")
        tables += [_stages(plan, number, reports), _memory(reports), _communication(plan, reports)]
    blocks = [
        _headline(plan),
        *tables,
        _compute(plan),
        *reading_block(plan.config),
        _notes(plan),
    ]
    return "\n\n".join(blocks) + "\n"


def _headline(plan: Plan) -> str:
    config, model = plan.config, plan.model_config
    training, parallel = config.training, config.parallel
    total, backbone = count_parameters(plan.layout)
    name = config.model.preset or config.model.config
    changed = f" with {', '.join(sorted(config.model.overrides))} changed" if config.model.overrides else ""
    loops = f", {parallel.stages_per_rank} stages per rank" if parallel.stages_per_rank > 1 else ""
    tokens = _tokens_per_step(plan)
    rows = (
        ("model", f"{name}{changed}"),
        ("", f"{model.num_hidden_layers} layers, hidden {model.hidden_size}, FFN {model.intermediate_size}, "
             f"{model.num_attention_heads} heads of {model.head_size}, vocabulary {model.vocab_size}"),
        ("parameters", f"{total:,} in all; backbone {backbone:,} as Hugging Face counts it"),
        ("", "(without position table and head)" if model.uses_enhanced_mask_decoder else "(without head)"),
        *([("decoder", "plain: the head reads the last hidden states")] if model.decoder == "plain" else []),
        ("precision", f"{precision(plan.deepspeed)}, recompute {training.recompute}"),
        ("processes", f"{plan.world_size} = tensor {parallel.tensor_parallel_size} x pipeline "
                      f"{parallel.pipeline_parallel_size} x data {parallel.data_parallel_size}"
                      f"{', sequence parallel' if parallel.sequence_parallel else ''}"),
        ("schedule", f"{parallel.schedule}{loops}, {training.num_micro_batches} micro-batches per step"),
        ("batch", f"{training.global_batch_size} sequences = micro-batch {training.micro_batch_size} x "
                  f"{training.num_micro_batches} micro-batches x data {parallel.data_parallel_size}"),
        ("tokens", f"{training.max_steps:,} steps x {training.global_batch_size} x {config.data.max_seq_length} = "
                   f"{_scaled(training.max_steps * tokens).rstrip()} tokens"),
    )  # fmt: skip
    lines = [(label if number == 0 else "", line)
             for label, text in rows for number, line in enumerate(textwrap.wrap(text, 88))]  # fmt: skip
    return "\n".join(f"{label:<12}{line}" for label, line in lines)


def _stages(plan: Plan, number: int, reports: Sequence[RankReport]) -> str:
    layout, by_layer = plan.layouts[number], plan.network_flops[number].by_layer
    total = plan.network_flops[number].forward
    unit, size = ("G", 1e9) if total >= 1e8 else ("M", 1e6)
    lines = [f"STAGES                      {unit}FLOP/token   share   parameters of a rank (millions)",
             "  rank stage layers             forward              owned   borrowed   also holds"]  # fmt: skip
    for rank, (stages, report) in enumerate(zip(layout.stages_by_rank, reports, strict=True)):
        for place, index in enumerate(stages):
            layers = layout.stages[index]
            flops = sum(by_layer[layer] for layer in layers)
            owned = f"{report.owned / 1e6:11.2f}{report.borrowed / 1e6:11.2f}" if place == 0 else " " * 22
            span = f"{layers.start}-{layers.stop - 1} ({len(layers)})"
            lines.append(
                f"  {rank:>4} {index:>5} {span:<13} {flops / size:12.3f} {flops / total:8.1%}{owned}   "
                f"{_also_holds(layout, index)}"
            )
    loads = [report.flops for report in reports]
    bubble = bubble_fraction(plan)
    lines.append(f"  busiest rank / mean: {max(loads) * len(loads) / total:.3f};   pipeline bubble: {bubble:.1%} of a step")
    return "\n".join(lines)


def _also_holds(layout: Layout, index: int) -> str:
    config, parts = layout.config, []
    if index == 0:
        parts += ["embedding"] + ["conv"] * (config.conv_kernel_size > 0)
    if index == len(layout.stages) - 1:
        parts += ["head"] if layout.network.decoder_layer is None else ["EMD, head"]
    return ", ".join([*parts, "rel. table"])


def _memory(reports: Sequence[RankReport]) -> str:
    memories = [report.memory for report in reports]
    offload = memories[0].offload
    where = "" if offload == "none" else f" [{offload}]"
    rows: list[tuple[str, Sequence[int]]] = [
        ("weights at rest, 1/dp", [m.weights for m in memories]),
        (f"float32 master, 1/dp{where}", [m.master_weights for m in memories]),
        (f"2 Adam moments, 1/dp{where}", [m.moments for m in memories]),
        (f"gradient shard, 1/dp{where}", [m.gradient_shard for m in memories]),
        ("ZeRO reduce bucket", [m.reduce_bucket for m in memories]),
        ("pipeline receive buffers", [m.receive_buffers for m in memories]),
        *([("other networks at rest", [m.others_at_rest for m in memories])] if memories[0].others_at_rest else []),
        ("= between steps", [m.at_rest for m in memories]),
        ("batch", [m.batch for m in memories]),
        ("weights gathered", [m.gathered for m in memories]),
        ("weights borrowed", [m.borrowed_weights for m in memories]),
        ("float32 gradients", [m.gradients for m in memories]),
        ("  of borrowed weights", [m.borrowed_gradients for m in memories]),
        ("activations in flight", [m.activations for m in memories]),
        ("head: logits in flight", [m.logits for m in memories]),
        ("temporaries, one at a time", [m.working for m in memories]),
        ("= in the micro-batches", [m.in_micro_batches for m in memories]),
        ("gradient rounded, or ties", [m.reduction for m in memories]),
        ("= at the hand-over", [m.in_reduction for m in memories]),
        ("PEAK", [m.peak for m in memories]),
    ]
    if any(report.peak_of_first < 0.99 * report.memory.peak for report in reports):
        rows.append(("PEAK of tensor rank 0", [report.peak_of_first for report in reports]))
    if offload != "none":
        rows.append((f"on the host [{offload}]", [m.optimizer for m in memories]))
    return _table("MEMORY of a rank", rows)


def _communication(plan: Plan, reports: Sequence[RankReport]) -> str:
    messages = [report.communication for report in reports]
    halves = "all-gather or reduce-scatter (half an all-reduce)"
    kinds = halves if plan.layout.sequence_parallel else "all-reduce"
    table = _table("COMMUNICATION of a rank", [
        ("ZeRO all-gather weights *", [m.zero_gather for m in messages]),
        ("ZeRO reduce-scatter *", [m.zero_reduce for m in messages]),
        ("ties: broadcast weights *", [m.tie_broadcast for m in messages]),
        ("ties: reduce gradients *", [m.tie_reduce for m in messages]),
        ("tensor: layers", [m.tensor_layers for m in messages]),
        ("tensor: embedding", [m.tensor_embedding for m in messages]),
        ("tensor: mask decoder", [m.tensor_decoder for m in messages]),
        ("tensor: head and loss", [m.tensor_head for m in messages]),
        ("pipeline: activations", [m.pipeline_activations for m in messages]),
        ("pipeline: gradients", [m.pipeline_gradients for m in messages]),
        ("TOTAL", [m.total for m in messages]),
    ], per=" per optimizer step")  # fmt: skip
    return (
        f"{table}\n  * once per step, whatever the number of micro-batches. Bytes of the message buffers (pipeline:"
        f"\n    what the rank sends), no algorithm factor. {messages[0].scalars} bytes of scalars besides."
        f"\n    Layers: per micro-batch {layer_messages(plan.config)} hidden states by {kinds}."
    )


def _table(title: str, rows: Sequence[tuple[str, Sequence[int]]], *, per: str = "") -> str:
    """Kinds down, pipeline ranks across, one unit for all; broken into several where there are many ranks."""
    largest = max(max(values) for _, values in rows)
    unit, size = next(((u, s) for u, s in (("GB", 1e9), ("MB", 1e6)) if largest >= s), ("kB", 1e3))
    count = len(rows[0][1])
    lines = []
    for start in range(0, count, COLUMNS_PER_TABLE):
        ranks = range(start, min(start + COLUMNS_PER_TABLE, count))
        head = f"{title}, {unit}" if start == 0 else ""
        lines.append(f"{head:<{LABEL_WIDTH + 2}}" + "".join(f"{f'rank {r}':>{COLUMN_WIDTH}}" for r in ranks))
        for label, values in rows:
            numbers = "".join(f"{values[r] / size:>{COLUMN_WIDTH}.3f}" for r in ranks)
            lines.append(f"  {label:<{LABEL_WIDTH}}{numbers}")
    return "\n".join([*lines, f"  ({unit} = {size:,.0f} bytes{per}; of each pipeline rank the largest tensor rank)"])


def _compute(plan: Plan) -> str:
    seconds, forward = step_seconds(plan), sum(flops.forward for flops in plan.network_flops)
    per_step = plan.training_flops * _tokens_per_step(plan)
    peak = PEAK_FLOPS[REFERENCE_GPU] / 1e12
    time = f"{seconds:,.2f} s" if seconds >= 0.1 else f"{seconds * 1e3:,.2f} ms"
    days = seconds * plan.config.training.max_steps / 86400
    whole = f"{days:,.1f} days" if days >= 1 else format_seconds(days * 86400)
    return (
        f"COMPUTE     {_scaled(forward)}FLOP/token forward, {_scaled(plan.training_flops)}FLOP/token training; "
        f"{_scaled(per_step)}FLOP per step\n"
        f"  orientation: {time} per step, {whole} for the run, if every process is one "
        f"{REFERENCE_GPU}\n  at {REFERENCE_UTILISATION:.0%} of its {peak:.0f} TFLOP/s dense bf16 "
        "(recomputation not counted as work done)"
    )


def _notes(plan: Plan) -> str:
    config, vocabulary = plan.config, plan.model_config.vocab_size
    padded = padded_vocabulary(vocabulary, tensor_parallel_size=plan.layout.tensor_parallel_size)
    notes = [f"{expected_targets(config)} targets per sequence of {config.data.max_seq_length} tokens are assumed"]
    if config.data.bucket_lengths is not None:
        notes.append("FLOP, messages and time are those of a step of the longest bucket, memory that of the one with most")
    if padded > vocabulary:
        notes.append(
            f"the vocabulary is padded for the tensor split: {vocabulary} + {padded - vocabulary} rows; pads are not exported"
        )
    notes.append("NVIDIA apex is looked for where the run starts, not here; its Adam takes the same memory")
    others = {"validation": config.data.validation, "tokenizer": config.data.tokenizer}
    for key, path in (training_paths(config) | others).items():
        if not path.exists():
            notes.append(f"data.{key} = {path} does not exist yet")
    notes += plan.deepspeed_notes
    offload = offload_device(plan.deepspeed, "param")
    if offload != "none":
        notes.append(f"offload_param is {offload}: the weights at rest are there and not on the device")
    return "NOTES\n" + "\n".join(f"  - {note}" for note in notes)


def _scaled(number: float) -> str:
    """``1,048.58 G``, to be followed by what is counted."""
    for prefix, size in (("P", 1e15), ("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:,.2f} {prefix}"
    return f"{number:,.0f} "


def _tokens_per_step(plan: Plan) -> int:
    return plan.config.training.global_batch_size * plan.config.data.max_seq_length


def format_seconds(seconds: float) -> str:
    """``1d 02:03:04`` or ``02:03:04`` or ``03:04``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour:02d}:{minute:02d}:{second:02d}" if hours else f"{minute:02d}:{second:02d}"
    return f"{days}d {clock}" if days else clock
