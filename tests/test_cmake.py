"""edgecomp_add_model through a real CMake: what is built, when again, and what a broken budget says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from edgecomp import __version__
from edgecomp.artifact import FILES
from edgecomp.cli import main
from edgecomp.exporters.c_facts import read_facts
from tests.c_program import codes_for
from tests.graphs import images
from tests.pipeline import C_PERCENT, COMMAND, FLOAT_PERCENT, ROOT, Made, make_and_watch, quantized, tool, write_model

GENERATORS = ("Ninja", "Unix Makefiles")
LISTS = """\
cmake_minimum_required(VERSION 3.20)
project(firmware LANGUAGES C)
find_package(edgecomp CONFIG REQUIRED)
edgecomp_add_model(TARGET first PLAN model/plan.json BUDGET_FLASH ${FLASH} BUDGET_RAM ${RAM} ${MORE})
edgecomp_add_model(TARGET second FOLDER exported)
add_executable(app.elf main.c)
target_link_libraries(app.elf PRIVATE first second)
"""
MAIN = """\
#include <stdio.h>
#include "first/network.h"
#include "second/network.h"
static int32_t arena[(RESIDUAL_ARENA_BYTES + PLAIN_ARENA_BYTES) / 4 + 2];
static int8_t in[RESIDUAL_INPUT_BYTES], out[RESIDUAL_OUTPUT_BYTES], in2[PLAIN_INPUT_BYTES], out2[PLAIN_OUTPUT_BYTES];
int main(void) {
  if (fread(in, 1, sizeof in, stdin) != sizeof in || fread(in2, 1, sizeof in2, stdin) != sizeof in2) return 1;
  if (residual_run(in, out, arena) || plain_run(in2, out2, arena)) return 2;
  fwrite(out, 1, sizeof out, stdout);
  fwrite(out2, 1, sizeof out2, stdout);
  return 0;
}
"""
SOURCES = {f"edgecomp/first/{name}" for name in FILES["c"]}
OBJECTS = {f"first/edgecomp/first/{name}.o" for name in ("network.c", "edgecomp_kernels.c")}
GATE = "edgecomp/first.gate.txt"
LINKED = {"libfirst.a", "app.elf"}
MAIN_OBJECT = "app.elf/main.c.o"


@dataclass(kw_only=True)
class Project:
    """A firmware's source folder, and one to build in.

    Attributes:
        folder: the source.
        site: where the edgecomp lies that is used.
        package: its CMake package.
        definitions: of CMake's cache.
    """

    folder: Path
    generator: str
    site: Path = ROOT
    package: Path = ROOT / "edgecomp" / "pipelines"
    definitions: dict[str, str] = field(default_factory=dict)

    @property
    def binary(self) -> Path:
        return self.folder / "a build"

    def configure(self, **definitions: str) -> Made:
        given = {
            "edgecomp_DIR": str(self.package),
            "EDGECOMP_COMMAND": ";".join(COMMAND),
            "CMAKE_MAKE_PROGRAM": tool("ninja" if self.generator == "Ninja" else "make"),
            "FLASH": "64K",
            "RAM": "16K",
            **self.definitions,
            **definitions,
        }
        options = [f"-D{name}={value}" for name, value in given.items()]
        command = [tool("cmake"), "-S", ".", "-B", str(self.binary), "-G", self.generator, *options]
        return make_and_watch(command, self.folder, self.binary, self.site)

    def build(self) -> Made:
        return make_and_watch([tool("cmake"), "--build", str(self.binary)], self.folder, self.binary, self.site)

    def again(self, **definitions: str) -> Made:
        """Configure and build."""
        configured = self.configure(**definitions)
        assert configured.code == 0, configured.output
        return self.build()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    write_model(folder / "model", "residual")
    write_model(folder / "other", "plain")
    plan, graph = folder / "other" / "plan.json", folder / "other" / "graph.edgecomp"
    assert main(["export", str(plan), "--graph", str(graph), "--format", "c", "-o", str(folder / "exported")]) == 0
    (folder / "CMakeLists.txt").write_text(LISTS)
    (folder / "main.c").write_text(MAIN)
    return folder


@pytest.fixture(params=GENERATORS)
def project(request: pytest.FixtureRequest, source: Path, tmp_path: Path) -> Project:
    shutil.copytree(source, tmp_path / "project")
    return Project(folder=tmp_path / "project", generator=request.param)


def test_two_networks_in_one_program(project: Project) -> None:
    built = project.again()
    assert built.code == 0, built.output
    assert {*SOURCES, *OBJECTS, *LINKED, GATE, MAIN_OBJECT} <= built.files
    inputs, outputs = b"", b""
    for name in ("residual", "plain"):
        graph = quantized(name)
        x, y = codes_for(graph, images(graph, 1))
        inputs, outputs = inputs + x.tobytes(), outputs + y.tobytes()
    ran = subprocess.run([project.binary / "app.elf"], input=inputs, capture_output=True, timeout=60, check=True)
    assert np.array_equal(np.frombuffer(ran.stdout, np.int8), np.frombuffer(outputs, np.int8))
    facts = read_facts((project.binary / "edgecomp/first/network.c").read_bytes(), "network.c")
    report = (project.binary / GATE).read_text()
    assert f"{facts.constant_bytes:,} " in report
    assert f"{facts.arena_bytes:,} " in report


def test_nothing_is_built_again_without_cause(project: Project) -> None:
    assert project.again().code == 0
    assert project.build().files == frozenset()
    assert project.again().files == frozenset(), "configured again, with the same"
    (project.folder / "main.c").touch()
    assert project.build().files == {MAIN_OBJECT, "app.elf"}
    for name in ("plan.json", "graph.edgecomp"):
        (project.folder / "model" / name).touch()
        assert project.build().files == {*SOURCES, *OBJECTS, *LINKED, GATE, MAIN_OBJECT}, name
    assert project.again(FLASH="60K").files == {GATE}
    assert project.build().files == frozenset()
    assert project.again(FLASH="60K", MORE="WEIGHTS_AT_REST;int8").files >= {*SOURCES, *OBJECTS, GATE}
    facts = read_facts((project.binary / "edgecomp/first/network.c").read_bytes(), "network.c")
    n_weights = sum(int(np.prod(g.weight(n).shape)) for g in [quantized("residual")] for n in g.layers())
    assert sum(facts.weight_bytes.values()) >= n_weights
    kernels = project.folder / "exported" / "edgecomp_kernels.h"
    kernels.touch()
    assert {"libsecond.a", "app.elf"} <= project.build().files


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """An installed edgecomp, as the wheel lays it out."""
    place = tmp_path / "site" / "edgecomp"
    leave = shutil.ignore_patterns("__pycache__", "samples", "pytorch")
    shutil.copytree(ROOT / "edgecomp", place, ignore=leave)
    for name in ("exporters", "targets"):
        shutil.copytree(ROOT / name, place / name, ignore=leave)
    return place.parent


def test_another_version_writes_again(project: Project, site: Path) -> None:
    project.site, project.package = site, site / "edgecomp" / "pipelines"
    assert project.again().code == 0
    assert project.build().files == frozenset()
    init = site / "edgecomp" / "__init__.py"
    text = init.read_text()
    init.write_text(text.replace(f'"{__version__}"', '"9.8.7"'))
    # By itself: nobody has to configure first.
    assert {*SOURCES, *OBJECTS, *LINKED, GATE} <= project.build().files
    assert "9.8.7" in (project.binary / "edgecomp" / "first.export.txt").read_text()
    assert project.build().files == frozenset()


def layers_by_size(folder: Path) -> list[tuple[str, int]]:
    facts = read_facts((folder / "network.c").read_bytes(), "network.c")
    return sorted(facts.weight_bytes.items(), key=lambda layer: -layer[1])


def test_budgets_that_are_broken(project: Project) -> None:
    assert project.again().code == 0
    made = project.binary / "edgecomp" / "first"
    facts = read_facts((made / "network.c").read_bytes(), "network.c")
    flash, ram = facts.constant_bytes, facts.arena_bytes
    largest = ", ".join(f"{name} {n:,}" for name, n in layers_by_size(made)[:3])
    for definitions, line in (
        (
            {"FLASH": str(flash - 1)},
            f"flash is {flash:,} bytes, 1 more than --max-flash {flash - 1:,}; the largest weights: {largest}",
        ),
        (
            {"RAM": str(ram - 4)},
            f"RAM is {ram:,} bytes, 4 more than --max-ram {ram - 4:,}; the arena is {ram:,}, most is needed in "
            f"{facts.peak_step}",
        ),
        (
            {"MORE": "MAX_DROP;2.4"},
            f"accuracy is {C_PERCENT:.2f} %, {FLOAT_PERCENT - C_PERCENT:.2f} points below the float network's; "
            "--max-drop allows 2.4",
        ),
    ):
        broken = project.again(**definitions)
        assert broken.code != 0
        assert broken.said() == [f"edgecomp: {made}: {line}"]
        assert broken.files == frozenset()
        assert project.build().code != 0, "it stays broken"
    kept = project.again(FLASH=str(flash), RAM=str(ram), MORE="MAX_DROP;2.5")
    assert (kept.code, kept.files) == (0, {GATE})
    (project.folder / "model" / "manifest.json").touch()
    assert project.build().files == {GATE}, "judged by another manifest"


def test_a_build_from_scratch_links_nothing_that_breaks_a_budget(project: Project) -> None:
    broken = project.again(FLASH="100")
    assert broken.code != 0
    assert broken.files >= SOURCES
    assert not {*OBJECTS, "libfirst.a", "app.elf", GATE} & broken.files


@pytest.mark.parametrize("project", ["Ninja"], indirect=True)
def test_with_a_core_the_code_counts_too(project: Project) -> None:
    assert project.again().code == 0
    facts = read_facts((project.binary / "edgecomp/first/network.c").read_bytes(), "network.c")
    flash = facts.constant_bytes + 500
    assert project.again(FLASH=str(flash)).code == 0
    broken = project.again(FLASH=str(flash), MORE="CORE;cortex-m4")
    assert broken.code != 0
    assert [f"more than --max-flash {flash:,}" in line for line in broken.said()] == [True]
    assert project.again(FLASH="64K", MORE="CORE;cortex-m4").files == {GATE}
    assert "all, on cortex-m4" in (project.binary / GATE).read_text()


@pytest.mark.parametrize("project", ["Ninja"], indirect=True)
def test_a_network_in_another_folder_than_where_the_package_is_found(project: Project) -> None:
    lists = project.folder / "CMakeLists.txt"
    text = lists.read_text()
    for name, lines in (("finding", [2]), ("building", range(3, 7))):
        (project.folder / name).mkdir()
        (project.folder / name / "CMakeLists.txt").write_text("\n".join(text.splitlines()[i] for i in lines))
    for name in ("model", "exported", "main.c"):
        (project.folder / name).rename(project.folder / "building" / name)
    head = "\n".join(text.splitlines()[:2])
    lists.write_text(f"{head}\nadd_subdirectory(finding)\nadd_subdirectory(building)\n")
    built = project.again()
    assert built.code == 0, built.output
    assert "building/app.elf" in built.files
    assert project.build().files == frozenset()


@pytest.mark.parametrize("project", ["Ninja"], indirect=True)
def test_two_networks_of_one_name(project: Project) -> None:
    """Without another name for one, the linker would take the first for both, and say nothing."""
    write_model(project.folder / "third", "residual", bits=8)
    lists = project.folder / "CMakeLists.txt"
    text = lists.read_text().replace("second FOLDER exported", "second PLAN third/plan.json NAME plain MAX_DROP 50")
    lists.write_text(text)
    built = project.again()
    assert built.code == 0, built.output
    graphs = [quantized("residual", bits) for bits in (4, 8)]
    pairs = [codes_for(graph, images(graph, 1)) for graph in graphs]
    assert not np.array_equal(pairs[0][1], pairs[1][1])
    inputs = b"".join(x.tobytes() for x, _ in pairs)
    ran = subprocess.run([project.binary / "app.elf"], input=inputs, capture_output=True, timeout=60, check=True)
    assert ran.stdout == b"".join(y.tobytes() for _, y in pairs)


@pytest.mark.parametrize("project", ["Ninja"], indirect=True)
def test_what_has_grown(project: Project) -> None:
    write_model(project.folder / "old", "residual", bits=3)
    lists = project.folder / "CMakeLists.txt"
    lists.write_text(lists.read_text().replace("${MORE}", "BASELINE old/manifest.json ${MORE}"))
    broken = project.again(FLASH="1K")
    then = {
        layer["name"]: layer["stored_bytes"]
        for layer in json.loads((project.folder / "old" / "manifest.json").read_text())["layers"]
    }
    now = dict(layers_by_size(project.binary / "edgecomp" / "first"))
    name, n = max(((k, v - then[k]) for k, v in now.items()), key=lambda grown: grown[1])
    assert [f"grown most: {name} +{n:,}" in line for line in broken.said()] == [True]


@pytest.mark.parametrize("project", ["Ninja"], indirect=True)
def test_accuracy_that_is_not_known(project: Project) -> None:
    (project.folder / "model" / "manifest.json").unlink()
    broken = project.again(MORE="MAX_DROP;5")
    assert broken.code != 0
    assert [line.partition("; ")[0] for line in broken.said()] == [
        f"edgecomp: {project.binary / 'edgecomp' / 'first'}: --max-drop: nothing here says how accurate the network is"
    ]
    broken = project.again(MORE="MAX_DROP;5;MANIFEST;other/manifest.json")
    (line,) = broken.said()
    assert "other/manifest.json: is about another network" in line


@pytest.mark.parametrize("project", ["Ninja"], indirect=True)
def test_a_broken_plan(project: Project) -> None:
    assert project.again().code == 0
    plan = project.folder / "model" / "plan.json"
    text = plan.read_text()
    plan.write_text(text.replace('"weight_bits": 4', '"weight_bits": 99', 1))
    broken = project.build()
    assert broken.code != 0
    (line,) = broken.said()
    assert line.startswith(f"edgecomp: {plan}: ")
    assert "99" in line
    plan.write_text(text)
    assert project.build().code == 0


WRONG = {
    "a word it does not know": ("edgecomp_add_model(TARGET x PLAN p FLASH 1K)", "cannot read 'FLASH;1K'"),
    "a word without its value": ("edgecomp_add_model(TARGET x PLAN)", "cannot read 'PLAN'"),
    "no name": ("edgecomp_add_model(PLAN p)", "expected TARGET"),
    "no network": ("edgecomp_add_model(TARGET x)", "expected either PLAN, to write the C from, or FOLDER"),
    "two networks": ("edgecomp_add_model(TARGET x PLAN p FOLDER f)", "expected either PLAN"),
    "a graph for C": ("edgecomp_add_model(TARGET x FOLDER f GRAPH g)", "GRAPH, NAME and WEIGHTS_AT_REST are for PLAN"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use(case: str, tmp_path: Path) -> None:
    line, found = WRONG[case]
    (tmp_path / "CMakeLists.txt").write_text(f"{LISTS.partition('edgecomp_add')[0]}{line}\n")
    refused = Project(folder=tmp_path, generator="Ninja").configure()
    assert refused.code != 0
    assert found in " ".join(refused.output.split())


def test_without_c(tmp_path: Path) -> None:
    text = LISTS.partition("edgecomp_add")[0].replace("LANGUAGES C", "LANGUAGES NONE")
    (tmp_path / "CMakeLists.txt").write_text(f"{text}edgecomp_add_model(TARGET x PLAN p)\n")
    assert "the project has no C" in " ".join(Project(folder=tmp_path, generator="Ninja").configure().output.split())


def only_found(folder: Path, request: str = "edgecomp", **definitions: str) -> Made:
    text = f"cmake_minimum_required(VERSION 3.20)\nproject(x LANGUAGES NONE)\nfind_package({request} CONFIG REQUIRED)\n"
    (folder / "CMakeLists.txt").write_text(f'{text}message("version ${{edgecomp_VERSION}} found")\n')
    return Project(folder=folder, generator="Ninja").configure(**definitions)


def test_the_package_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--cmake-dir"])
    assert left.value.code == 0
    where = capsys.readouterr().out.strip()
    by_prefix = only_found(tmp_path, edgecomp_DIR="", CMAKE_PREFIX_PATH=where)
    assert f"version {__version__} found" in by_prefix.output
    minor = ".".join(__version__.split(".")[:2])
    assert only_found(tmp_path, f"edgecomp {minor}").code == 0
    assert only_found(tmp_path, f"edgecomp {__version__} EXACT").code == 0
    for other in (f"{minor}.999", "99", f"{int(minor[0]) + 1}.0"):
        refused = only_found(tmp_path, f"edgecomp {other}", edgecomp_DIR="", CMAKE_PREFIX_PATH=where)
        assert refused.code != 0, other


def test_the_command_of_another_installation_is_refused(tmp_path: Path, site: Path) -> None:
    (tmp_path / "x").mkdir()
    refused = only_found(tmp_path / "x", edgecomp_DIR=str(site / "edgecomp" / "pipelines"))
    assert refused.code != 0
    assert "it is another edgecomp than this package is of" in " ".join(refused.output.split())
    refused = only_found(tmp_path / "x", EDGECOMP_COMMAND=f"{sys.executable};-c;raise SystemExit('no such luck')")
    assert re.search("says 'no such luck', expected", " ".join(refused.output.split()))
