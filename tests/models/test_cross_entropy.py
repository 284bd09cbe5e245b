"""The loss of the head and the gradient of the word table, against torch's own, in float64 and in 16 bits."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deberta_dist.models import cross_entropy as room
from deberta_dist.models.cross_entropy import CrossEntropy
from deberta_dist.models.masked_lm import DebertaForMaskedLM
from deberta_dist.models.presets import preset
from deberta_dist.models.shared_table import SharedTable, look_up

TARGETS, WIDTH, VOCABULARY = 23, 6, 101


@pytest.fixture(params=[2**25, 300], ids=["at once", "three rows at a time"], autouse=True)
def rows_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "ELEMENTS_AT_ONCE_ON_CPU", request.param)


def product(dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = (TARGETS, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,)
    operands = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    return operands, torch.randint(0, VOCABULARY, (TARGETS,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_chunks", [1, 2, 7, 500])
def test_of_a_product(dtype: torch.dtype, num_chunks: int) -> None:
    operands, labels = product(dtype)
    loss_T, is_hit_T = CrossEntropy().of_product(*operands, labels, num_chunks=num_chunks)
    weights = torch.linspace(0.5, 2.0, TARGETS, dtype=loss_T.dtype)
    found = torch.autograd.grad(loss_T, operands, weights)

    whole = [x.detach().double().requires_grad_() for x in operands]
    logits = F.linear(*whole)
    expected = F.cross_entropy(logits, labels, reduction="none")
    wanted = torch.autograd.grad(expected, whole, weights.double())
    tolerance = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    assert loss_T.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss_T.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(is_hit_T, logits.argmax(-1) == labels) or dtype == torch.bfloat16
    for gradient, reference in zip(found, wanted, strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient.double(), reference, rtol=tolerance, atol=tolerance)


def test_logits_that_others_read_stay_as_they_are() -> None:
    operands, labels = product(torch.float64)
    logits = F.linear(*operands).detach().requires_grad_()
    before = logits.detach().clone()
    loss_T, _ = CrossEntropy()(logits, labels)
    loss_T.sum().backward()
    assert torch.equal(logits.detach(), before)
    gradient = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), logits)[0]
    torch.testing.assert_close(logits.grad, gradient, rtol=1e-13, atol=1e-15)


def test_a_second_backward_pass_over_overwritten_logits_is_refused() -> None:
    operands, labels = product(torch.float32)
    loss = CrossEntropy().of_product(*operands, labels)[0].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be run once"):
        loss.backward()


@pytest.mark.parametrize("with_product", [False, True])
@pytest.mark.parametrize("padding_idx", [None, 3])
def test_both_uses_of_a_table_give_one_gradient(with_product: bool, padding_idx: int | None) -> None:
    words = nn.Embedding(11, WIDTH, padding_idx=padding_idx, dtype=torch.float64)
    ids = torch.tensor([[3, 4, 4], [10, 0, 3]])

    def loss_of(table: SharedTable | None) -> Tensor:
        looked_up = look_up(ids, words, table)
        if not with_product:
            return looked_up.sin().sum()
        return F.linear(looked_up.sin(), words.weight if table is None else table.weight_VW).cos().sum()

    expected = torch.autograd.grad(loss_of(None), words.weight)[0]
    for _ in range(2):
        found = torch.autograd.grad(loss_of(SharedTable(words.weight)), words.weight)[0]
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("chunks", [1, 3])
def test_a_stage_of_all_layers_gives_the_loss_and_gradients_of_the_model(chunks: int) -> None:
    model = DebertaForMaskedLM(preset("tiny-v2", vocab_size=211), seed=2).double().eval()
    ids = torch.randint(5, 211, (2, 9), generator=torch.Generator().manual_seed(1))
    labels = torch.where(torch.arange(18).view(2, 9) % 4 == 1, ids, 0)
    output = model(ids, labels=labels)
    output.loss.backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    model.vocabulary_chunks = chunks
    [[loss, hits, count]] = model.forward_stage(
        None,
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        labels=labels,
        layers=range(model.config.num_hidden_layers),
        dropout_key=None,
    )
    (loss / count).backward()
    assert hits == (output.logits.argmax(-1) == labels[labels > 0]).sum()
    torch.testing.assert_close(loss / count, output.loss, rtol=1e-13, atol=0)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-14, msg=name)
