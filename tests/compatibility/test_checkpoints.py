"""Weights of version 0.1.0 in three forms: read, converted into each other bit by bit, and computed with."""

import json
from pathlib import Path

import pytest
import torch

from deberta_dist import load_masked_lm, load_with_head
from tests.compatibility.commands import recorded, same_as_recorded, same_tensors, tool, weights

FORMS = ("uninterrupted/weights", "huggingface", "official")
IDS = torch.arange(5, 37).reshape(2, 16)


def test_three_forms_of_the_same_weights(made: Path) -> None:
    """The comparison of whole checkpoints, which ends with 1 where a tensor differs."""
    for other in FORMS[1:]:
        tool("inspect_checkpoint", made / FORMS[0], "--diff", made / other)
    tool("inspect_checkpoint", made / FORMS[0], "--diff", made / "pretraining", code=1)


def test_inspection_is_the_recorded_one(made: Path) -> None:
    """The interrupted run's checkpoint: step, layout, parameters by group, configuration, what it was trained with."""
    found = json.loads(tool("inspect_checkpoint", made / "pretraining", "--json"))
    expected = recorded(made, "inspection")
    for key in ("step", "layout", "dtype", "num_parameters", "groups", "num_tensors", "config"):
        assert found[key] == expected[key], key
    assert (found["step"], found["num_tensors"]) == (3, 80)


@pytest.mark.parametrize("form", FORMS[1:])
def test_back_to_our_form_bit_by_bit(made: Path, tmp_path: Path, form: str) -> None:
    tool("convert_checkpoint", made / form, tmp_path / "back", "--to", "deberta_dist")
    same_tensors(weights(tmp_path / "back"), weights(made / FORMS[0]), relative=0)
    found, expected = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "back", made / FORMS[0]))
    if form == "huggingface":  # its classes have no key for it: hidden size / heads
        assert found.get("attention_head_size") is None and expected.pop("attention_head_size") == 8
    assert {key: found.get(key) for key in expected} == expected


def test_into_the_other_forms_as_then(made: Path, tmp_path: Path) -> None:
    """Every tensor under its name, the configuration and the tokenizer of each form."""
    tool("convert_checkpoint", made / FORMS[0], tmp_path / "huggingface", "--to", "huggingface")
    same_tensors(weights(tmp_path / "huggingface"), weights(made / "huggingface"), relative=0)
    tool("convert_checkpoint", made / FORMS[0], tmp_path / "official", "--to", "official")
    found, expected = (torch.load(path / "official/pytorch_model.bin", weights_only=True) for path in (tmp_path, made))
    same_tensors({k: v.numpy() for k, v in found.items()}, {k: v.numpy() for k, v in expected.items()}, relative=0)
    for name in ("huggingface/config.json", "huggingface/tokenizer.json", "official/model_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((made / name).read_text()), name
    for name in ("huggingface/spm.model", "official/spm.model"):
        assert (tmp_path / name).read_bytes() == (made / "spm.model").read_bytes()


def test_a_runs_checkpoint_is_read_whole(made: Path, tmp_path: Path) -> None:
    """Two pipeline stages' slices, put together: what 0.1.0 made of them."""
    tool("convert_checkpoint", made / "pretraining", tmp_path / "halfway", "--to", "deberta_dist")
    same_as_recorded(weights(tmp_path / "halfway"), recorded(made, "tensors")["halfway/model.safetensors"], relative=0)


def test_logits_are_the_recorded_ones(made: Path) -> None:
    """Of all three forms the same bits on one machine; beside the recorded ones to 1e-5, for products round differently."""
    with torch.no_grad():
        found = [load_masked_lm(made / form)[0](IDS).logits for form in FORMS]
        classified = load_with_head(made / "finetuning/seed-7/RTE/weights")[0](IDS).logits
    assert all(torch.equal(logits, found[0]) for logits in found[1:])
    torch.testing.assert_close(found[0][::5, ::16], torch.tensor(recorded(made, "logits")["masked_lm"]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(classified, torch.tensor(recorded(made, "logits")["classifier"]), rtol=1e-5, atol=1e-5)
    # Not so close to anything: two rows differ.
    assert (classified[0] - classified[1]).abs().max() > 1e-3


@pytest.mark.slow
def test_transformers_reads_what_was_exported(made: Path) -> None:
    """Weights and tokenizer, offline; its hidden states are ours."""
    from transformers import AutoModel, AutoTokenizer

    ours, tokenizer = load_masked_lm(made / "huggingface")
    theirs = AutoModel.from_pretrained(made / "huggingface").eval()
    sentences = (made / "inputs/text/sentences.txt").read_text(encoding="utf-8").splitlines()
    there = AutoTokenizer.from_pretrained(made / "huggingface")
    assert tokenizer is not None
    for sentence in sentences:
        assert there(sentence, add_special_tokens=False)["input_ids"] == list(tokenizer.encode(sentence)), sentence
    with torch.no_grad():
        expected = theirs(IDS).last_hidden_state
        found = ours.deberta(IDS, torch.ones_like(IDS)).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
