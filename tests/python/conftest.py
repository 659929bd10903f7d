from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch

# Shapes vary from example to example; the time of a first call is no failure.
hypothesis.settings.register_profile("default", deadline=None, derandomize=False)
hypothesis.settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20260315)


@pytest.fixture
def one_thread() -> Iterator[None]:
    held = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(held)
