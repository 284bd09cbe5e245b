"""The operator against a dense oracle that writes the formula out, and its gradients against finite differences."""

import math

import pytest
import torch
from torch import Tensor

from deberta_dist.kernels import attention_scale, disentangled_attention, position_scores

B, N, Q, S, H, R = 2, 3, 4, 5, 6, 8
TERMS = [(True, True), (True, False), (False, True), (False, False)]


def tensors(dtype=torch.float64, *, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    mask = torch.rand(B, 1, Q, S, generator=generator) < 0.7
    mask[0, 0, 1] = False
    mask[1, 0, :, 2] = False
    return {
        "query": normal(B, N, Q, H),
        "key": normal(B, N, S, H),
        "value": normal(B, N, S, H),
        "rel_key": normal(N, R, H),
        "rel_query": normal(N, R, H),
        "index": torch.randint(0, R, (B, Q, S), generator=generator),
        "mask": mask,
    }


def oracle(t: dict[str, Tensor], *, c2p: bool, p2c: bool) -> tuple[Tensor, Tensor]:
    """Element by element in the order of the formula."""
    context, probabilities = torch.zeros(B, N, Q, H, dtype=torch.float64), torch.zeros(B, N, Q, S, dtype=torch.float64)
    for b in range(B):
        for n in range(N):
            for i in range(Q):
                seen = [j for j in range(S) if t["mask"][b, 0, i, j]]
                if not seen:
                    continue
                scores = []
                for j in seen:
                    row = t["index"][b, i, j]
                    score = t["query"][b, n, i] @ t["key"][b, n, j]
                    score = score + c2p * (t["query"][b, n, i] @ t["rel_key"][n, row])
                    score = score + p2c * (t["key"][b, n, j] @ t["rel_query"][n, row])
                    scores.append(score / math.sqrt(H * (1 + c2p + p2c)))
                probabilities[b, n, i, seen] = torch.softmax(torch.stack(scores), dim=0)
                context[b, n, i] = probabilities[b, n, i] @ t["value"][b, n]
    return context, probabilities


def run(t: dict[str, Tensor], *, c2p: bool = True, p2c: bool = True, **options) -> tuple[Tensor, Tensor | None]:
    return disentangled_attention(
        t["query"],
        t["key"],
        t["value"],
        rel_key_NRH=t["rel_key"] if c2p else None,
        rel_query_NRH=t["rel_query"] if p2c else None,
        relative_index=t["index"],
        mask=t["mask"],
        **options,
    )


@pytest.mark.parametrize(("c2p", "p2c"), TERMS)
def test_dense_oracle(c2p, p2c):
    t = tensors()
    context, probabilities = run(t, c2p=c2p, p2c=p2c, return_probabilities=True)
    expected_context, expected_probabilities = oracle(t, c2p=c2p, p2c=p2c)
    assert torch.allclose(context, expected_context, atol=1e-14, rtol=1e-12)
    assert torch.allclose(probabilities, expected_probabilities, atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize(("c2p", "p2c"), TERMS)
def test_gradients_of_every_operand(c2p, p2c):
    t = tensors()
    names = ["query", "key", "value"] + ["rel_key"] * c2p + ["rel_query"] * p2c
    operands = tuple(t[name].requires_grad_() for name in names)
    keep = torch.rand(B, N, Q, S, generator=torch.Generator().manual_seed(1)) < 0.8

    def function(*values: Tensor) -> Tensor:
        return run({**t, **dict(zip(names, values, strict=True))}, c2p=c2p, p2c=p2c, dropout=lambda p: p * keep)[0]

    assert torch.autograd.gradcheck(function, operands)


def test_index_without_a_batch_is_the_same_for_all():
    t = tensors()
    shared = {**t, "index": t["index"][0]}
    repeated = {**t, "index": t["index"][:1].expand(B, -1, -1)}
    assert torch.equal(run(shared)[0], run(repeated)[0])


def test_queries_that_see_nothing_are_exactly_zero_and_have_no_gradient():
    t = tensors(torch.float32)
    t["mask"][1] = False
    for name in ("query", "key", "value", "rel_key", "rel_query"):
        t[name].requires_grad_()
    context, probabilities = run(t, return_probabilities=True)
    assert torch.all(context[1] == 0) and torch.all(probabilities[1] == 0)
    assert torch.all(context[0, :, 1] == 0)
    context.sum().backward()
    assert torch.all(t["query"].grad[1] == 0) and torch.all(t["query"].grad[0, :, 1] == 0)
    assert all(torch.isfinite(t[name].grad).all() for name in ("query", "key", "value", "rel_key", "rel_query"))


def test_what_is_not_seen_has_no_influence():
    t = tensors()
    before = run(t)[0]
    changed = {**t, "key": t["key"].clone(), "value": t["value"].clone()}
    changed["key"][1, :, 2] = 1e4
    changed["value"][1, :, 2] = 1e4
    assert torch.equal(before, run(changed)[0])


def test_position_scores_made_before_are_the_same_term():
    t = tensors()
    scale = attention_scale(H, has_c2p=True, has_p2c=True)
    context, _ = disentangled_attention(
        t["query"],
        t["key"],
        t["value"],
        rel_key_NRH=t["rel_key"],
        p2c_BNSR=position_scores(t["key"], t["rel_query"], scale=scale),
        relative_index=t["index"],
        mask=t["mask"],
    )
    assert torch.equal(context, run(t)[0])
    with pytest.raises(ValueError, match="two forms of one term"):
        disentangled_attention(
            t["query"], t["key"], t["value"], rel_query_NRH=t["rel_query"], p2c_BNSR=t["key"], relative_index=t["index"]
        )


def test_dropout_acts_on_probabilities_and_those_returned_are_from_before():
    t = tensors()
    context, probabilities = run(t, dropout=torch.zeros_like, return_probabilities=True)
    assert torch.all(context == 0)
    assert torch.equal(probabilities, run(t, return_probabilities=True)[1])
    assert run(t)[1] is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_are_float32(dtype):
    t = tensors(dtype)
    # Unscaled products of this size leave float16's range.
    t["query"], t["key"] = t["query"] * 200, t["key"] * 200
    context, probabilities = run(t, return_probabilities=True)
    exact = {name: value.double() if value.is_floating_point() else value for name, value in t.items()}
    assert context.dtype == dtype and probabilities.dtype == torch.float32
    assert torch.allclose(probabilities.double(), run(exact, return_probabilities=True)[1], atol=1e-2)
    assert torch.isfinite(context).all()
