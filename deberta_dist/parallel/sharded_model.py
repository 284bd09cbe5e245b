"""A rank's model whose parameters exist only while a step needs them.

Between steps the parameters are empty and the weight store holds 1 / data_parallel_size of what this rank owns. ``gather``
makes every parameter a view of gathered or borrowed weights, with a float32 view that sums its gradients over micro-batches;
``reduce`` adds the borrowers' gradients to the owners', reduce-scatters them and frees both; ``apply`` updates the weights.

On a GPU the gradient view is a ``main_grad``: matrix products add weight gradients to it directly (see `models.fused_qkv`),
and ``accumulate`` adds whatever else the backward pass of a micro-batch left in ``.grad``. On a CPU the view is ``.grad``
itself and autograd adds to it. Adding within the product would sum in another order there, and runs begun by earlier
versions have to resume bit-equal.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deberta_dist.models.fused_qkv import add_gradients_, set_main_grads
from deberta_dist.parallel.pipeline.ties import TiedWeights
from deberta_dist.parallel.zero import WeightStore

DEVICES_WHOSE_PRODUCTS_ADD = ("cuda",)


class ShardedModel:
    """Connects the parameters of a rank's model to its weight store and its ties.

    Args:
        model: This rank's layers, divided by the sharding rules, on the meta device.
        store: The weights that this rank owns.
        ties: The weights that this rank broadcasts to borrowers, and those that it borrows.
        device: The mesh's device, where gathered weights are.
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
            # autograd insists that .grad has the weight's dtype unless told otherwise, and sums over micro-batches need
            # float32. None admits any dtype: with main_grad, some gradients arrive in 16 bits and some in float32.
            empty.grad_dtype = None if self._products_add else torch.float32
            setattr(model.get_submodule(module_name), leaf, empty)
            del parameter
        self._parameters = dict(model.named_parameters())

    def gather(self, *, with_gradients: bool) -> None:
        """Fills the parameters: one all-gather of the owned weights, then one broadcast per tie. Collective."""
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
        """Adds what a backward pass left in ``.grad`` to the sums over micro-batches. Call it after each backward pass."""
        if self._products_add:
            add_gradients_(self.model)

    def reduce_ties(self) -> None:
        """Adds the borrowers' gradients to the owners'. Collective."""
        self._ties.reduce_gradients(self._owned_gradients)

    def reduce(self, *, loss_scale: float) -> Tensor:
        """Reduce-scatters the gradients; returns their norms on the device, see `WeightStore.reduce`."""
        # Ties first: an owner's gradient has to be complete before its shards leave for the other data ranks.
        self.reduce_ties()
        # The parameters let go of the gathered weights before the store frees them, or the memory would stay referenced.
        self._empty()
        return self.store.reduce(loss_scale=loss_scale)

    def apply(self, norms: Sequence[float], *, learning_rate: float, joint_norm: float | None = None) -> None:
        """One optimizer step, or none if the norm is not finite; see `WeightStore.apply`."""
        self.store.apply(norms, learning_rate=learning_rate, joint_norm=joint_norm)

    def release(self) -> None:
        """Frees the gathered weights without a step (after an evaluation)."""
        self._empty()
        self.store.release()

    def _empty(self) -> None:
        self._owned_gradients = {}
        set_main_grads(self.model, None)
        for parameter in self._parameters.values():
            parameter.grad = None
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
