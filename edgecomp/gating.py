"""Judge a network in C by budgets, for a build pipeline: one line says what is too much.

It lies in a folder that `edgecomp build` wrote, whose manifest knows its accuracy, or in one that `edgecomp export`
wrote: that is C alone, and the first line of its source says what there is to say.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgecomp.artifact import FILES
from edgecomp.benching import bench_target
from edgecomp.errors import BudgetError, BundleError, ParityError, UsageError
from edgecomp.exporters.c_facts import BEGIN, check_files, read_facts
from edgecomp.files import MANIFEST, check_new_file
from edgecomp.folder import open_folder, read_file, read_text
from edgecomp.manifest import read_manifest
from edgecomp.report import table

if TYPE_CHECKING:
    from edgecomp.check import Stage

_SHOWN = 3
_HEADER = ("what", "is", "allowed")
_SOURCE = FILES["c"][0]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Network:
    """What is known of a network in C before it runs.

    Attributes:
        flash_bytes: of weights and scales.
        arena_bytes: that the caller gives.
        weight_bytes: of every layer.
        peak_step: the layer that needs most of the arena at once.
        graph_digest: of what it computes.
        accuracy_percent: of the float network and of this one; None where nothing says.
    """

    flash_bytes: int
    arena_bytes: int
    weight_bytes: Mapping[str, int]
    peak_step: str = ""
    graph_digest: str = ""
    accuracy_percent: tuple[float, float] | None = None


def gate(
    path: Path,
    limits: Limits,
    *,
    target: str | None,
    baseline: Path | None,
    stage: Stage,
    manifest: Path | None = None,
    report: Path | None = None,
) -> str:
    """Check the network in C of a folder.

    Args:
        path: the folder, built or exported with format c.
        limits: at least one.
        target: a core, to build and run the network for; None to judge what is the same on all.
        baseline: an earlier manifest or network.c, to say what has grown since.
        stage: shows how far the work is.
        manifest: of an exported folder: that of the build whose network it is, which knows its accuracy.
        report: where the table will be written; it may replace only an earlier one.

    Returns:
        a table of what was judged.

    Raises:
        BudgetError: flash or RAM is above its limit.
        ParityError: too much accuracy is lost.
        BundleError: the folder or the earlier file is damaged, or the manifest is another network's.
        TargetError: as `bench_target`.
        UsageError: there is nothing to judge, or nothing says how accurate an exported network is.
    """
    if limits == Limits():
        raise UsageError("gate: expected a budget: --max-flash, --max-ram or --max-drop")
    for option, limit in (("flash", limits.flash_bytes), ("ram", limits.ram_bytes)):
        if limit is not None and limit < 0:
            raise UsageError(f"gate: --max-{option} {limit:g}: expected 0 or more")
    exported = (path / _SOURCE).is_file() and not (path / MANIFEST).exists()
    if manifest is not None and not exported:
        raise UsageError(f"{path}: --manifest is for a folder with nothing but C; a built one has its own")
    network = _exported(path, manifest) if exported else _built(path)
    if limits.drop_points is not None and network.accuracy_percent is None:
        raise UsageError(
            f"{path}: --max-drop: nothing here says how accurate the network is; name the {MANIFEST} of its build with "
            "--manifest, or leave --max-drop out"
        )
    before = None if baseline is None else _before(baseline)
    if baseline is not None and before is None:
        raise UsageError(f"{baseline}: --baseline knows no network in C to compare with; leave it out")
    if report is not None:
        _check_report(report)
    flash, ram = {"weights and scales": network.flash_bytes}, {"arena": network.arena_bytes}
    if target is not None:
        flash, ram = _on_core(path, target, stage) if exported else _benched(path, target, stage)
    broken = []
    for what, taken, option, limit, where in (
        ("flash", flash, "--max-flash", limits.flash_bytes, _where(network, before)),
        ("RAM", ram, "--max-ram", limits.ram_bytes, _grown(network, before)),
    ):
        if limit is not None and sum(taken.values()) > limit:
            broken.append(f"{_above(what, taken, option, limit)}; {where}")
    lost, inaccurate = "-", ""
    if network.accuracy_percent is not None:
        of_float, own = network.accuracy_percent
        drop, lost = of_float - own, f"{of_float - own:.2f}"
        if limits.drop_points is not None and round(drop, 4) > limits.drop_points:
            inaccurate = (
                f"accuracy is {own:.2f} %, {drop:.2f} points below the float network's; "
                f"--max-drop allows {limits.drop_points:g}"
            )
    if broken:
        raise BudgetError(f"{path}: {'; '.join(part for part in (*broken, inaccurate) if part)}")
    if inaccurate:
        raise ParityError(f"{path}: {inaccurate}")
    code = "weights and scales" if target is None else f"all, on {target}"
    rows = [
        (f"flash bytes ({code})", f"{sum(flash.values()):,}", _limit(limits.flash_bytes)),
        (f"RAM bytes ({'arena' if target is None else code})", f"{sum(ram.values()):,}", _limit(limits.ram_bytes)),
        ("points of accuracy lost", lost, _limit(limits.drop_points)),
    ]
    return table(rows, _HEADER)


def _check_report(path: Path) -> None:
    """Refuse to replace a file that is no table of `gate`, and a place where none can be written.

    Raises:
        UsageError: it is such a file or place.
    """
    begin = f"| {_HEADER[0]}".encode()
    if path.is_dir() or (path.is_file() and not path.read_bytes().startswith(begin)):
        raise UsageError(f"{path}: --report replaces only an earlier table of gate; choose another name")
    check_new_file(path, "--report", force=True)


# ---- where a network is described ------------------------------------------------------------------------------------


def _built(path: Path) -> _Network:
    folder = open_folder(path)
    entry = _entry(folder.record)
    if entry is None:
        raise UsageError(f"{path}: has no network in C, whose flash and RAM are judged; build it with --format c")
    source = folder.read(entry["path"])
    return replace(_of_manifest(folder.record, entry), peak_step=read_facts(source, str(path / _SOURCE)).peak_step)


def _exported(path: Path, manifest: Path | None) -> _Network:
    network = _of_source(read_file(path / _SOURCE), path / _SOURCE)
    check_files({name: read_file(path / name) for name in FILES["c"]}, _SOURCE, str(path))
    if manifest is None:
        return network
    record = read_manifest(read_text(manifest), str(manifest))
    entry = _entry(record)
    if entry is None:
        raise BundleError(f"{manifest}: knows no network in C, so not how accurate it is; build it with --format c")
    measured, own = str(entry.get("graph_digest", "unknown")), network.graph_digest
    if measured != own:
        raise BundleError(
            f"{manifest}: is about another network (digest {measured[:12]}) than {path / _SOURCE} ({own[:12]}), whose "
            "accuracy was not measured: name the manifest of its build, or build again with this edgecomp"
        )
    return replace(network, accuracy_percent=_of_manifest(record, entry).accuracy_percent)


def _before(path: Path) -> _Network | None:
    """Read an earlier manifest, or an earlier source; None where the manifest has no network in C."""
    data = read_file(path)
    if data.startswith(BEGIN.encode()):
        return _of_source(data, path)
    record = read_manifest(read_text(path), str(path))
    entry = _entry(record)
    return None if entry is None else _of_manifest(record, entry)


def _of_manifest(record: Mapping[str, Any], entry: Mapping[str, Any]) -> _Network:
    return _Network(
        flash_bytes=entry["flash_bytes"],
        arena_bytes=entry["arena_bytes"],
        weight_bytes={layer["name"]: int(layer["stored_bytes_by_format"].get("c", 0)) for layer in record["layers"]},
        accuracy_percent=(record["float"]["accuracy"], entry["accuracy"]["value"]),
    )


def _of_source(source: bytes, where: Path) -> _Network:
    facts = read_facts(source, str(where))
    return _Network(
        flash_bytes=facts.constant_bytes,
        arena_bytes=facts.arena_bytes,
        weight_bytes=dict(facts.weight_bytes),
        peak_step=facts.peak_step,
        graph_digest=facts.graph_digest,
    )


def _entry(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    found = next((a for a in record["artifacts"] if a["format"] == "c"), None)
    if found is not None and not all(isinstance(found.get(key), int) for key in ("flash_bytes", "arena_bytes")):
        raise BundleError("manifest.json: the network in C has no 'flash_bytes' or 'arena_bytes'; build it again")
    return found


# ---- on a core -------------------------------------------------------------------------------------------------------


def _benched(path: Path, target: str, stage: Stage) -> tuple[dict[str, int], dict[str, int]]:
    """Give what takes flash, and what takes RAM, of a built network: its outputs are the reference's."""
    report = bench_target(path, target, n_images=1, seed=0, stage=stage)
    flash = {"code": report.code_bytes, "weights": report.weight_bytes, "other constants": report.constant_bytes}
    ram = {"arena": report.arena_bytes, "static": report.static_bytes, "stack": report.stack_bytes}
    return flash, {**ram, report.border_name: report.border_bytes}


