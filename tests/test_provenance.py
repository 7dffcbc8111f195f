"""Digests of tools: of their code, and of nothing that differs from one folder to the next."""

from __future__ import annotations

import hashlib
import sys
from importlib import metadata
from pathlib import Path

import pytest

from edgecomp import provenance
from edgecomp.provenance import tools

HEX = set("0123456789abcdef")


def test_tools_that_can_change_a_byte_have_a_version_and_a_digest() -> None:
    found = tools()
    assert {"edgecomp", "python", "numpy", "onnx"} <= found.keys()
    assert found["numpy"]["version"] == metadata.version("numpy")
    for tool in found.values():
        assert tool.keys() == {"version", "sha256"}
        assert len(tool["sha256"]) == 64
        assert set(tool["sha256"]) <= HEX
    assert found["python"]["sha256"] == hashlib.sha256(Path(sys.executable).read_bytes()).hexdigest()


def package(root: Path, record: str) -> metadata.Distribution:
    info = root / "thing-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Name: thing\nVersion: 1.0\n")
    (info / "RECORD").write_text(record)
    return metadata.Distribution.at(info)


FILES = "thing/b.py,sha256=Yg,2\nthing/a.py,sha256=YQ,1\nthing-1.0.dist-info/METADATA,sha256=bQ,9\n"


def test_a_package_is_known_by_its_files_alone(tmp_path: Path) -> None:
    by_hand = hashlib.sha256(b"thing/a.py,sha256=YQ\nthing/b.py,sha256=Yg\n").hexdigest()
    one = package(tmp_path / "one", FILES)
    other = package(tmp_path / "other", f"../../../bin/thing,sha256=Yy,3\n{FILES}thing/a.pyc,,\n")
    changed = package(tmp_path / "changed", FILES.replace("sha256=Yg", "sha256=Zg"))
    digests = [provenance._package_sha256(p) for p in (one, other, changed)]
    assert digests[:2] == [by_hand, by_hand], "a program in bin/ names its environment; bytecode its machine"
    assert digests[2] != by_hand


def test_our_own_digest_follows_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = {name: tmp_path / name for name in provenance._FOLDERS}
    for name, place in places.items():
        (place / "sub").mkdir(parents=True)
        (place / "sub" / "x.py").write_text(name)
        (place / "README.md").write_text("text")
    monkeypatch.setattr(provenance, "files", places.__getitem__)
    before = provenance._own_sha256()
    (places["edgecomp"] / "README.md").write_text("other text")
    (places["edgecomp"] / "exporters").mkdir()
    (places["edgecomp"] / "exporters" / "x.py").write_text("is counted as edgecomp.exporters")
    assert provenance._own_sha256() == before
    (places["edgecomp.exporters"] / "sub" / "x.py").write_text("changed")
    assert provenance._own_sha256() != before
