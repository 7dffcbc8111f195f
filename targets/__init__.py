"""The boards that edgecomp knows: one TOML file each, facts with their sources."""

from __future__ import annotations

import difflib
from importlib import resources

from edgecomp.errors import TargetError
from edgecomp.target import Target, parse


def names() -> tuple[str, ...]:
    """List the boards, in alphabetical order."""
    files = (entry.name for entry in resources.files(__package__).iterdir())
    return tuple(sorted(name.removesuffix(".toml") for name in files if name.endswith(".toml")))


def load(name: str) -> Target:
    """Look up a board.

    Raises:
        TargetError: no board has that name, or its file is damaged.
    """
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=2)
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(names())}"
        raise TargetError(f"target {name!r:.80} is unknown; {hint}")
    target = parse(resources.files(__package__).joinpath(f"{name}.toml").read_text(encoding="utf-8"), f"{name}.toml")
    if target.name != name:
        raise TargetError(f"{name}.toml: name is {target.name!r:.80}, expected {name!r}, as the file's")
    return target
