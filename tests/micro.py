"""What tests of TFLite Micro share: where it can run, and a network in which every kind of layer is decoded."""

from __future__ import annotations

import platform
import sys

import pytest

from edgecomp.graph import Graph, Op
from tests.graphs import Build

NEEDS_MICRO = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="TFLite Micro has wheels for Linux on x86-64 alone",
)


def wide(seed: int = 0) -> Graph:
    """Every kind of layer, large enough to be decoded: depthwise with its channels last, groups, a residual add."""
    b = Build(seed, (3, 8, 8))
    x = b.clip("stem.relu", b.conv("stem", "input", 32))
    y = b.clip("dw.relu6", b.conv("dw", x, 64, groups=32), 0, 6)
    y = b.conv("project", y, 32, (1, 1), pads=(0, 0, 0, 0))
    x = b.clip("add.relu", b.node(Op.ADD, "add", (y, x), {}))
    x = b.clip("grouped.relu", b.conv("grouped", b.max_pool("pool", x), 32, groups=4))
    x = b.avg_pool("avg", x)
    return b.graph(b.linear("fc", b.node(Op.FLATTEN, "flatten", (x,), {}), 20), "wide")
