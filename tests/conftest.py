"""Imported before every test: `kernels` first, so that its interpreter switch comes before Triton."""

import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import torch

import kernels
from labkit import splits


@pytest.fixture(scope="session")
def device() -> str:
    return kernels.DEVICE


@pytest.fixture(params=[1, 2], ids=["whole", "halves"])
def four_pieces(request, monkeypatch) -> int:
    """Up to four pieces of the keys are offered, of 128 each. The fixture: how many each sequence is cut into at least."""
    monkeypatch.setattr(splits, "choose", lambda *_: request.param)
    monkeypatch.setattr(splits, "offered", lambda *_: 4)
    monkeypatch.setattr(splits, "PIECE", 128)
    return request.param


def pytest_addoption(parser):
    parser.addoption("--on-device", action="store_true", help="only the tests that run kernels (`make compiled`, `make metal`)")
    parser.addoption("--every", type=int, default=1, help="with --on-device: a sample, every so many of them")


def pytest_ignore_collect(collection_path, config):
    """With --on-device, files without such a test are not imported: what they need may be missing beside a GPU."""
    if config.getoption("--on-device") and collection_path.suffix == ".py":
        return not re.search(r"def test_\w+\([^)]*\bdevice\b", collection_path.read_text()) or None


def pytest_collection_modifyitems(config, items):
    if config.getoption("--on-device"):
        items[:] = [item for item in items if "device" in item.fixturenames][:: config.getoption("--every")]


def pytest_runtest_teardown(item):
    """After an illegal access every further test of this process would fail: end it, pytest-xdist starts another."""
    if kernels.DEVICE == "cuda" and "device" in item.fixturenames:
        try:
            torch.cuda.synchronize()
            if far := sys.modules.get("far_apart"):
                far.end_turn()
        except RuntimeError as error:
            print(f"{item.nodeid} left the GPU unusable: {error}", file=sys.__stderr__, flush=True)
            os._exit(1)
