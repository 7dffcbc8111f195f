"""What the command line's arguments say, as values; a text that says nothing is an ArgumentTypeError."""

from __future__ import annotations

import argparse
import re


def read_number(text: str) -> float:
    """Read a number that is neither infinite nor none."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not -1e300 < value < 1e300:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number")
    return value


def read_percent(text: str) -> float:
    """Read percent of 0 or more, with the sign behind or not."""
    value = read_number(text.removesuffix("%"))
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected percent, 0 or more")
    return value


def read_points(text: str) -> float:
    """Read percentage points: 0.5 and 0.5% are both half a point."""
    return read_number(text.removesuffix("%"))


def read_numbers(text: str) -> tuple[float, ...]:
    """Read numbers with commas between them."""
    return tuple(read_number(part) for part in text.split(","))


def read_shape(text: str) -> tuple[int, int, int]:
    """Read channels, height and width."""
    parts = text.lower().replace("x", ",").split(",")
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: expected channels, height and width, e.g. 3,224,224")
    return int(parts[0]), int(parts[1]), int(parts[2])


def read_bytes(text: str) -> float:
    """Read bytes, with a unit or without: K and KiB are 1024, kB is 1000."""
    units = {"kb": 1000, "mb": 1000**2, "k": 1024, "kib": 1024, "m": 1024**2, "mib": 1024**2, "b": 1}
    digits = text.strip().lower()
    for unit in sorted(units, key=len, reverse=True):
        if digits.endswith(unit) and digits != unit:
            digits, factor = digits.removesuffix(unit), units[unit]
            break
    else:
        factor = 1
    try:
        return read_number(digits) * factor
    except argparse.ArgumentTypeError as e:
        known = "K = 1024, kB = 1000, M = 1048576, MB = 1000000"
        raise argparse.ArgumentTypeError(f"{text!r}: expected bytes, e.g. 64000, 64K or 64kB ({known})") from e


def read_c_name(text: str) -> str:
    """Read what functions in C begin with; macros have the same in capitals."""
    from edgecomp.exporters.to_c import MOST_NAME, RESERVED_NAMES

    if not re.fullmatch("[a-z][a-z0-9_]*", text):
        raise argparse.ArgumentTypeError(f"{text!r:.80}: expected a name for C, of a-z, 0-9 and _, a letter first")
    if text in RESERVED_NAMES:
        raise argparse.ArgumentTypeError(f"{text!r}: there is {text}.h already; choose another name")
    if len(text) > MOST_NAME:
        raise argparse.ArgumentTypeError(f"{text!r:.80}: expected {MOST_NAME} letters at most")
    return text


def read_milliseconds(text: str) -> float:
    """Read a time, with a unit or without: ms, us, s; plain numbers are milliseconds."""
    digits = text.strip().lower()
    for unit, ms in (("ms", 1.0), ("us", 1e-3), ("s", 1e3)):
        if digits.endswith(unit):
            return read_number(digits.removesuffix(unit)) * ms
    return read_number(digits)


def read_formats(text: str) -> tuple[str, ...]:
    """Read names of file formats, each once."""
    from edgecomp.exporters import FORMATS

    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in FORMATS:
            raise argparse.ArgumentTypeError(f"{name!r} is not a format; expected {', '.join(FORMATS)}")
    return names
