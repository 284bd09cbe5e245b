"""The fused attention against the plain formula in float64: values and every gradient.

Without a GPU the kernels run in Triton's interpreter, in small tiles so that every shape has several.
"""

from unittest import mock

import pytest
import torch

from deberta_dist.kernels.dropout import dropped
from deberta_dist.models.fused_qkv import adjacent
from tests.kernels.fused_cases import DEVICE, Case, random_case, values_and_gradients

pytest.importorskip("triton", reason="Triton is not installed: pip install 'deberta_dist[triton]'")

from deberta_dist.kernels import attention as operator
from deberta_dist.kernels.fused import attention, autograd, launch
from deberta_dist.kernels.fused.tiles import Tile, Tiles


def tiles(rows: int, columns: int) -> Tiles:
    return Tiles(*[Tile(rows, columns, 4, 1)] * len(Tiles._fields))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        monkeypatch.setattr(attention, "tiles_of", lambda *_: tiles(32, 16))


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest) -> None:
    if request.node.originalname != "test_random_shapes":
        request.getfixturevalue("no_overflow_checks")


def check(case: Case, *, tolerance: float = 2e-6) -> None:
    """Largest differences relative to the largest value, or to 0.3 where all are smaller: with one key they are zero."""
    expected = values_and_gradients(case.formula, [x.double() for x in case.operands], case.gradient)
    made = values_and_gradients(case.fused, case.operands, case.gradient)
    names = ("context", "query", "key", "value", *["rel_key"] * case.c2p, *["rel_query"] * case.p2c)
    for name, ours, theirs in zip(names, made, expected, strict=True):
        assert ours.dtype == case.dtype
        worst = float((ours.double() - theirs).abs().max() / theirs.abs().max().clamp_min(0.3))
        assert worst < tolerance, f"{name}: {worst}"


DOCUMENTS = torch.tensor([[1] * 7 + [2] * 9 + [0] * 3, [3] * 19])
KEY_MASK = torch.arange(19) < torch.tensor([[15], [19]])
DECODED = torch.tensor([[18, 0, 7, 7, 3], [2, 17, 9, 1, 16]])
CASES = {
    "both terms, clamped": Case(queries=37, keys=37),
    "no buckets, clamped": Case(buckets=0, max_distance=5),
    "table longer than the sequence": Case(buckets=0, max_distance=40, batch=1, heads=1),
    "c2p alone": Case(p2c=False, key_mask=KEY_MASK),
    "p2c alone": Case(c2p=False, documents=DOCUMENTS),
    "no position terms": Case(c2p=False, p2c=False, key_mask=KEY_MASK, dropout_p=0.2),
    "one token": Case(queries=1, keys=1, dropout_p=0.5),
    "fewer queries": Case(queries=9, keys=20),
    "fewer keys": Case(queries=20, keys=9),
    "decoder": Case(queries=5, positions=DECODED, dropout_p=0.25),
    "decoder, padded queries": Case(queries=5, positions=DECODED, dropout_p=0.25, counted_queries=3),
    "decoder, documents": Case(queries=5, positions=DECODED, documents=DOCUMENTS, key_mask=KEY_MASK),
    "dropout": Case(dropout_p=0.1, documents=DOCUMENTS),
    "heads of 64": Case(head_size=64, batch=1),
    "heads of 128": Case(head_size=128, batch=1, heads=1, dropout_p=0.1),
}


@pytest.mark.parametrize("name", CASES)
def test_formula(name):
    check(CASES[name])


@pytest.mark.parametrize("seed", range(5))
def test_random_shapes(seed):
    check(random_case(seed))


@pytest.fixture
def widened_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of bfloat16 in float32, as GPUs have them: Triton 3.9's interpreter multiplies the bit patterns."""
    from triton.runtime import interpreter

    plain = interpreter.InterpreterBuilder.create_dot

    def create_dot(builder, a, b, *rest):
        if a.dtype == interpreter.tl.bfloat16:
            a, b = (builder.cast_impl(x, interpreter.tl.float32) for x in (a, b))
        return plain(builder, a, b, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, widened_products):
    # Each of a chain of four roundings is off by at most half of eps; the sums are float32.
    case = Case(dtype=dtype, queries=33, keys=33, documents=torch.ones(2, 33, dtype=torch.int64), dropout_p=0.1)
    check(case, tolerance=2 * torch.finfo(dtype).eps)


def test_half_precision_does_not_overflow_in_unscaled_products():
    case = Case(dtype=torch.float16, batch=1, heads=1)
    case.operands = [x * 100 if number in (0, 1, 3, 4) else x for number, x in enumerate(case.operands)]
    assert (case.operands[0].double() @ case.operands[3].double().mT).abs().max() > torch.finfo(torch.float16).max
    assert torch.isfinite(case.fused()).all()


def test_queries_that_see_nothing_are_exactly_zero_and_have_no_gradient():
    key_mask = KEY_MASK.clone()
    key_mask[1] = False
    case = Case(key_mask=key_mask)
    context, query, key, value, rel_key, rel_query = values_and_gradients(case.fused, case.operands, case.gradient)
    for x in (context, query, key, value):
        assert torch.all(x[1] == 0) and torch.all(x[0, :, 15:] == 0)
    assert all(torch.isfinite(x).all() for x in (context, query, key, value, rel_key, rel_query))


def test_what_is_not_seen_has_no_influence():
    case = Case(key_mask=KEY_MASK)
    changed = [x.clone() for x in case.operands]
    for x in changed[:3]:
        x[0, :, 15:] = 1e4
    assert torch.equal(case.fused(), case.fused(changed))


