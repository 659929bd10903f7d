from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

pytest.register_assert_rewrite("eager", "stream_networks", "stream_suite")

# Shapes vary from example to example; the time of a first call is no failure. At a desk every run
# draws fresh inputs; continuous integration repeats the same ones, so that a change is judged by
# what it changes.
hypothesis.settings.register_profile("fresh", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "fresh")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20260315)


@pytest.fixture
def one_thread() -> Iterator[None]:
    held = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(held)
