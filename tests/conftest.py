"""Fixtures for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgecomp.errors import TargetError
from edgecomp.targets.cores import AARCH64, ARMV7, Machine
from tests import ssh_device

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of trained models and data sets beside the checkout; tests that need it skip without it."""
    if not (SHARED / "models").is_dir():
        pytest.skip("../shared with trained models and data sets is not here")
    return SHARED


@pytest.fixture(scope="session")
def root() -> Path:
    """The file system of emulated 64-bit boards; made when it is not there."""
    return emulated_root(AARCH64)


@pytest.fixture(scope="module")
def switched_on(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ssh_device.Device]:
    """A device of 64 bits, for all tests of a module."""
    with ssh_device.running(tmp_path_factory.mktemp("device"), root) as made:
        yield made


@pytest.fixture
def device(switched_on: ssh_device.Device, monkeypatch: pytest.MonkeyPatch) -> Iterator[ssh_device.Device]:
    """The device as it should be, found clean and left as it was; its ssh stands first in PATH."""
    monkeypatch.setenv("PATH", f"{switched_on.place}/bin:{os.environ['PATH']}")
    assert switched_on.left_behind() == []
    yield switched_on
    switched_on.trust("host")
    switched_on.key("user")
    switched_on.extra("")


@pytest.fixture(scope="session")
def root_32() -> Path:
    """The same of 32-bit boards."""
    return emulated_root(ARMV7)


def emulated_root(machine: Machine) -> Path:
    """Make a board's file system; in CI a machine that cannot is a failure."""
    lacking = ssh_device.missing()
    try:
        made = None if lacking else ssh_device.emulated_root(machine)
    except TargetError as e:
        lacking, made = str(e), None
    if made is None:
        assert not os.environ.get(ssh_device.REQUIRED), f"devices cannot be tested: {lacking}"
        pytest.skip(f"devices cannot be tested here: {lacking}")
    return made
