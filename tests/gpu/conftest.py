"""Tests that need a GPU: every one is marked ``gpu`` and skipped where there is none."""

from __future__ import annotations

import os
import pathlib
import sys

import pytest
import torch

# Matrix products of PyTorch repeat their bits on several streams, as the tests ask for.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# The eager formulas and the tolerance rule are those of the CPU tests.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "python"))


pytest.register_assert_rewrite("eager", "stream_networks", "stream_suite")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU")
    config.addinivalue_line("markers", "large: takes nearly all memory of the GPU")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folder = pathlib.Path(__file__).parent
    no_gpu = pytest.mark.skip(reason="there is no GPU here that PyTorch can use")
    for item in items:
        if folder in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(no_gpu)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20260315)
