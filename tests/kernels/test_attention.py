"""The operator against a dense oracle that writes the formula out, and its gradients against finite differences."""

import math

import pytest
import torch
from torch import Tensor

from deberta_dist.kernels import (
    AttentionMask,
    RelativePositions,
    attention_scale,
    disentangled_attention,
    position_scores,
)
from deberta_dist.kernels.dropout import dropped

B, N, Q, S, H, R = 2, 3, 4, 5, 6, 8
TERMS = [(True, True), (True, False), (False, True), (False, False)]
everywhere = pytest.mark.parametrize("implementation", ["reference", "portable"])  # the fused has its own tests


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
        "rows": torch.randint(0, R, (7,), generator=generator),
        "queries": torch.stack([torch.randperm(S, generator=generator)[:Q] for _ in range(B)]),
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
                    place = i if t["queries"] is None else int(t["queries"][b, i])
                    row = t["rows"][max(-3, min(place - j, 3)) + 3]
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
        positions=RelativePositions(t["rows"], t["queries"]),
        mask=AttentionMask(pairs_BQS=t["mask"][:, 0]),
        **options,
    )


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize(("c2p", "p2c"), TERMS)
def test_dense_oracle(c2p, p2c, gathered):
    t = tensors()
    t["queries"] = t["queries"] if gathered else None
    expected_context, expected_probabilities = oracle(t, c2p=c2p, p2c=p2c)
    context, probabilities = run(t, c2p=c2p, p2c=p2c, return_probabilities=True)
    assert torch.allclose(context, expected_context, atol=1e-14, rtol=1e-12)
    assert torch.allclose(probabilities, expected_probabilities, atol=1e-14, rtol=1e-12)
    context, _ = run(t, c2p=c2p, p2c=p2c, implementation="portable")
    assert torch.allclose(context, expected_context, atol=1e-14, rtol=1e-12)


@everywhere
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("c2p", "p2c"), TERMS)
def test_gradients_of_every_operand(c2p, p2c, dropout_p, implementation):
    t = tensors()
    t["queries"] = None if c2p else t["queries"]
    names = ["query", "key", "value"] + ["rel_key"] * c2p + ["rel_query"] * p2c
    operands = tuple(t[name].requires_grad_() for name in names)

    def function(*values: Tensor) -> Tensor:
        given = {**t, **dict(zip(names, values, strict=True))}
        return run(given, c2p=c2p, p2c=p2c, dropout_p=dropout_p, implementation=implementation)[0]

    assert torch.autograd.gradcheck(function, operands, fast_mode=True)


@everywhere
def test_queries_that_see_nothing_are_exactly_zero_and_have_no_gradient(implementation):
    t = tensors(torch.float32)
    t["mask"][1] = False
    for name in ("query", "key", "value", "rel_key", "rel_query"):
        t[name].requires_grad_()
    context, _ = run(t, implementation=implementation, dropout_p=0.1)
    assert torch.all(context[1] == 0) and torch.all(context[0, :, 1] == 0)
    context.sum().backward()
    assert torch.all(t["query"].grad[1] == 0) and torch.all(t["query"].grad[0, :, 1] == 0)
    assert all(torch.isfinite(t[name].grad).all() for name in ("query", "key", "value", "rel_key", "rel_query"))


@everywhere
def test_what_is_not_seen_has_no_influence(implementation):
    t = tensors()
    before = run(t, implementation=implementation)[0]
    changed = {**t, "key": t["key"].clone(), "value": t["value"].clone()}
    changed["key"][1, :, 2] = 1e4
    changed["value"][1, :, 2] = 1e4
    assert torch.equal(before, run(changed, implementation=implementation)[0])


def test_segments_see_their_equals_and_padding_nothing():
    keys, queries = torch.tensor([[1, 1, 2, 0]]), torch.tensor([[2, 0, 1]])
    mask = AttentionMask(key_segments_BS=keys, query_segments_BQ=queries)
    assert mask.visible()[0].int().tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]]
    addend, factor = mask.arithmetic()
    assert torch.equal(addend == 0, mask.visible()) and factor.flatten().tolist() == [1, 0, 1]
    assert AttentionMask(key_segments_BS=torch.ones(1, 3)).arithmetic() == (None, None)


