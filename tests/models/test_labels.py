"""What labels may be, the losses of classifiers as Hugging Face's classes compute them, and no loss that broadcasts."""

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from deberta_dist.errors import ConfigError
from deberta_dist.models.classification import DebertaForReplacedTokenDetection, DebertaForSequenceClassification
from deberta_dist.models.config import PROBLEM_TYPES, DebertaConfig
from deberta_dist.models.cross_entropy import CrossEntropy
from deberta_dist.models.masked_lm import DebertaForMaskedLM
from deberta_dist.models.presets import preset
from deberta_dist.models.targets import classification_loss, find_targets

SIZES = {"num_hidden_layers": 1, "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 16}
CLASSES = torch.tensor([2, 0, 1, 2])
UNKNOWN = torch.tensor([2, -100, 1, -100])
MULTI_HOT = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
NUMBERS = torch.tensor([0.5, -2.0, 3.25, 0.0])
MATRIX = torch.linspace(-1, 2, 12).view(4, 3)
SOFT = torch.softmax(MATRIX, -1)

LOSSES = {
    "classes": ("single_label_classification", 3, CLASSES),
    "unknown classes": ("single_label_classification", 3, UNKNOWN),
    "many": ("multi_label_classification", 3, MULTI_HOT.float()),
    "many of one": ("multi_label_classification", 1, MULTI_HOT[:, :1].float()),
    "number": ("regression", 1, NUMBERS),
    "column": ("regression", 1, NUMBERS[:, None]),
    "numbers": ("regression", 3, MATRIX),
    "inferred classes": (None, 3, CLASSES),
    "inferred unknown classes": (None, 3, UNKNOWN),
    "inferred number": (None, 1, NUMBERS),
    "inferred column": (None, 1, NUMBERS[:, None]),
    "inferred probabilities": (None, 3, SOFT),
}


@pytest.mark.parametrize("case", LOSSES)
def test_the_loss_is_hugging_faces(case: str) -> None:
    problem_type, num_labels, labels = LOSSES[case]
    published = {**preset("tiny-v2", **SIZES).to_dict(), "num_labels": num_labels, "problem_type": problem_type}
    config = DebertaConfig.from_dict(published)
    ours = DebertaForSequenceClassification(config, num_labels=num_labels).eval()
    with torch.no_grad():
        for number, parameter in enumerate(ours.parameters()):
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    published["pad_token_id"] = published.pop("padding_idx")
    theirs = transformers.DebertaV2ForSequenceClassification(transformers.DebertaV2Config(**published)).eval()
    state = {name: value for name, value in ours.state_dict().items() if "position_embeddings" not in name}
    theirs.load_state_dict(state, strict=True)
    ids = torch.randint(5, 61, (4, 9), generator=torch.Generator().manual_seed(3))
    found, expected = ours(ids, labels=labels), theirs(ids, labels=labels)
    # Theirs come back flat where a number was inferred.
    torch.testing.assert_close(found.logits, expected.logits.view_as(found.logits), rtol=1e-5, atol=1e-5)
    assert abs(found.loss.item() - expected.loss.item()) < 1e-6 * max(1, expected.loss.item())
    found.loss.backward()
    expected.loss.backward()
    torch.testing.assert_close(ours.classifier.weight.grad, theirs.classifier.weight.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.int64, torch.int8, torch.bool, torch.float64])
def test_multi_hot_labels_of_any_kind(kind: torch.dtype) -> None:
    logits = MATRIX.clone()
    expected = F.binary_cross_entropy_with_logits(logits, MULTI_HOT.float())
    assert classification_loss(logits, MULTI_HOT.to(kind), problem_type="multi_label_classification") == expected


@pytest.mark.parametrize("problem_type", [None, "single_label_classification"])
def test_a_column_of_classes(problem_type: str | None) -> None:
    found = classification_loss(MATRIX, CLASSES[:, None], problem_type=problem_type)
    assert found == F.cross_entropy(MATRIX, CLASSES)


def test_half_precision_logits_and_wide_ones() -> None:
    labels = NUMBERS.double()
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert classification_loss(NUMBERS[:, None].to(dtype), labels, problem_type=None).dtype == wide


