"""examples/firmware from a clean tree: built by CMake and make, run from reset in an emulator, as its README says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgecomp import bundle, quantmath, reference
from edgecomp.compress import border_codes, compress
from edgecomp.plan import CompressionPlan
from edgecomp.preprocessing import preprocess
from tests.pipeline import COMMAND, ROOT, Made, make_and_watch, tool
from tests.test_cmake import GENERATORS

EXAMPLE = ROOT / "examples" / "firmware"
GCC = shutil.which("arm-none-eabi-gcc")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What git would give."""
    for name in ("CMakeLists.txt", "Makefile", "README.md", "run.py", "cortex-m4.ld"):
        assert (EXAMPLE / name).is_file()
    leave = shutil.ignore_patterns("build*")
    shutil.copytree(EXAMPLE, tmp_path / "firmware", ignore=leave)
    return tmp_path / "firmware"


def expected(tree: Path) -> str:
    """What the firmware must send, by the integer reference."""
    plan = CompressionPlan.from_json((tree / "model" / "plan.json").read_text("utf-8"), "plan.json")
    graph = compress(bundle.load(tree / "model" / "graph.edgecomp"), plan)
    numbers = re.findall(r"\d+,", (tree / "picture.h").read_text("utf-8").partition("= {")[2])
    pixels = np.array([int(n[:-1]) for n in numbers], dtype=np.uint8).reshape(1, 28, 28, 1)
    values = reference.run(graph, {graph.inputs[0]: preprocess(pixels, plan.preprocessing)})
    (codes,) = values[border_codes(graph)[1]]
    quant = graph.tensors[border_codes(graph)[1]].quant
    assert quant is not None
    assert np.array_equal(quantmath.dequantize(codes[None], quant), values[graph.outputs[0]])
    return f"codes: {' '.join(map(str, codes))}\nclass: {plan.classes[int(codes.argmax())]}\n"


def run(tree: Path, image: str) -> str:
    command = [sys.executable, "run.py", image]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def cmake(tree: Path, toolchain: str, generator: str = "Ninja", **definitions: str) -> Made:
    given = {
        "CMAKE_TOOLCHAIN_FILE": f"toolchain-{toolchain}.cmake",
        "CMAKE_MAKE_PROGRAM": tool("ninja" if generator == "Ninja" else "make"),
        "EDGECOMP_COMMAND": ";".join(COMMAND),
        "edgecomp_DIR": str(ROOT / "edgecomp" / "pipelines"),
        **definitions,
    }
    options = [f"-D{name}={value}" for name, value in given.items()]
    configured = make_and_watch([tool("cmake"), "-S", ".", "-B", "build", "-G", generator, *options], tree, tree)
    assert configured.code == 0, configured.output
    return make_and_watch([tool("cmake"), "--build", "build"], tree, tree)


TOOLCHAINS = [("zig", "Ninja"), ("zig", "Unix Makefiles")]
TOOLCHAINS += [("arm-none-eabi", generator) for generator in GENERATORS] if GCC else []


@pytest.mark.parametrize(("toolchain", "generator"), TOOLCHAINS)
def test_it_says_what_the_reference_says(toolchain: str, generator: str, tree: Path) -> None:
    built = cmake(tree, toolchain, generator)
    assert built.code == 0, built.output
    assert "warning" not in built.output
    assert run(tree, "build/firmware.elf") == expected(tree)
    assert cmake(tree, toolchain, generator).files == frozenset()


@pytest.mark.parametrize("toolchain", sorted({name for name, _ in TOOLCHAINS}))
def test_two_clean_builds_on_two_paths_are_equal(toolchain: str, tree: Path, tmp_path: Path) -> None:
    shutil.copytree(tree, tmp_path / "another" / "place")
    images = []
    for folder in (tree, tmp_path / "another" / "place"):
        assert cmake(folder, toolchain).code == 0
        images.append((folder / "build" / "firmware.elf").read_bytes())
    assert images[0] == images[1]


@pytest.mark.parametrize(
    ("budget", "found"),
    [
        ({"FLASH": "1K"}, "flash is "),
        ({"RAM": "1K"}, "RAM is "),
        ({"DROP": "5"}, "points below the float network's; --max-drop allows 5"),
    ],
)
def test_its_budgets_are_judged(budget: dict[str, str], found: str, tree: Path) -> None:
    broken = cmake(tree, "zig", **budget)
    assert broken.code != 0
    (line,) = broken.said()
    assert found in line
    assert not any(name.endswith("firmware.elf") for name in broken.files)


@pytest.mark.skipif(GCC is None, reason="its Makefile is for arm-none-eabi-gcc, which is not here")
def test_by_make(tree: Path) -> None:
    command = [tool("make"), f"EDGECOMP={' '.join(COMMAND)}"]
    built = make_and_watch(command, tree, tree)
    assert built.code == 0, built.output
    assert run(tree, "build-make/firmware.elf") == expected(tree)
    assert make_and_watch(command, tree, tree).files == frozenset()
    broken = make_and_watch([*command, "FLASH=1K"], tree, tree)
    assert broken.code != 0
    assert len(broken.said()) == 1


def test_a_firmware_that_does_not_end_well(tree: Path) -> None:
    """run.py tells of it: the picture of a main() that never returns."""
    main = tree / "main.c"
    main.write_text(main.read_text().replace("  uart[4] = 16;", "  for (;;) uart[0] = 'x';"))
    assert cmake(tree, "zig").code == 0
    script = tree / "run.py"
    script.write_text(script.read_text().replace("MOST_US = 60_000_000", "MOST_US = 200_000"))
    command = [sys.executable, "run.py", "build/firmware.elf"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=120, check=False, env=os.environ)
    assert done.returncode != 0
    assert "does not halt within" in done.stderr
