"""What a document is, and what happens to a malformed one.

``texts`` finds where documents lie; here their bytes become text, a fault to be counted, or an error with file and line.
Line numbers are computed for errors only, since counting lines means reading everything before them again.
"""

from dataclasses import dataclass
from pathlib import Path

from deberta_dist.errors import ConfigError, DataError
from deberta_dist.preparation.reading.inputs import AUTO, FORMATS, InputFile
from deberta_dist.preparation.reading.records import text_of
from deberta_dist.preparation.reading.streams import line_number
from deberta_dist.preparation.reading.wikiextractor import article_text

DOCUMENTS = ("auto", "line", "block", "record", "file")
INVALID_UTF8 = ("error", "replace", "drop")
BAD_RECORDS = ("error", "drop")

REPLACED_UTF8, DROPPED_UTF8, BAD_RECORD, TOO_LONG = "replaced_utf8", "dropped_utf8", "bad_record", "too_long"


@dataclass(frozen=True, kw_only=True)
class TextReadOptions:
    """How text is read.

    Attributes:
        format: what files hold, as for ``find_inputs``.
        text_field: field of JSON objects, or column of Parquet files, which holds the text; "doc.text" is the field
            "text" of the object (or struct column) "doc", where there is no field "doc.text".
        document: what is a document in text files: a "line" that is not blank; a "block" of such lines between
            blank ones; a "record": each line a JSON object; the "file". "auto": block. In files of JSON lines and
            Parquet files it is always a record, in those of WikiExtractor an article.
        invalid_utf8: a document that is not UTF-8 is an "error", gets U+FFFD instead ("replace"), or is left out
            ("drop").
        bad_records: what is no JSON object with a string in the field, a row without a value, and a document that
            is too long, is an "error" or left out ("drop").
        max_document_bytes: bytes of the longest document (of .jsonl: of its line); about as much memory is needed
            several times over when there is such a document.
    """

    format: str = AUTO
    text_field: str = "text"
    document: str = "auto"
    invalid_utf8: str = "error"
    bad_records: str = "error"
    max_document_bytes: int = 1 << 28

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ConfigError: a value is none of those above.
        """
        words = {"format": FORMATS, "document": DOCUMENTS, "invalid_utf8": INVALID_UTF8, "bad_records": BAD_RECORDS}
        for name, allowed in words.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} = {getattr(self, name)!r}, expected one of {', '.join(allowed)}")
        if not all(self.text_field.split(".")):
            raise ConfigError(
                f"text_field = {self.text_field!r}: expected the name of the field which holds the text, or names with a "
                "dot between them"
            )
        if self.max_document_bytes < 1:
            raise ConfigError(f"max_document_bytes = {self.max_document_bytes}, expected at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One document of an input file.

    Attributes:
        text: its text; "" for one that is left out.
        offset: byte of the (decompressed) text where it begins; of a Parquet file the row, from 0.
        num_bytes: bytes of the (decompressed) text from the end of the document before to the end of this one; of a
            Parquet file the bytes of the document.
        fault: None; "replaced_utf8" if U+FFFD stands for bytes that are not UTF-8; "dropped_utf8", "bad_record" or
            "too_long" if it is left out: such a one is there to be counted.
        is_row: whether it is a row of a Parquet file.
    """

    text: str
    path: Path
    offset: int
    num_bytes: int
    fault: str | None = None
    is_row: bool = False

    @property
    def where(self) -> str:
        """File and place, for messages."""
        unit = "row" if self.is_row else "byte"
        return f"{self.path}: {unit} {self.offset}"

    @property
    def is_dropped(self) -> bool:
        """Whether it is left out."""
        return self.fault is not None and self.fault != REPLACED_UTF8


