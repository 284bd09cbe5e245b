"""Text files to one token file, streaming: a corpus of any size in the memory of its largest document.

Called by tools/prepare_corpus.py.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deberta_dist.corpus.contamination import NgramSet
from deberta_dist.corpus.filters import Filters
from deberta_dist.corpus.inputs import list_inputs
from deberta_dist.corpus.near_duplicates import NearDuplicates, signature
from deberta_dist.corpus.reading import ReadOptions, read_documents
from deberta_dist.data.new_file import refuse_existing
from deberta_dist.data.token_writer import TokenFileWriter
from deberta_dist.data.tokenizer import Tokenizer, clean_text
from deberta_dist.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a preparation is.

    Attributes:
        num_bytes: bytes of input read.
        total_bytes: bytes of all inputs.
        num_tokens: tokens written.
        seconds: time since the start.
    """

    num_bytes: int
    total_bytes: int
    num_tokens: int
    seconds: float

    def __str__(self) -> str:
        """Share done, speed in MB (10**6 bytes) per second and time left."""
        speed = self.num_bytes / max(self.seconds, 1e-9)
        left = round((self.total_bytes - self.num_bytes) / max(speed, 1e-9))
        return (
            f"{100 * self.num_bytes / max(self.total_bytes, 1):.1f}% of {self.total_bytes / 1e6:,.1f} MB, "
            f"{self.num_tokens:,} tokens, {speed / 1e6:.1f} MB/s, "
            f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        )


@dataclass(frozen=True, kw_only=True)
class PrepareReport:
    """What a preparation read and wrote.

    Attributes:
        num_files: input files.
        num_bytes: bytes read.
        num_documents: documents written.
        num_tokens: tokens written.
        num_empty_documents: documents skipped because no token came of them.
        num_cleaned_documents: documents in which NUL or lone surrogates became spaces.
        num_filtered_documents: documents left out by each rule: those of the filters, ``contaminated`` and
            ``near_duplicate``.
        seconds: time taken.
    """

    num_files: int
    num_bytes: int
    num_documents: int
    num_tokens: int
    num_empty_documents: int
    num_cleaned_documents: int
    seconds: float
    num_filtered_documents: Mapping[str, int] = field(default_factory=dict)


def prepare_corpus(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    tokenizer: Tokenizer,
    text_field: str = "text",
    filters: Filters | None = None,
    contamination: NgramSet | None = None,
    near_duplicates: NearDuplicates | None = None,
    progress: Callable[[Progress], None] | None = None,
    progress_seconds: float = 5.0,
) -> PrepareReport:
    """Writes the documents of ``inputs``, in order, as one token file.

    Args:
        inputs: files and folders, as for ``list_inputs``.
        output: token file to make.
        tokenizer: turns text into ids.
        text_field: field of .jsonl objects which holds the text.
        filters: documents that fail a rule are left out and counted; None: all stay.
        contamination: documents that hold one of these n-grams are left out and counted; None: all stay.
        near_duplicates: knows the documents kept; those near an earlier one are left out and counted. None: all stay.
        progress: called every ``progress_seconds`` while it runs.
        progress_seconds: seconds between calls.

    Returns:
        What was read and written.

    Raises:
        DataError: ``output`` exists, no document has a token, or an input cannot be read (as
            ``list_inputs`` and ``read_documents``). No file is left behind.
    """
    refuse_existing(output)
    files = list_inputs(inputs)
    total_bytes = sum(file.num_bytes for file in files)
    begin = last = time.monotonic()
    num_bytes = num_empty = num_cleaned = 0
    filtered: Counter[str] = Counter()
    filters = Filters() if filters is None else filters
    with TokenFileWriter(
        output,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.num_tokens,
        source=" ".join(file.path.name for file in files),
    ) as writer:
        for file in files:
            for document in read_documents(file, options=ReadOptions(text_field=text_field)):
                num_bytes += document.num_bytes
                text = clean_text(document.text)
                num_cleaned += text != document.text
                ids = tokenizer.encode_array(text)
                if not ids.size:
                    num_empty += 1
                elif (failed := filters.first_failed(text)) is not None:
                    filtered[failed] += 1
                elif contamination is not None and contamination.shares(text):
                    filtered["contaminated"] += 1
                elif near_duplicates is not None and near_duplicates.is_duplicate(signature(text)):
                    filtered["near_duplicate"] += 1
                else:
                    writer.add_document(ids)
                now = time.monotonic()
                if progress and now - last >= progress_seconds:
                    last = now
                    progress(
                        Progress(
                            num_bytes=num_bytes,
                            total_bytes=total_bytes,
                            num_tokens=writer.num_tokens,
                            seconds=now - begin,
                        )
                    )
        if writer.num_tokens == 0:
            left_out = "".join(f", {number:,} left out by {rule}" for rule, number in sorted(filtered.items()))
            raise DataError(f"no text was read from {len(files)} files ({num_empty} empty documents{left_out})")
    return PrepareReport(
        num_files=len(files),
        num_bytes=total_bytes,
        num_documents=writer.num_documents,
        num_tokens=writer.num_tokens,
        num_empty_documents=num_empty,
        num_cleaned_documents=num_cleaned,
        num_filtered_documents=dict(filtered),
        seconds=time.monotonic() - begin,
    )
