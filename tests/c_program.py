"""Networks in C as programs that read images and write results, for sanitizers and other watchers."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np

from edgecomp import quantmath, reference
from edgecomp.benchmarks.compiled_c import host_compiler
from edgecomp.compress import border_codes
from edgecomp.exporters import export, files_of
from edgecomp.exporters.c_facts import read_facts
from edgecomp.exporters.to_c import Program, kernel_files
from edgecomp.graph import Array, Graph

SANITIZERS = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def written(graph: Graph, folder: Path, form: str = "c") -> Mapping[str, bytes]:
    files = files_of(export(graph, form))
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return files


def harness(name: str, n_in: int, n_out: int, arena: int) -> str:
    """A program that runs images from stdin; every piece of memory is of just the size that is needed."""
    return f"""
#include <stdio.h>
#include <stdlib.h>
#include "network.h"
int main(void) {{
  int8_t *in = malloc({n_in}), *out = malloc({n_out}); int32_t *arena = malloc({arena});
  while (fread(in, 1, {n_in}, stdin) == {n_in}) {{
    if ({name}_run(in, out, arena)) return 1;
    fwrite(out, 1, {n_out}, stdout);
  }}
  free(in); free(out); free(arena);
  return 0;
}}
"""


def program(graph: Graph, folder: Path, *options: str) -> Path:
    written(graph, folder)
    facts = read_facts((folder / "network.c").read_bytes(), "network.c")
    text = harness(facts.name, facts.input.n_bytes, facts.output.n_bytes, max(1, facts.arena_bytes))
    (folder / "main.c").write_text(text)
    sources = [str(folder / name) for name in ("main.c", "network.c")]
    kernels = str(Path(_kernels(options).name) / "kernels.o")
    subprocess.run([*host_compiler(), *options, "-g", "-o", str(folder / "run"), *sources, kernels], check=True)
    return folder / "run"


@cache
def _kernels(options: tuple[str, ...]) -> tempfile.TemporaryDirectory[str]:
    """A folder with the kernels, compiled: they are the same for every network, and most of what is to be compiled."""
    folder = tempfile.TemporaryDirectory(prefix="edgecomp-kernels-")
    for name, data in kernel_files().items():
        Path(folder.name, name).write_bytes(data)
    command = [*host_compiler(), *options, "-g", "-c", "-o", "kernels.o", "edgecomp_kernels.c"]
    subprocess.run(command, check=True, cwd=folder.name)
    return folder


def with_least_scratch(source: str, found: Program) -> str:
    """The same network, whose kernels are told of no more scratch memory than they need."""
    for i, (offset, n_bytes) in found.scratch.items():
        step = found.steps[i]
        if step.more_scratch:
            (call,) = (line for line in source.splitlines() if f"(&step{i}, " in line)
            given, least = (f" memory + {offset}, {n}u);" for n in (n_bytes, step.scratch_bytes))
            assert given in call
            source = source.replace(call, call.replace(given, least))
    return source


def codes_for(graph: Graph, x: Array) -> tuple[Array, Array]:
    """Images as a network in C takes them, and what it must give."""
    first, last = border_codes(graph)
    quant = graph.tensors[graph.inputs[0]].quant
    values = reference.run(graph, {graph.inputs[0]: x if quant is None else quantmath.quantize(x, quant)})
    inputs, outputs = (v.transpose(0, 2, 3, 1) if v.ndim == 4 else v for v in (values[first], values[last]))
    return np.ascontiguousarray(inputs), np.ascontiguousarray(outputs)
