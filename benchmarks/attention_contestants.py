"""One attention with all its gradients, computed by us and by others from the same weights: what `layer` measures.

Letters: B batch, S sequence, D hidden, N heads, H head size, R rows of the relative table.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import peers
from benchmarks.stopwatch import TimedPass, saved_bytes
from deberta_dist.kernels import RelativePositions, disentangled_attention, unavailable_reason
from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.layers import DisentangledSelfAttention
from deberta_dist.models.positions import relative_positions
from deberta_dist.models.presets import preset

HEAD_SIZE = 64
AttentionForward = Callable[[], Tensor]


@dataclass(frozen=True)
class AttentionCase:
    """Sizes; operands and contestants are made from them, always the same."""

    batch_size: int
    length: int
    heads: int
    dropout: float
    device: torch.device
    dtype: torch.dtype

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        width = self.heads * HEAD_SIZE
        config = preset(
            "v3-base",
            hidden_size=width,
            num_attention_heads=self.heads,
            intermediate_size=4 * width,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=self.dropout,
        )

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            x = torch.randn(*shape, generator=generator) * scale
            return x.to(self.device, self.dtype).requires_grad_()

        made = {
            "config": config,
            "hidden_BSD": normal(self.batch_size, self.length, width),
            "rel_RD": normal(config.num_position_rows, width),
            "gradient_BSD": normal(self.batch_size, self.length, width).detach(),
            "module": DisentangledSelfAttention(config).to(self.device, self.dtype),
            "_modules": [],
        }
        for name, value in made.items():
            object.__setattr__(self, name, value)
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.copy_(normal(*parameter.shape, scale=0.04))
        self._modules.append(self.module)

    @property
    def leaves(self) -> list[Tensor]:
        """Tensors that are there anyway."""
        return [self.hidden_BSD, self.rel_RD, *(p for module in self._modules for p in module.parameters())]

    def contestant(self, forward: AttentionForward) -> TimedPass:
        """With the gradients of hidden states, table and weights."""
        return TimedPass(forward, lambda context: context.backward(self.gradient_BSD), self._clear)

    def values(self, forward: AttentionForward) -> list[Tensor]:
        """Context and gradients of hidden states, table and the three projections' weights."""
        self._clear()
        context = forward()
        context.backward(self.gradient_BSD)
        weights = {}
        for module in self._modules:
            found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
            weights = found or weights
        names = [f"{part}_proj.weight" for part in ("query", "key", "value")]
        return [context.detach(), self.hidden_BSD.grad, self.rel_RD.grad, *(weights[name] for name in names)]

    @contextmanager
    def no_dropout(self) -> Iterator[None]:
        """All modules in evaluation mode meanwhile."""
        for module in self._modules:
            module.eval()
        yield
        for module in self._modules:
            module.train()

    @property
    def positions(self) -> RelativePositions:
        """Of all tokens."""
        config = self.config
        return relative_positions(
            num_buckets=config.position_buckets, max_distance=config.max_relative_distance, device=self.device
        )

    @property
    def no_fused_reason(self) -> str | None:
        """Why the fused implementation cannot run here; None if it can."""
        key_BNSH = self.hidden_BSD.unflatten(-1, (-1, HEAD_SIZE)).transpose(1, 2)
        return unavailable_reason(key_BNSH, positions=self.positions, mask=None)

    def ours(self, implementation: str, *, recompute: bool = False) -> AttentionForward:
        """This package's, by one implementation of the kernel."""
        module, positions = self.module, self.positions

        def forward() -> Tensor:
            query, memory = module.queries_and_memory(self.hidden_BSD, rel_RD=self.rel_RD, dropout_key=1)
            context, _ = disentangled_attention(
                query,
                memory.key_BNSH,
                memory.value_BNSH,
                positions=positions,
                rel_key_NRH=memory.rel_key_NRH,
                rel_query_NRH=memory.rel_query_NRH,
                dropout_p=self.dropout if module.training else 0.0,
                dropout_seed=1,
                recompute=recompute,
                implementation=implementation,
            )
            return context.transpose(1, 2).flatten(2)

        return forward

    def hugging_face(self) -> AttentionForward:
        """transformers' module."""
        module = self._with_our_weights(peers.hugging_face_attention(self.config))
        mask = torch.ones(self.batch_size, 1, self.length, self.length, dtype=torch.bool, device=self.device)
        return lambda: module(self.hidden_BSD, mask, rel_embeddings=self.rel_RD)[0]

    def published(self, checkout: Path) -> AttentionForward:
        """The published module."""
        module = self._with_our_weights(peers.published_attention(checkout, self.config))
        mask = torch.ones(self.batch_size, 1, self.length, self.length, dtype=torch.uint8, device=self.device)
        return lambda: module(self.hidden_BSD, mask, rel_embeddings=self.rel_RD)["hidden_states"]

    def disentangled_flash(self) -> AttentionForward:
        """The module of the package of that name."""
        module = self._with_our_weights(peers.disentangled_flash_attention(self.config, self.device))
        mask = torch.ones(self.batch_size, self.length, dtype=torch.bool, device=self.device)
        return lambda: module(self.hidden_BSD, mask, rel_embeddings=self.rel_RD)[0]

    def without_positions(self) -> AttentionForward:
        """The same projections with torch's attention: no relative table."""
        module = self.module

        def heads(x_BSD: Tensor) -> Tensor:
            return x_BSD.unflatten(-1, (-1, HEAD_SIZE)).transpose(1, 2)

        def forward() -> Tensor:
            query, key, value = (
                heads(projection(self.hidden_BSD)) for projection in (module.query_proj, module.key_proj, module.value_proj)
            )
            context = F.scaled_dot_product_attention(query, key, value, dropout_p=self.dropout if module.training else 0.0)
            return context.transpose(1, 2).flatten(2)

        return forward

    def products_alone(self) -> Callable[[], None]:
        """The products of the formula and of its gradients, into storage that is there.

        Per head 2 of queries, keys and values, 2 with the table; 3 projections of tokens and 2 of the table; and two
        gradients of each.
        """
        hidden = self.hidden_BSD.detach().flatten(0, 1)
        table, weight = self.rel_RD.detach(), self.module.query_proj.weight.detach()
        one_head = hidden[:, :HEAD_SIZE].contiguous().view(self.batch_size, self.length, HEAD_SIZE)
        rows, of_head = one_head.view(-1, HEAD_SIZE), table[:, :HEAD_SIZE].contiguous()
        scores = torch.bmm(one_head, one_head.transpose(1, 2))
        products = rows @ of_head.t()
        out_head, out_table, out_rows = one_head.clone(), of_head.clone(), rows.clone()
        outs = [(x, torch.empty_like(x @ weight), torch.empty_like(weight)) for x in (hidden, table)]

        def project() -> None:
            for (x, out, out_weight), count in zip(outs, (3, 2), strict=True):
                for _ in range(count):
                    torch.mm(x, weight.t(), out=out)
                    torch.mm(x, weight, out=out)
                    torch.mm(out.t(), x, out=out_weight)

        def run() -> None:
            project()
            for _ in range(self.heads):
                for _ in range(2):  # scores and their gradient; context and value; query and key
                    torch.bmm(one_head, one_head.transpose(1, 2), out=scores)
                    torch.bmm(scores, one_head, out=out_head)
                    torch.bmm(scores.transpose(1, 2), one_head, out=out_head)
                for _ in range(2):  # c2p and p2c
                    torch.mm(rows, of_head.t(), out=products)
                    torch.mm(products, of_head, out=out_rows)
                    torch.mm(products.t(), rows, out=out_table)

        return torch.no_grad()(run)

    def _with_our_weights(self, module: nn.Module) -> nn.Module:
        module.load_state_dict(self.module.state_dict(), strict=True)
        self._modules.append(module.to(self.device, self.dtype))
        return module

    def _clear(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None


def layer_saved_bytes(checkout: Path | None) -> dict[str, int]:
    """What one layer of the 1.5B model saves for one sequence of 512 tokens in bfloat16, counted on the meta device."""
    from deberta_dist.planning.activations import StageCase, stage_activations  # needs pydantic; the contestants do not
    from deberta_dist.training.objectives.masked_lm import MaskedLMNetwork

    config = preset("v2-xxlarge")
    found = {}
    for name, recompute in (("ours", "none"), ("ours, selective recomputation", "selective")):
        two, three = (
            stage_activations(
                MaskedLMNetwork(config=config),
                StageCase(
                    layers=range(1, stop),
                    tensor_parallel_size=1,
                    batch_shape=(4, 512),
                    targets_per_sequence=77,
                    dtype=torch.bfloat16,
                    recompute=recompute,
                ),
            ).saved
            for stop in (3, 4)
        )
        found[name] = (three - two) // 4
    found[peers.HUGGING_FACE] = _peer_layer(peers.hugging_face_layer(config), config)
    if checkout is not None:
        found[peers.PUBLISHED] = _peer_layer(peers.published_layer(checkout, config), config)
    return found


def _peer_layer(make: Callable[[], nn.Module], config: DebertaConfig) -> int:
    with torch.device("meta"):
        layer = make().to(torch.bfloat16).train()
        hidden = torch.empty(4, 512, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        table = torch.empty(config.num_position_rows, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        mask = torch.empty(4, 1, 512, 512, dtype=torch.uint8)
        distances = torch.empty(512, 512, dtype=torch.int64)
        return (
            saved_bytes(
                lambda: layer(hidden, mask, relative_pos=distances, rel_embeddings=table),
                without=[hidden, table, mask, distances, *layer.parameters()],
            )
            // 4
        )
