"""Hugging Face's tokenizer files from a SentencePiece model, so that both split text alike.

Their ``DebertaV2Tokenizer`` makes a normaliser of its own and ignores the model's rules, and without
``tokenizer.json`` it cannot even be made where protobuf is missing. So ``tokenizer.json`` is written here with the
rules in it, and a class is named that takes the file as it is.
"""

import base64
import importlib.util
import json
from collections.abc import Sequence
from typing import Any

from deberta_dist.data.sentencepiece_model import BYTE, CONTROL, UNIGRAM, USER_DEFINED, SentencePieceModel, parse_model
from deberta_dist.data.tokenizer import MASK_PIECE, SPECIAL_PIECES, WORD_START, Tokenizer
from deberta_dist.errors import DataError

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

MASK_PROBE = "a [MASK] b"


def build_tokenizer_json(model: SentencePieceModel, *, mask_id: int) -> dict[str, Any]:
    """The contents of ``tokenizer.json``.

    Args:
        model: A unigram model whose pieces 0 to 3 are ``[PAD] [CLS] [SEP] [UNK]``.
        mask_id: Id of ``[MASK]``, the first after the pieces.

    Raises:
        DataError: the model does what this form cannot say.
    """
    if model.model_type != UNIGRAM or model.suffix_whitespace:
        raise DataError("tokenizer.json can only be written for unigram models that put spaces before words")
    special = {**{piece: i for i, piece in enumerate(SPECIAL_PIECES)}, MASK_PIECE: mask_id}
    own = {piece.text: i for i, piece in enumerate(model.pieces) if piece.kind == USER_DEFINED}
    normalizers: list[dict[str, Any]] = []
    if model.charsmap:
        encoded = base64.b64encode(model.charsmap).decode("ascii")
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": encoded})
    if model.remove_extra_whitespaces:
        normalizers.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
        normalizers.append({"type": "Strip", "strip_left": True, "strip_right": True})
    scheme = "always" if model.add_dummy_prefix else "never"
    spaces = {"type": "Metaspace", "replacement": WORD_START, "prepend_scheme": scheme, "split": True}
    cls, sep = _token("[CLS]", 0), _token("[SEP]", 0)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(piece, number, is_special=True) for piece, number in special.items()]
        + [_added(piece, number, is_special=False) for piece, number in own.items()],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": spaces,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [cls, _text("A", 0), sep],
            "pair": [cls, _text("A", 0), sep, _text("B", 1), _token("[SEP]", 1)],
            "special_tokens": {
                piece: {"id": piece, "ids": [special[piece]], "tokens": [piece]} for piece in ("[CLS]", "[SEP]")
            },
        },
        "decoder": _BYTE_DECODER if model.byte_fallback else spaces,
        "model": {
            "type": "Unigram",
            "unk_id": special["[UNK]"],
            "vocab": [[piece.text, piece.score] for piece in model.pieces],
            "byte_fallback": model.byte_fallback,
        },
    }


def _added(piece: str, number: int, *, is_special: bool) -> dict[str, Any]:
    spaces = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": piece, "special": is_special, **spaces}


_BYTE_DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": WORD_START}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}


def tokenizer_texts(tokenizer: Tokenizer, *, max_length: int) -> dict[str, str]:
    """Name -> text of the tokenizer files beside ``spm.model``.

    Args:
        tokenizer: The SentencePiece model.
        max_length: Longest text that the model can take, tokens.

    Raises:
        DataError: see `build_tokenizer_json`.
    """
    content = build_tokenizer_json(parse_model(tokenizer.path.read_bytes()), mask_id=tokenizer.mask_id)
    special = {
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "bos_token": "[CLS]",
        "sep_token": "[SEP]",
        "eos_token": "[SEP]",
        "unk_token": "[UNK]",
        "mask_token": MASK_PIECE,
    }
    settings = {
        # Takes tokenizer.json as it is; their class for DeBERTa puts another normaliser in its place.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        **special,
    }
    return {
        "tokenizer.json": json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n",
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
    }


def probe(tokenizer: Tokenizer) -> list[str]:
    """Texts to compare on: `PROBE`, and what looks like pieces that text is never split into."""
    pieces = parse_model(tokenizer.path.read_bytes()).pieces
    odd = [piece for piece in pieces if piece.kind in (CONTROL, USER_DEFINED, BYTE) and piece.text not in SPECIAL_PIECES]
    some = {piece.kind: piece.text for piece in reversed(odd)}
    return [*PROBE, *(f"a {text} b" for text in some.values())]


def compare(tokenizer_json: str, *, tokenizer: Tokenizer, texts: Sequence[str]) -> list[str] | None:
    """Texts that the exported tokenizer splits differently from SentencePiece.

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
    return [text for text in texts if exported.encode(text, add_special_tokens=False).ids != tokenizer.encode(text)]


def _token(piece: str, type_id: int) -> dict[str, Any]:
    return {"SpecialToken": {"id": piece, "type_id": type_id}}


def _text(name: str, type_id: int) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": type_id}}
