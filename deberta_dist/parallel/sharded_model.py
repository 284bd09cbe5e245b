"""A rank's model whose parameters exist only while a step needs them.

Between steps the parameters are empty and the weight store holds 1/dp of what this rank owns. ``gather``
makes every parameter a view of gathered or borrowed weights and gives it a float32 view to sum its gradients over
micro-batches in; ``reduce`` completes the owners' sums, reduce-scatters them and frees both; ``apply`` moves the weights.

On a GPU the view is a ``main_grad``: products add weights' gradients to it themselves (see
`models.joint_linear`), and what the backward pass of a micro-batch leaves in ``.grad`` is added by ``accumulate``, all of it
at once. On a CPU the view is ``.grad`` itself and autograd adds, product by product: a product that adds would sum in
another order, and runs go on to the same bits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deberta_dist.models.fused_qkv import add_gradients_, set_main_grads
from deberta_dist.parallel.pipeline.ties import TiedWeights
from deberta_dist.parallel.zero import WeightStore

DEVICES_WHOSE_PRODUCTS_ADD = ("cuda",)


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
        self._products_add = device.type in DEVICES_WHOSE_PRODUCTS_ADD
        self._owned_gradients: dict[str, Tensor] = {}
        for name, parameter in list(model.named_parameters()):
            module_name, _, leaf = name.rpartition(".")
            empty = nn.Parameter(torch.empty(0, dtype=store.dtype, device=device))
            # Gradients of low-precision weights are summed over micro-batches in float32; some come in it.
            empty.grad_dtype = None if self._products_add else torch.float32
            setattr(model.get_submodule(module_name), leaf, empty)
            del parameter
        self._parameters = dict(model.named_parameters())

    def gather(self, *, with_gradients: bool) -> None:
        """Fills the parameters: one all-gather of what the stage owns, one broadcast per tie."""
        weights, gradients = self.store.gather(with_gradients=with_gradients)
        weights |= self._ties.broadcast_weights(weights)
        if with_gradients:
            self._owned_gradients = gradients
            gradients = gradients | self._ties.gradient_views()
        for name, parameter in self._parameters.items():
            parameter.data = weights[name]
            if with_gradients and not self._products_add:
                parameter.grad = gradients[name]
        if with_gradients and self._products_add:
            set_main_grads(self.model, {name: gradients[name] for name in self._parameters})

    def accumulate(self) -> None:
        """Adds what a backward pass has left in ``.grad`` to the sums of micro-batches; after each."""
        if self._products_add:
            add_gradients_(self.model)

    def reduce_ties(self) -> None:
        """Adds what borrowers accumulated to the owners' gradients."""
        self._ties.reduce_gradients(self._owned_gradients)

    def reduce(self, *, loss_scale: float) -> Tensor:
        """Reduce-scatters the gradients; returns their norms on the device, see `WeightStore.reduce`."""
        self.reduce_ties()
        self._empty()
        return self.store.reduce(loss_scale=loss_scale)

    def apply(self, norms: Sequence[float], *, learning_rate: float, joint_norm: float | None = None) -> None:
        """One optimizer step, or none where the norm is not finite; see `WeightStore.apply`."""
        self.store.apply(norms, learning_rate=learning_rate, joint_norm=joint_norm)

    def release(self) -> None:
        """Gives the gathered weights up (after an evaluation)."""
        self._empty()
        self.store.release()

    def _empty(self) -> None:
        self._owned_gradients = {}
        set_main_grads(self.model, None)
        for parameter in self._parameters.values():
            parameter.grad = None
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