def _on_core(path: Path, target: str, stage: Stage) -> tuple[dict[str, int], dict[str, int]]:
    """Give the same of an exported network: without its plan, outputs are compared with nothing."""
    from edgecomp.benchmarks.cross_compile import core_of, link
    from edgecomp.benchmarks.firmware import emulate
    from edgecomp.targets import load

    core = core_of(load(target).cpu, target)
    files = {name: read_file(path / name) for name in FILES["c"]}
    with stage(f"running in {target}", 1) as advance, tempfile.TemporaryDirectory() as place:
        linked = link(files, core, Path(place))
        image = np.random.default_rng(0).integers(-128, 128, size=(1, *linked.facts.input.shape), dtype=np.int8)
        stack_bytes = emulate(linked, core, image, counting=False).stack_bytes
        advance(1)
    flash = {"code": linked.code_bytes, "weights": linked.weight_bytes, "other constants": linked.constant_bytes}
    facts = linked.facts
    ram = {"arena": facts.arena_bytes, "static": linked.static_bytes, "stack": stack_bytes}
    return flash, {**ram, facts.border_name: facts.border_bytes}


# ---- what is said ----------------------------------------------------------------------------------------------------


def _limit(value: float | None) -> str:
    return "-" if value is None else f"{value:,g}" if value != int(value) else f"{int(value):,}"


