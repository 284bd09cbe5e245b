"""Rows of activations on a GPU: the kernels in Triton's interpreter against torch's own operators in float64."""

import pytest
import torch
from torch.nn import functional as F

from deberta_dist.kernels import rows
from deberta_dist.kernels.dropout import keep_probability, threshold
from deberta_dist.kernels.rows import RowDropout, RowNumbers, residual_norm, row_dropout, row_words

P, SEED, EPS = 0.3, 0x9E3779B97F4A7C15, 1e-7
NUMBERS = {"plain": RowNumbers(), "part of a sequence": RowNumbers(3, 6, 3), "padded queries": RowNumbers(3, 2, 0)}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """The kernels take tensors of a CPU in Triton's interpreter."""
    monkeypatch.setattr(rows, "_has_kernels", lambda device: True)


def dropped(shape, numbers, *, p=P, seed=SEED):
    """By the definition, in Python's integers."""
    word, found = (1 << 64) - 1, []
    for number in numbers.of(shape[0] * shape[1], torch.device("cpu")).tolist():
        state = ((number + 1) * 0x9E3779B97F4A7C15 + seed) & word
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & word
        state = (state ^ state >> 27) * 0x94D049BB133111EB & word
        state ^= state >> 31
        low, high = state & 0xFFFFFFFF, state >> 32
        for column in range(shape[2]):
            x = _signed(low + column * 0x9E3779B9)
            x = _signed((x ^ x >> 16) * 0x7FEB352D + high)
            x = _signed((x ^ x >> 15) * 0x846CA68B)
            found.append(x >> 1 < threshold(p))
    return torch.tensor(found).view(shape)


def _signed(number):
    number &= 0xFFFFFFFF
    return number - (1 << 32) if number >> 31 else number


@pytest.mark.parametrize("numbers", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("has_kernels", [True, False])
def test_dropout_is_a_function_of_seed_row_and_column(monkeypatch, numbers, has_kernels):
    monkeypatch.setattr(rows, "_has_kernels", lambda device: has_kernels)
    x = torch.randn(2, 3, 37, requires_grad=True)
    is_dropped = dropped(x.shape, numbers)
    assert 0.2 < is_dropped.float().mean() < 0.4
    y = row_dropout(x, p=P, seed=SEED, numbers=numbers)
    torch.testing.assert_close(y, (x / keep_probability(P)).masked_fill(is_dropped, 0.0), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(gradient, (~is_dropped) / keep_probability(P), rtol=1e-6, atol=0)


def test_rows_have_the_numbers_of_the_whole_they_are_of():
    whole = torch.randn(2, 6, 16)
    full = row_dropout(whole, p=P, seed=SEED, numbers=RowNumbers())
    for part in range(2):
        own = whole[:, 3 * part : 3 * part + 3].contiguous()
        assert torch.equal(
            row_dropout(own, p=P, seed=SEED, numbers=RowNumbers(3, 6, 3 * part)), full[:, 3 * part : 3 * part + 3]
        )
    padded = torch.cat([whole, torch.randn(2, 2, 16)], dim=1)
    found = row_dropout(padded, p=P, seed=SEED, numbers=RowNumbers(8, 6, 0))
    assert torch.equal(found[:, :6], full)


def test_words_are_the_same_by_kernel_and_by_torch(monkeypatch):
    by_kernel = row_words(300, seed=SEED, numbers=RowNumbers(4, 9, 5), device=torch.device("cpu"))
    monkeypatch.setattr(rows, "_has_kernels", lambda device: False)
    by_torch = row_words(300, seed=SEED, numbers=RowNumbers(4, 9, 5), device=torch.device("cpu"))
    assert all(torch.equal(x, y) for x, y in zip(by_kernel, by_torch, strict=True))


def operands(columns, dtype):
    torch.manual_seed(0)
    shapes = [(2, 19, columns), (columns,), (2, 19, columns), (columns,), (columns,)]
    x, bias, residual, weight, norm_bias = (torch.randn(shape).to(dtype) for shape in shapes)
    return [t.requires_grad_() for t in (x, bias, residual, weight + 1, norm_bias)], torch.randn(shapes[0]).to(dtype)


def formula(tensors, gradient, *, p, numbers):
    x, bias, residual, weight, norm_bias = leaves = [t.detach().double().requires_grad_() for t in tensors]
    attended = x + bias
    if p > 0.0:
        attended = (attended / keep_probability(p)).masked_fill(dropped(x.shape, numbers, p=p), 0.0)
    y = F.layer_norm(attended + residual, x.shape[-1:], weight, norm_bias, EPS)
    return [y.detach(), *torch.autograd.grad(y, leaves, gradient.double())]


def fused(tensors, gradient, *, p, numbers):
    leaves = [t.detach().requires_grad_() for t in tensors]
    for leaf in leaves[1:2] + leaves[3:]:
        leaf.grad_dtype = None
    y = residual_norm(*leaves, eps=EPS, dropout=RowDropout(p, SEED, numbers))
    y.backward(gradient)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("numbers", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize(("columns", "p"), [(48, P), (48, 0.0), (64, P)])
def test_residual_and_norm(columns, p, numbers):
    tensors, gradient = operands(columns, torch.float32)
    for found, expected in zip(
        fused(tensors, gradient, p=p, numbers=numbers), formula(tensors, gradient, p=p, numbers=numbers), strict=True
    ):
        error = (found.double() - expected).norm() / expected.norm()
        assert error < 1e-6, error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once_and_sums_in_float32(dtype):
    tensors, gradient = operands(48, dtype)
    found, expected = fused(tensors, gradient, p=P, numbers=RowNumbers()), formula(tensors, gradient, p=P, numbers=RowNumbers())
    assert [t.dtype for t in found] == [dtype, dtype, torch.float32, dtype, torch.float32, torch.float32]
    for one, other in zip(found, expected, strict=True):
        error = (one.double() - other).norm() / other.norm()
        assert error < 2 * torch.finfo(dtype).eps, error


def test_two_runs_agree_in_every_bit():
    tensors, gradient = operands(48, torch.float32)
    first, second = (fused(tensors, gradient, p=P, numbers=RowNumbers()) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_no_second_derivative():
    tensors, _ = operands(48, torch.float32)
    y = residual_norm(*tensors, eps=EPS, dropout=RowDropout(P, SEED, RowNumbers()))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum(), tensors[0], create_graph=True)


def test_a_cpu_has_no_such_kernels(monkeypatch):
    monkeypatch.undo()
    assert not rows.fuses_rows(torch.zeros(2, 3))
