"""Libraries for Arduino and PlatformIO, and Zephyr modules: by their published rules, compiled as those tools do."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from edgecomp import __version__, options
from edgecomp.benchmarks.compiled_c import host_compiler
from edgecomp.cli import main
from edgecomp.exporters.c_facts import read_facts
from edgecomp.exporters.c_layouts import LAYOUTS
from tests.c_program import codes_for, harness
from tests.graphs import images
from tests.pipeline import make_and_watch, quantized, tool, write_model

CATEGORIES = {
    "Display", "Communication", "Signal Input/Output", "Sensors", "Device Control", "Timing", "Data Storage",
    "Data Processing", "Other",
}  # fmt: skip
ARDUINO_H = """\
// What of Arduino's core the sketch uses.
#include <cstdio>
struct Out {
  void begin(long) {}
  void print(const char *text) { std::printf("%s", text); }
  void print(int n) { std::printf("%d", n); }
  void println(unsigned long) { std::printf("?\\n"); }
};
static Out Serial;
static unsigned long micros() { return 0; }
static void delay(int) {}
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("residual", "plain"):
        write_model(folder / name, name)
    return folder


def exported(models: Path, name: str, layout: str, folder: Path, *more: str) -> Path:
    model = models / name
    argv = ["export", str(model / "plan.json"), "--graph", str(model / "graph.edgecomp"), "--format", "c"]
    assert main([*argv, "--layout", layout, "-o", str(folder), *more]) == 0
    return folder


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_command_line_knows_all() -> None:
    assert tuple(LAYOUTS) == options.LAYOUTS


def compiled(library: Path, folder: Path) -> list[str]:
    """Compile all of a library's src as Arduino does: each file by its ending, src on the path, nothing else."""
    folder.mkdir()
    objects = []
    for source in sorted((library / "src").rglob("*")):
        language = {".c": ["-x", "c", "-std=gnu11"], ".cpp": ["-x", "c++", "-std=gnu++11"]}.get(source.suffix)
        if language is None:
            assert source.suffix == ".h"
            continue
        out = str(folder / f"{source.name}.o")
        command = [*host_compiler(), *language, "-Wall", "-Wextra", "-Werror", "-I", str(library / "src")]
        subprocess.run([*command, "-c", str(source), "-o", out], check=True)
        objects.append(out)
    archive = folder / "library.a"
    subprocess.run(["ar", "rcs", str(archive), *objects], check=True)
    return [str(archive)]


def properties(library: Path) -> dict[str, str]:
    lines = (library / "library.properties").read_text("utf-8").splitlines()
    pairs = [line.partition("=") for line in lines]
    assert all(key and equals and value for key, equals, value in pairs)
    assert len({key for key, _, _ in pairs}) == len(pairs)
    return {key: value for key, _, value in pairs}


def test_an_arduino_library(models: Path, tmp_path: Path) -> None:
    library = exported(models, "residual", "arduino", tmp_path / "lib")
    sources = {"network.c", "network.h", "edgecomp_kernels.c", "edgecomp_kernels.h", "residual.h"}
    others = {"library.properties", "library.json", "examples/Run/Run.ino"}
    assert files(library) == {*others, *(f"src/{name}" for name in sources)}
    # The rules of Arduino's library specification 2.2 and of arduino-lint's schema of it.
    said = properties(library)
    required = {"name", "version", "author", "maintainer", "sentence", "paragraph", "category", "url", "architectures"}
    assert required <= said.keys() <= {*required, "includes", "dot_a_linkage"}
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 _.-]{0,62}", said["name"])
    assert not said["name"].lower().startswith("arduino")
    assert re.fullmatch(r"\d+\.\d+\.\d+", said["version"])
    assert __version__.startswith(said["version"])
    assert said["category"] in CATEGORIES
    assert re.fullmatch(r"[a-z][a-z0-9+.-]*:[^ ]+", said["url"])
    assert (said["includes"], said["dot_a_linkage"], said["architectures"]) == ("residual.h", "true", "*")
    facts = read_facts((library / "src" / "network.c").read_bytes(), "network.c")
    assert f"{facts.constant_bytes:,} bytes of weights in flash" in said["paragraph"]


def test_a_platformio_library(models: Path, tmp_path: Path) -> None:
    library = exported(models, "residual", "platformio", tmp_path / "lib")
    said: dict[str, Any] = json.loads((library / "library.json").read_text("utf-8"))
    # The rules of PlatformIO's manifest schema.
    assert said.keys() <= {"name", "version", "description", "frameworks", "platforms", "headers", "build"}
    assert re.fullmatch(r"[^:;/,@<>]{1,100}", said["name"])
    assert "." in said["version"]
    assert len(said["description"]) <= 1000
    assert (said["frameworks"], said["platforms"]) == ("*", "*")
    for key in ("srcDir", "includeDir"):
        assert (library / said["build"][key]).is_dir()
    assert (library / "src" / said["headers"]).is_file()