WRONG = {
    "rows of another batch": ("single_label_classification", 3, CLASSES[:3]),
    "classes as numbers": ("single_label_classification", 3, CLASSES.float()),
    "classes as truth": ("single_label_classification", 3, CLASSES.bool()),
    "no such class": ("single_label_classification", 3, CLASSES + 1),
    "multi-hot for one class": ("single_label_classification", 3, MULTI_HOT),
    "a class for many": ("multi_label_classification", 3, CLASSES),
    "a class for many, as number": ("multi_label_classification", 3, CLASSES.float()),
    "a column for many": ("multi_label_classification", 3, MULTI_HOT[:, :1]),
    "a row for many": ("multi_label_classification", 3, MULTI_HOT[:1].float()),
    "beyond one": ("multi_label_classification", 3, 2.0 * MULTI_HOT),
    "unknown among many": ("multi_label_classification", 3, MULTI_HOT - 1),
    "one number for several": ("regression", 3, NUMBERS),
    "a column for several": ("regression", 3, NUMBERS[:, None]),
    "a row of numbers": ("regression", 1, NUMBERS[None]),
    "one number for all": ("regression", 1, NUMBERS[0]),
    "several for one": ("regression", 1, MATRIX),
    "truth as number": ("regression", 1, CLASSES.bool()),
    "inferred: other batch": (None, 3, CLASSES[:1]),
    "inferred: a matrix of another width": (None, 3, MATRIX[:, :2]),
    "inferred: multi-hot without a word": (None, 3, MULTI_HOT),
    "inferred: classes as numbers": (None, 3, CLASSES.float()),
    "inferred: negative probabilities": (None, 3, MATRIX),
    "inferred: several for one": (None, 1, MATRIX),
    "inferred: a row": (None, 1, NUMBERS[None]),
}


@pytest.mark.parametrize("case", WRONG)
def test_other_labels_are_refused(case: str) -> None:
    problem_type, num_labels, labels = WRONG[case]
    with pytest.raises(ValueError, match=r"^labels: .* (given|is not).*(takes|class)") as caught:
        classification_loss(torch.zeros(4, num_labels), labels, problem_type=problem_type)
    assert "\n" not in str(caught.value)


def test_the_configuration_says_which() -> None:
    config = preset("tiny-v2", problem_type="multi_label_classification")
    assert DebertaConfig.from_dict(config.to_dict()) == config and set(PROBLEM_TYPES) > {config.problem_type}
    with pytest.raises(ConfigError, match="problem_type = 'multilabel' is not one of regression"):
        preset("tiny-v2", problem_type="multilabel")
    with pytest.raises(ConfigError, match="at least 2 labels"):
        DebertaForSequenceClassification(preset("tiny-v2", problem_type="single_label_classification"), num_labels=1)


IDS = torch.randint(5, 61, (2, 9), generator=torch.Generator().manual_seed(3))
WRONG_TOKENS = {
    "a row": IDS[:1],
    "a column": IDS[:, :1],
    "one batch for another": IDS[:, :8],
    "flat": IDS.flatten(),
    "numbers": IDS.float(),
    "truth": IDS > 9,
    "beyond the vocabulary": IDS + 61,
}


@pytest.mark.parametrize("case", WRONG_TOKENS)
def test_labels_that_are_no_tokens_are_refused(case: str) -> None:
    labels, config = WRONG_TOKENS[case], preset("tiny-v2", **SIZES | {"num_hidden_layers": 2})
    masked, detector = DebertaForMaskedLM(config), DebertaForReplacedTokenDetection(config)
    mask = torch.ones_like(IDS)
    for call in (
        lambda: masked(IDS, labels=labels),
        lambda: masked.forward_stage(None, input_ids=IDS, attention_mask=mask, labels=labels, layers=range(2), dropout_key=1),
        lambda: detector(IDS, labels=labels),
    ):
        with pytest.raises(ValueError, match="^labels: .*(one for every token of input_ids|is not a token)"):
            call()
    if case != "beyond the vocabulary":
        with pytest.raises(ValueError, match="^labels: .* one for every token"):
            find_targets(IDS > 9, labels)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_narrow_whole_numbers_are_labels(dtype: torch.dtype) -> None:
    model = DebertaForMaskedLM(preset("tiny-v2", **SIZES | {"num_hidden_layers": 2})).eval()
    assert model(IDS, labels=IDS.to(dtype)).loss == model(IDS, labels=IDS).loss


@pytest.mark.parametrize(
    "labels", [torch.tensor([1]), torch.tensor([[1], [2]]), torch.tensor([1.0, 2.0]), torch.tensor([1, 7])]
)
def test_cross_entropy_takes_a_label_for_every_row(labels: Tensor) -> None:
    logits, hidden = torch.zeros(2, 7), torch.zeros(2, 3)
    for call in (
        lambda: CrossEntropy()(logits, labels),
        lambda: CrossEntropy().of_product(hidden, torch.zeros(7, 3), torch.zeros(7), labels),
    ):
        with pytest.raises(ValueError, match="^labels: "):
            call()
