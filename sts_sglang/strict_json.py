"""JSON of files and arguments that others wrote: each key once, and nothing that JSON does not have."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


def loads(text: str, repeated: Callable[[str], Exception], constant: Callable[[str], Exception]) -> Any:
    """Like json.loads, which keeps the last of two equal keys and takes NaN.

    Args:
        repeated: the error for a key that stands twice in an object. constant: for NaN and infinities.

    Raises:
        What these two make, json.JSONDecodeError (a ValueError), ValueError for a number with too many digits
        to convert, RecursionError for what is nested too deeply.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise repeated(key)
            found[key] = value
        return found

    def no_constant(name: str) -> Any:
        raise constant(name)

    return json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