def test_segments_and_their_pairs_say_the_same():
    segments = AttentionMask(key_segments_BS=torch.tensor([[1, 1, 2, 0], [3, 0, 0, 4]]))
    pairs = AttentionMask(pairs_BQS=segments.visible())
    padding = AttentionMask(key_segments_BS=torch.tensor([[True, True, False]]))
    queries = torch.tensor([[2, 0, 3], [1, 3, 3]])
    assert torch.equal(segments.seen(), pairs.seen())
    assert torch.equal(segments.of_queries(queries).visible(), pairs.of_queries(queries).visible())
    for offset in range(-3, 4):
        assert torch.equal(segments.seen_at(offset), pairs.seen_at(offset))
    assert [mask.is_of_padding for mask in (segments, pairs, padding)] == [False, False, True]


def test_other_forms_of_a_mask_are_made_once():
    mask, calls = AttentionMask(key_segments_BS=torch.tensor([[True, False]])), []

    def form(number: int) -> Tensor:
        return mask.derived(number, lambda: calls.append(number) or mask.key_segments_BS * number)

    assert form(2) is form(2) and form(3).tolist() == [[3, 0]]
    assert calls == [2, 3]
    assert mask.of_queries(torch.tensor([[0]])).derived(2, lambda: "another") == "another"


@everywhere
def test_position_scores_made_before_are_the_same_term(implementation):
    t = tensors()
    scale = attention_scale(H, has_c2p=True, has_p2c=True)
    made = position_scores(t["key"], t["rel_query"], scale=scale)
    context = run({**t, "rel_query": None}, p2c_BNSR=made, implementation=implementation)[0]
    assert torch.allclose(context, run(t, implementation="reference")[0], rtol=1e-12)


@everywhere
def test_dropout_acts_on_probabilities_and_those_returned_are_from_before(implementation):
    t = tensors()
    _, probabilities = run(t, return_probabilities=True, dropout_p=0.5)
    assert torch.equal(probabilities, run(t, return_probabilities=True)[1])
    context = run(t, dropout_p=0.5, dropout_seed=5, implementation=implementation)[0]
    keep = ~dropped(5, p=0.5, shape=(B, N, Q, S), device=torch.device("cpu"))
    assert torch.allclose(context, (probabilities * keep / 0.5) @ t["value"], rtol=1e-12, atol=1e-14)
    assert run(t)[1] is None


@everywhere
def test_padded_queries_leave_the_masks_of_the_others(implementation):
    t = tensors()
    fewer = {**t, "query": t["query"][:, :, :3], "queries": t["queries"][:, :3], "mask": t["mask"][:, :, :3]}
    options = {"dropout_p": 0.5, "dropout_seed": 5, "implementation": implementation}
    expected = run(fewer, **options)[0]
    assert torch.allclose(run(t, counted_queries=3, **options)[0][:, :, :3], expected, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(run(t, **options)[0][:, :, :3], expected), "masks do not depend on the number of queries"


@everywhere
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_are_float32(dtype, implementation):
    t = tensors(dtype)
    # Unscaled products of this size leave float16's range.
    t["query"], t["key"] = t["query"] * 200, t["key"] * 200
    exact = {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in t.items()}
    expected, exact_probabilities = run(exact, return_probabilities=True)
    context, _ = run(t, implementation=implementation)
    assert context.dtype == dtype and torch.isfinite(context).all()
    assert torch.allclose(context.double(), expected, atol=3e-2)
    probabilities = run(t, return_probabilities=True)[1]
    assert probabilities.dtype == torch.float32
    assert torch.allclose(probabilities.double(), exact_probabilities, atol=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p2c_BNSR": torch.zeros(1)}, "two forms of one term"),
        ({"dropout_p": 1.0}, r"dropout_p = 1.0 is not in \[0, 1\)"),
        ({"implementation": "quick"}, "'quick' is not one of fused, portable, reference"),
        ({"implementation": "portable", "return_probabilities": True}, "portable .* returns no probabilities"),
        ({"implementation": "fused", "return_probabilities": True}, "'fused' is not available: .* needs an NVIDIA GPU"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        run(tensors(), **options)


@pytest.mark.parametrize(
    "mask",
    [
        {},
        {"key_segments_BS": torch.ones(1, 2), "pairs_BQS": torch.ones(1, 2, 2).bool()},
        {"pairs_BQS": torch.ones(2, 2).bool()},
        {"pairs_BQS": torch.ones(1, 2, 2)},
    ],
)
def test_masks_of_neither_form_are_refused(mask):
    with pytest.raises(ValueError, match="pairs_BQS"):
        AttentionMask(**mask)