def test_two_libraries_in_one_sketch(models: Path, tmp_path: Path) -> None:
    """Both have a network.h and the same kernels, and lie beside each other on the path."""
    libraries = {name: exported(models, name, "arduino", tmp_path / name) for name in ("residual", "plain")}
    archives = [a for name, library in libraries.items() for a in compiled(library, tmp_path / f"{name}-objects")]
    graphs = {name: quantized(name) for name in libraries}
    for name, other in (("residual", "plain"), ("plain", "residual")):
        x, y = codes_for(graphs[name], images(graphs[name], 1))
        facts = read_facts((libraries[name] / "src" / "network.c").read_bytes(), "network.c")
        text = harness(name, facts.input.n_bytes, facts.output.n_bytes, facts.arena_bytes)
        text = text.replace("in = malloc", "in = (int8_t *)malloc").replace("out = malloc", "out = (int8_t *)malloc")
        text = text.replace("arena = malloc", "arena = (int32_t *)malloc")
        text = text.replace('"network.h"', f"<{name}.h>\n#include <{other}.h>\nvoid *keep = (void *)&{other}_run;")
        (tmp_path / "main.cpp").write_text(text)
        paths = [word for library in libraries.values() for word in ("-I", str(library / "src"))]
        command = [*host_compiler(), *paths, "-x", "c++", str(tmp_path / "main.cpp"), "-x", "none", *archives]
        subprocess.run([*command, "-o", str(tmp_path / name / "run")], check=True)
        ran = subprocess.run([tmp_path / name / "run"], input=x.tobytes(), capture_output=True, check=True)
        assert np.array_equal(np.frombuffer(ran.stdout, np.int8), y.ravel())


def test_the_sketch(models: Path, tmp_path: Path) -> None:
    library = exported(models, "residual", "arduino", tmp_path / "lib")
    (archive,) = compiled(library, tmp_path / "objects")
    (tmp_path / "Arduino.h").write_text(ARDUINO_H)
    # As Arduino does: the sketch is C++ with its header before it.
    sketch = (library / "examples" / "Run" / "Run.ino").read_text()
    (tmp_path / "run.cpp").write_text(f'#include "Arduino.h"\n{sketch}\nint main() {{ setup(); loop(); return 0; }}\n')
    command = [*host_compiler(), "-x", "c++", "-Wall", "-Wextra", "-Werror", "-I", str(library / "src")]
    command += [str(tmp_path / "run.cpp"), "-x", "none", archive, "-o", str(tmp_path / "run")]
    subprocess.run(command, check=True)
    ran = subprocess.run([tmp_path / "run"], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"largest output: \d, microseconds: \?\n", ran.stdout)


STAND_IN = """\
cmake_minimum_required(VERSION 3.20)
project(zephyr_app LANGUAGES C)
# What of Zephyr's CMake a module may call; as its documentation says of them.
add_library(zephyr_interface INTERFACE)
function(zephyr_include_directories)
  target_include_directories(zephyr_interface INTERFACE ${ARGN})
endfunction()
macro(zephyr_library_named name)
  set(ZEPHYR_CURRENT_LIBRARY ${name})
  add_library(${name} STATIC "")
  target_link_libraries(${name} PUBLIC zephyr_interface)
  set_property(GLOBAL APPEND PROPERTY ZEPHYR_LIBS ${name})
endmacro()
function(zephyr_library_sources)
  target_sources(${ZEPHYR_CURRENT_LIBRARY} PRIVATE ${ARGN})
endfunction()
add_subdirectory(${MODULE}/${MODULE_CMAKE} module)
get_property(libraries GLOBAL PROPERTY ZEPHYR_LIBS)
message("libraries: '${libraries}'")
if(libraries)
  add_executable(app main.c)
  target_link_libraries(app PRIVATE ${libraries} zephyr_interface)
endif()
"""


