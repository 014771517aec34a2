"""Exchanges as data: what a caller sends, what the vendor sees and answers, what the caller gets. See tests/exchanges."""

import json
from typing import Any

import httpx

from .calls import ALL_KEYS
from .vendors import Scripted, Vendors

GONE = "gone"  # The value of what was there before and is not afterwards.


def changes(before: Any, after: Any, path: str = "") -> dict[str, Any]:
    """What differs, by its path: the value afterwards, or GONE."""

    def at(key: object) -> str:
        return f"{path}.{key}" if path else str(key)

    if isinstance(before, list) and isinstance(after, list):
        before, after = dict(enumerate(before)), dict(enumerate(after))
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return {} if before == after and isinstance(before, bool) == isinstance(after, bool) else {path: after}
    found = {}
    for key in [*before, *(key for key in after if key not in before)]:
        if key not in after:
            found[at(key)] = GONE
        elif key not in before:
            found[at(key)] = after[key]
        else:
            found |= changes(before[key], after[key], at(key))
    return found


def includes(whole: Any, part: Any) -> bool:
    """Whether `whole` has all of `part`: of a dict the keys that `part` names, of a list each item. GONE says: not there."""
    if isinstance(whole, dict) and isinstance(part, dict):
        return all(key not in whole if value == GONE else key in whole and includes(whole[key], value) for key, value in part.items())
    if isinstance(whole, list) and isinstance(part, list):
        return len(whole) == len(part) and all(map(includes, whole, part))
    return whole == part and isinstance(whole, bool) == isinstance(part, bool)


def without_gained_nulls(before: Any, after: Any) -> Any:
    """`after` without what is null there and was not there before."""
    if isinstance(before, list) and isinstance(after, list):
        return [without_gained_nulls(*pair) for pair in zip(before, after, strict=False)] + after[len(before) :]
    if isinstance(before, dict) and isinstance(after, dict):
        return {
            key: without_gained_nulls(before.get(key), value)
            for key, value in after.items()
            if key in before or value is not None
        }
    return after
