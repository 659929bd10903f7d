"""The stream on the CPU: the tests of every device, and those of the machinery around it."""

from __future__ import annotations

import pytest
import torch

from stream_suite import *  # noqa: F403


@pytest.fixture
def device() -> str:
    return "cpu"


@pytest.fixture(params=[torch.float64, torch.float32, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
