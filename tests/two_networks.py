"""A second objective, for tests: a drafter guesses masked tokens, and the model tells which tokens are not the original.

The model reads the sum of the drafter's table and its own, without a gradient to the drafter, and each has an optimizer
step of its own. ``train_plain`` is the same in one process of plain PyTorch.
"""

import dataclasses
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deberta_dist.config import RunConfig
from deberta_dist.data.loader import Batch
from deberta_dist.models.classification import DebertaForReplacedTokenDetection
from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.encoder import CallInputs
from deberta_dist.models.flops import ForwardFlops, forward_flops
from deberta_dist.models.initialisation import initial_tensor
from deberta_dist.models.masked_lm import DebertaForMaskedLM
from deberta_dist.models.positions import within_documents
from deberta_dist.models.targets import Targets, find_targets
from deberta_dist.parallel.network import is_decayed
from deberta_dist.parallel.pipeline import MicroBatches
from deberta_dist.training.objectives.base import Fold, Objective, TrainedNetwork
from deberta_dist.training.objectives.masked_lm import MaskedLMNetwork
from deberta_dist.training.step_batch import StepBatch
from tests.integration.parallel_run import LEARNING_RATE, SEED, Case, global_batch

TABLE = "deberta.embeddings.word_embeddings.weight"
DRAFTER = "drafter"
MODEL_WEIGHT = 5.0
DRAFTER_RATE = 0.5
"""Factor on the learning rate of the drafter."""


class Drafter(DebertaForMaskedLM):
    """Its last stage returns beside its sums the most likely token of every target, int64 [B, S], and 0 elsewhere."""

    def forward_stage(
        self,
        hidden_BSD: Tensor | None,
        *,
        input_ids: Tensor | None,
        attention_mask: Tensor,
        targets: Targets,
        layers: range,
        dropout_key: int | None,
        document_ids: Tensor | None = None,
    ) -> Any:
        mask, position_ids = within_documents(attention_mask, document_ids)
        inputs = CallInputs(input_ids=input_ids, mask=mask, position_ids=position_ids, dropout_key=dropout_key)
        hidden = self._run(hidden_BSD, inputs, targets=targets, layers=layers)
        if layers.stop < self.config.num_hidden_layers:
            return hidden
        head, loss = self.lm_predictions.lm_head, self.cross_entropy
        logits_PV = head(hidden, word_embeddings_VW=self._word_table(hidden.device))
        loss_P, correct_P = loss(logits_PV, targets.ids_P)
        num_real = logits_PV.shape[1] if loss.num_real_rows is None else loss.num_real_rows
        largest_P, best_P = logits_PV.detach()[:, :num_real].float().max(dim=-1)
        wins_P = largest_P == loss.join.largest(largest_P)
        beyond = torch.full_like(best_P, torch.iinfo(torch.int64).max)
        guesses_P = loss.join.smallest(torch.where(wins_P, best_P + loss.first_row, beyond))
        ids_BS = torch.zeros_like(attention_mask).flatten().index_copy(0, targets.tokens_P, guesses_P)
        sums = torch.stack([loss_P.sum(), correct_P.sum().float(), loss_P.new_full((), len(loss_P))])
        return sums[None], ids_BS.view_as(attention_mask)


class Detector(DebertaForReplacedTokenDetection):
    """One logit per token: is it another than the original?"""

    def __init__(self, config: DebertaConfig) -> None:
        super().__init__(config)
        if not config.position_biased_input:
            self.deberta.embeddings.position_embeddings = None
        self.whole_sequence = nn.Identity()

    def keep_layers(self, layers: Collection[int]) -> None:
        self.deberta.keep_layers(layers)
        if 0 not in layers:  # kept for a tied head, which is not here
            self.deberta.embeddings.word_embeddings = None
        if self.config.num_hidden_layers - 1 not in layers:
            self.mask_predictions = None

    def forward_stage(
        self,
        hidden_BSD: Tensor | None,
        *,
        input_ids: Tensor | None,
        attention_mask: Tensor,
        is_replaced: Tensor,
        layers: range,
        dropout_key: int | None,
    ) -> Tensor:
        mask, _ = within_documents(attention_mask, None)
        inputs = CallInputs(input_ids=input_ids, mask=mask, dropout_key=dropout_key)
        hidden_BSD, _ = self.deberta.run_stage(hidden_BSD, inputs, layers=layers)
        if layers.stop < self.config.num_hidden_layers:
            return hidden_BSD
        is_token = attention_mask.to(torch.float32)
        logits_BS = self.mask_predictions(self.whole_sequence(hidden_BSD)).float()
        losses = F.binary_cross_entropy_with_logits(logits_BS, is_replaced.float(), reduction="none")
        correct = ((logits_BS.detach() > 0) == is_replaced) * is_token
        return torch.stack([(losses * is_token).sum(), correct.sum(), is_token.sum()])[None]


