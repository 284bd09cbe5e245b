"""Hugging Face's tokenizer files from a SentencePiece model, so that both split text alike.

Their ``DebertaV2Tokenizer`` makes a normaliser of its own and ignores the model's rules, and without
``tokenizer.json`` it cannot even be made where protobuf is missing. So ``tokenizer.json`` is written here with the
rules in it, and a class is named that takes the file as it is.
"""

import base64
import importlib.util
import json
import string
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from deberta_dist.conversion.tokenizer_names import CONFIG_NAME, JSON_NAME, SPECIAL_NAME
from deberta_dist.conversion.tokenizer_settings import ROLES, AddedToken, TokenizerSettings
from deberta_dist.data.sentencepiece_model import BYTE, CONTROL, UNIGRAM, USER_DEFINED, SentencePieceModel, parse_model
from deberta_dist.data.tokenizer import SPECIAL_PIECES, Tokenizer
from deberta_dist.data.training_words import WORD_START
from deberta_dist.errors import DataError

AS_TRAINED = TokenizerSettings()
"""What a SentencePiece model alone means."""

PROBE = (
    "ﬁne oﬃce waﬄe",
    "Ｆｕｌｌ ｗｉｄｔｈ　ｔｅｘｔ！",
    "cafe\u0301 re\u0301sume\u0301 A\u030angstro\u0308m",
    "stacked e\u0301\u0323 a\u0308\u0304 q\u0307\u0323",
    "ligature and accent ﬁ\u0301x",
    "😀 emoji 👩‍👩‍👧 🏳️‍🌈",
    "2¼ cups, ½ or ⅓",
    "① Ⅷ x² H₂O ™ ℃ ﷺ",
    "non\u00a0breaking\u202fspaces\u2009here",
    "wait… really",
    "  lead,  inner   and trail  ",
    "tab\there\nand line",
    "zero\u200bwidth\ufeff and soft\u00adhyphen",
    "don't “quote” — dash – minus −",
    "각 \u1100\u1161\u11a8 ｶﾞ カ\u3099 漢字",
    "हिन्दी ที่ مَرْحَبًا",
    "\u2581marked \u2581text",
    "",
)
"""Strings that tokenizers of other make are known to split differently."""


def build_tokenizer_json(model: SentencePieceModel, settings: TokenizerSettings = AS_TRAINED) -> dict[str, Any]:
    """The contents of ``tokenizer.json``.

    Args:
        model: A unigram model whose pieces 0 to 3 are ``[PAD] [CLS] [SEP] [UNK]``.
        settings: What is done to text beside it, and the tokens that are added. By default ``[MASK]`` alone is, with the
            first id after the pieces.

    Raises:
        DataError: the model does what this form cannot say.
    """
    if model.model_type != UNIGRAM or model.suffix_whitespace:
        raise DataError("tokenizer.json can only be written for unigram models that put spaces before words")
    own = {
        i: AddedToken(content=piece.text, special=False) for i, piece in enumerate(model.pieces) if piece.kind == USER_DEFINED
    }
    added = dict(sorted({**own, **settings.with_ids([piece.text for piece in model.pieces])}.items()))
    ids = {token.content: number for number, token in added.items()}
    normalizers: list[dict[str, Any]] = [{"type": "Lowercase"}] if settings.do_lower_case else []
    if model.charsmap:
        encoded = base64.b64encode(model.charsmap).decode("ascii")
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": encoded})
    if model.remove_extra_whitespaces:
        normalizers.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
        # Behind an added token only a leading space marks a new word, where none is inserted.
        normalizers.append({"type": "Strip", "strip_left": settings.add_prefix_space, "strip_right": True})
    scheme = ("always" if settings.add_prefix_space else "first") if model.add_dummy_prefix else "never"
    spaces = {"type": "Metaspace", "replacement": WORD_START, "prepend_scheme": scheme, "split": True}
    words: dict[str, Any] = spaces
    if settings.split_by_punct:
        words = {"type": "Sequence", "pretokenizers": [{"type": "Punctuation", "behavior": "Isolated"}, spaces]}
    cls, sep = settings.roles["cls_token"].content, settings.roles["sep_token"].content
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, **asdict(token)} for number, token in added.items()],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": words,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [_token(cls, 0), _text("A", 0), _token(sep, 0)],
            "pair": [_token(cls, 0), _text("A", 0), _token(sep, 0), _text("B", 1), _token(sep, 1)],
            "special_tokens": {piece: {"id": piece, "ids": [ids[piece]], "tokens": [piece]} for piece in (cls, sep)},
        },
        "decoder": _BYTE_DECODER if model.byte_fallback else spaces,
        "model": {
            "type": "Unigram",
            "unk_id": SPECIAL_PIECES.index("[UNK]"),
            "vocab": [[piece.text, piece.score] for piece in model.pieces],
            "byte_fallback": model.byte_fallback,
        },
    }


