"""The learning rate of a step: linear warm-up, then linear decay (paper, Table 8)."""


def learning_rate(step: int, *, peak: float, warmup_steps: int, max_steps: int) -> float:
    """Learning rate of optimizer step ``step`` (counted from 0).

    (step + 1) / warmup_steps of the peak while warming up, so that the first step already learns and step
    warmup_steps - 1 runs at the peak; then (max_steps - step) / (max_steps - warmup_steps) of it.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * (max_steps - step) / (max_steps - warmup_steps)
