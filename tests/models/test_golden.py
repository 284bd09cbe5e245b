"""Every number of the published implementation, from its weights and inputs."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

ALL = [
    "v1_c2p_only_mlm",
    "v1_mlm",
    "v1_position_biased_classification",
    "v2_full_length_mlm",
    "v2_mlm",
    "v2_rtd",
    "v2_sift_classification",
]
TOLERANCE = 1e-5


@pytest.mark.parametrize("name", ALL)
def test_hidden_states_and_probabilities(golden, relative_error, name):
    file = golden(name)
    input_ids, attention_mask, _ = file.inputs
    with torch.no_grad():
        output = file.model().deberta(input_ids, attention_mask, output_hidden_states=True, output_attentions=True)
    is_real = attention_mask.bool()
    embeddings, *layers = output.hidden_states
    assert relative_error(embeddings[is_real], file.tensors["out.embeddings"][is_real]) < TOLERANCE
    expected = file.group("out.hidden_states.")
    assert len(expected) == len(layers) or name == "v2_full_length_mlm"
    for number, hidden in expected.items():
        assert relative_error(layers[int(number)][is_real], hidden[is_real]) < TOLERANCE
    assert torch.equal(output.last_hidden_state, layers[-1])
    assert relative_error(output.attentions[0], file.tensors["out.attention_probs.0"]) < TOLERANCE
    for probabilities in output.attentions:
        assert torch.all(probabilities.transpose(1, 2)[~is_real] == 0.0)
        sums = probabilities.transpose(1, 2)[is_real].sum(dim=-1)
        assert torch.allclose(sums, torch.ones_like(sums), atol=1e-6)


@pytest.mark.parametrize("name", [name for name in ALL if name.endswith(("mlm", "rtd"))])
def test_loss_logits_and_every_gradient(golden, relative_error, gradients, name):
    file = golden(name)
    model = file.model()
    input_ids, attention_mask, labels = file.inputs
    output = model(input_ids, attention_mask, labels)
    shown = attention_mask.bool() if file.kind == "rtd" else slice(None)
    assert relative_error(output.logits[shown], file.tensors["out.logits"][shown]) < TOLERANCE
    assert relative_error(output.loss, file.tensors["out.loss"]) < TOLERANCE
    _compare_gradients(file, gradients(model, output.loss), relative_error)


def test_replaced_tokens_of_the_detector(golden):
    file = golden("v2_rtd")
    input_ids, attention_mask, labels = file.inputs
    is_replaced = (labels > 0) & (labels != input_ids)
    assert torch.equal(is_replaced[attention_mask.bool()].float(), file.tensors["out.replaced"])


@pytest.mark.parametrize("name", [name for name in ALL if name.endswith("classification")])
def test_sift(golden, relative_error, gradients, name):
    """Loss + adversarial loss by hooks on the embeddings' LayerNorm, as the published code computes them.

    In float64: the gradient of the classifier's bias is a small sum of large terms, and two float32 results lie further
    from each other than either lies from the exact one.
    """
    file = golden(name)
    model = file.model().double()
    input_ids, attention_mask, labels = file.inputs
    layer_norm = model.deberta.embeddings.LayerNorm

    def logits_with(replace) -> Tensor:
        hook = layer_norm.register_forward_pre_hook(lambda _, inputs: replace(inputs[0]))
        try:
            return model(input_ids, attention_mask).logits
        finally:
            hook.remove()

    kept: list[Tensor] = []

    def normalise(x: Tensor) -> Tensor:
        kept.append(F.layer_norm(x, x.shape[-1:], eps=1e-7))
        return kept[-1]

    clean_logits = logits_with(normalise)
    normalised = kept[0].detach()
    is_real = attention_mask.bool()
    expected = file.tensors["out.sift.normalised_embeddings"]
    assert relative_error(normalised[is_real], expected[is_real]) < TOLERANCE
    assert relative_error(clean_logits, file.tensors["out.sift.clean_logits"]) < TOLERANCE
    clean_loss = F.cross_entropy(clean_logits, labels)
    assert relative_error(clean_loss, file.tensors["out.sift.clean_loss"]) < TOLERANCE

    delta = file.tensors["in.sift.initial_delta"].double().requires_grad_()
    first = _symmetric_kl(logits_with(lambda _: normalised + delta), clean_logits.detach()).sum()
    (gradient,) = torch.autograd.grad(first, delta)
    delta = (delta + 1e-2 * gradient / (1e-6 + gradient.abs().amax(-1, keepdim=True))).detach()
    assert relative_error(delta, file.tensors["out.sift.updated_delta"]) < TOLERANCE

    adversarial = _symmetric_kl(logits_with(lambda _: normalised + delta), clean_logits).mean()
    assert relative_error(adversarial, file.tensors["out.sift.adversarial_loss"]) < TOLERANCE
    _compare_gradients(file, gradients(model, clean_loss + adversarial), relative_error)


@pytest.mark.parametrize("name", [name for name in ALL if name.endswith("classification")])
def test_classification(golden, relative_error, name):
    file = golden(name)
    output = file.model()(*file.inputs)
    assert relative_error(output.logits, file.tensors["out.logits"]) < TOLERANCE
    assert relative_error(output.loss, file.tensors["out.loss"]) < TOLERANCE


def _symmetric_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Both cross entropies, probabilities detached, logits not."""
    student_log, teacher_log = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    return -(teacher_log.exp().detach() * student_log + student_log.exp().detach() * teacher_log).sum(-1)


def _compare_gradients(file, actual: dict[str, Tensor], relative_error) -> None:
    expected = file.group("grad.")
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        if _shifts_whole_rows(name, file.config):
            # Zero in exact arithmetic, so rounding alone is left: measured against the projection's own gradient.
            largest = expected[name.removesuffix("bias") + "weight"].abs().max()
            assert actual[name].abs().max() < TOLERANCE * largest, name
        else:
            assert relative_error(actual[name], gradient) < TOLERANCE, name


def _shifts_whole_rows(name: str, config) -> bool:
    """Biases that add the same to all scores of a query, which softmax does not see."""
    return name.endswith("pos_key_proj.bias") or (name.endswith("key_proj.bias") and "p2c" not in config.pos_att_type)
