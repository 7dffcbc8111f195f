"""What is known of boards, for people and for programs."""

from __future__ import annotations

from dataclasses import fields

from edgecomp.report import table
from edgecomp.target import Target
from edgecomp.targets import load, names


def board_facts(name: str | None) -> list[dict[str, object]]:
    """Give the facts of one board, or of all, for programs.

    Raises:
        TargetError: no board has that name, or its file is damaged.
    """
    return [{**_facts(load(known)), "sources": dict(load(known).sources)} for known in ([name] if name else names())]


def board_table(name: str) -> str:
    """Show the facts of a board with their sources; errors as `board_facts`."""
    target: Target = load(name)
    rows = [(fact, _shown(value), target.sources.get(fact, "")) for fact, value in _facts(target).items()]
    return table(rows, ("fact", "value", "source"))


def boards_table() -> str:
    """List the boards."""
    known: list[Target] = [load(name) for name in names()]
    return table([(t.name, t.cores or "-", t.description) for t in known], ("target", "cores", "description"))


def _facts(target: Target) -> dict[str, object]:
    return {field.name: getattr(target, field.name) for field in fields(target) if field.name != "sources"}


def _shown(value: object) -> str:
    if value is None:
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
