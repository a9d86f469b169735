"""The plugin's errors. Every message names the thing, its value, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QSDPluginError(Exception):
    """Base class of every error the plugin raises on purpose.

    Args:
        what: The thing that is wrong, as the user knows it ("config key QSD.TAU", "label file x.npz").
        value: What was found; left out of the message when ``None``.
        expected: What would have been accepted.
        remedy: What the user can do now.
    """

    def __init__(self, what: str, *, value: object = None, expected: str = "", remedy: str = "") -> None:
        self.what = what
        self.value = value
        self.expected = expected
        self.remedy = remedy
        super().__init__(_sentence(what, value, expected, remedy))


class ConfigError(QSDPluginError):
    """A config key or value, or a combination of them, cannot work."""


class DataError(QSDPluginError):
    """A data folder, list, image or identity cannot be used."""


class LabelError(QSDPluginError):
    """A quality label file is missing, belongs elsewhere or holds impossible values."""


class RegistryError(QSDPluginError, KeyError):
    """A name is not registered, or registered twice."""

    __str__ = Exception.__str__  # KeyError would show the message as a quoted, escaped literal


class CheckpointError(QSDPluginError):
    """A checkpoint cannot be read or belongs to another architecture."""


class ExportError(QSDPluginError):
    """A network cannot be exported, or its export computes something else."""


class TrainingError(QSDPluginError):
    """A training step computed something that must not reach the weights."""


class StageError(QSDPluginError):
    """A recipe stage is stale, missing or failed."""


class HostError(QSDPluginError):
    """The host (fast-reid, insightface) is missing or cannot do what was asked."""


def nearest(name: str, candidates: Iterable[str], *, count: int = 3) -> list[str]:
    """The candidates that a misspelt ``name`` most likely meant, best first, at most ``count``."""
    by_folded = {candidate.casefold(): candidate for candidate in candidates}
    return [by_folded[match] for match in difflib.get_close_matches(name.casefold(), by_folded, n=count, cutoff=0.6)]


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """A remedy sentence for a misspelt ``name``: the nearest candidates, or all of them when none is near."""
    known = sorted(candidates)
    close = nearest(name, known)
    if close:
        return f"Did you mean {' or '.join(repr(match) for match in close)}?"
    return f"Known names: {', '.join(known)}." if known else "Nothing is registered yet."


def _sentence(what: str, value: object, expected: str, remedy: str) -> str:
    parts = [what if value is None else f"{what}: got {value!r}"]
    if expected:
        parts.append(f"expected {expected}")
    text = "; ".join(parts)
    if not text.endswith((".", "!", "?")):
        text += "."
    return f"{text} {remedy}".rstrip()