def _above(what: str, taken: Mapping[str, int], option: str, limit: float) -> str:
    got = sum(taken.values())
    parts = "" if len(taken) == 1 else f" = {' + '.join(f'{name} {n:,}' for name, n in taken.items())}"
    return f"{what} is {got:,} bytes, {got - int(limit):,} more than {option} {int(limit):,}{parts}"


def _where(now: _Network, before: _Network | None) -> str:
    """Say which layers take most, or have grown most."""
    if before is None:
        largest = sorted(now.weight_bytes.items(), key=lambda layer: -layer[1])[:_SHOWN]
        return "the largest weights: " + ", ".join(f"{name} {n:,}" for name, n in largest)
    then = before.weight_bytes
    grown = {name: n - then.get(name, 0) for name, n in now.weight_bytes.items() if n > then.get(name, 0)}
    if not grown:
        return "no layer's weights have grown"
    most = sorted(grown.items(), key=lambda layer: -layer[1])[:_SHOWN]
    return "grown most: " + ", ".join(f"{name} +{n:,}" for name, n in most)


def _grown(now: _Network, before: _Network | None) -> str:
    if before is None:
        return f"the arena is {now.arena_bytes:,}, most is needed in {now.peak_step}"
    if now.arena_bytes == before.arena_bytes:
        return f"the arena is {now.arena_bytes:,} bytes, as before"
    return f"the arena was {before.arena_bytes:,} bytes, now it is {now.arena_bytes:,}"