def test_two_runs_agree_in_every_bit():
    case = random_case(3)
    first, second = (values_and_gradients(case.fused, case.operands, case.gradient) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="these tiles are for the interpreter")
def test_tiles_do_not_enter_the_dropout_mask(monkeypatch):
    case = Case(queries=33, keys=40, dropout_p=0.5)
    expected = case.formula([x.double() for x in case.operands])
    for shape in ((16, 32), (64, 16)):
        monkeypatch.setattr(attention, "tiles_of", lambda *_, shape=shape: tiles(*shape))
        assert torch.allclose(case.fused().double(), expected, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 5 + 2**32, 2**63 + 12345, 2**64 - 1])
@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("counted", [33, 30])
def test_the_dropped_are_those_of_every_implementation(p, seed, counted):
    case = Case(batch=3, queries=33, keys=45, dropout_p=p, dropout_seed=seed)
    query, key = (launch.token_rows(x) for x in case.operands[:2])
    call = mock.Mock(dropout_p=p, dropout_seed=seed, counted_queries=counted)
    kept = (launch.keep_bits(query, key, call)[..., None] >> torch.arange(8, device=DEVICE)) & 1
    expected = ~dropped(seed, p=p, shape=(3, 2, 33, 45), device=DEVICE, counted=counted)
    assert torch.equal(kept.flatten(3)[..., :45].bool(), expected)


def test_portable_agrees_in_values_gradients_and_the_dropped():
    case = Case(queries=5, positions=DECODED, documents=DOCUMENTS, dropout_p=0.4)
    expected = values_and_gradients(
        lambda operands: case.formula(operands, implementation="portable"), case.operands, case.gradient
    )
    for ours, theirs in zip(values_and_gradients(case.fused, case.operands, case.gradient), expected, strict=True):
        assert (ours - theirs).abs().max() < 5e-6 * theirs.abs().max()


@pytest.mark.parametrize("asked", [None, "fused"])
def test_it_is_chosen_where_it_is_available(asked, monkeypatch):
    case, calls = Case(), []
    plain = autograd.FusedAttention.apply
    monkeypatch.setattr(autograd.FusedAttention, "apply", lambda *operands: calls.append(1) or plain(*operands))
    monkeypatch.setattr(operator, "unavailable_reason", lambda *_, **__: None)
    assert torch.equal(case.formula(case.operands, implementation=asked), case.fused())
    assert len(calls) == 2
    # A table in another precision is nothing that the kernels take.
    case.formula([*case.operands[:-1], case.operands[-1].half()], implementation=None)
    assert len(calls) == 2


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the kernels are compiled there")
def test_the_interpreter_is_not_chosen():
    case = Case(dropout_p=0.1)
    chosen, portable = (case.formula(case.operands, implementation=name) for name in (None, "portable"))
    assert torch.equal(chosen, portable) and not torch.equal(chosen, case.fused())


def test_heads_inside_of_a_wider_projection_are_read_in_place():
    case = Case()
    _batch, heads, _length, head_size = case.operands[0].shape
    wide = torch.cat([x.transpose(1, 2).flatten(2) for x in case.operands[:3]], dim=-1)
    views = [x.unflatten(-1, (heads, head_size)).transpose(1, 2) for x in wide.chunk(3, dim=-1)]
    assert all(launch.token_rows(x).data_ptr() == x.data_ptr() for x in views)
    assert torch.equal(case.fused([*views, *case.operands[3:]]), case.fused())
    assert case.fused().transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("order", [(3, 4), (4, 3)])
def test_gradients_lie_side_by_side_as_the_operands_do(order):
    case = Case(batch=1, queries=5, keys=5, buckets=0, max_distance=8)
    expected = values_and_gradients(case.fused, case.operands, case.gradient)[1:]
    operands = list(case.operands)
    for group in ((0, 1, 2), order):
        wide = torch.cat([case.operands[number].transpose(-3, -2).flatten(-2) for number in group], dim=-1)
        for number, part in zip(group, wide.chunk(len(group), dim=-1), strict=True):
            operands[number] = part.unflatten(-1, (case.heads, case.head_size)).transpose(-3, -2).requires_grad_()
    gradients = torch.autograd.grad(case.fused(operands), operands, case.gradient)
    assert all(torch.equal(one, other) for one, other in zip(gradients, expected, strict=True))
    for group in ((0, 1, 2), order):
        assert adjacent([gradients[number].transpose(-3, -2).flatten(-2) for number in group], dim=-1) is not None


def test_nothing_of_the_size_of_the_scores_is_saved():
    case = Case(queries=40, keys=40, batch=1, dropout_p=0.1)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        case.fused([x.requires_grad_() for x in case.operands])
    assert 0 < max(saved) < case.heads * case.queries * case.keys


def test_gradients_that_nobody_asks_for_are_left_out():
    case = Case()
    query, key, *rest = case.operands
    key.requires_grad_()
    case.fused([query, key, *rest]).backward(case.gradient)
    expected = values_and_gradients(case.fused, case.operands, case.gradient)[2]
    assert torch.equal(key.grad, expected) and query.grad is None


def test_no_second_derivative():
    case = Case(queries=3, keys=3)
    leaves = [x.requires_grad_() for x in case.operands]
    with pytest.raises(RuntimeError, match="fused .* no second derivative; give .* implementation='reference'"):
        torch.autograd.grad(case.fused(leaves), leaves, case.gradient, create_graph=True)
