"""Reports what a preparation read, left out and wrote: report.json for programs, report.md for people."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deberta_dist.errors import encodable, printable
from deberta_dist.preparation.filtering.contamination import NgramSet, Used
from deberta_dist.preparation.pipeline.encode import Spool
from deberta_dist.preparation.pipeline.publish import publish
from deberta_dist.preparation.pipeline.recipe import PreparationRecipe
from deberta_dist.preparation.pipeline.shards import HELD_OUT, TRAIN, ShardAssignment, SourceSplit, folder_of
from deberta_dist.preparation.pipeline.spool import Counts
from deberta_dist.preparation.pipeline.work_items import WorkItem
from deberta_dist.preparation.reading.inputs import PassedOver

JSON_NAME, TEXT_NAME = "report.json", "report.md"
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class SourceReport:
    """One source, or all together.

    Attributes:
        files: number of input files.
        input_bytes: bytes of these files on disk, compressed as they are.
        read_documents, read_bytes: documents read and bytes of text (of compressed files: after decompression).
        dropped: documents that are in no split, by rule.
        altered: documents that were altered and kept by the rules that look at one document, by reason.
        train, heldout: what is in the splits.
        cpu_seconds: processor time of reading and encoding.
    """

    files: int
    input_bytes: int
    read_documents: int
    read_bytes: int
    dropped: Mapping[str, int]
    altered: Mapping[str, int]
    train: SourceSplit
    heldout: SourceSplit
    cpu_seconds: float

    @property
    def bytes_per_cpu_second(self) -> float:
        """Bytes of text per second and core."""
        return self.read_bytes / max(self.cpu_seconds, 1e-9)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished preparation.

    Attributes:
        recipe: settings as ``PreparationRecipe.as_json`` gives them.
        sources: what each source came to; "" is the name of inputs without one.
        total: sum over the sources.
        shards: token files in each folder.
        missing: folders that were asked for and are not there, for no document is left for them.
        processes: workers of all ranks in the start that finished it.
        seconds: wall time of that start.
        passed_over: what lay in the inputs' directories, or fitted their patterns, and was not read.
        benchmark: files whose texts documents were compared with.
        benchmark_passed_over: what lay beside these.
    """

    recipe: Mapping[str, Any]
    sources: Mapping[str, SourceReport]
    total: SourceReport
    shards: Mapping[str, int]
    missing: Sequence[str]
    processes: int
    seconds: float
    passed_over: PassedOver = PassedOver()
    benchmark: Sequence[Used] = ()
    benchmark_passed_over: PassedOver = PassedOver()

    @classmethod
    def of(
        cls,
        work_items: Sequence[WorkItem],
        *,
        spool: Spool,
        assignment: ShardAssignment,
        recipe: PreparationRecipe,
        processes: int,
        seconds: float,
        passed_over: PassedOver,
        ngrams: NgramSet | None,
    ) -> "Outcome":
        """Counts what there is.

        Args:
            work_items: all of them, in the order of the input: the spool's numbers count them.
            spool: what they became.
            assignment: where documents went.
            processes, seconds, passed_over: as above.
            ngrams: of the benchmark; None: there is none.
        """
        counts: dict[str, Counts] = {item.file.source: Counts() for item in work_items}
        for spool_file, number in zip(spool.files, spool.item_numbers, strict=True):
            counts[work_items[number].file.source] += spool_file.counts
        sources: dict[str, SourceReport] = {}
        for source, count in counts.items():
            files = {item.file.path: item.file.num_bytes for item in work_items if item.file.source == source}
            duplicates = {rule: number for rule, number in assignment.dropped.get(source, {}).items() if number}
            sources[source] = SourceReport(
                files=len(files),
                input_bytes=sum(files.values()),
                read_documents=count.num_read,
                read_bytes=count.num_bytes,
                dropped={**count.dropped, **duplicates},
                altered=count.altered,
                train=assignment.splits.get((source, TRAIN), SourceSplit()),
                heldout=assignment.splits.get((source, HELD_OUT), SourceSplit()),
                cpu_seconds=round(count.seconds, 3),
            )
        folders = assignment.folders()
        expected = dict.fromkeys(folder_of(item.file.source, split=TRAIN) for item in work_items if not item.held_out)
        if recipe.held_out_percent or any(item.held_out for item in work_items):
            expected[HELD_OUT] = None
        return cls(
            recipe=recipe.as_json(),
            sources=sources,
            total=_sum(list(sources.values())),
            shards={folder: len(shards) for folder, shards in folders.items()},
            missing=[folder for folder in expected if folder not in folders],
            processes=processes,
            seconds=round(seconds, 3),
            passed_over=passed_over,
            benchmark=() if ngrams is None else ngrams.files,
            benchmark_passed_over=PassedOver() if ngrams is None else ngrams.passed_over,
        )

    def as_json(self) -> dict[str, Any]:
        """The content of report.json; ``Outcome.from_json`` reads it."""
        return {"version": _VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Outcome":
        """What ``as_json`` has made."""
        values = {key: value for key, value in content.items() if key != "version"}
        values["sources"] = {name: _source(value) for name, value in content["sources"].items()}
        values["total"] = _source(content["total"])
        values["benchmark"] = tuple(Used(**used) for used in content.get("benchmark", ()))
        for name in ("passed_over", "benchmark_passed_over"):
            there = content.get(name, {})
            values[name] = PassedOver(count=there.get("count", 0), first=tuple(there.get("first", ())))
        return cls(**values)

    def summary(self, output: Path) -> str:
        """A few lines for the terminal."""
        total = self.total
        dropped = ", ".join(f"{number:,} {rule}" for rule, number in sorted(total.dropped.items())) or "none"
        lines = [
            f"{output}: {total.read_documents:,} documents of {total.read_bytes / 1e6:,.1f} MB in {total.files:,} files, "
            f"{self.seconds:,.1f} s, {total.bytes_per_cpu_second / 1e6:,.1f} MB/s per core",
            *(f"  {line}" for line in self._passed_over_lines()),
            *([f"  {self._benchmark_line()}"] if self.benchmark else []),
            f"  left out: {dropped}",
            *(
                f"  {folder}: {split.documents:,} documents, {split.tokens:,} tokens"
                for folder, split in ((TRAIN, total.train), (HELD_OUT, total.heldout))
            ),
            *(f"  {line}" for line in self._missing_lines()),
            f"  {output / TEXT_NAME} says more",
        ]
        return "\n".join(lines)

    def _passed_over_lines(self) -> list[str]:
        kinds = (("passed over beside the inputs", self.passed_over), ("beside the benchmark", self.benchmark_passed_over))
        return [f"{what}: {paths}" for what, paths in kinds if paths]

    def _benchmark_line(self) -> str:
        searched, texts = (sum(getattr(used, name) for used in self.benchmark) for name in ("num_searched", "num_texts"))
        shorter = " (the others are shorter)" if searched < texts else ""
        line = f"compared with {searched:,} of {texts:,} texts in {len(self.benchmark):,} benchmark files{shorter}"
        if silent := [used for used in self.benchmark if not used.num_searched]:
            line += f"; {len(silent):,} files have none that is long enough, such as {_shown(silent[0].path)}"
        return line

    def _missing_lines(self) -> list[str]:
        return [f"{folder}/ is not there: no document is left for it" for folder in self.missing]

    def as_text(self) -> str:
        """Tables in Markdown."""
        named = [*self.sources.items()] if len(self.sources) > 1 else []
        rows = [*named, ("total", self.total)]
        lines = [
            "# Corpus",
            "",
            "| source | files | MB read | documents read | train: documents | tokens | held out: documents | tokens |",
            "|---|--:|--:|--:|--:|--:|--:|--:|",
        ]
        rows = [(name or "(no name)", source) for name, source in rows]
        for name, source in rows:
            lines.append(
                f"| {name} | {source.files:,} | {source.read_bytes / 1e6:,.1f} | {source.read_documents:,} "
                f"| {source.train.documents:,} | {source.train.tokens:,} "
                f"| {source.heldout.documents:,} | {source.heldout.tokens:,} |"
            )
        rules = sorted({rule for _, source in rows for rule in source.dropped})
        reasons = sorted({reason for _, source in rows for reason in source.altered})
        for title, names, field in (
            ("Documents left out", rules, "dropped"),
            ("Documents altered", reasons, "altered"),
        ):
            if names:
                lines += ["", f"## {title}", "", f"| source | {' | '.join(names)} |", "|---|" + "--:|" * len(names)]
                for name, source in rows:
                    values = " | ".join(f"{getattr(source, field).get(column, 0):,}" for column in names)
                    lines.append(f"| {name} | {values} |")
        if self.benchmark:
            lines += ["", "## Benchmark", "", self._benchmark_line() + ".", ""]
            lines += ["| file | texts | long enough to be looked for |", "|---|--:|--:|"]
            lines += [f"| {_shown(used.path)} | {used.num_texts:,} | {used.num_searched:,} |" for used in self.benchmark]
        if not_read := self._passed_over_lines():
            lines += ["", "## Not read", "", *(f"- {line}" for line in not_read)]
        lines += [
            "",
            "## Work",
            "",
            f"- reading and encoding: {self.total.cpu_seconds:,.1f} core-seconds, "
            f"{self.total.bytes_per_cpu_second / 1e6:,.1f} MB/s per core",
            f"- the start that finished it: {self.processes} processes, {self.seconds:,.1f} s",
            *(f"- {folder}/: {count:,} token files" for folder, count in self.shards.items()),
            *(f"- {line}" for line in self._missing_lines()),
        ]
        return "\n".join(lines) + "\n"


def write_report(outcome: Outcome, *, directory: Path) -> None:
    """Writes both files, report.json last: its presence marks a corpus as complete.

    Raises:
        DataError: the disk is full.
    """
    publish(directory / TEXT_NAME, outcome.as_text().encode("utf-8"))
    publish(directory / JSON_NAME, (json.dumps(outcome.as_json(), indent=2) + "\n").encode("utf-8"))


def _shown(path: str) -> str:
    """A path in a line, or a cell of a table."""
    return printable(encodable(path)).replace("|", "\\|")


def _source(content: Mapping[str, Any]) -> SourceReport:
    splits = {split: SourceSplit(**content[split]) for split in (TRAIN, HELD_OUT)}
    return SourceReport(**{**content, **splits})


def _sum(sources: Sequence[SourceReport]) -> SourceReport:
    def add(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
        names = dict.fromkeys(name for count in counts for name in count)
        return {name: sum(count.get(name, 0) for count in counts) for name in names}

    return SourceReport(
        files=sum(source.files for source in sources),
        input_bytes=sum(source.input_bytes for source in sources),
        read_documents=sum(source.read_documents for source in sources),
        read_bytes=sum(source.read_bytes for source in sources),
        dropped=add([source.dropped for source in sources]),
        altered=add([source.altered for source in sources]),
        train=sum((source.train for source in sources), SourceSplit()),
        heldout=sum((source.heldout for source in sources), SourceSplit()),
        cpu_seconds=round(sum(source.cpu_seconds for source in sources), 3),
    )