@dataclass(frozen=True, kw_only=True)
class DrafterNetwork(MaskedLMNetwork):
    name: str = DRAFTER
    tables_apart: tuple[str, ...] = (TABLE,)
    learning_rate_factor: float = DRAFTER_RATE

    def make(self) -> Drafter:
        return Drafter(self.config)

    @property
    def hands_on(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class DetectorNetwork(TrainedNetwork):
    tables_apart: tuple[str, ...] = (TABLE,)
    tables_added: tuple[str, ...] = (TABLE,)
    loss_weight: float = MODEL_WEIGHT

    def make(self) -> Detector:
        return Detector(self.config)

    @property
    def results(self) -> tuple[str, ...]:
        return "loss", "correct", "tokens"

    @property
    def mean_over(self) -> str:
        return "tokens"

    @property
    def is_handed(self) -> bool:
        return True

    def flops(self, *, length: int, micro_batch_size: int) -> ForwardFlops:
        return forward_flops(self.config, max_seq_length=length, micro_batch_size=micro_batch_size, mask_probability=0.0)

    def micro_batches(self, batch: StepBatch, *, dropout_keys: Sequence[int], handed: Tensor | None) -> MicroBatches:
        count = len(dropout_keys)
        ids = torch.where(handed > 0, handed, batch.input_ids)
        originals = torch.cat([_originals(*one) for one in zip(batch.input_ids.chunk(count), batch.targets, strict=True)])
        fields = zip(batch.attention_mask.chunk(count), (ids != originals).chunk(count), dropout_keys, strict=True)
        names = ("attention_mask", "is_replaced", "dropout_key")
        return MicroBatches(input_ids=ids, fields=[dict(zip(names, found, strict=True)) for found in fields])


def _originals(ids: Tensor, targets: Targets) -> Tensor:
    return ids.flatten().index_copy(0, targets.tokens_P, targets.ids_P).view_as(ids)


def two_networks(config: RunConfig, model_config: DebertaConfig, *, folds: bool = True, joint: bool = False) -> Objective:
    """A drafter with half the layers of the model, and the model."""
    layers = math.ceil(model_config.num_hidden_layers / 2)
    drafter = DrafterNetwork(config=dataclasses.replace(model_config, num_hidden_layers=layers))
    detector = DetectorNetwork(config=model_config, tables_added=(TABLE,) if folds else ())
    ties = (Fold(owner=DRAFTER, reader="", table=TABLE),) if folds else ()
    return Objective((drafter, detector), folds=ties, is_joint=joint)


def train_plain(case: Case, *, joint: bool = False) -> dict[str, Any]:
    """The oracle: losses and norms of every step by network, and weights as each network reads them."""
    torch.set_num_threads(1)
    networks = two_networks(case.run_config(), case.model_config()).networks
    models = [network.make() for network in networks]
    optimizers = []
    for network, model in zip(networks, models, strict=True):
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        with torch.no_grad():
            for name, parameter in named:
                value = initial_tensor(network.saved_name(name), parameter.shape, seed=SEED, std=0.02)
                parameter.copy_(torch.zeros_like(value) if name in network.tables_added else value)
        groups = [
            {"params": [p for n, p in named if is_decayed(n) is decays], "weight_decay": 0.01 * decays}
            for decays in (True, False)
        ]
        rate = network.learning_rate_factor * LEARNING_RATE
        optimizers.append(torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.999), eps=1e-6))
    history = [_plain_step(models, optimizers, global_batch(case, step), case, joint) for step in range(case.steps)]
    weights = [{n: p.detach().clone() for n, p in model.named_parameters()} for model in models]
    weights[1][TABLE] += weights[0][TABLE]
    return {"history": history, "weights": {DRAFTER: weights[0], "": weights[1]}}


def _plain_step(models: list[Any], optimizers: list[Any], batch: Batch, case: Case, joint: bool) -> list[float]:
    drafter, detector = models
    targets = find_targets(batch.labels > 0, batch.labels)
    whole = {"attention_mask": batch.attention_mask, "dropout_key": None}
    for optimizer in optimizers:
        optimizer.zero_grad()
    sums, guesses = drafter.forward_stage(
        None, input_ids=batch.input_ids, targets=targets, layers=range(drafter.config.num_hidden_layers), **whole
    )
    loss = sums[0, 0] / sums[0, 2]
    loss.backward()
    norms = []
    if not joint:
        norms.append(float(nn.utils.clip_grad_norm_(drafter.parameters(), case.clipping)))
        optimizers[0].step()
    base = drafter.get_parameter(TABLE).detach()
    corrupted = torch.where(batch.labels > 0, guesses, batch.input_ids)
    is_replaced = (batch.labels > 0) & (guesses != batch.labels)
    folded = {**dict(detector.named_parameters()), TABLE: base + detector.get_parameter(TABLE)}
    arguments = {"input_ids": corrupted, "is_replaced": is_replaced, **whole}
    arguments["layers"] = range(detector.config.num_hidden_layers)
    found = torch.func.functional_call(_Stage(detector), {f"model.{n}": p for n, p in folded.items()}, (), arguments)
    second = found[0, 0] / found[0, 2]
    (MODEL_WEIGHT * second).backward()
    if joint:
        parameters = [p for model in models for p in model.parameters()]
        norms.append(float(nn.utils.clip_grad_norm_(parameters, case.clipping)))
        optimizers[0].step()
    else:
        norms.append(float(nn.utils.clip_grad_norm_(detector.parameters(), case.clipping)))
    optimizers[1].step()
    return [loss.item(), second.item(), *norms]


class _Stage(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **arguments: Any) -> Tensor:
        return self.model.forward_stage(None, **arguments)
