"""Fixtures for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of trained models and data sets beside the checkout; tests that need it skip without it."""
    if not (SHARED / "models").is_dir():
        pytest.skip("../shared with trained models and data sets is not here")
    return SHARED
