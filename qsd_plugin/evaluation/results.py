"""Results as JSON: every result of this package is a frozen dataclass of numbers and arrays."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def to_json(result: Any) -> Any:
    """``result`` in types that :mod:`json` writes.

    Args:
        result: A result of this package, or numbers, arrays, sequences and mappings of them.

    Returns:
        Dataclasses and mappings as dictionaries, arrays and sequences as lists; numbers that are not finite, which JSON
        does not know, as ``None``.
    """
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return {field.name: to_json(getattr(result, field.name)) for field in dataclasses.fields(result)}
    if isinstance(result, Mapping):
        return {str(key): to_json(value) for key, value in result.items()}
    if isinstance(result, np.ndarray | np.generic):
        return to_json(result.tolist())
    if isinstance(result, list | tuple):
        return [to_json(value) for value in result]
    if isinstance(result, float) and not math.isfinite(result):
        return None
    return result
