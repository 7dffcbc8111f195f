"""Networks on disk as a firmware team has them, and builds of which one can ask what they have made."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgecomp import bundle, manifest
from edgecomp.compress import compress
from edgecomp.exporters import export
from edgecomp.exporters.c_facts import read_facts
from edgecomp.graph import Graph
from edgecomp.strictjson import write_json
from tests.built import MEASURED, flat_relevance, record_of
from tests.graphs import GRAPHS, plan_for

ROOT = Path(__file__).parents[1]
COMMAND = (sys.executable, "-m", "edgecomp")
FLOAT_PERCENT, C_PERCENT = 90.0, 87.5
"""The accuracies that the manifests of `write_model` tell of."""


def environment(python_path: Path = ROOT) -> dict[str, str]:
    """Find the tools of this Python's environment first, and the edgecomp of a folder."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    return {**os.environ, "PATH": path, "PYTHONPATH": str(python_path)}


def tool(name: str) -> str:
    found = shutil.which(name, path=environment()["PATH"])
    assert found is not None, f"{name} is missing: it is in the extra 'dev'"
    return found


def quantized(name: str, bits: int = 4) -> Graph:
    graph = GRAPHS[name]()
    return compress(graph, plan_for(graph, bits))


def write_model(folder: Path, name: str, bits: int = 4) -> Path:
    """Write plan.json, graph.edgecomp and manifest.json, as a build with format c does."""
    graph: Graph = GRAPHS[name]()
    plan = plan_for(graph, bits)
    small = compress(graph, plan)
    exported = export(small, "c")
    arena_bytes = read_facts(exported.data, "network.c").arena_bytes
    plan_text = plan.to_json()
    files = {"network.c": exported.sha256(), "plan.json": hashlib.sha256(plan_text.encode()).hexdigest()}
    record = record_of(
        graph,
        plan,
        files=files,
        artifacts=[manifest.artifact_entry(exported, small, {**MEASURED, "arena_bytes": arena_bytes})],
        layers=manifest.layer_entries(graph, small, plan, flat_relevance(graph), [exported]),
    )
    folder.mkdir(parents=True, exist_ok=True)
    bundle.save(graph, folder / "graph.edgecomp")
    (folder / "plan.json").write_text(plan_text, "utf-8")
    (folder / "manifest.json").write_text(write_json(record), "utf-8")
    return folder


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a run of a build tool has done.

    Attributes:
        code: its exit status.
        output: all that was said.
        files: which of the watched files are new or were written again.
    """

    code: int
    output: str
    files: frozenset[str]

    def said(self) -> list[str]:
        """Give edgecomp's own lines."""
        return [line for line in self.output.splitlines() if line.startswith("edgecomp: ")]


def watched(folder: Path) -> dict[str, int]:
    """When was each file written that a build makes, by its path without what the tool puts before it?"""
    wanted = (".o", ".a", ".c", ".h", ".elf", ".gate.txt")
    found = {}
    for path in folder.rglob("*"):
        if "CompilerId" in str(path) or "CMakeScratch" in str(path) or "ShowIncludes" in str(path):
            continue
        if path.name.endswith(wanted) and path.is_file():
            found[path.relative_to(folder).as_posix().replace(".dir/", "/").replace("CMakeFiles/", "")] = (
                path.stat().st_mtime_ns
            )
    return found


def make_and_watch(command: list[str], folder: Path, watch: Path, python_path: Path = ROOT) -> Made:
    """Run a build tool."""
    before = watched(watch)
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment(python_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    after = watched(watch)
    files = frozenset(name for name, time_ns in after.items() if before.get(name) != time_ns)
    return Made(code=done.returncode, output=done.stdout, files=files)


Maker = Callable[..., Made]
