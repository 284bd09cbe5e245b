"""The only door to sentencepiece: training a vocabulary, and turning text into ids and back.

Ids follow the published ``spm.model`` of DeBERTa v2: ``[PAD] [CLS] [SEP] [UNK]`` are 0 to 3, and ``[MASK]``
is no piece of the model but the first id after its pieces. Preparation, the loader and the benchmarks use
it; a file is known by the SHA-256 of its bytes, which token files and checkpoints carry.
"""

import hashlib
import importlib.metadata
import io
import itertools
import re
import tempfile
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from deberta_dist.data.seed_pieces import seed_pieces
from deberta_dist.data.sentencepiece_model import without_seeds_file
from deberta_dist.data.training_words import WORD_START, TrainingWords, count_words
from deberta_dist.data.vocabulary_options import VocabularyOptions
from deberta_dist.errors import ConfigError, DataError, printable
from deberta_dist.files.atomic import new_file
from deberta_dist.files.foreign import HEAD_BYTES, begins_like, refuse_foreign

SPECIAL_PIECES = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
MASK_PIECE = "[MASK]"
TESTED_SENTENCEPIECE = "0.2.2"
"""The version that pyproject.toml asks for, which says why."""

# The floating point sums of the trainer depend on how sentences are dealt to threads: a constant, not the
# machine's number of cores, makes the same text give the same file everywhere.
_NUM_THREADS = 4
_MAX_SENTENCE_BYTES = 1 << 30
# Candidates that the trainer begins with; it refuses some of those it is given, and takes the first million others.
# A vocabulary cannot have more, and near 2^31 the trainer would not end.
_NUM_SEEDS = 1_000_000
_NUM_BYTES = 256
_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
_NOT_TEXT = re.compile("[\0\ud800-\udfff]")


def clean_text(text: str) -> str:
    """Text without NUL and lone surrogates, each replaced by a space.

    sentencepiece would drop or refuse them, and a JSON escape can hold either.
    """
    # Almost every text is clean, and both looks are much faster than the search.
    if "\0" not in text and (text.isascii() or _has_no_surrogate(text)):
        return text
    return _NOT_TEXT.sub(" ", text)


