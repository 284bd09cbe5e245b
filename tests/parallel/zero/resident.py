"""What a weight store holds between steps, counted."""

import torch

from deberta_dist.parallel.zero import WeightStore


def resident_bytes(store: WeightStore) -> dict[str, int]:
    """Bytes that this rank holds between steps, by kind: shards of weights, gathered weights, master weights, moments."""
    at_rest = sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in store._parameters)
    gathered = sum(p.numel() * p.element_size() for p in store._parameters)
    masters, moments = 0, 0
    for master, state in store._flat_states():
        masters += master.numel() * master.element_size()
        moments += sum(v.numel() * v.element_size() for v in state.values() if torch.is_tensor(v) and v.ndim)
    return {"weights": at_rest, "gathered": gathered, "master_weights": masters, "optimizer_states": moments}
