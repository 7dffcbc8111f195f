"""The boards that edgecomp knows: one TOML file each, facts with their sources."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import replace
from importlib import resources
from pathlib import Path

from edgecomp.errors import TargetError, UsageError
from edgecomp.processor import check_core, core_name
from edgecomp.target import Target, parse

SUFFIX = "-emulated"
"""What is behind a board's name where bench is to emulate it, see `targets.emulated`."""


def names() -> tuple[str, ...]:
    """List the boards, in alphabetical order."""
    files = (entry.name for entry in resources.files(__package__).iterdir())
    return tuple(sorted(name.removesuffix(".toml") for name in files if name.endswith(".toml")))


def load(name: str) -> Target:
    """Look up a board by its name, or read a user's own file: a path that ends in .toml.

    Raises:
        TargetError: a file of ours is damaged.
        UsageError: no board has that name, there is no such file, or as `target.parse` and `processor.check_core`.
    """
    if name.endswith(".toml"):
        return _read(Path(name))
    if name not in names():
        board = name.removesuffix(SUFFIX)
        if board in names():
            raise UsageError(f"target {name!r:.80}: an emulated board is for bench alone; did you mean {board}?")
        raise UsageError(f"target {name!r:.80} is unknown; {nearest(name, names())}")
    target = parse(resources.files(__package__).joinpath(f"{name}.toml").read_text(encoding="utf-8"), f"{name}.toml")
    if target.name != name:
        raise TargetError(f"{name}.toml: name is {target.name!r:.80}, expected {name!r}, as the file's")
    return target


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which of the known names a mistyped one may have meant, and where all of them are."""
    close = difflib.get_close_matches(name.lower(), known, n=2)
    return f"did you mean {' or '.join(close)}? see edgecomp targets" if close else "see edgecomp targets"


def _read(path: Path) -> Target:
    try:
        text = path.read_text("utf-8-sig")  # Windows puts a mark before a text
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is no text"
        what = "no such file" if isinstance(e, FileNotFoundError) else f"cannot be read ({reason})"
        raise UsageError(f"{path}: {what}; expected the facts of a board, as edgecomp targets shows them") from e
    target = parse(text, str(path), stem=path.stem)
    target = replace(target, cpu=None if target.cpu is None else core_name(target.cpu))
    check_core(target, str(path))
    return target
