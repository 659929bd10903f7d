"""Which kernels of this library a call launches."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

SANITIZED = "FLASH_ATTN_RES_SANITIZED"
"""Set by tools/gpu_sanitize: beside compute-sanitizer nothing can be traced."""


def kernels_of(run: Callable[[], object]) -> set[str] | None:
    """The names of those that ``run()`` launches; None where they cannot be known."""
    if SANITIZED in os.environ:
        run()
        torch.cuda.synchronize()
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return {e.name for e in profile.events() if "flash_attn_res::cuda" in e.name}