_BYTE_DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": WORD_START}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}


def tokenizer_texts(tokenizer: Tokenizer, settings: TokenizerSettings, *, max_length: int) -> dict[str, str]:
    """Name -> text of the tokenizer files beside ``spm.model``.

    Args:
        settings: What the source says beside it.
        max_length: Longest text that the model can take, tokens; unless the settings say another.

    Raises:
        DataError: see `build_tokenizer_json`.
    """
    content = build_tokenizer_json(parse_model(tokenizer.path.read_bytes()), settings)
    special: dict[str, Any] = {role: settings.roles[role].content for role in ROLES}
    if settings.extra:
        special["extra_special_tokens"] = [token.content for token in settings.extra]
    config = {
        # Takes tokenizer.json as it is; their class for DeBERTa puts another normaliser in its place.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        **settings.kept,
        **special,
    }
    return {
        JSON_NAME: json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n",
        CONFIG_NAME: json.dumps(config, indent=2, ensure_ascii=False) + "\n",
        SPECIAL_NAME: json.dumps(special, indent=2, ensure_ascii=False) + "\n",
    }


def probe(tokenizer: Tokenizer) -> list[str]:
    """Texts to compare on: `PROBE`, and what looks like pieces that text is never split into."""
    pieces = parse_model(tokenizer.path.read_bytes()).pieces
    odd = [piece for piece in pieces if piece.kind in (CONTROL, USER_DEFINED, BYTE) and piece.text not in SPECIAL_PIECES]
    some = {piece.kind: piece.text for piece in reversed(odd)}
    return [*PROBE, *(f"a {text} b" for text in some.values())]


def compare(
    tokenizer_json: str, *, tokenizer: Tokenizer, texts: Sequence[str], settings: TokenizerSettings = AS_TRAINED
) -> list[str] | None:
    """Texts that the exported tokenizer splits differently from SentencePiece under the source's settings.

    Returns:
        None where the ``tokenizers`` library is not installed and nothing was compared.

    Raises:
        DataError: the library cannot read it.
    """
    if importlib.util.find_spec("tokenizers") is None:
        return None
    from tokenizers import Tokenizer as Exported

    try:
        exported = Exported.from_str(tokenizer_json)
    except Exception as error:  # the library has no narrower one
        raise DataError(f"tokenizer.json is not understood ({error})") from error

    def ids(text: str) -> list[int]:
        return exported.encode(text, add_special_tokens=False).ids

    different = [text for text in texts if ids(text) != expected_ids(text, tokenizer=tokenizer, settings=settings)]
    for number, token in settings.with_ids(tokenizer.pieces(range(tokenizer.num_tokens - 1))).items():
        text = f"a {token.content} b"
        if number >= tokenizer.mask_id and text not in texts and ids(text).count(number) != 1:
            different.append(text)
    return different


def expected_ids(text: str, *, tokenizer: Tokenizer, settings: TokenizerSettings) -> list[int]:
    """Ids of a text without added tokens: SentencePiece's, after what the settings say is done to the text."""
    if settings.do_lower_case:
        # One by one, as the tokenizers library does: a whole word's would end in another sigma.
        text = "".join(character.lower() for character in text)
    if not settings.split_by_punct:
        return tokenizer.encode(text)
    pieces = tokenizer.pieces(range(tokenizer.num_tokens))
    space = pieces.index(WORD_START) if WORD_START in pieces else tokenizer.unk_id
    found: list[int] = []
    for word in _split_by_punctuation(tokenizer.normalise(text)):
        # Their class leaves a piece for a space before punctuation.
        found += tokenizer.encode(word) + [space] * word.endswith(" ")
    return found


def _split_by_punctuation(text: str) -> list[str]:
    """Punctuation characters, each alone, and what lies between them."""
    words = [""]
    for character in text:
        is_punctuation = character in string.punctuation or unicodedata.category(character).startswith("P")
        if is_punctuation:
            words += [character, ""]
        else:
            words[-1] += character
    return [word for word in words if word]


def _token(piece: str, type_id: int) -> dict[str, Any]:
    return {"SpecialToken": {"id": piece, "type_id": type_id}}


def _text(name: str, type_id: int) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": type_id}}
