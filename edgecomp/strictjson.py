"""JSON as edgecomp reads and writes it: what Python's reader lets pass is refused; what is written is fit for diff.

Apart from what it is about, because the runner on a device, whose memory is counted, needs this and little else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping

from edgecomp.errors import PlanError

_AT_ONCE = 1000
_FLAT = json.JSONEncoder(allow_nan=False, ensure_ascii=False)


def load_strict_json(text: str, where: str) -> Mapping[str, object]:
    """Read one JSON object; refuse what Python's reader lets pass: duplicate keys, NaN and infinities.

    Raises:
        PlanError: with the place and the reason.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise PlanError(f"{where}: key {key!r:.80} stands twice")
            seen.add(key)
        return dict(pairs)

    def refuse(constant: str) -> object:
        raise PlanError(f"{where}: {constant} is not a number JSON knows")

    try:
        obj = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as e:
        raise PlanError(f"{where}: not JSON: {str(e)[:120]}") from e
    return checked_object(obj, where)


def check_keys(obj: Mapping[str, object], expected: tuple[str, ...], where: str) -> None:
    """Demand exactly these keys.

    Raises:
        PlanError: one is missing or unknown.
    """
    missing = [key for key in expected if key not in obj]
    unknown = [key for key in obj if key not in expected]
    if missing or unknown:
        what = f"key {missing[0]!r} is missing" if missing else f"unknown key {unknown[0]!r:.80}"
        raise PlanError(f"{where}: {what}; expected {', '.join(expected)}")


def checked_object(value: object, where: str) -> dict[str, object]:
    """Demand a JSON object.

    Raises:
        PlanError: it is something else.
    """
    if not isinstance(value, dict):
        raise PlanError(f"{where}: expected an object, found {type(value).__name__}")
    return value


def write_json(obj: Mapping[str, object]) -> str:
    """Write an object with a line for each key, and for each entry of the objects right below: fit for diff."""
    return "".join(json_parts(obj))


def json_parts(obj: Mapping[str, object]) -> Iterator[str]:
    """Give the text of `write_json` in parts, one after the other: all of it is never in memory at once."""
    yield "{\n"
    yield from _entries(obj, " ", _block)
    yield "\n}\n"


def _entries(
    obj: Mapping[str, object], indent: str, write: Callable[[object], Iterator[str]]
) -> Iterator[str]:
    between = ""
    for key, value in obj.items():
        yield f"{between}{indent}{_FLAT.encode(key)}: "
        yield from write(value)
        between = ",\n"


def _block(value: object) -> Iterator[str]:
    if isinstance(value, dict) and value:
        yield "{\n"
        yield from _entries(value, "  ", _line)
        yield "\n }"
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for i, entry in enumerate(value):
            yield f"{',' if i else '['}\n  "
            yield from _line(entry)
        yield "\n ]"
    else:
        yield from _line(value)


def _line(value: object) -> Iterator[str]:
    """Write a value in one line, a long list a part at a time: a string for each number is many times the text."""
    if isinstance(value, dict):
        yield "{"
        for i, (key, inner) in enumerate(value.items()):
            yield f"{', ' if i else ''}{_FLAT.encode(key)}: "
            yield from _line(inner)
        yield "}"
    elif isinstance(value, (list, tuple, memoryview)):
        yield "["
        for start in range(0, len(value), _AT_ONCE):
            yield f"{', ' if start else ''}{_FLAT.encode(list(value[start : start + _AT_ONCE]))[1:-1]}"
        yield "]"
    else:
        yield _FLAT.encode(value)
