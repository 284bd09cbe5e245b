"""GLUE's MNLI: the natural language inference task from which small tasks start; not part of SuperGLUE.

Files of GLUE's ``MNLI/`` folder: ``train.tsv`` to train on, ``dev_matched.tsv`` to choose weights by.
"""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from deberta_dist.errors import DataError
from deberta_dist.files.foreign import refuse_foreign
from deberta_dist.tasks import metrics
from deberta_dist.tasks.base import Head, Split, Task
from deberta_dist.tasks.data_files import DataFiles
from deberta_dist.tasks.decisions import Decision, Key
from deberta_dist.tasks.encoding import Example, RowEncoder, TextPart

_FILES = {"train": "train.tsv", "val": "dev_matched.tsv"}
_COLUMNS = ("index", "sentence1", "sentence2", "gold_label")
_LABELS = ("entailment", "contradiction", "neutral")


class MnliTask(Task):
    """The task."""

    def data_file(self, split: str) -> str:
        """GLUE's names."""
        return _FILES[split]

    def read(self, files: DataFiles, split: str) -> Split:
        """Reads and checks a split of GLUE's ``MNLI/``."""
        return read_mnli(files.path, split)

    def examples(self, split: Split, encoder: RowEncoder) -> Iterator[Example]:
        """The hypothesis whole, the premise in windows."""
        for row in split.rows:
            yield encoder.windowed((row["idx"],), [TextPart(row["premise"])], [[TextPart(row["hypothesis"], is_kept=True)]])


MNLI = MnliTask(
    name="MNLI",
    head=Head.SEQUENCE,
    labels=_LABELS,
    measures={"accuracy": metrics.answer_accuracy},
    splits=("train", "val"),
    counts={"train": 392702, "val": 9815},
    data_help="GLUE's MNLI/",
)


def read_mnli(directory: Path, split: str) -> Split:
    """Reads and checks a split.

    Args:
        directory: GLUE's ``MNLI/``.
        split: train or val.

    Raises:
        DataError: the file is missing, or a line is not what it should be; the message has file and line.
    """
    path = directory / _FILES[split]
    try:
        content = path.read_bytes()
        refuse_foreign(content, path)
        lines = [line.removesuffix("\r") for line in content.decode("utf-8-sig").split("\n")]
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): GLUE's MNLI files are needed") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason} at byte {error.start})") from error
    # Not the csv module: quotes are characters here, a field may begin with one and never end.
    header = lines[0].split("\t")
    if lacking := [name for name in _COLUMNS if name not in header]:
        raise DataError(f"{path}, line 1: column {lacking[0]} is missing; it has {', '.join(header)[:200]}")
    columns = [header.index(name) for name in _COLUMNS]
    rows, decisions = [], dict[Key, Decision]()
    for line, text in enumerate(lines[1:], start=2):
        if not text:
            continue
        at, fields = f"{path}, line {line}", text.split("\t")
        if len(fields) != len(header):
            raise DataError(f"{at}: {len(fields)} columns, the first line has {len(header)}")
        index, premise, hypothesis, label = (fields[column] for column in columns)
        if not re.fullmatch("[0-9]{1,9}", index):
            raise DataError(f"{at}: index is {index!r}, a whole number is expected")
        if label not in _LABELS:
            raise DataError(f"{at}: gold_label is {label!r}, MNLI has {', '.join(_LABELS)}")
        if (int(index),) in decisions:
            raise DataError(f"{at}: index {index} stands in line {decisions[int(index),].line} already")
        decisions[int(index),] = Decision(MNLI.labels, (label,), line)
        rows.append({"idx": int(index), "premise": premise, "hypothesis": hypothesis, "label": label})
    if not rows:
        raise DataError(f"{path} is empty")
    sha256 = hashlib.sha256(content).hexdigest()
    return Split(task=MNLI, name=split, where=str(path), sha256=sha256, rows=tuple(rows), decisions=decisions)
