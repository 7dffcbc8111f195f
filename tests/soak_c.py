"""Random small networks as C: compiled with sanitizers, run here and on emulated cores, beside the reference."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from edgecomp.benchmarks.cross_compile import CORES, link
from edgecomp.benchmarks.firmware import emulate
from edgecomp.compress import compress
from edgecomp.errors import ExportError
from edgecomp.exporters import export, files_of
from tests.c_program import SANITIZERS, codes_for, program
from tests.soak_graphs import Case

REFUSED = "softmax on codes|image into an image|computes nothing"
"""What the kernels do not do, as the error says it."""
_EMULATED_SHARE = 0.1


def check(case: Case, rng: np.random.Generator) -> str:
    """Compare every byte; every tenth network also on a core.

    Returns:
        what was done.

    Raises:
        AssertionError: an output differs.
    """
    graph = compress(case.graph, case.plan)
    try:
        files = files_of(export(graph, "c"))
    except ExportError as e:
        if not re.search(REFUSED, str(e)):
            raise
        return "network refused in C"
    inputs, outputs = codes_for(graph, case.images)
    with tempfile.TemporaryDirectory() as name:
        run = program(graph, Path(name), *SANITIZERS)
        done = subprocess.run([run], input=inputs.tobytes(), capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode(errors="replace")[:2000]
        assert done.stdout == outputs.tobytes(), "the program's output is not the reference's"
    if rng.random() >= _EMULATED_SHARE:
        return "network in C"
    core = CORES[str(rng.choice([cpu for cpu, core in CORES.items() if core.unicorn is not None]))]
    with tempfile.TemporaryDirectory() as name:
        got = emulate(link(files, core, Path(name)), core, inputs, counting=False).outputs
    assert np.array_equal(got, outputs), f"the emulated output ({core.unicorn}) is not the reference's"
    return "network in C, emulated too"
