"""The speed steps of the GPU measurements: attention, layers, whole models, beside what others take for them.

bfloat16 on a GPU. Each contestant is timed alone, between two events, several runs in a row where one is short; medians.
"""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import attention_contestants, peers, whole_layer
from benchmarks.device_models import PlainTraining, join_residuals, random_masked_lm
from benchmarks.gpu_attention import Problem
from benchmarks.gpu_worker import StepReport, StepSetting
from benchmarks.stopwatch import TimedPass, differences, kernel_seconds, race
from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.flops import device_peak_flops, forward_flops
from deberta_dist.models.masked_lm import DebertaForMaskedLM
from deberta_dist.models.presets import preset
from deberta_dist.models.targets import find_targets
from deberta_dist.operations.random_batch import masked_tokens

# What training/sharded_model.py has; that module needs a configuration, and this one does not.
DEVICES_WHOSE_PRODUCTS_ADD = ("cuda",)
LARGE = "v2-xxlarge"
MASK_PROBABILITY, DROPOUT = 0.15, 0.1
FUSED, PORTABLE, NO_POSITIONS = "fused", "portable", "SDPA without positions"
AGREEMENT = 0.05  # of bfloat16, as in ``layer``
IGNORED = -100
_KERNELS = 14  # most kernels of a profile that are reported


def attention(setting: StepSetting, report: StepReport, *, batch: int, length: int) -> None:
    """The attention of one layer of the 1.5B, alone and with its projections, and its kernels."""
    on, heads = torch.device(setting.device), setting.sized(24, 2)
    batch, length = setting.sized((batch, length), (1, 64))
    dtype = setting.sized(torch.bfloat16, torch.float32)
    problem = Problem((batch, heads, length), feature="dropout", dtype=dtype, device=on)
    names = setting.sized((FUSED, PORTABLE), (PORTABLE,))
    contestants = {name: problem.passes(name) for name in names}
    operands = [x.detach().requires_grad_() for x in problem.operands[:3]]
    gradient = torch.randn_like(operands[0])
    contestants[NO_POSITIONS] = (
        lambda: torch.nn.functional.scaled_dot_product_attention(*operands, dropout_p=DROPOUT),
        lambda context: torch.autograd.grad(context, operands, gradient),
    )
    times = {}
    for name, (forward, backward) in contestants.items():
        passes = {"forward": TimedPass(forward), "both": TimedPass(forward, backward)}
        figures = race(passes, rounds=setting.sized(9, 1), warm_up=2, device=on, repeats=setting.sized(8, 1))
        times[name] = {key: row["seconds"] for key, row in figures.items()}
        report.row(f"alone, {name}", {f"{key}, ms": 1e3 * seconds for key, seconds in times[name].items()})
    first = names[0]
    ratios = {f"x the time of {name}": times[first]["both"] / times[name]["both"] for name in times if name != first}
    report.row(f"alone, {first} takes", ratios)
    kernels = kernel_seconds(TimedPass(*contestants[first]).run, on, rounds=setting.sized(3, 1))
    report.row(f"kernels of {first}, us", {name[:60]: 1e6 * s for name, s in list(kernels.items())[:_KERNELS]})
    del problem, contestants
    _with_projections(setting, report, batch=batch, length=length, heads=heads, dtype=dtype)


