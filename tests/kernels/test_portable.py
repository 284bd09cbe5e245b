"""The portable attention against the reference: what its blocks and chunks have to survive."""

import pytest
import torch
from torch import Tensor

from deberta_dist.kernels import (
    AttentionMask,
    RelativePositions,
    attention_scale,
    disentangled_attention,
    inputs,
    portable,
    position_scores,
)
from deberta_dist.models.fused_qkv import adjacent

H, R = 8, 11
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 3e-2}


class Problem:
    """Operands of one attention and the gradient of its result."""

    def __init__(self, batch, heads, queries, keys, *, dtype=torch.float64, c2p=True, p2c=True, gathered=False):
        self.generator = torch.Generator().manual_seed(0)
        self.dtype = dtype
        self.shape = (batch, heads, queries, keys)
        self.query, self.gradient = self.normal(batch, heads, queries, H), self.normal(batch, heads, queries, H)
        self.key, self.value = self.normal(batch, heads, keys, H), self.normal(batch, heads, keys, H)
        self.rel_key = self.normal(heads, R, H) if c2p else None
        self.rel_query = self.normal(heads, R, H) if p2c else None
        places = [torch.randperm(keys, generator=self.generator)[:queries] for _ in range(batch)]
        rows = torch.randint(0, R, (31,), generator=self.generator)
        self.positions = RelativePositions(rows, torch.stack(places) if gathered else None)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.dtype).requires_grad_()

    def integers(self, *shape: int) -> Tensor:
        return torch.randint(0, 3, shape, generator=self.generator)

    @property
    def operands(self) -> list[Tensor]:
        return [x for x in (self.query, self.key, self.value, self.rel_key, self.rel_query) if x is not None]

    def context(self, implementation: str, **options) -> Tensor:
        position_operands = {"rel_key_NRH": self.rel_key, "rel_query_NRH": self.rel_query}
        return disentangled_attention(
            self.query,
            self.key,
            self.value,
            positions=self.positions,
            implementation=implementation,
            **position_operands | options,
        )[0]

    def run(self, implementation: str, **options) -> list[Tensor]:
        """Context and gradients of all operands."""
        context = self.context(implementation, **options)
        return [context.detach(), *torch.autograd.grad(context, self.operands, self.gradient.detach())]

    def assert_agreement(self, **options) -> None:
        expected, actual = self.run("reference", **options), self.run("portable", **options)
        for number, (a, b) in enumerate(zip(expected, actual, strict=True)):
            assert a.dtype == b.dtype and a.shape == b.shape
            assert (a - b).abs().max() <= TOLERANCE[self.dtype] * max(a.abs().max(), 1e-3), number


MASKS = {
    "none": lambda problem: None,
    "all": lambda p: AttentionMask(pairs_BQS=torch.ones(p.shape[0], *p.shape[2:], dtype=torch.bool)),
    "segments": lambda p: AttentionMask(
        key_segments_BS=p.integers(p.shape[0], p.shape[3]), query_segments_BQ=p.integers(p.shape[0], p.shape[2])
    ),
    "pairs": lambda p: AttentionMask(pairs_BQS=p.integers(p.shape[0], *p.shape[2:]) > 0),
    "pairs for all samples": lambda p: AttentionMask(pairs_BQS=p.integers(1, *p.shape[2:]) > 1),
}


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_masks_and_dtypes(dtype, mask, gathered):
    problem = Problem(2, 3, 70, 83, dtype=dtype, gathered=gathered)
    problem.assert_agreement(mask=MASKS[mask](problem), dropout_p=0.2, dropout_seed=3)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 1, 5), (1, 2, 64, 64), (3, 2, 65, 63), (2, 2, 130, 1), (1, 5, 31, 197)])
def test_lengths(shape):
    Problem(*shape).assert_agreement(dropout_p=0.1)


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("c2p", "p2c"), [(True, False), (False, True), (False, False)])
def test_terms(c2p, p2c, recompute, gathered):
    problem = Problem(2, 2, 20, 70, c2p=c2p, p2c=p2c, gathered=gathered)
    problem.assert_agreement(dropout_p=0.1, recompute=recompute)


@pytest.mark.parametrize("gathered", [False, True])
def test_products_made_before_get_the_gradient_of_every_pass(gathered):
    problem = Problem(2, 2, 20, 70, gathered=gathered)
    results = []
    for implementation in ("reference", "portable"):
        scale = attention_scale(H, has_c2p=True, has_p2c=True)
        made = position_scores(problem.key, problem.rel_query, scale=scale)
        passes = [
            problem.context(implementation, rel_query_NRH=None, p2c_BNSR=made, dropout_p=0.1, dropout_seed=seed)
            for seed in range(2)
        ]
        results.append(torch.autograd.grad(sum(passes), problem.operands, problem.gradient))
    for expected, actual in zip(*results, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_recomputation_changes_no_bit_and_keeps_nothing_of_queries_times_keys(dtype):
    problem = Problem(2, 3, 70, 70, dtype=dtype)
    kept, again = (problem.run("portable", dropout_p=0.2, recompute=recompute) for recompute in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes), lambda x: x):
        problem.context("portable", dropout_p=0.2, recompute=True)
        without = sum(sizes)
        problem.context("portable", dropout_p=0.2)
    assert sum(sizes) - 2 * without == 2 * 3 * 70 * 70 * dtype.itemsize
    assert without == sum(x.nbytes for x in problem.operands)


