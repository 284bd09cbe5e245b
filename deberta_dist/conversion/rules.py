"""Defines a format: a list of renames, a list of keys without meaning, and a few structural rules.

Applied in that order they lead from the keys of a file to published names.
"""

import fnmatch
import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace

from deberta_dist.checkpoint.errors import CheckpointError
from deberta_dist.conversion.weights import DroppedKey, Weights, shorten
from deberta_dist.errors import printable
from deberta_dist.models.config import DebertaConfig


@dataclass(frozen=True)
class Rename:
    """Keys that match ``pattern`` are called ``name`` (as in ``re.sub``)."""

    pattern: str
    name: str
    why: str


@dataclass(frozen=True)
class Drop:
    """Keys that match ``pattern`` from end to end carry nothing that a model needs."""

    pattern: str
    why: str


@dataclass
class Reading:
    """A checkpoint on its way to published names.

    Attributes:
        weights: By the names so far.
        config: Sizes that rules need, such as heads for the split of `in_proj`.
        dropped: Keys that are left behind.
        warnings: What a user should know.
        open_generator: Weights of the generator that lies beside a discriminator by published names, empty where
            none does.
    """

    weights: Weights
    config: DebertaConfig
    dropped: list[DroppedKey] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    open_generator: Callable[[], Weights] = dict

    def drop(self, name: str, *, why: str) -> None:
        """Leaves out the weight called ``name``."""
        self.dropped += [DroppedKey(key, why) for key in self.weights.pop(name).origin]


Rule = Callable[[Reading], None]


@dataclass(frozen=True, kw_only=True)
class Format:
    """How the keys of one format lead to published names.

    Attributes:
        name: What messages call it.
        renames: Each is applied to what the ones before it have made.
        drops: Applied to renamed keys.
        rules: Structural ones, in order; each changes the ``Reading``.
        consumed: Patterns of renamed keys that are no published names and that the rules need.
    """

    name: str
    renames: Sequence[Rename] = ()
    drops: Sequence[Drop] = ()
    rules: Sequence[Rule] = ()
    consumed: Sequence[str] = ()


# A backbone on its own has no prefix, and the first releases have another: every format knows both.
COMMON_RENAMES = (
    Rename(r"^module\.", "", "prefix of DistributedDataParallel"),
    Rename(r"^bert\.", "deberta.", "prefix of the first releases"),
    Rename(r"^(?=(embeddings|encoder)\.)", "deberta.", "a backbone saved on its own has no prefix"),
)
COMMON_DROPS = (Drop(r"deberta\.embeddings\.position_ids", "0, 1, 2, ...: a buffer of old versions, rebuilt by every model"),)


def leave_out_twins(reading: Reading, *, renames: Sequence[Rename], allow_unmapped: Sequence[str]) -> None:
    """Leaves out keys that patterns name and that are, renamed, what another key is that no pattern names."""
    names = {key: next(iter(renamed({key: weight}, renames))) for key, weight in reading.weights.items()}
    allowed = {key: allowed_by(key, allow_unmapped) for key in names}
    kept = {names[key] for key, pattern in allowed.items() if pattern is None}
    for key, pattern in allowed.items():
        if pattern is not None and names[key] in kept:
            reading.drop(key, why=f"--allow-unmapped {pattern}")


def renamed(weights: Weights, renames: Sequence[Rename]) -> Weights:
    """The weights under their new names.

    Raises:
        CheckpointError: two keys get the same name.
    """
    found: Weights = {}
    for key, weight in weights.items():
        name, reasons = key, []
        for rename in renames:
            changed = re.sub(rename.pattern, rename.name, name)
            if changed != name:
                reasons.append(rename.why)
            name = changed
        if name in found:
            raise CheckpointError(
                f"keys {printable(found[name].origin[0])} and {printable(key)} are both {printable(name)}; to leave one out, "
                "give --allow-unmapped KEY"
            )
        why = "; ".join([*([weight.why] if weight.why else []), *reasons])
        found[name] = replace(weight, why=why) if reasons else weight
    return found


def apply(fmt: Format, reading: Reading, *, known: Container[str], allow_unmapped: Sequence[str]) -> None:
    """Brings ``reading`` to published names.

    Args:
        reading: Weights by the file's keys; by published names afterwards.
        known: Published names of the model.
        allow_unmapped: fnmatch patterns of the file's keys; those that nothing else explains are left out.
    """
    for key in list(reading.weights):
        (name,) = renamed({key: reading.weights[key]}, fmt.renames)
        # The key as the file has it, or without the names of wrappers before it.
        keys = (key, *reading.weights[key].origin)
        pattern = next((found for found in (allowed_by(k, allow_unmapped) for k in keys) if found is not None), None)
        explained = name in known or any(re.fullmatch(consumed, name) for consumed in fmt.consumed)
        if pattern is not None and not explained:
            reading.drop(key, why=f"--allow-unmapped {pattern}")
    reading.weights = renamed(reading.weights, fmt.renames)
    # A copy of the names: dropping changes the dictionary.
    for name in list(reading.weights):
        for drop in fmt.drops:
            if re.fullmatch(drop.pattern, name):
                reading.drop(name, why=drop.why)
                break
    for rule in fmt.rules:
        rule(reading)


def allowed_by(key: str, patterns: Sequence[str]) -> str | None:
    """The first fnmatch pattern that matches, or None."""
    return next((pattern for pattern in patterns if fnmatch.fnmatchcase(key, pattern)), None)


def require_known(reading: Reading, *, shapes: Mapping[str, object], fmt: Format, where: object) -> None:
    """Refuses keys that no rule explains.

    Raises:
        CheckpointError: there are some; the message names them.
    """
    unknown = [key for name, weight in reading.weights.items() if name not in shapes for key in weight.origin or (name,)]
    if unknown:
        raise CheckpointError(
            f"{where}: {len(unknown)} keys of this {fmt.name} checkpoint are not explained: {shorten(unknown)}; "
            "to leave them out, give --allow-unmapped PATTERN"
        )