def _with_projections(
    setting: StepSetting, report: StepReport, *, batch: int, length: int, heads: int, dtype: torch.dtype
) -> None:
    """What the package disentangled-flash offers is a module that makes them itself."""
    on = torch.device(setting.device)
    case = attention_contestants.AttentionCase(
        batch_size=batch, length=length, heads=heads, dropout=DROPOUT, device=on, dtype=dtype
    )
    ours = FUSED if case.no_fused_reason is None else PORTABLE
    forward, seconds = case.ours(ours), {}

    def measure(name: str, forward: Callable[[], Tensor]) -> None:
        contestants = {name: case.contestant(forward)}
        row = race(contestants, rounds=setting.sized(9, 1), warm_up=2, device=on, repeats=setting.sized(4, 1))[name]
        seconds[name] = row["seconds"]
        times = {f"{ours} takes, x": seconds[ours] / row["seconds"]} if name != ours else {}
        report.row(f"with projections, {name}", {"both, ms": 1e3 * row["seconds"], **times})

    measure(ours, forward)
    measure(NO_POSITIONS, case.without_positions())
    if not peers.has_disentangled_flash():
        report.note(f"{peers.DISENTANGLED_FLASH} is not measured: it is not installed, or transformers is not")
        return
    theirs = case.disentangled_flash()
    with case.no_dropout():
        values = {ours: case.values(forward), peers.DISENTANGLED_FLASH: case.values(theirs)}
    error = differences(values, oracle=ours)[peers.DISENTANGLED_FLASH]
    at_most = setting.sized(AGREEMENT, 1e-5)
    report.check(f"{peers.DISENTANGLED_FLASH} and {ours} compute the same", error, at_most=at_most)
    measure(peers.DISENTANGLED_FLASH, theirs)


def layer(setting: StepSetting, report: StepReport, *, compiles: bool) -> None:
    """A whole layer of the 1.5B, forward and backward, beside the same one without positions."""
    on, heads = torch.device(setting.device), setting.sized(24, 2)
    for batch, length in setting.sized(((16, 512), (4, 512), (2, 4096)), ((1, 64),)):
        whole = whole_layer.WholeLayer(
            heads=heads,
            shape=(batch, length),
            dropout=DROPOUT,
            device=on,
            dtype=setting.sized(torch.bfloat16, torch.float32),
        )
        forwards = whole.own_contestants()
        if compiles:
            plain = whole.values(forwards[whole_layer.OURS])
            whole.compile()
            values = {"compiled": whole.values(forwards[whole_layer.OURS]), "plain": plain}
            error = differences(values, oracle="plain")["compiled"]
            report.check(f"{batch}x{length}: compiled as plain", error, at_most=setting.sized(AGREEMENT, 1e-5))
        units = forward_flops(
            whole.config, max_seq_length=length, micro_batch_size=batch, mask_probability=MASK_PROBABILITY
        ).units
        figures = {}
        for name, forward in forwards.items():
            contestants = {name: whole.contestant(forward)}
            row = race(contestants, rounds=setting.sized(7, 1), warm_up=2, device=on, repeats=setting.sized(4, 1))
            figures[name] = row[name]["seconds"]
        ours, without = figures[whole_layer.OURS], figures[whole_layer.NO_POSITIONS]
        report.row(
            f"{batch}x{length}",
            {
                "ms": 1e3 * ours,
                "without positions, ms": 1e3 * without,
                "x the time without positions": ours / without,
                **_share_of_peak(3 * units[1] * batch * length / ours, on),
            },
        )
        del whole, forwards
        _forget(on)


def whole_model(setting: StepSetting, report: StepReport, *, compiles: bool) -> None:
    """The 1.5B: forward, backward and optimizer step of one micro-batch, without DeepSpeed."""
    on = torch.device(setting.device)
    config, shape = setting.sized((preset(LARGE), (16, 512)), (preset("tiny-v2"), (2, 32)))
    model = random_masked_lm(config, device=on, dtype=setting.sized(torch.bfloat16, torch.float32))
    join_residuals(model, joins=compiles)
    training = _own_training(model, shape, on)
    _measure(setting, report, "compiled" if compiles else "plain", training, shape=shape, flops=_flops(config, shape))


