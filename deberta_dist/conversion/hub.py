"""The metadata of a model card for the Hugging Face hub, checked here because errors would otherwise show on upload only."""

import difflib
import json
import re
from collections.abc import Mapping, Sequence

from deberta_dist.errors import ConfigError

LICENSES = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0
    cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
    cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0
    cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2
    fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 h-research intel-research isc lgpl lgpl-2.1
    lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1
    openmdw-1.0 openrail openrail++ osl-3.0 pddl postgresql unknown unlicense wtfpl zlib
    """.split()
)
"""Identifiers that the hub knows, beside "other".

Source: huggingface/hub-docs docs/hub/repositories-licenses.md.
"""
_OTHER = "other"
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|multilingual|code")
# Of the class that config.json names.
_TASKS = {
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": "multiple-choice",
    "Model": "feature-extraction",
}


def license_fields(given: str) -> dict[str, str]:
    """The card's fields for a licence.

    Args:
        given: An identifier of ``LICENSES``, or ``other:NAME`` or ``other:NAME,LINK``; a link is an address or the name of a
            file of the repository.

    Raises:
        ConfigError: it is neither.
    """
    kind, colon, rest = given.partition(":")
    if kind == _OTHER and colon:
        name, comma, link = (part.strip() for part in rest.partition(","))
        if name and (link or not comma) and name.isprintable() and link.isprintable():
            return {"license": _OTHER, "license_name": name, **({"license_link": link} if link else {})}
    if given in LICENSES:
        return {"license": given}
    nearest = difflib.get_close_matches(given.lower(), sorted(LICENSES), n=1, cutoff=0.0)[0]
    raise ConfigError(
        f"--license {given[:80]!r} is not an identifier that the hub knows (the nearest is {nearest}); for any other licence give "
        "'other:NAME' or 'other:NAME,LINK'"
    )


def language_codes(given: Sequence[str]) -> list[str]:
    """Codes of languages, each once.

    Args:
        given: Codes, or several with commas between them.

    Raises:
        ConfigError: one is no code.
    """
    codes = [code.strip() for text in given for code in text.split(",")]
    if odd := [code for code in codes if not _LANGUAGE.fullmatch(code)]:
        raise ConfigError(
            f"--language {odd[0][:40]!r} is not a language code: give ISO 639 (en, de, yue), BCP 47 (pt-BR), multilingual or "
            "code"
        )
    return list(dict.fromkeys(codes))


def pipeline_tag(architecture: str) -> str:
    """The hub's task for a class."""
    return next(task for suffix, task in _TASKS.items() if architecture.endswith(suffix))


def front_matter(fields: Mapping[str, str | Sequence[str]]) -> str:
    """Fields as YAML between lines of three dashes.

    Every value is in quotes: without them Norwegian's code is false, and 1.0 a number.
    """
    lines = ["---"]
    for key, value in fields.items():
        if isinstance(value, str):
            lines.append(f"{key}: {_quoted(value)}")
        else:
            lines += [f"{key}:", *(f"- {_quoted(item)}" for item in value)]
    return "\n".join([*lines, "---"])


def _quoted(text: str) -> str:
    # A string of JSON is one of YAML.
    return json.dumps(text, ensure_ascii=False)
