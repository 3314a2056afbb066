"""Imported before every test: `kernels` first, so that its interpreter switch comes before Triton."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest

import kernels


@pytest.fixture(scope="session")
def device() -> str:
    return kernels.DEVICE