def _has_no_surrogate(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def sentencepiece_version() -> str:
    """The installed one."""
    return importlib.metadata.version("sentencepiece")


def version_warning(installed: str = "") -> str:
    """What to know about a version of sentencepiece (by default the installed one) before training with it; "" for the tested one."""
    installed = installed or sentencepiece_version()
    if installed == TESTED_SENTENCEPIECE:
        return ""
    known = " (of Thai, Devanagari and scripts like them its own trainer loses most pieces)"
    return (
        f"sentencepiece {installed} is installed{known if installed == '0.2.3' else ''}: vocabularies are tested "
        f"with {TESTED_SENTENCEPIECE} alone; pip install sentencepiece=={TESTED_SENTENCEPIECE}"
    )


def train_tokenizer(
    texts: Iterable[str],
    model_path: str | Path,
    *,
    vocab_size: int,
    options: VocabularyOptions = VocabularyOptions(),
) -> TrainingWords:
    """Trains a unigram vocabulary and writes it as a sentencepiece model.

    The same texts in the same order give the same bytes.

    Args:
        texts: documents. Read once; their different words are held in memory.
        model_path: file to write. An identical file there is left alone.
        vocab_size: number of pieces including the four special ones, without ``[MASK]``.
        options: how; the default is that of the releases without their byte fallback.

    Returns:
        The words it was trained on.

    Raises:
        ConfigError: ``vocab_size`` leaves no piece for text or is above a million, or a user-defined symbol cannot be one.
        DataError: ``texts`` holds no text, is too small for ``vocab_size`` (the message gives the largest
            possible one) or has more characters than that, or ``model_path`` holds something else.
    """
    import sentencepiece

    _require_symbols(options)
    more = len(options.symbols) + (_NUM_BYTES if options.byte_fallback else 0)
    if vocab_size <= len(SPECIAL_PIECES) + more:
        also = f" and {more} symbols and bytes" if more else ""
        raise ConfigError(f"vocab_size = {vocab_size} leaves no piece after {' '.join(SPECIAL_PIECES)}{also}")
    if vocab_size > _NUM_SEEDS:
        raise ConfigError(f"vocab_size = {vocab_size}, expected at most {_NUM_SEEDS:,}: there are no more candidates")
    normalizer = sentencepiece.SentencePieceNormalizer(rule_name=options.normalization_rule)
    words = count_words(
        texts,
        normalize=lambda text: normalizer.normalize(clean_text(text)),
        max_run_characters=options.max_run_characters,
    )
    if not words.counts:
        raise DataError("the tokenizer was given no text to learn from")
    content = _train(words.counts, vocab_size=vocab_size, options=options)
    path = Path(model_path)
    if not (path.is_file() and path.read_bytes() == content):
        with new_file(path) as file:
            file.write(content)
    return words


def _train(counts: dict[str, int], *, vocab_size: int, options: VocabularyOptions) -> bytes:
    """The model file for words and their counts."""
    import sentencepiece

    model = io.BytesIO()
    # The trainer puts a space before each word that it is given, and so has to be counted.
    spaced = {WORD_START + word: count for word, count in counts.items()}
    with tempfile.TemporaryDirectory() as folder:
        seeds = Path(folder) / "seeds.tsv"
        with open(seeds, "w", encoding="utf-8", newline="\n") as file:
            for piece, count in seed_pieces(spaced, max_pieces=2 * _NUM_SEEDS):
                file.write(f"{piece}\t{count}\n")
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(f"{word}\t{count}" for word, count in counts.items()),
                input_format="tsv",
                seed_sentencepieces_file=str(seeds),
                seed_sentencepiece_size=_NUM_SEEDS,
                model_writer=model,
                model_type="unigram",
                vocab_size=vocab_size,
                character_coverage=options.character_coverage,
                byte_fallback=options.byte_fallback,
                user_defined_symbols=list(options.symbols),
                normalization_rule_name=options.normalization_rule,
                pad_id=0,
                bos_id=1,
                eos_id=2,
                unk_id=3,
                pad_piece=SPECIAL_PIECES[0],
                bos_piece=SPECIAL_PIECES[1],
                eos_piece=SPECIAL_PIECES[2],
                unk_piece=SPECIAL_PIECES[3],
                max_sentence_length=_MAX_SENTENCE_BYTES,
                num_threads=_NUM_THREADS,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise _training_error(error, vocab_size=vocab_size) from error
    return without_seeds_file(model.getvalue())


def _require_symbols(options: VocabularyOptions) -> None:
    """Refuses user-defined symbols that cannot be pieces, or are already."""
    taken = {*SPECIAL_PIECES, MASK_PIECE}
    seen: set[str] = set()
    for symbol in options.user_defined_symbols:
        if symbol in taken:
            raise ConfigError(f"user-defined symbol {printable(symbol)}: it is a piece of every vocabulary already; remove it")
        if symbol in seen:
            raise ConfigError(f"user-defined symbol {printable(symbol)} is given twice")
        seen.add(symbol)
        if not symbol or symbol != "".join(clean_text(symbol).split()) or WORD_START in symbol:
            raise ConfigError(f"user-defined symbol {printable(symbol)!r}: it is empty or holds white space")
        if options.byte_fallback and _BYTE_PIECE.fullmatch(symbol):
            raise ConfigError(f"user-defined symbol {symbol}: byte_fallback makes it a piece already")


def _training_error(error: RuntimeError, *, vocab_size: int) -> DataError | RuntimeError:
    """What the trainer's message means for who gave the text; any other failure is returned as it is."""
    message = str(error)
    too_large = re.search(r"Please set it to a value <= (\d+)", message)
    if too_large:
        return DataError(
            f"vocab_size = {vocab_size} is too large for this text: the largest possible is "
            f"{too_large[1]}; give more text or a smaller vocab_size"
        )
    too_small = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if too_small:
        return DataError(
            f"vocab_size = {vocab_size} is too small: characters and special pieces of this text alone take {too_small[1]}"
        )
    return error


class Tokenizer:
    """Text to ids and back with one sentencepiece model.

    Attributes:
        path: the SentencePiece model file.
        sha256: SHA-256 of its bytes, in hexadecimal.
        num_tokens: number of ids: the pieces and ``[MASK]``.
        pad_id, cls_id, sep_id, unk_id, mask_id: the special ids.
    """

    def __init__(self, path: str | Path) -> None:
        """Reads the model file.

        Raises:
            DataError: the file is missing, no sentencepiece model, or its special pieces are not those of
                the published model.
        """
        self.path = Path(path)
        try:
            model = self.path.read_bytes()
        except OSError as error:
            raise DataError(
                f"tokenizer {path} cannot be read ({error.strerror}): give the path of an spm.model, "
                "for example one made by tools/train_tokenizer.py"
            ) from error
        refuse_foreign(model, f"tokenizer {path}")
        try:
            import sentencepiece  # here, for help texts and submissions need no tokenizer

            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            pieces = [self._processor.id_to_piece(i) for i in range(self._processor.get_piece_size())]
        except RuntimeError as error:
            like = begins_like(model[:HEAD_BYTES])
            raise DataError(f"tokenizer {path} is not a sentencepiece model, or is damaged{like}") from error
        if not pieces:
            raise DataError(f"tokenizer {path} is not a sentencepiece model: it holds no pieces")
        if tuple(pieces[:4]) != SPECIAL_PIECES or MASK_PIECE in pieces:
            raise DataError(
                f"tokenizer {path} begins with {' '.join(pieces[:4])}, expected {' '.join(SPECIAL_PIECES)} "
                f"as ids 0 to 3 and no piece {MASK_PIECE}, as in the published spm.model"
            )
        self._pieces = [*pieces, MASK_PIECE]
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.num_tokens = len(self._pieces)
        self.pad_id, self.cls_id, self.sep_id, self.unk_id = range(4)
        self.mask_id = self.num_tokens - 1

    @property
    def special_ids(self) -> tuple[int, ...]:
        """``[PAD] [CLS] [SEP] [UNK] [MASK]``: the ids that are never masked."""
        return (self.pad_id, self.cls_id, self.sep_id, self.unk_id, self.mask_id)

    @cached_property
    def byte_ids(self) -> frozenset[int]:
        """The ids that are single bytes; none where the model has no byte fallback."""
        return frozenset(filter(self._processor.is_byte, range(self._processor.get_piece_size())))

    @cached_property
    def is_word_start(self) -> np.ndarray:
        """Whether an id begins a word, bool [num_tokens], read-only.

        As published (``part_of_whole_word`` in deberta/spm_tokenizer.py): a piece that begins with U+2581,
        a piece which is a single punctuation, space or control character, and the special ones.
        """
        starts = np.array([p.startswith(WORD_START) or _stands_alone(p) for p in self._pieces])
        starts[list(self.special_ids)] = True
        starts.flags.writeable = False
        return starts

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without ``[CLS]`` and ``[SEP]``.

        Special pieces written out in the text are ordinary characters. NUL and lone surrogates count as
        spaces.
        """
        return self._processor.encode(clean_text(text))

    def encode_array(self, text: str, *, is_clean: bool = False) -> np.ndarray:
        """As ``encode``, int32 [T], without a Python number per token; ``is_clean`` if ``clean_text`` made the text."""
        return self._processor.encode(text if is_clean else clean_text(text), return_type="numpy")

    def normalise(self, text: str) -> str:
        """A text as the model's rules rewrite it before it is split, with spaces between words and none around them."""
        return self._processor.normalize(clean_text(text)).replace(WORD_START, " ").strip()

    def surfaces(self, text: str) -> list[str]:
        """What each id of ``encode(text)`` stands for in the normalised text, ``[UNK]`` as well.

        ``WORD_START`` is a space; characters outside the vocabulary that follow each other are one ``[UNK]``. Where
        they become bytes, the first byte of a character stands for it and the others for "".
        """
        surfaces = self._processor.encode(clean_text(text), out_type=str)
        return _bytes_as_characters(surfaces) if self.byte_ids else surfaces

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special ones written out as ``[CLS]`` and so on.

        Raises:
            DataError: an id is outside the vocabulary.
        """
        words: list[str] = []
        run: list[int] = []
        pieces = self.pieces(ids)
        special = set(self.special_ids)
        for i, piece in zip(ids, pieces, strict=True):
            if i in special:
                words += [self._processor.decode(run), piece]
                run = []
            else:
                run.append(int(i))
        words.append(self._processor.decode(run))
        return " ".join(word for word in words if word)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The piece of every id.

        Raises:
            DataError: an id is outside the vocabulary.
        """
        for i in ids:
            if not 0 <= i < self.num_tokens:
                raise DataError(f"id {i} is outside the {self.num_tokens} tokens of {self.path}")
        return [self._pieces[i] for i in ids]


def _bytes_as_characters(surfaces: list[str]) -> list[str]:
    """Surfaces with a character instead of its first byte, and "" instead of the others."""
    result: list[str] = []
    for is_byte, group in itertools.groupby(surfaces, key=lambda surface: bool(_BYTE_PIECE.fullmatch(surface))):
        if not is_byte:
            result += group
            continue
        values = [int(surface[1:-1], 16) for surface in group]
        characters = iter(bytes(values).decode("utf-8"))
        result += ["" if value & 0xC0 == 0x80 else next(characters) for value in values]
    return result


def _stands_alone(piece: str) -> bool:
    """Whether a piece is one character that is neither letter nor digit (ASCII symbols count as such)."""
    if len(piece) != 1:
        return False
    ascii_symbol = piece.isascii() and not piece.isalnum()
    category = unicodedata.category(piece)
    return ascii_symbol or category[0] in "PC" or category == "Zs"