@dataclass(frozen=True, kw_only=True)
class DocumentMaker:
    """Bytes of one file to documents.

    Attributes:
        options: what becomes of bad ones.
        kind: what the bytes of one are: "record": a JSON object; "article": one of WikiExtractor; else the text.
    """

    file: InputFile
    options: TextReadOptions
    kind: str

    def document(self, *, start: int, content: bytes | bytearray | None, num_bytes: int) -> Document | None:
        """The document in ``content``, which begins at byte ``start``.

        Args:
            start: where its bytes begin in the text.
            content: they; None if they are more than the limit.
            num_bytes: as in ``Document``.

        Returns:
            It; None if there is nothing but white space.

        Raises:
            DataError: it is not as it should be, and ``options`` make that an error.
        """
        fault = None
        if content is None:
            self.refuse_long(start)
            text, fault = "", TOO_LONG
        else:
            text, fault = self._decode(content, start=start, row=None)
            if not text or text.isspace():
                if fault is None:
                    return None
            elif self.kind in ("record", "article"):
                text, fault = self._inside(text, start=start, fault=fault)
            else:
                text = text.removesuffix("\r")
        return Document(text=text, path=self.file.path, offset=start, num_bytes=num_bytes, fault=fault)

    def row(self, *, row: int, content: bytes | None) -> Document:
        """The document in one row of a Parquet file.

        Args:
            row: number of the row in its file, from 0.
            content: the value; None where there is none.

        Raises:
            DataError: as ``document``.
        """
        fault: str | None
        if content is None:
            self._refuse_record(f"{self.file.path}: row {row} has no value in column {self.options.text_field!r}")
            text, fault = "", BAD_RECORD
        elif len(content) > self.options.max_document_bytes:
            self._refuse_record(f"{self.file.path}: row {row} is larger than {self._limit}")
            text, fault = "", TOO_LONG
        else:
            text, fault = self._decode(content, start=0, row=row)
        size = 0 if content is None else len(content)
        return Document(text=text, path=self.file.path, offset=row, num_bytes=size, fault=fault, is_row=True)

    def refuse_long(self, start: int) -> None:
        """Raises the error for a document that is too long, if it is one.

        Raises:
            DataError: with its line.
        """
        if self.options.bad_records == "error":
            what = "line" if self.kind in ("record", "line") else "document"
            hint = "; an empty line separates documents" if self.kind == "block" else ""
            self._refuse_record(f"{self._place(start)}: a {what} is larger than {self._limit}{hint}")

    @property
    def _limit(self) -> str:
        return f"{self.options.max_document_bytes:,} bytes (max_document_bytes)"

    def _place(self, offset: int) -> str:
        return f"{self.file.path}:{line_number(self.file, offset=offset)}"

    def _refuse_record(self, message: str) -> None:
        if self.options.bad_records == "error":
            raise DataError(f"{message}; --bad-records drop leaves such documents out")

    def _decode(self, content: bytes | bytearray, *, start: int, row: int | None) -> tuple[str, str | None]:
        """Text and fault."""
        try:
            return content.decode("utf-8"), None
        except UnicodeDecodeError as error:
            if self.options.invalid_utf8 == "replace":
                return content.decode("utf-8", "replace"), REPLACED_UTF8
            if self.options.invalid_utf8 == "drop":
                return "", DROPPED_UTF8
            at = start + error.start
            if row is None:
                place = f"{self._place(at)}: byte {at} of the {'text' if self.file.compression else 'file'}"
            else:
                place = f"{self.file.path}: row {row}: byte {at} of the value"
            raise DataError(
                f"{place} (0x{content[error.start]:02x}) is not UTF-8: convert the file to UTF-8 first, or give "
                "--invalid-utf8 replace or drop"
            ) from error

    def _inside(self, content: str, *, start: int, fault: str | None) -> tuple[str, str | None]:
        """Text in one JSON object or article, and fault."""
        try:
            if self.kind == "article":
                return article_text(content), fault
            return text_of(content, field=self.options.text_field), fault
        except ValueError as error:
            return self._bad_record(start, str(error))

    def _bad_record(self, start: int, message: str) -> tuple[str, str]:
        if self.options.bad_records == "error":
            self._refuse_record(f"{self._place(start)}: {message}")
        return "", BAD_RECORD
