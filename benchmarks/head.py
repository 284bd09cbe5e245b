"""The head of a masked language model, from hidden states to loss and all gradients, beside other ways to do it.

Gather of the targets, transform, logits and cross entropy, with the gradients of hidden states, head and word table; 15%
of tokens are targets. Loss and gradients are compared first. Peak is what is made between the start of the forward pass
and the end of the backward pass, at its highest, with the gradients: counted, not timed.
For steady times on a CPU set MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184.
"""

import argparse
from typing import Any

from deberta_dist.operations.measure import add_model_arguments, machine

OURS, CHUNKED = "ours", "ours, in {} chunks"
TARGETS, TORCH, ALL_TOKENS = "targets, torch", "targets, torch's fused", "all tokens, as transformers"
TOLERANCE = 1e-5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this verb."""
    parser.add_argument("--hidden-size", type=int, default=768, help="width of hidden states and embeddings")
    parser.add_argument("--vocabulary", type=int, default=128_100, help="tokens of the vocabulary")
    parser.add_argument("--chunks", type=int, default=8, help="of the vocabulary, for the contestant that has them")
    add_model_arguments(parser, batch_size=2, official=False)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compares, times and counts; returns figures as JSON."""
    import torch

    from benchmarks import stopwatch
    from benchmarks.head_contestants import HeadContestant
    from deberta_dist.planning.activations import LiveBytes

    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    head = HeadContestant(
        hidden_size=arguments.hidden_size,
        vocab_size=arguments.vocabulary,
        shape=(arguments.batch_size, arguments.length),
        device=device,
        dtype=dtype,
    )
    losses = {
        OURS: lambda: head.ours(num_chunks=1),
        CHUNKED.format(arguments.chunks): lambda: head.ours(num_chunks=arguments.chunks),
        TARGETS: head.of_targets,
        TORCH: head.fused_by_torch,
        ALL_TOKENS: head.of_all_tokens,
    }
    tolerance = TOLERANCE if dtype == torch.float32 else 0.05
    values = {name: head.values(loss) for name, loss in losses.items()}
    agreement = stopwatch.require_agreement(values, oracle=TARGETS, tolerance=tolerance)
    del values
    contestants = {
        name: stopwatch.TimedPass(loss, lambda value: value.backward(), head.forget) for name, loss in losses.items()
    }
    figures = stopwatch.race(contestants, rounds=arguments.rounds, warm_up=1, device=device)
    for name, contestant in contestants.items():
        contestant.prepare()
        with LiveBytes() as live:
            contestant.run()
        figures[name]["peak_bytes"] = live.peak
    used = stopwatch.settings(device, arguments.threads)
    title = (
        f"head: {arguments.batch_size} x {arguments.length} tokens, {head.num_targets} targets, width "
        f"{arguments.hidden_size}, vocabulary {arguments.vocabulary}, {str(dtype).removeprefix('torch.')}, {used['device']}"
    )
    print(stopwatch.describe(title, figures, against=(TARGETS, ALL_TOKENS)))
    return {"machine": machine(), "settings": used, "head": title, "agreement": agreement, "figures": figures}
