"""Imported before every test: `kernels` first, so that its interpreter switch comes before Triton."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest

import kernels


@pytest.fixture(scope="session")
def device() -> str:
    return kernels.DEVICE


def pytest_addoption(parser):
    parser.addoption("--on-device", action="store_true", help="only the tests that run kernels (`make compiled`, `make sanitize`)")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--on-device"):
        items[:] = [item for item in items if "device" in item.fixturenames]