def trainer(setting: StepSetting, report: StepReport) -> None:
    """The same steps as a run takes them: the trainer with DeepSpeed, one process."""
    from deberta_dist.operations.ranks import start_ranks

    plan = {
        "preset": setting.sized(LARGE, "tiny-v2"),
        "layers": None,
        "layout": (1, 1, 1, False),
        "micro_batch_size": setting.sized(16, 2),
        "micro_batches": 2,
        "length": setting.sized(512, 32),
        "recompute": "none",
        "compile": False,
        "attention": "auto",
        "device_weights": True,
        "contestants": ["ours"],
        "rounds": setting.sized(4, 1),
    }
    rank_module = "benchmarks.train_rank"
    timeout = setting.sized(85, 300)
    [found] = start_ranks(rank_module, plan, processes=1, timeout=timeout, uses_gpus=not setting.rehearses)
    steps = sorted(found["seconds"]["ours"])
    seconds = steps[len(steps) // 2]
    on = torch.device(setting.device)
    report.row(
        f"{plan['micro_batches']} micro-batches of {plan['micro_batch_size']}x{plan['length']}",
        {
            "step, ms": 1e3 * seconds,
            "tokens/s": found["tokens"] / seconds,
            **_share_of_peak(found["flops_per_token"] * found["tokens"] / seconds, on),
            "peak memory, GB": found["peak_bytes"]["ours"] / 1e9,
            "loss": found["losses"]["ours"],
        },
    )


def model_beside_peers(setting: StepSetting, report: StepReport, *, size: str, batch: int, length: int) -> None:
    """v3-base or v3-large, whole steps, beside ModernBERT of that size and transformers' DeBERTa."""
    on = torch.device(setting.device)
    shape = setting.sized((batch, length), (2, 32))
    name = setting.sized(f"v3-{size}", "tiny-v2")
    config = preset(name, max_position_embeddings=max(512, shape[1]))
    peer = setting.sized(size, "tiny")
    model = random_masked_lm(config, device=on, dtype=torch.bfloat16)
    training = _own_training(model, shape, on)
    ours = _measure(setting, report, "ours", training, shape=shape, flops=_flops(config, shape))
    del model, training
    _forget(on)
    if not peers.has_transformers():
        report.note("ModernBERT and transformers' DeBERTa are not measured: transformers is not installed")
        return
    makers: dict[str, Callable[[], nn.Module]] = {
        "ModernBERT, its local layers": lambda: peers.modern_bert_masked_lm(peer, is_global=False),
        "ModernBERT, all layers global": lambda: peers.modern_bert_masked_lm(peer, is_global=True),
        "transformers' DeBERTa": lambda: peers.hugging_face_masked_lm(config),
    }
    for title, make in makers.items():
        try:
            with on:
                model = make().to(torch.bfloat16).train()
            theirs = _measure(setting, report, title, PlainTraining(model, _peers_loss(model, shape, on)), shape=shape)
            report.row(f"ours / {title}", {"tokens/s": ours / theirs})
        except torch.OutOfMemoryError:
            report.note(f"{title}: out of memory")
        model = None
        _forget(on)


def launching(setting: StepSetting, report: StepReport) -> None:
    """12 layers of the 1.5B with large and small micro-batches: whether the device waits for launches."""
    on = torch.device(setting.device)
    config = setting.sized(preset(LARGE, num_hidden_layers=12), preset("tiny-v2"))
    model = random_masked_lm(config, device=on, dtype=torch.bfloat16)
    seconds = {}
    for shape in setting.sized(((16, 512), (4, 512)), ((4, 32), (1, 32))):
        training = _own_training(model, shape, on)
        row = race({"passes": TimedPass(training.passes)}, rounds=setting.sized(7, 1), warm_up=3, device=on)["passes"]
        seconds[shape] = row["seconds"]
        busy = sum(kernel_seconds(training.passes, on, rounds=setting.sized(3, 1)).values())
        report.row(
            f"{shape[0]}x{shape[1]}",
            {"passes, ms": 1e3 * row["seconds"], "kernels, ms": 1e3 * busy, "kernels / passes": busy / row["seconds"]},
        )
        del training
    large, small = seconds
    times = {"x the tokens": large[0] / small[0], "x the time": seconds[large] / seconds[small]}
    report.row("the large micro-batch has", times)


def _measure(
    setting: StepSetting,
    report: StepReport,
    name: str,
    training: PlainTraining,
    *,
    shape: tuple[int, int],
    flops: float | None = None,
) -> float:
    """Reports passes, steps and peak memory of a model; returns its tokens per second.

    Args:
        setting: Where the step runs, and how many rounds.
        report: Gets the row.
        name: Title of the row.
        training: A model with its optimizer; it is trained.
        shape: (B, S), sequences and tokens of its micro-batch.
        flops: Of its step; None where nobody has counted them.
    """
    on = torch.device(setting.device)
    if on.type == "cuda":
        torch.cuda.reset_peak_memory_stats(on)
    contestants = {"passes": TimedPass(training.passes), "step": TimedPass(training.step)}
    figures = race(contestants, rounds=setting.sized(5, 1), warm_up=setting.sized(2, 1), device=on)
    seconds, tokens = figures["step"]["seconds"], shape[0] * shape[1]
    row = {
        "passes, ms": 1e3 * figures["passes"]["seconds"],
        "step, ms": 1e3 * seconds,
        "tokens/s": tokens / seconds,
        "parameters": training.num_parameters,
    }
    if flops is not None:
        row |= _share_of_peak(flops / seconds, on)
    if on.type == "cuda":
        row["peak memory, GB"] = torch.cuda.max_memory_allocated(on) / 1e9
    report.row(name, row)
    return tokens / seconds


def _own_training(model: DebertaForMaskedLM, shape: tuple[int, int], on: torch.device) -> PlainTraining:
    """Of a model as a run trains it: with dropout, targets found ahead, products that add on a GPU."""
    ids, labels = _tokens(model.config.vocab_size, shape, on)
    mask, layers, targets = torch.ones_like(ids), range(model.config.num_hidden_layers), find_targets(labels > 0, labels)

    def loss() -> Tensor:
        [(loss_sum, _, _)] = model.forward_stage(
            None, input_ids=ids, attention_mask=mask, targets=targets, layers=layers, dropout_key=1
        )
        return loss_sum / targets.num_targets

    return PlainTraining(model, loss, products_add=on.type in DEVICES_WHOSE_PRODUCTS_ADD)


def _peers_loss(model: Any, shape: tuple[int, int], on: torch.device) -> Callable[[], Tensor]:
    ids, labels = _tokens(model.config.vocab_size, shape, on)
    labels = labels.masked_fill(labels == 0, IGNORED)
    return lambda: model(input_ids=ids, labels=labels).loss


def _tokens(vocab_size: int, shape: tuple[int, int], on: torch.device) -> tuple[Tensor, Tensor]:
    targets = round(MASK_PROBABILITY * shape[1])
    ids, labels = masked_tokens(shape, vocab_size=vocab_size, num_targets=targets, seed=1)
    return ids.to(on), labels.to(on)


def _flops(config: DebertaConfig, shape: tuple[int, int]) -> float:
    batch, length = shape
    per_token = forward_flops(config, max_seq_length=length, micro_batch_size=batch, mask_probability=MASK_PROBABILITY).training
    return per_token * batch * length


def _share_of_peak(flops_per_second: float, on: torch.device) -> dict[str, float]:
    """Of the data sheet's bfloat16 products, where it is known."""
    found = {"TFLOP/s": flops_per_second / 1e12}
    peak = device_peak_flops(torch.cuda.get_device_name(on)) if on.type == "cuda" else None
    return found if peak is None else {**found, "share of peak": flops_per_second / peak}


def _forget(on: torch.device) -> None:
    """Gives memory back before the next contestant is measured."""
    gc.collect()
    if on.type == "cuda":
        torch.cuda.empty_cache()
