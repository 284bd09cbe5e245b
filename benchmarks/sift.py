"""A SiFT step beside a plain one: forward and backward passes of a classifier, without the optimizer.

Floor: SiFT is three forward passes, one backward pass to the perturbation alone (which needs no gradient of a weight and
so costs a forward pass) and one through two graphs. In units of a forward pass 3 + 1 + 2 x 2 = 8, a plain step is
1 + 2 = 3: SiFT costs 8/3 of it. The optimizer would be the same for both and is left out, which is to SiFT's disadvantage.
"""

import argparse
import resource
import time
from functools import partial
from typing import Any

from deberta_dist.operations.measure import Sample, add_attention_argument, describe, interleaved, machine, summary

PLAIN, SIFT = "plain step", "SiFT step"
COUNT = 8 / 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this verb."""
    parser.add_argument("--preset", default="v3-base", help="model, with random weights")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    add_attention_argument(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs plain and SiFT steps in turn and returns figures as JSON."""
    # Other verbs measure processes that must not inherit torch's memory.
    import torch
    from torch import Tensor

    from benchmarks.device_models import attend_by
    from deberta_dist.finetuning.sift import Sift, SiftSettings
    from deberta_dist.models.classification import DebertaForSequenceClassification
    from deberta_dist.models.presets import preset

    torch.set_num_threads(arguments.threads)
    is_cuda = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if is_cuda else (torch.device("cpu"), torch.float32)
    config = preset(arguments.preset)
    model = DebertaForSequenceClassification(config).to(device, dtype).train()
    attend_by(arguments.attention, model, config, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(1)
    shape = (arguments.batch_size, arguments.length)
    ids = torch.randint(5, config.vocab_size, shape, generator=generator).to(device)
    mask, labels = torch.ones_like(ids), torch.zeros(arguments.batch_size, dtype=torch.int64, device=device)
    sift = Sift(model.deberta.embeddings.LayerNorm, SiftSettings())

    def forward(key: int | None) -> Tensor:
        return model(ids, mask, dropout_key=key).logits

    def step(*, perturbed: bool) -> Sample:
        model.zero_grad()  # outside of the clock: both need it
        if is_cuda:
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        if perturbed:
            logits, adversarial = sift.passes(forward, key=7)
            loss = torch.nn.functional.cross_entropy(logits, labels) + 5.0 * adversarial.mean()
        else:
            loss = torch.nn.functional.cross_entropy(forward(7).float(), labels)
        loss.backward()
        if is_cuda:
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() if is_cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return Sample(time.perf_counter() - wall, time.process_time() - cpu, peak)

    contestants = {PLAIN: partial(step, perturbed=False), SIFT: partial(step, perturbed=True)}
    interleaved(contestants, rounds=1)  # what happens once: allocators, caches
    figures = summary(interleaved(contestants, rounds=arguments.rounds), against=(PLAIN,))
    # A CPU may be shared with others; a GPU's time is the clock's.
    clock = "wall_seconds" if is_cuda else "cpu_seconds"
    ratio = figures[SIFT][clock] / figures[PLAIN][clock]
    where = torch.cuda.get_device_name() if is_cuda else f"CPU, {arguments.threads} thread(s)"
    title = f"{arguments.preset}, {shape[0]} x {shape[1]} tokens, {str(dtype).removeprefix('torch.')}, {where}"
    print(describe(title, figures))
    print(
        f"  {SIFT} / {PLAIN} in {clock.replace('_', ' ')}: {ratio:.2f}; the count of passes is {COUNT:.2f}, so {ratio / COUNT - 1:+.1%}"
    )
    return {"machine": machine(), "model": title, "steps": figures, "ratio": ratio, "count": COUNT}
