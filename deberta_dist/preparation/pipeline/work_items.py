"""Work items: the inputs, cut into ranges that one process encodes at a time."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deberta_dist.errors import DataError
from deberta_dist.preparation.reading.inputs import AUTO, PARQUET, FileRange, InputFile, PassedOver, find_inputs
from deberta_dist.preparation.reading.texts import cut


@dataclass(frozen=True, kw_only=True)
class WorkItem:
    """A range of an input: what one process encodes at a time.

    Attributes:
        file_range: bytes, or row groups, of the file that are this work item's.
        held_out: whether all its documents are held out.
        input_bytes: bytes of the file that it takes, about.
        name: begins the names of its spool: another file, or the same file changed, has another.
    """

    file: InputFile
    file_range: FileRange
    held_out: bool
    input_bytes: int
    name: str


def list_work_items(
    inputs: Sequence[str | Path], held_out_inputs: Sequence[str | Path], *, range_bytes: int, format: str = AUTO
) -> tuple[tuple[WorkItem, ...], PassedOver]:
    """Ranges of all inputs, in order, and what lies beside them; an empty file is one work item, so that the report counts it.

    Args:
        inputs: as for ``find_inputs``.
        held_out_inputs: further ones, all of whose documents are held out; they come first.
        range_bytes: as for ``cut``.
        format: as for ``find_inputs``.

    Raises:
        DataError: as ``find_inputs`` and ``cut``; a file is in both; an archive has no bytes, or all files of one of
            ``held_out_inputs`` have none; the names of two sources differ in case alone.
    """
    work_items: list[WorkItem] = []
    seen: dict[Path, bool] = {}
    spelling: dict[str, str] = {}
    for word in held_out_inputs:
        if not any(file.num_bytes for file in find_inputs([word], format=format).files):
            raise DataError(f"--held-out-input {word} has no bytes: nothing would be held out; correct or remove it")
    listings = [(find_inputs(given, format=format), held_out) for given, held_out in ((held_out_inputs, True), (inputs, False))]
    for listing, held_out in listings:
        for file in listing.files:
            path = file.path.resolve()
            if seen.setdefault(path, held_out) != held_out:
                raise DataError(f"{file.path} is given as --input and as --held-out-input: name it in one of them")
            if (other := spelling.setdefault(file.source.lower(), file.source)) != file.source:
                raise DataError(
                    f"sources {other} and {file.source} differ in case alone, and would share a folder where file "
                    "names do not: spell them alike, or rename one"
                )
            if not file.num_bytes and (file.compression or file.kind == PARQUET):
                raise DataError(f"{file.path} is cut short: it has no bytes; copy it again, or leave it out")
            ranges = cut(file, range_bytes=range_bytes) or [FileRange(start=0, stop=0)]
            identity = json.dumps([str(path), file.num_bytes, file.modified_ns, held_out])
            digest = hashlib.sha256(identity.encode("ascii")).hexdigest()[:20]
            work_items += [
                WorkItem(
                    file=file,
                    file_range=file_range,
                    held_out=held_out,
                    input_bytes=file.num_bytes // len(ranges),
                    name=f"{digest}-{file_range.start:x}-{file_range.stop:x}",
                )
                for file_range in ranges
            ]
    return tuple(work_items), PassedOver.join(listing.passed_over for listing, _ in listings)