@pytest.mark.parametrize("matrices", [1, 2, 5, 100])
def test_size_of_chunks_and_blocks_is_without_influence(monkeypatch, matrices):
    problem = Problem(3, 4, 40, 45)
    mask = MASKS["pairs"](problem)
    expected = problem.run("portable", mask=mask, dropout_p=0.3)
    monkeypatch.setitem(portable.CHUNK_BYTES, "cpu", matrices * 40 * 45 * 4)
    monkeypatch.setattr(portable, "BLOCK", 7)
    for recompute in (False, True):
        actual = problem.run("portable", mask=mask, dropout_p=0.3, recompute=recompute)
        for a, b in zip(expected, actual, strict=True):
            assert torch.allclose(a, b, rtol=1e-11, atol=1e-11)


def test_operands_laid_out_by_tokens_as_projections_give_them():
    problem = Problem(2, 3, 20, 20)
    expected = problem.run("portable")
    for name in ("query", "key", "value"):
        x = getattr(problem, name).detach()
        setattr(problem, name, x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_())
    actual = problem.run("portable")
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    # Neither the context nor a gradient has to be copied to become [B, S, N * H] again, nor all gradients [B, S, 3 N * H].
    context, *gradients = (x.transpose(1, 2) for x in actual[:4])
    assert context.is_contiguous()
    width = gradients[0].flatten(2).shape[-1]
    assert {x.flatten(2).stride() for x in gradients} == {(20 * 3 * width, 3 * width, 1)}
    assert len({x.untyped_storage().data_ptr() for x in gradients}) == 1
    # Keys and values have a length of their own where queries are fewer.
    query, key, value = (x.transpose(1, 2).flatten(2) for x in Problem(2, 3, 7, 20).run("portable")[1:4])
    assert query.is_contiguous() and adjacent([key, value], dim=-1) is not None


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """16-bit operands are multiplied as they are; float32 products of them are what a GPU makes."""

    def multiply(out: Tensor, left: Tensor, right: Tensor, *, alpha: float, beta: float) -> Tensor:
        assert left.dtype == right.dtype and left.dtype.itemsize == 2 and out.dtype == torch.float32
        calls.append(1)
        return torch.baddbmm(out, left.float(), right.float(), alpha=alpha, beta=beta, out=out)

    calls = []
    monkeypatch.setattr(inputs, "multiplies_halves", lambda x: x.dtype.itemsize == 2)
    monkeypatch.setattr(inputs, "half_product_into", multiply)
    return calls


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_factors(as_on_a_gpu, dtype, dropout_p, gathered):
    problem = Problem(2, 3, 70, 83, dtype=dtype, gathered=gathered)
    options = {"mask": MASKS["segments"](problem), "dropout_p": dropout_p, "dropout_seed": 3}
    made = problem.run("portable", **options)
    assert all(torch.equal(a, b) for a, b in zip(made, problem.run("portable", recompute=True, **options), strict=True))
    assert as_on_a_gpu
    exact = Problem(2, 3, 70, 83, gathered=gathered)
    for name in ("query", "key", "value", "rel_key", "rel_query", "gradient"):
        setattr(exact, name, getattr(problem, name).detach().double().requires_grad_())
    for ours, theirs in zip(made, exact.run("reference", **options), strict=True):
        assert ours.dtype == dtype
        # Probabilities, the scores' gradient and the result are rounded to 16 bits; sums are not.
        assert (ours.double() - theirs).abs().max() <= 2 * torch.finfo(dtype).eps * theirs.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gpu_multiplies_16_bit_factors_with_float32_sums(dtype):
    generator = torch.Generator().manual_seed(0)
    left, right, start = (torch.randn(*shape, generator=generator).cuda() for shape in ((3, 70, 41), (3, 83, 41), (3, 90, 100)))
    left, right = left.to(dtype), right.to(dtype).transpose(1, 2)
    if not inputs.multiplies_halves(left):
        pytest.skip("this GPU has no tensor cores for the dtype")
    for adds in (False, True):
        out = start[:, 5:75, 7:90]
        expected = 0.3 * (left.double() @ right.double()) + adds * out.double()
        found = inputs.product_into(out.clone(), left, right, scale=0.3, adds=adds)
        assert found.dtype == torch.float32 and (found - expected).abs().max() < 1e-5
        # Of a view, and with a left factor that is rounded.
        view = start.clone()[:, 5:75, 7:90]
        assert torch.equal(inputs.product_into(view, left.float(), right, scale=0.3, adds=adds), found)
        assert torch.equal(view, found)


def test_nothing_is_kept_without_gradients():
    problem = Problem(1, 2, 9, 9)
    expected = problem.context("portable")
    with torch.no_grad():
        context = problem.context("portable")
    assert not context.requires_grad and torch.equal(context, expected)
    with torch.inference_mode():
        assert torch.equal(problem.context("portable"), expected)


def test_a_gradient_of_a_gradient_is_refused():
    problem = Problem(1, 1, 5, 5)
    with pytest.raises(RuntimeError, match="no second derivative; give .* implementation='reference'"):
        torch.autograd.grad(problem.context("portable").sum(), problem.query, create_graph=True)
    (gradient,) = torch.autograd.grad(problem.context("reference").sum(), problem.query, create_graph=True)
    gradient.sum().backward()
    assert problem.query.grad.abs().sum() > 0
