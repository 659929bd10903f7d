"""Two GPUs, connected by NCCL: the checks of ``tests/python/distributed_checks.py``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from distributed_checks import CHECKS, run_checks, spawn

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def test_checks(tmp_path: Path) -> None:
    codes = spawn(run_checks, 2, "cuda", tmp_path)
    outcomes = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    failed = "\n".join(f"rank {r}: {o['failed']}" for r, o in enumerate(outcomes) if o["failed"])
    assert not failed, failed
    assert codes == [0, 0]
    assert all(len(outcome["seconds"]) == len(CHECKS) for outcome in outcomes)
