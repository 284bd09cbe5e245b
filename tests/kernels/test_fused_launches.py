"""How much one fused attention starts on the GPU: in small batches the GPU waits for the host to start the next kernel.

Every launch of a Triton kernel counts, and every operator of torch that is neither a view nor an allocation. The Triton
kernels are replaced by a note of their name, so nothing true is computed.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deberta_dist.kernels import AttentionMask, attention
from deberta_dist.models.layers import AttentionMemory, DisentangledSelfAttention
from deberta_dist.models.positions import relative_positions
from deberta_dist.models.presets import preset

pytest.importorskip("triton", reason="Triton is not installed: pip install 'deberta_dist[triton]'")

from deberta_dist.kernels.fused import launch

B, S, D, HEADS = 2, 48, 64, 2
# _unsafe_view is a view whose schema does not say so.
STARTS_NOTHING = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view"}
FORWARD = {"baddbmm": 2, "keep_bits_kernel": 1, "forward_kernel": 1}
BACKWARD = {
    "baddbmm": 4,
    "keep_bits_kernel": 1,
    "delta_kernel": 1,
    "backward_kernel": 1,
    "row_sums_kernel": 2,
    "token_gradient_kernel": 2,
}
# Of the projections, and of dropout on the relative table.
OF_PROJECTIONS = {"addmm", "mm", "sum", "add", "mul", "random_", "lt", "masked_fill_", "masked_fill"}


class Launches(TorchDispatchMode):
    """What was started within, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = function.overloadpacket.__name__
        returned = [value.alias_info for value in function._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returned)
        if not is_view and name not in STARTS_NOTHING:
            self.names[name] += 1
        return function(*args, **(kwargs or {}))

    def of(self, function: Callable[[], Any]) -> tuple[Any, Counter[str]]:
        """What the function returns, and what it started."""
        self.names.clear()
        with self:
            result = function()
        return result, Counter(self.names)


@dataclasses.dataclass
class Note:
    """In the place of a kernel, which is started by ``kernel[grid](...)``."""

    name: str
    launches: Launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: self.launches.names.update([self.name])


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    counter = Launches()
    for name in [name for name in vars(launch) if name.endswith("_kernel")]:
        monkeypatch.setattr(launch, name, Note(name, counter))
    monkeypatch.setattr(launch, "INTERPRETED", True)
    monkeypatch.setattr(attention, "unavailable_reason", lambda *_, **__: None)
    return counter


class Layer:
    """Self-attention of one layer in training, on a mask and positions that the layer before has used already."""

    def __init__(self, *, shares_keys: bool = True, max_distance: int = 16) -> None:
        config = preset("tiny-v2", hidden_size=D, num_attention_heads=HEADS, share_att_key=shares_keys)
        self.attention = DisentangledSelfAttention(config).train()
        self.positions = relative_positions(num_buckets=0, max_distance=max_distance, device=torch.device("cpu"))
        self.mask = AttentionMask(key_segments_BS=torch.arange(S).expand(B, S) < S - 5)
        self.states = torch.randn(B, S, D, requires_grad=True)
        self.table = torch.randn(2 * max_distance, D, requires_grad=True)
        self.attend(*self.project())

    def project(self) -> tuple[Tensor, AttentionMemory]:
        return self.attention.queries_and_memory(self.states, rel_RD=self.table, dropout_key=1)

    def attend(self, query: Tensor, memory: AttentionMemory) -> Tensor:
        return self.attention.attend(query, memory, positions=self.positions, mask=self.mask, dropout_key=1)[0]


@pytest.mark.parametrize(("max_distance", "of_other_rows"), [(16, {}), (2 * S, {"new_zeros": 1})])
def test_one_attention(launches, max_distance, of_other_rows):
    layer = Layer(max_distance=max_distance)
    query, memory = layer.project()
    # Leaves that lie in memory as the projections have left them.
    operands = [x.detach().requires_grad_() for x in (query, *memory[:4])]
    context, started = launches.of(lambda: layer.attend(operands[0], AttentionMemory(*operands[1:])))
    assert started == FORWARD
    gradient = torch.ones_like(context)
    _, started = launches.of(lambda: torch.autograd.grad(context, operands, gradient))
    assert started == BACKWARD | of_other_rows


@pytest.mark.parametrize("shares_keys", [True, False])
def test_nothing_is_copied_between_projections_and_kernels(launches, shares_keys):
    layer = Layer(shares_keys=shares_keys)
    context, started = launches.of(lambda: layer.attend(*layer.project()))
    assert set(started) - OF_PROJECTIONS == set(FORWARD)
    wanted = [layer.states, layer.table, *layer.attention.parameters()]
    gradient = torch.ones_like(context)
    _, started = launches.of(lambda: torch.autograd.grad(context, wanted, gradient))
    assert set(started) - OF_PROJECTIONS == set(BACKWARD)


def test_queries_anywhere_are_sorted_once_for_all_passes(launches):
    layer = Layer()
    query_positions = torch.arange(7).expand(B, 7)
    layer.positions = dataclasses.replace(layer.positions, query_positions_BQ=query_positions)
    layer.mask = layer.mask.of_queries(query_positions)
    memory, query = layer.project()[1], layer.attention.queries(torch.randn(B, 7, D))
    _, first = launches.of(lambda: layer.attend(query, memory))
    assert first["sort"] == 1
    _, second = launches.of(lambda: layer.attend(query, memory))
    assert second == FORWARD
