"""What is installed: everything of the tree, under one name, and nothing that a small device has no use for."""

from __future__ import annotations

import configparser
import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from edgecomp.provenance import tools

ROOT = Path(__file__).parents[1]
PLACES = {
    "edgecomp": "edgecomp",
    "exporters": "edgecomp/exporters",
    "benchmarks": "edgecomp/benchmarks",
    "targets": "edgecomp/targets",
}


def sources() -> list[str]:
    """List the files of the project: what git tracks or does not ignore, and what is there."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("the project does not lie in a git checkout")
    names = listed.stdout.decode().split("\0")
    return sorted(name for name in names if name and (ROOT / name).is_file())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.Path:
    """Build the wheel from a copy, so that nothing is left behind in the checkout."""
    copy, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in sources():
        if name.partition("/")[0] in PLACES or "/" not in name:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    # What `python -m build --wheel --no-isolation` and pip call.
    code = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", code, str(out)]
    built = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    # Warnings of setuptools foretell files that a later version leaves out.
    assert "SetuptoolsDeprecationWarning" not in built.stdout + built.stderr
    (file,) = out.iterdir()
    return zipfile.Path(file)


@pytest.fixture(scope="module")
def names(wheel: zipfile.Path) -> set[str]:
    return {name for name in wheel.root.namelist() if not name.endswith("/")}


def metadata(wheel: zipfile.Path, name: str) -> str:
    info = next(p for p in wheel.iterdir() if p.name.endswith(".dist-info"))
    return (info / name).read_text("utf-8")


def test_the_wheel_holds_the_tree(names: set[str]) -> None:
    expected = set()
    for name in sources():
        folder, _, rest = name.partition("/")
        if folder in PLACES:
            expected.add(f"{PLACES[folder]}/{rest}")
    inside = {name for name in names if not re.match(r"edgecomp-[^/]*\.dist-info/", name)}
    assert inside == expected


def test_nothing_else_is_at_the_top(names: set[str]) -> None:
    top = {name.partition("/")[0] for name in names}
    assert sorted(re.sub("-[0-9].*", "", name) for name in top) == ["edgecomp", "edgecomp"]


def test_data_files_are_inside(names: set[str]) -> None:
    assert {"edgecomp/py.typed", "edgecomp/exporters/edgecomp_unpack.hpp"} <= names
    assert {f"edgecomp/pipelines/{name}" for name in ("edgecompConfig.cmake", "edgecomp.mk")} <= names
    assert sum(name.startswith("edgecomp/targets/") and name.endswith(".toml") for name in names) >= 4
    for suffix in (".safetensors", ".npz", ".json", "README.md", "LICENSE.fashion-mnist"):
        assert any(name.startswith("edgecomp/samples/") and name.endswith(suffix) for name in names), suffix
    assert not any(name.endswith((".pyc", ".pt", ".orig")) or "__pycache__" in name for name in names)


def test_the_base_needs_numpy_only(wheel: zipfile.Path) -> None:
    head = email.message_from_string(metadata(wheel, "METADATA"))
    required = head.get_all("Requires-Dist") or []
    assert [r for r in required if "extra ==" not in r] == ["numpy>=1.26"]
    extras = {"build", "bench", "micro", "firmware", "boards", "sbom", "compare", "dev"}
    assert set(head.get_all("Provides-Extra") or []) == extras
    on_device = [r for r in required if re.search(r"extra == .bench.", r)]
    assert not any(r.startswith("torch") for r in on_device)
    assert head["Name"] == "edgecomp"
    assert head["Requires-Python"] == ">=3.11"


def test_the_command(wheel: zipfile.Path) -> None:
    entries = configparser.ConfigParser()
    entries.read_string(metadata(wheel, "entry_points.txt"))
    assert dict(entries["console_scripts"]) == {"edgecomp": "edgecomp.cli:entry"}


def test_the_installed_package_works_beside_a_checkout_of_nothing(wheel: zipfile.Path, tmp_path: Path) -> None:
    """Unpacked as pip does it, with no checkout on the path: one folder, every side folder, their data."""
    wheel.root.extractall(tmp_path / "site")
    code = """
import edgecomp, edgecomp.exporters, edgecomp.benchmarks.runners, edgecomp.targets, edgecomp.samples
assert len(edgecomp.__path__) == 1, edgecomp.__path__
assert "site" in edgecomp.exporters.__file__
assert len(edgecomp.targets.names()) >= 4
for name in edgecomp.targets.names():
    edgecomp.targets.load(name)
edgecomp.samples.sample_files()
from edgecomp import pipelines
assert "site" in str(pipelines.CMAKE_DIR)
assert (pipelines.CMAKE_DIR / "edgecompConfig.cmake").is_file() and pipelines.MAKE_INCLUDE.is_file()
from edgecomp.cli import main
assert main(["targets"]) == 0
from edgecomp.provenance import tools
print(tools()["edgecomp"]["sha256"])
"""
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    ran = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert "rpi4" in ran.stdout
    assert ran.stdout.splitlines()[-1] == tools()["edgecomp"]["sha256"], "installed code is not that of the checkout's"
