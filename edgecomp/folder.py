"""A built folder, read back and checked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgecomp import bundle
from edgecomp.errors import BundleError
from edgecomp.files import MANIFEST, PLAN_FILE
from edgecomp.graph import Graph
from edgecomp.manifest import read_manifest
from edgecomp.plan import CompressionPlan, validate


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BuiltFolder:
    """What lies in a folder that `edgecomp build` wrote.

    Attributes:
        path: the folder.
        record: its manifest.
        plan: what was decided.
        graph: the float graph.
    """

    path: Path
    record: Mapping[str, Any]
    plan: CompressionPlan
    graph: Graph

    def read(self, name: str) -> bytes:
        """Read a file of the folder and check that it is the one the manifest speaks of.

        Raises:
            BundleError: missing, unknown to the manifest, or of another digest.
        """
        path = self.path / name
        data, known = read_file(path), self.record["files"]
        if name not in known:
            raise BundleError(f"{path}: {MANIFEST} does not know it; build the folder again")
        if (digest := hashlib.sha256(data).hexdigest()) != known[name]:
            raise BundleError(
                f"{path}: sha256 is {digest[:12]}…, the manifest says {known[name][:12]}…; "
                "file or manifest was changed after the build, build it again"
            )
        return data


def open_folder(path: Path) -> BuiltFolder:
    """Read a built folder.

    Raises:
        BundleError: it is none, or a file of it is missing, damaged or of another build.
        PlanError: the plan is malformed or belongs to another graph.
    """
    if not path.is_dir():
        raise BundleError(f"{path}: is no folder; expected one that edgecomp build wrote")
    if not (path / MANIFEST).exists():
        what = "expected the folder that edgecomp build wrote; one that edgecomp export wrote is only for edgecomp gate"
        raise BundleError(f"{path}: has no {MANIFEST}; {what}")
    record = read_manifest(read_text(path / MANIFEST), str(path / MANIFEST))
    text = read_text(path / PLAN_FILE)
    if hashlib.sha256(text.encode()).hexdigest() != record["files"][PLAN_FILE]:
        raise BundleError(
            f"{path / PLAN_FILE}: was changed after the build; write files from it with: "
            f"edgecomp export {PLAN_FILE} --graph {bundle.GRAPH_FILE} --format onnx -o NEW"
        )
    plan = CompressionPlan.from_json(text, str(path / PLAN_FILE))
    graph = bundle.load(path / bundle.GRAPH_FILE)
    validate(plan, graph)
    return BuiltFolder(path=path, record=record, plan=plan, graph=graph)


def read_file(path: Path) -> bytes:
    """Read a file of ours.

    Raises:
        BundleError: it cannot be read, or is a device, a pipe or the like, which may never end.
    """
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise BundleError(f"{path}: is no plain file; expected one on disk")
        return path.read_bytes()
    except OSError as e:
        raise BundleError(f"{path}: cannot be read: {e.strerror}") from e


def read_text(path: Path) -> str:
    """Read a text of ours.

    Raises:
        BundleError: it cannot be read, or is not UTF-8.
    """
    try:
        return read_file(path).decode("utf-8")
    except UnicodeDecodeError as e:
        raise BundleError(f"{path}: is not UTF-8 text; the file is damaged, build it again") from e
