"""Tokenizers, token files and corpora of version 0.1.0 are read, and the same text gives the same files again."""

import json
from pathlib import Path

import pytest

from tests.compatibility.commands import recorded, tool, tool_process

CORPORA = ("train/fiction", "train/speech", "heldout")


def files_below(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", CORPORA)
def test_token_files_are_whole(made: Path, name: str) -> None:
    """Checksums, ids and offsets of every file; the numbers are those of the corpus's own report."""
    found = json.loads(tool("inspect_corpus", made / "corpus" / name, "--verify", "--json"))
    assert found["verified"] is not None and not any(found["verified"].values()), found["verified"]
    assert found["num_documents"] == {"train/fiction": 36, "train/speech": 10, "heldout": 3}[name]


def test_documents_have_the_recorded_ids(made: Path) -> None:
    """One document of the second file of a corpus, and sentences with ligatures, accents and letters without a piece."""
    found = json.loads(tool("inspect_corpus", made / "corpus/train/fiction", "--document", 17, "--json"))
    (document,) = found["documents"]
    assert document == recorded(made, "document")["documents"][0] and len(document["ids"]) == 50
    found = json.loads(tool("inspect_corpus", made / "sentences/train", "--documents", 9, "--json"))
    assert found["documents"] == recorded(made, "sentences")["documents"] and len(found["documents"]) == 5


def test_documents_are_decoded(made: Path) -> None:
    """As they were written, but for documents with a letter that the tokenizer has never seen."""
    lines = (made / "inputs/text/speech.jsonl").read_text(encoding="utf-8").splitlines()
    shown = json.loads(
        tool("inspect_corpus", made / "corpus/train/speech", "--documents", 99, "--tokenizer", made / "spm.model", "--json")
    )
    pairs = [(shown["text"], json.loads(line)["text"]) for shown, line in zip(shown["documents"], lines, strict=True)]
    known = [(found, expected) for found, expected in pairs if "[UNK]" not in found]
    assert all(found == expected for found, expected in known) and len(known) >= 5


def test_the_same_sentences_give_the_same_ids(made: Path, tmp_path: Path) -> None:
    """Text to token file with a tokenizer of then: equal to the byte, on any machine."""
    words = ("--tokenizer", made / "spm.model", "--held-out", 0, "--document", "line", "--output", tmp_path / "sentences")
    tool_process("prepare_corpus", "--input", "inputs/text/sentences.txt", *words, cwd=made)
    tokens = {name: content for name, content in files_below(tmp_path / "sentences").items() if name.endswith(".tokens")}
    assert tokens and tokens == {name: files_below(made / "sentences")[name] for name in tokens}


@pytest.mark.slow
def test_the_same_text_gives_the_same_corpus(made: Path, tmp_path: Path) -> None:
    """Several sources, several files and held-out text likewise, indexes included."""
    words = ("--tokenizer", made / "spm.model", "--held-out", 0, "--shard-bytes", 8000, "--output", tmp_path / "corpus")
    inputs = ("fiction=inputs/text/fiction.jsonl", "speech=inputs/text/speech.jsonl")
    tool_process(
        "prepare_corpus", "--input", *inputs, "--held-out-input", "inputs/text/heldout.jsonl", *words, "--workers", 2, cwd=made
    )
    found, expected = files_below(tmp_path / "corpus"), files_below(made / "corpus")
    assert found.keys() >= expected.keys()
    compared = [name for name in expected if not name.startswith("report")]
    assert len(compared) > 6 and all(found[name] == expected[name] for name in compared)


@pytest.mark.slow
def test_the_same_text_gives_the_same_tokenizer(made: Path, tmp_path: Path) -> None:
    """Its pieces in their order; scores are sums of logarithms, whose last bits may differ between machines."""
    from sentencepiece import SentencePieceProcessor

    inputs = ("inputs/text/fiction.jsonl", "inputs/text/speech.jsonl")
    tool_process("train_tokenizer", "--input", *inputs, "--output", tmp_path / "spm.model", "--vocab-size", 320, cwd=made)
    found, expected = (SentencePieceProcessor(model_file=str(path / "spm.model")) for path in (tmp_path, made))
    assert [found.id_to_piece(i) for i in range(len(found))] == [expected.id_to_piece(i) for i in range(320)]


def test_megatron_dataset_and_back(made: Path, tmp_path: Path) -> None:
    """What was converted to Megatron's form comes back as the corpus that it was made from."""
    words = ("--tokenizer", made / "spm.model", "--strip-eod", 2)
    tool("convert_corpus", made / "megatron" / "speech.idx", tmp_path / "back.tokens", *words)
    found, expected = (
        json.loads(tool("inspect_corpus", path, "--documents", 99, "--json"))["documents"]
        for path in (tmp_path / "back.tokens", made / "corpus/train/speech")
    )
    assert found == expected and len(found) == 10
    tool(
        "convert_corpus", made / "corpus/train/speech", tmp_path / "again", "--tokenizer", made / "spm.model", "--append-eod", 2
    )
    for ending in ("idx", "bin"):
        assert (tmp_path / f"again.{ending}").read_bytes() == (made / f"megatron/speech.{ending}").read_bytes()
