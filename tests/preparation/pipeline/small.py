"""What the tests of preparation share: inputs, a run of the whole, and what is in a corpus."""

import json
from pathlib import Path
from typing import Any

from deberta_dist.data.token_corpus import open_corpus
from deberta_dist.data.token_file import TokenFile
from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.preparation.pipeline.prepare import prepare_corpus
from deberta_dist.preparation.pipeline.recipe import PreparationRecipe
from deberta_dist.preparation.pipeline.report import Outcome


def jsonl(path: Path, *texts: str, field: str = "text") -> Path:
    """A .jsonl file of documents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def prepare(
    inputs: list[Any], output: Path, *, tokenizer: Tokenizer, held_out_percent: float = 0.0, **settings: Any
) -> Outcome:
    """A preparation by one rank; what ``PreparationRecipe`` does not know goes to ``prepare_corpus``."""
    names = ("held_out_inputs", "ngrams", "num_workers", "memory_bytes", "progress", "progress_seconds")
    others = {name: settings.pop(name) for name in names if name in settings}
    recipe = PreparationRecipe.of(tokenizer, held_out_percent=held_out_percent, **settings)
    outcome = prepare_corpus(inputs, output, tokenizer=tokenizer, recipe=recipe, **others)
    assert outcome is not None
    return outcome


def documents_in(path: Path) -> list[list[int]]:
    """Ids of every document of a token file, in order."""
    file = TokenFile(path)
    file.verify()
    offsets = file.document_offsets
    return [file.ids[a:b].tolist() for a, b in zip(offsets[:-1], offsets[1:], strict=True)]


def documents_of(corpus: Path) -> list[list[int]]:
    """Ids of every document of a directory with index.json, in order."""
    names = [item["name"] for item in json.loads((corpus / "index.json").read_text())["files"]]
    found = [document for name in names for document in documents_in(corpus / name)]
    assert open_corpus(corpus).num_tokens == sum(map(len, found))
    return found


def files_of(output: Path) -> dict[str, bytes]:
    """Every file of a corpus but the reports, which tell times."""
    paths = (path for path in sorted(output.rglob("*")) if path.is_file() and not path.name.startswith("report."))
    return {str(path.relative_to(output)): path.read_bytes() for path in paths}
