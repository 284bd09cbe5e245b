"""A rank's model whose parameters exist only while a step needs them.

Between steps the parameters are empty and the weight store holds 1/dp of what this rank owns. ``gather``
makes every parameter a view of gathered or borrowed weights and every ``.grad`` a float32 view to accumulate
in; ``hand_over`` completes the owners' sums and reduce-scatters them; ``step`` ends it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deberta_dist.pipeline_parallel.ties import TiedWeights
from deberta_dist.zero import WeightStore


class ShardedModel:
    """Joins a cut model, the weight store and the ties.

    Args:
        model: The rank's model, cut by layers and split by the plan, on the meta device.
        store: What this rank owns.
        ties: What it lends and borrows.
        device: Where it computes.
    """

    def __init__(self, model: nn.Module, *, store: WeightStore, ties: TiedWeights, device: torch.device) -> None:
        self.model = model
        self.store = store
        self._ties = ties
        self._owned_gradients: dict[str, Tensor] = {}
        for name, parameter in list(model.named_parameters()):
            module_name, _, leaf = name.rpartition(".")
            empty = nn.Parameter(torch.empty(0, dtype=store.dtype, device=device))
            # Gradients of low-precision weights are summed over micro-batches in float32.
            empty.grad_dtype = torch.float32
            setattr(model.get_submodule(module_name), leaf, empty)
            del parameter
        self._parameters = dict(model.named_parameters())

    def gather(self, *, with_gradients: bool) -> None:
        """Fills the parameters: one all-gather of what the stage owns, one broadcast per tie."""
        weights, gradients = self.store.gather(with_gradients=with_gradients)
        weights |= self._ties.lend(weights)
        if with_gradients:
            self._owned_gradients = gradients
            gradients = gradients | self._ties.gradient_views()
        for name, parameter in self._parameters.items():
            parameter.data = weights[name]
            if with_gradients:
                parameter.grad = gradients[name]

    def collect_gradients(self) -> None:
        """Adds what borrowers accumulated to the owners' gradients."""
        self._ties.collect(self._owned_gradients)

    def hand_over(self, *, loss_scale: float) -> Tensor:
        """Reduce-scatters the gradients; returns their norms on the device, see `WeightStore.hand_over`."""
        self.collect_gradients()
        self._empty()
        return self.store.hand_over(loss_scale=loss_scale)

    def step(self, norms: Sequence[float], *, learning_rate: float) -> None:
        """One optimizer step, or none where the norm is not finite; see `WeightStore.step`."""
        self.store.step(norms, learning_rate=learning_rate)

    def release(self) -> None:
        """Gives the gathered weights up (after an evaluation)."""
        self._empty()
        self.store.release()

    def _empty(self) -> None:
        self._owned_gradients = {}
        for parameter in self._parameters.values():
            parameter.grad = None
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
