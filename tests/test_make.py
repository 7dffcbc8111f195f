"""The Makefile include through a real make: what is built, when again, and what a broken budget says."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from edgecomp import __version__
from edgecomp.artifact import FILES
from edgecomp.cli import main
from edgecomp.exporters.c_facts import read_facts
from tests.c_program import codes_for
from tests.graphs import images
from tests.pipeline import COMMAND, ROOT, Made, make_and_watch, quantized, tool, write_model
from tests.test_cmake import MAIN

MAKEFILE = """\
include $(shell $(EDGECOMP) --make-include)

FLASH ?= 64K
first_PLAN := model/plan.json
first_BUDGET_FLASH := $(FLASH)
first_BUDGET_RAM := 16K
first_MAX_DROP := $(DROP)
$(eval $(call edgecomp_model,first))

second_FOLDER := exported
$(eval $(call edgecomp_model,second))

app.elf: main.o $(first_LIB) $(second_LIB)
	$(CC) -o $@ $^
main.o: main.c $(first_HEADER) $(second_HEADER)
main.o: CPPFLAGS += $(first_CPPFLAGS) $(second_CPPFLAGS)
"""
SOURCES = {f"edgecomp-build/first/{name}" for name in FILES["c"]}
OBJECTS = {f"edgecomp-build/first.{name}.o" for name in ("network", "edgecomp_kernels")}
GATE = "edgecomp-build/first.gate.txt"
LINKED = {"edgecomp-build/libfirst.a", "app.elf"}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    write_model(folder / "model", "residual")
    write_model(folder / "other", "plain")
    plan, graph = folder / "other" / "plan.json", folder / "other" / "graph.edgecomp"
    assert main(["export", str(plan), "--graph", str(graph), "--format", "c", "-o", str(folder / "exported")]) == 0
    (folder / "Makefile").write_text(MAKEFILE)
    (folder / "main.c").write_text(MAIN)
    return folder


def make(folder: Path, *words: str, site: Path = ROOT) -> Made:
    command = [tool("make"), "-j2", f"EDGECOMP={' '.join(COMMAND)}", "CFLAGS=-std=c99 -O1", *words]
    return make_and_watch(command, folder, folder, site)


def test_two_networks_in_one_program(project: Path) -> None:
    built = make(project)
    assert built.code == 0, built.output
    assert {*SOURCES, *OBJECTS, *LINKED, GATE} <= built.files, "what the Makefile names first is made"
    inputs, outputs = b"", b""
    for name in ("residual", "plain"):
        graph = quantized(name)
        x, y = codes_for(graph, images(graph, 1))
        inputs, outputs = inputs + x.tobytes(), outputs + y.tobytes()
    ran = subprocess.run([project / "app.elf"], input=inputs, capture_output=True, timeout=60, check=True)
    assert np.array_equal(np.frombuffer(ran.stdout, np.int8), np.frombuffer(outputs, np.int8))


def test_nothing_is_built_again_without_cause(project: Path) -> None:
    assert make(project).code == 0
    assert make(project).files == frozenset()
    (project / "main.c").touch()
    assert make(project).files == {"main.o", "app.elf"}
    for name in ("plan.json", "graph.edgecomp"):
        (project / "model" / name).touch()
        assert make(project).files == {*SOURCES, *OBJECTS, *LINKED, GATE, "main.o"}, name
    assert make(project, "FLASH=60K").files == {GATE}
    assert make(project, "FLASH=60K").files == frozenset()
    assert {*SOURCES, *OBJECTS, GATE} <= make(project, "FLASH=60K", "first_WEIGHTS_AT_REST=int8").files
    named = make(project, "first_NAME=other", "edgecomp-build/libfirst.a")
    assert {*SOURCES, *OBJECTS, GATE} <= named.files
    assert "int other_run(" in (project / "edgecomp-build/first/network.h").read_text()


def test_another_version_writes_again(project: Path, tmp_path: Path) -> None:
    place = tmp_path / "site" / "edgecomp"
    leave = shutil.ignore_patterns("__pycache__", "samples", "pytorch")
    shutil.copytree(ROOT / "edgecomp", place, ignore=leave)
    shutil.copytree(ROOT / "exporters", place / "exporters", ignore=leave)
    assert make(project, site=place.parent).code == 0
    assert make(project, site=place.parent).files == frozenset()
    text = (place / "__init__.py").read_text()
    (place / "__init__.py").write_text(text.replace(f'"{__version__}"', '"9.8.7"'))
    assert {*SOURCES, *OBJECTS, *LINKED, GATE} <= make(project, site=place.parent).files
    assert make(project, site=place.parent).files == frozenset()


def test_budgets_that_are_broken(project: Path) -> None:
    broken = make(project, "FLASH=100")
    assert broken.code != 0
    assert not {*OBJECTS, *LINKED, GATE} & broken.files
    facts = read_facts((project / "edgecomp-build/first/network.c").read_bytes(), "network.c")
    flash = facts.constant_bytes
    (line,) = broken.said()
    above = f"flash is {flash:,} bytes, {flash - 100:,} more than --max-flash 100; the largest weights: "
    assert line.startswith(f"edgecomp: edgecomp-build/first: {above}")
    assert make(project).code == 0
    broken = make(project, f"first_BUDGET_RAM={facts.arena_bytes - 1}")
    assert (broken.code != 0, broken.files) == (True, frozenset())
    assert "1 more than --max-ram" in broken.said()[0]
    broken = make(project, "DROP=2.4")
    assert (broken.code != 0, broken.files) == (True, frozenset())
    assert "2.50 points below the float network's; --max-drop allows 2.4" in broken.said()[0]
    assert make(project, "DROP=2.5").files == {GATE}


def test_wrong_use(project: Path) -> None:
    both = make(project, "first_FOLDER=exported")
    assert both.code != 0
    assert "edgecomp_model first: expected either first_PLAN, to write the C from, or first_FOLDER" in both.output
    (project / "model" / "plan.json").write_text("{}")
    broken = make(project)
    assert broken.code != 0
    assert [line.startswith("edgecomp: model/plan.json: ") for line in broken.said()] == [True]
