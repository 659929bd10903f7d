"""Two GPUs, connected by NCCL: the checks of ``tests/python/distributed_checks.py``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distributed_checks import TIMEOUT, lose_a_peer, run_all, spawn

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def test_checks(tmp_path: Path) -> None:
    failures = run_all(2, "cuda", tmp_path)
    assert not failures, "\n\n".join(failures)


@pytest.mark.parametrize("kind", ["pipeline", "shards"])
def test_a_lost_peer_is_an_error(kind: str, tmp_path: Path) -> None:
    """In Python, or by NCCL's watchdog, which ends the process; in no case a hang."""
    survivor, lost = spawn(lose_a_peer, 2, "cuda", tmp_path, kind, grace=TIMEOUT)
    assert lost == 9
    assert survivor in (3, -6)
