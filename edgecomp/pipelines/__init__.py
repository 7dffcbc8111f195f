"""Files for other build systems: networks in C within a firmware's own build, by CMake or make."""

from __future__ import annotations

from pathlib import Path

CMAKE_DIR = Path(__file__).resolve().parent
"""Where `find_package(edgecomp CONFIG)` looks: it holds edgecompConfig.cmake."""
MAKE_INCLUDE = CMAKE_DIR / "edgecomp.mk"
"""What a Makefile includes."""
