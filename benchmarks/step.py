"""A whole step of masked language modelling, without the optimizer, beside other implementations.

Embeddings, layers, enhanced mask decoder, head, loss and all gradients, from the same weights and batch; 15% of tokens
are targets. Hugging Face's model has no enhanced mask decoder and computes the logits of all tokens: it does another
thing for the same end. So its hidden states alone are compared with ours; loss and gradients are with --official.
The floor is the time of the model's products (planning/flops.py) at the rate of one large product, measured between the
rounds: what no implementation can be under that does not compute less.
For steady times on a CPU set MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184.
"""

import argparse
from typing import Any

from deberta_dist.operations.measure import add_attention_argument, add_model_arguments, machine

OURS, FLOOR = "ours", "a large product"
TOLERANCE = 1e-4  # of gradients of many layers, float32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this verb."""
    parser.add_argument("--preset", default="v3-base", help="model, with random weights")
    parser.add_argument("--layers", type=int, default=12, help="layers; 12 is the whole v3-base")
    add_model_arguments(parser, batch_size=2)
    parser.add_argument("--recompute", default="none", help="activations that ours computes again")
    add_attention_argument(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compares and times; returns figures as JSON."""
    import torch

    from benchmarks import peers, stopwatch
    from benchmarks.device_models import attend_by
    from benchmarks.step_contestants import ContestStep
    from deberta_dist.models.presets import preset

    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = preset(arguments.preset, num_hidden_layers=arguments.layers)
    step = ContestStep(config, shape=(arguments.batch_size, arguments.length), device=device, dtype=dtype)
    step.model.recompute = arguments.recompute
    attend_by(arguments.attention, step.model, config, dtype=dtype, device=device)
    contestants = {OURS: step.ours(), peers.HUGGING_FACE: step.hugging_face()}
    if arguments.official is not None:
        contestants[peers.PUBLISHED] = step.published(arguments.official)
    tolerance = TOLERANCE if dtype == torch.float32 else 0.1
    agreement = {
        "hidden states": stopwatch.require_agreement(step.hidden_states(), oracle=OURS, tolerance=tolerance),
        "loss and gradients": stopwatch.require_agreement(step.gradients(), oracle=OURS, tolerance=tolerance),
    }
    product, product_flops = step.large_product()
    raced = stopwatch.race({**contestants, FLOOR: product}, rounds=arguments.rounds, warm_up=1, device=device)
    flops_per_second = product_flops / raced.pop(FLOOR)["seconds"]
    figures, floor = raced, step.flops / flops_per_second
    for name, contestant in contestants.items():
        contestant.prepare()
        figures[name]["saved_bytes"] = stopwatch.saved_bytes(contestant.forward, without=step.tensors(name))
    used = stopwatch.settings(device, arguments.threads)
    title = (
        f"a step of {arguments.preset} with {arguments.layers} layers, {arguments.batch_size} x {arguments.length} "
        f"tokens, {str(dtype).removeprefix('torch.')}, dropout {config.hidden_dropout_prob}, {used['device']}"
    )
    print(stopwatch.describe(title, figures, against=(peers.HUGGING_FACE, peers.PUBLISHED)))
    print(f"  {peers.HUGGING_FACE} has no enhanced mask decoder, and logits of all tokens")
    print(
        f"  floor {floor * 1e3:.1f} ms: {step.flops / 1e9:,.0f} GFLOP of products at {flops_per_second / 1e9:,.0f} GFLOP/s, "
        f"which is {floor / figures[OURS]['seconds']:.0%} of {OURS}"
    )
    return {
        "machine": machine(),
        "settings": used,
        "model": title,
        "agreement": agreement,
        "figures": figures,
        "floor": {"seconds": floor, "flops": step.flops, "flops_per_second": flops_per_second},
    }
