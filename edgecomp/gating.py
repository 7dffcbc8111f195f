"""Judge a built folder's network in C by budgets, for a build pipeline: one line says what is too much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgecomp.benching import bench_target
from edgecomp.errors import BudgetError, BundleError, ParityError, UsageError
from edgecomp.folder import open_folder
from edgecomp.manifest import read_manifest
from edgecomp.report import table

if TYPE_CHECKING:
    from edgecomp.check import Stage

_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a firmware allows; None where it does not care.

    Attributes:
        flash_bytes: of weights and scales; with a target of code too.
        ram_bytes: of the arena; with a target of stack, output and the like too.
        drop_points: of accuracy lost against the float network, as the manifest says.
    """

    flash_bytes: float | None = None
    ram_bytes: float | None = None
    drop_points: float | None = None


def gate(path: Path, limits: Limits, *, target: str | None, baseline: Path | None, stage: Stage) -> str:
    """Check a folder that was built with format c.

    Args:
        path: the folder.
        limits: at least one.
        target: a core, to build and run the network for; None to judge what is the same on all.
        baseline: an earlier manifest, to say what has grown since.
        stage: shows how far the work is.

    Returns:
        a table of what was judged.

    Raises:
        BudgetError: flash or RAM is above its limit.
        ParityError: too much accuracy is lost.
        BundleError: the folder or the earlier manifest is damaged.
        TargetError: as `bench_target`.
        UsageError: there is nothing to judge.
    """
    if limits == Limits():
        raise UsageError("gate: expected a budget: --max-flash, --max-ram or --max-drop")
    folder = open_folder(path)
    entry = _entry(folder.record)
    if entry is None:
        raise UsageError(f"{path}: has no network in C, whose flash and RAM are judged; build it with --format c")
    folder.read(entry["path"])
    before = None if baseline is None else _read(baseline)
    flash, ram = entry["flash_bytes"], entry["arena_bytes"]
    if target is not None:
        report = bench_target(path, target, n_images=1, seed=0, stage=stage)
        flash, ram = report.flash_bytes, report.ram_bytes
    drop = folder.record["float"]["accuracy"] - entry["accuracy"]["value"]
    if limits.flash_bytes is not None and flash > limits.flash_bytes:
        where = _where(folder.record, before)
        raise BudgetError(f"{path}: {_above('flash', flash, '--max-flash', limits.flash_bytes)}; {where}")
    if limits.ram_bytes is not None and ram > limits.ram_bytes:
        raise BudgetError(f"{path}: {_above('RAM', ram, '--max-ram', limits.ram_bytes)}{_grown(entry, before)}")
    if limits.drop_points is not None and round(drop, 4) > limits.drop_points:
        raise ParityError(
            f"{path}: accuracy is {entry['accuracy']['value']:.2f} %, {drop:.2f} points below the float network's; "
            f"--max-drop allows {limits.drop_points:g}"
        )
    code = "weights and scales" if target is None else f"all, on {target}"
    rows = [
        (f"flash bytes ({code})", f"{flash:,}", _limit(limits.flash_bytes)),
        (f"RAM bytes ({'arena' if target is None else code})", f"{ram:,}", _limit(limits.ram_bytes)),
        ("points of accuracy lost", f"{drop:.2f}", _limit(limits.drop_points)),
    ]
    return table(rows, ("what", "is", "allowed"))


def _entry(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    found = next((a for a in record["artifacts"] if a["format"] == "c"), None)
    if found is not None and not all(isinstance(found.get(key), int) for key in ("flash_bytes", "arena_bytes")):
        raise BundleError("manifest.json: the network in C has no 'flash_bytes' or 'arena_bytes'; build it again")
    return found


def _read(path: Path) -> Mapping[str, Any]:
    try:
        return read_manifest(path.read_text("utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as e:
        raise BundleError(f"{path}: cannot be read: {getattr(e, 'strerror', None) or 'it is no text'}") from e


def _limit(value: float | None) -> str:
    return "-" if value is None else f"{value:,g}" if value != int(value) else f"{int(value):,}"


def _above(what: str, got: int, option: str, limit: float) -> str:
    return f"{what} is {got:,} bytes, {got - int(limit):,} more than {option} {int(limit):,}"


def _layers(record: Mapping[str, Any]) -> dict[str, int]:
    return {layer["name"]: int(layer["stored_bytes_by_format"].get("c", 0)) for layer in record["layers"]}


def _where(record: Mapping[str, Any], before: Mapping[str, Any] | None) -> str:
    """Say which layers take most, or have grown most."""
    now = _layers(record)
    if before is None:
        largest = sorted(now.items(), key=lambda layer: -layer[1])[:_SHOWN]
        return "the largest weights: " + ", ".join(f"{name} {n:,}" for name, n in largest)
    then = _layers(before)
    grown = {name: n - then.get(name, 0) for name, n in now.items() if n > then.get(name, 0)}
    if not grown:
        return "no layer's weights have grown"
    most = sorted(grown.items(), key=lambda layer: -layer[1])[:_SHOWN]
    return "grown most: " + ", ".join(f"{name} +{n:,}" for name, n in most)


def _grown(entry: Mapping[str, Any], before: Mapping[str, Any] | None) -> str:
    then = None if before is None else _entry(before)
    if then is None:
        return ""
    return f"; the arena was {then['arena_bytes']:,} bytes, now it is {entry['arena_bytes']:,}"
