"""Run by test_custom_code.py in a process that cannot import this package: transformers and a directory's own code alone.

Arguments: a JSON file {directory: file with inputs and expected logits}, and a directory to write into. Prints JSON.
"""

import json
import sys
from pathlib import Path


class Blocker:
    """Nothing of this package may be found, wherever it lies."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "deberta_dist":
            raise ImportError(f"{name} must not be imported here")
        return


sys.meta_path.insert(0, Blocker())

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForMaskedLM  # noqa: E402


def load(directory, **options):
    """The model, in evaluation mode."""
    return AutoModelForMaskedLM.from_pretrained(directory, **options).eval()


def largest(a, b, mask):
    """Largest difference on real tokens."""
    return (a.float() - b.float())[mask.bool()].abs().max().item()


def examine(directory: Path, known: Path, work: Path) -> dict[str, object]:
    """Differences from the expected logits, and what saving, training and resizing do."""
    data = load_file(known)
    ids, mask, expected = data["input_ids"], data["attention_mask"], data["logits"]
    inputs = {"input_ids": ids, "attention_mask": mask}
    found = {}
    with torch.no_grad():
        # First: loading with code puts its class where transformers' own was, for the rest of the process.
        found["plain"] = largest(load(directory)(**inputs).logits, expected, mask)
        model = load(directory, trust_remote_code=True)
        logits = model(**inputs).logits
        found["code"] = largest(logits, expected, mask)
        found["module"] = type(model).__module__.rpartition(".")[2]
        whole = ids[mask.all(dim=1)]
        found["without mask"] = (model(whole).logits - logits[mask.all(dim=1)]).abs().max().item()
        half = load(directory, trust_remote_code=True, dtype=torch.bfloat16)(**inputs).logits
        found["bfloat16"] = largest(half, expected, mask) / expected.abs().max().item()
        model.save_pretrained(work / directory.name)
        again = load(work / directory.name, trust_remote_code=True)
        found["again"] = largest(again(**inputs).logits, logits, mask)
        found["as a tuple"] = len(model(**inputs, return_dict=False, output_hidden_states=True))
    model.train()
    model.gradient_checkpointing_enable()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, ::2] = -100
    result = model(**inputs, labels=labels)
    result.loss.backward()
    flat = torch.nn.functional.cross_entropy(result.logits.flatten(0, 1), labels.flatten())
    found["loss"] = abs(flat.item() - result.loss.item())
    found["without gradient"] = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    halved = model(**inputs, labels=labels, num_items_in_batch=2 * int((labels != -100).sum())).loss.item()
    model.eval()
    found["no targets"] = model(**inputs, labels=torch.full_like(ids, -100)).loss.item()
    found["halved"] = abs(2 * halved - result.loss.item()) if not drops(model) else 0.0
    model.resize_token_embeddings(ids.max().item() + 50)
    found["resized"] = model(**inputs).logits.shape[-1] - ids.max().item()
    return found


def drops(model) -> bool:
    """Whether two passes in training mode differ."""
    return any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())


def strangers(work: Path) -> dict[str, float]:
    """A masked language model trained with transformers, read by the same names after code was loaded."""
    config = transformers.DebertaV2Config(
        vocab_size=90, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32, relative_attention=True, position_biased_input=False, pos_att_type=["c2p", "p2c"],
        legacy=False,
    )  # fmt: skip
    theirs = transformers.DebertaV2ForMaskedLM(config).eval()
    theirs.save_pretrained(work / "stranger")
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        return {"stranger": (load(work / "stranger")(ids).logits - theirs(ids).logits).abs().max().item()}


def main() -> None:
    """Examines every directory."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    cases, work = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    found = {directory: examine(Path(directory), Path(known), work) for directory, known in cases.items()}
    found |= strangers(work)
    for directory in cases:
        if (Path(directory) / "tokenizer.json").exists():
            fill = transformers.pipeline("fill-mask", model=directory, trust_remote_code=True, top_k=3)
            found["pipeline"] = [[g["token_str"], g["score"]] for g in fill(f"the quick {fill.tokenizer.mask_token} fox")]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