def test_a_zephyr_module(models: Path, tmp_path: Path) -> None:
    module = exported(models, "residual", "zephyr", tmp_path / "module")
    meta = yaml.safe_load((module / "zephyr" / "module.yml").read_text("utf-8"))
    # The keys that Zephyr's schema of module.yml knows, and what it checks of their values.
    assert meta.keys() == {"name", "build"}
    assert meta["build"].keys() == {"cmake", "kconfig"}
    assert (module / meta["build"]["cmake"] / "CMakeLists.txt").is_file()
    kconfig = (module / meta["build"]["kconfig"]).read_text("utf-8")
    (option,) = re.findall(r"^config ([A-Z][A-Z0-9_]*)$", kconfig, re.MULTILINE)
    assert re.search(r'^\tbool ".*"$', kconfig, re.MULTILINE)
    assert re.search(r"^\thelp\n\t  \S", kconfig, re.MULTILINE)

    app, build = tmp_path / "app", tmp_path / "build"
    app.mkdir()
    (app / "CMakeLists.txt").write_text(STAND_IN)
    graph = quantized("residual")
    x, y = codes_for(graph, images(graph, 1))
    facts = read_facts((module / "src" / "network.c").read_bytes(), "network.c")
    text = harness("residual", facts.input.n_bytes, facts.output.n_bytes, facts.arena_bytes)
    (app / "main.c").write_text(text.replace('"network.h"', "<residual.h>"))
    command = [tool("cmake"), "-S", str(app), "-B", str(build), "-G", "Ninja"]
    command += [f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DMODULE={module}"]
    command += [f"-DMODULE_CMAKE={meta['build']['cmake']}"]
    without = make_and_watch(command, app, build)
    assert "libraries: ''" in without.output, without.output
    chosen = make_and_watch([*command, f"-DCONFIG_{option}=y"], app, build)
    assert f"libraries: '{meta['name']}'" in chosen.output
    built = make_and_watch([tool("cmake"), "--build", str(build)], app, build)
    assert built.code == 0, built.output
    ran = subprocess.run([build / "app"], input=x.tobytes(), capture_output=True, check=True)
    assert np.array_equal(np.frombuffer(ran.stdout, np.int8), y.ravel())


def test_the_sources_are_the_same(models: Path, tmp_path: Path) -> None:
    flat = exported(models, "plain", "flat", tmp_path / "flat")
    for layout in ("arduino", "platformio", "zephyr"):
        folder = exported(models, "plain", layout, tmp_path / layout)
        assert files(flat) == {path.name for path in flat.iterdir()}
        assert all((folder / "src" / path.name).read_bytes() == path.read_bytes() for path in flat.iterdir())
        assert main(["gate", str(folder / "src"), "--max-ram", "64K"]) == 0


def test_another_name(models: Path, tmp_path: Path) -> None:
    flat = exported(models, "plain", "flat", tmp_path / "flat")
    other = exported(models, "plain", "arduino", tmp_path / "other", "--name", "digits")
    facts = [read_facts(path.read_bytes(), "network.c") for path in (flat / "network.c", other / "src" / "network.c")]
    assert [f.name for f in facts] == ["plain", "digits"]
    assert facts[0].graph_digest == facts[1].graph_digest, "it computes the same"
    assert (other / "src" / "digits.h").is_file()
    argv = ["gate", str(other / "src"), "--max-drop", "50", "--manifest", str(models / "plain" / "manifest.json")]
    assert main(argv) == 0


def test_bad_use(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exported(models, "plain", "zephyr", tmp_path / "lib")
    before = {name: (tmp_path / "lib" / name).stat().st_mtime_ns for name in files(tmp_path / "lib")}
    model = models / "plain"
    argv = ["export", str(model / "plan.json"), "--graph", str(model / "graph.edgecomp"), "-o", str(tmp_path / "lib")]
    capsys.readouterr()
    for more, found in (
        (["--format", "c", "--layout", "zephyr"], "src/network.c: is there already; give --force"),
        (["--format", "onnx", "--layout", "zephyr"], "--layout is of C; add c to --format"),
        (["--format", "onnx", "--name", "a"], "--name is of C; add c to --format"),
    ):
        assert main([*argv, *more]) == 2
        error = capsys.readouterr().err
        assert found in error
        assert error.count("\n") == 1
    with pytest.raises(SystemExit) as left:
        main([*argv, "--format", "c", "--name", "My net"])
    assert left.value.code == 2
    assert "'My net': expected a name for C" in capsys.readouterr().err
    # What is called after the network is not replaced unasked either.
    for path in (tmp_path / "lib" / "src").glob("*k*"):
        path.unlink()
    assert main([*argv, "--format", "c", "--layout", "zephyr"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert not (tmp_path / "lib" / "src" / "network.c").exists()
    assert all((tmp_path / "lib" / n).stat().st_mtime_ns == before[n] for n in files(tmp_path / "lib"))
