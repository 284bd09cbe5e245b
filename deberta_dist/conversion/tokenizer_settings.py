"""What a checkpoint's JSON files say about text and ids beside its SentencePiece model, as Hugging Face's class reads them.

``DebertaV2Tokenizer`` lower-cases, splits off punctuation and adds tokens as ``tokenizer_config.json``,
``special_tokens_map.json`` and ``added_tokens.json`` say. A ``tokenizer.json`` that is written anew has to do the same.

Source: huggingface/transformers tokenization_utils_base.py and tokenization_utils_tokenizers.py, 5.23.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deberta_dist.checkpoint.errors import CheckpointError
from deberta_dist.conversion import files
from deberta_dist.conversion.tokenizer_names import ADDED_NAME, CONFIG_NAME, SPECIAL_NAME
from deberta_dist.conversion.weights import shorten

# In the order in which their class gives new ones an id.
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_DEFAULTS = dict(zip(ROLES, ("[CLS]", "[SEP]", "[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"), strict=True))
_SWITCHES = {"do_lower_case": False, "split_by_punct": False, "add_prefix_space": True}
_EXTRA = ("extra_special_tokens", "additional_special_tokens")
# Values that are true of every SentencePiece model of DeBERTa's, or are about a place.
_SAYS_NOTHING = frozenset(
    """name_or_path special_tokens_map_file tokenizer_file vocab_file _commit_hash backend is_local local_files_only
    processor_class tokenizer_class use_fast errors auto_map""".split()
)
_AS_USUAL = {"vocab_type": "spm", "sp_model_kwargs": {}, "unk_id": 3, "trim_offsets": None}
# What Hugging Face's classes do with ids, beside any tokenizer.json.
_OF_EVERY_CLASS = frozenset(
    """model_max_length max_length padding_side truncation_side truncation_strategy stride pad_to_multiple_of
    pad_token_type_id model_input_names clean_up_tokenization_spaces split_special_tokens chat_template verbose""".split()
)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


@dataclass(frozen=True, kw_only=True)
class AddedToken:
    """A token that is looked for in the text before, or (``normalized``) after, its normalisation."""

    content: str
    special: bool
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """Settings of one tokenizer.

    Attributes:
        do_lower_case: Whether text is lower-cased before SentencePiece sees it.
        split_by_punct: Every punctuation character is a word of its own.
        add_prefix_space: Text behind an added token begins with a space too.
        roles: The special tokens, by ``ROLES``.
        added: Tokens beside the pieces that the files name, in the order in which they get ids.
        extra: Those of them that are special and have no role.
        kept: Settings that stand in the new configuration as they are.
        untold: What is not in a new tokenizer.json, in words.
        numbers: The ids of added tokens that a file states; their class numbers them anew where these leave gaps.
    """

    do_lower_case: bool = False
    split_by_punct: bool = False
    add_prefix_space: bool = True
    roles: Mapping[str, AddedToken] = field(default_factory=lambda: {role: _special(text) for role, text in _DEFAULTS.items()})
    added: tuple[AddedToken, ...] = ()
    extra: tuple[AddedToken, ...] = ()
    kept: Mapping[str, Any] = field(default_factory=dict)
    untold: tuple[str, ...] = ()
    numbers: Mapping[str, int] = field(default_factory=dict)

    def with_ids(self, pieces: Sequence[str]) -> dict[int, AddedToken]:
        """Every added token by its id: that of its piece, or the next after the pieces."""
        ids = {piece: number for number, piece in enumerate(pieces)}
        found: dict[int, AddedToken] = {}
        for token in (*self.added, *self.roles.values(), *self.extra):
            found.setdefault(ids.setdefault(token.content, len(ids)), token)
        return dict(sorted(found.items()))

    def moved(self, pieces: Sequence[str]) -> list[str]:
        """Added tokens whose ids are not those that a file states, in words."""
        ids = {token.content: number for number, token in self.with_ids(pieces).items()}
        return [
            f"{text} has the id {ids[text]} there as in Hugging Face's class, and {number} in the source's file"
            for text, number in self.numbers.items()
            if ids[text] != number
        ]

    def changes(self) -> list[str]:
        """What makes other ids than the SentencePiece model alone, in words."""
        said = [f"{key} = {str(getattr(self, key)).lower()}" for key, usual in _SWITCHES.items() if getattr(self, key) != usual]
        said += [f"{role} = {token.content}" for role, token in self.roles.items() if token.content != _DEFAULTS[role]]
        usual = set(_DEFAULTS.values())
        tokens = dict.fromkeys(token.content for token in (*self.added, *self.extra) if token.content not in usual)
        return said + ([f"added tokens {shorten(tokens)}"] if tokens else [])


def read_settings(directory: Path) -> TokenizerSettings:
    """The settings that lie in a directory, or their defaults.

    Raises:
        CheckpointError: a file is damaged, or a value is not of its kind.
    """
    config, special, numbers = (
        files.read_json(files.inside(directory, name)) if files.has(directory, name) else {}
        for name in (CONFIG_NAME, SPECIAL_NAME, ADDED_NAME)
    )
    where = directory / CONFIG_NAME
    switches = {key: config.get(key, usual) for key, usual in _SWITCHES.items()}
    for key, value in switches.items():
        if not isinstance(value, bool):
            raise CheckpointError(f"{where}: {key} = {str(value)[:50]!r} is neither true nor false")
    named = {role: _token(config[role], where=where) for role in ROLES if config.get(role) is not None}
    extra = _extra(config, where=where)
    untold = _untold(config)
    if isinstance(config.get("added_tokens_decoder"), dict):
        stated, added = _by_number(config["added_tokens_decoder"], where=where)
    else:
        where = directory / SPECIAL_NAME
        named |= {role: _token(special[role], where=where) for role in ROLES if special.get(role) is not None}
        extra += [token for token in _extra({_EXTRA[0]: special.get(_EXTRA[0])}, where=where) if token not in extra]
        known = {token.content for token in (*named.values(), *extra)}
        if lost := [token.content for token in _extra(special, where=where) if token.content not in {*known, *numbers}]:
            untold.append(f"{SPECIAL_NAME} has {_EXTRA[1]} {shorten(lost)}, to which no file gives an id")
        table = {
            number: {"content": text, "special": text in known, "normalized": text not in known}
            for text, number in numbers.items()
        }
        if len(table) != len(numbers):
            raise CheckpointError(f"{directory / ADDED_NAME}: two tokens have one number")
        stated, added = _by_number(table, where=directory / ADDED_NAME)
    roles = {role: named.get(role, _special(text)) for role, text in _DEFAULTS.items()}
    of = {token.content: token for token in added}
    return TokenizerSettings(
        **switches,
        roles={role: of.get(token.content, token) for role, token in roles.items()},
        added=tuple(added),
        extra=tuple(extra),
        kept={key: value for key, value in config.items() if key in _OF_EVERY_CLASS},
        untold=tuple(untold),
        numbers=stated,
    )


def _special(content: str) -> AddedToken:
    return AddedToken(content=content, special=True)


def _token(value: object, *, where: object) -> AddedToken:
    """A token as their files have it: its text, or a table."""
    if isinstance(value, str) and value:
        return _special(value)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str) or not value["content"]:
        raise CheckpointError(f"{where}: {str(value)[:80]!r} is not a token: neither a string nor a table with its content")
    flags = {key: value[key] for key in (*_FLAGS, "special") if key in value}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise CheckpointError(f"{where}: {str(value)[:80]!r} has a flag that is neither true nor false")
    special = flags.pop("special", True)
    return AddedToken(content=value["content"], special=special, **{"normalized": not special, **flags})


def _extra(table: Mapping[str, Any], *, where: object) -> list[AddedToken]:
    value = table.get(_EXTRA[0]) or table.get(_EXTRA[1]) or []
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        raise CheckpointError(f"{where}: {_EXTRA[0]} = {str(value)[:80]!r} is not a list of tokens")
    return [_token(item, where=where) for item in value]


def _by_number(table: Mapping[Any, Any], *, where: object) -> tuple[dict[str, int], list[AddedToken]]:
    """Stated numbers by text, and tokens in the order of their numbers."""
    try:
        numbers = {int(number): value for number, value in table.items()}
    except (TypeError, ValueError):
        raise CheckpointError(f"{where}: {shorten(map(str, table))}: not all of these are numbers of added tokens") from None
    # A table here is not special unless it says so.
    tokens = {
        number: _token({"special": False, **value} if isinstance(value, dict) else value, where=where)
        for number, value in sorted(numbers.items())
    }
    return {token.content: number for number, token in tokens.items()}, list(tokens.values())


def _untold(config: Mapping[str, Any]) -> list[str]:
    known = {*_SWITCHES, *ROLES, *_EXTRA, "added_tokens_decoder", *_SAYS_NOTHING, *_OF_EVERY_CLASS}
    return [
        f"{CONFIG_NAME} says {key} = {str(value)[:60]}, which DebertaV2Tokenizer does not act on"
        for key, value in config.items()
        if key not in known and not (key in _AS_USUAL and value in (_AS_USUAL[key], None)) and value is not None
    ]
