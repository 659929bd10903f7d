"""Peak memory of training one variant, measured in a process of its own.

    python -m flash_attn_res.cli.measure '{"model": {...}, "batch": 8, "device": "cpu", ...}'

prints `{"peak_bytes": ..., "baseline_bytes": ...}`. On the CPU this is the resident set of the
process: the most that it held in a few training steps, less what it held when PyTorch was loaded
and no model made. On CUDA it is what PyTorch's allocator counts, whose baseline is 0.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import torch

from flash_attn_res.cli.device import resident_bytes, set_threads
from flash_attn_res.cli.loop import make_optimizer, training_step
from flash_attn_res.cli.model import VOCABULARY, LanguageModel, ModelConfig

_STEPS = 3  # the optimizer's state appears in the first, the gradients of the next meet it


@dataclass(frozen=True)
class Memory:
    """Bytes; `peak` includes `baseline`."""

    peak: int
    baseline: int


def measure(config: ModelConfig, *, batch: int, device: str, threads: int) -> Memory | None:
    """Starts the process and waits for it; None when it failed (out of memory, say)."""
    request = {
        "model": config.to_dict(),
        "batch": batch,
        "device": device,
        "threads": threads,
    }
    command = [sys.executable, "-m", "flash_attn_res.cli.measure", json.dumps(request)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        return None
    answer = json.loads(result.stdout.splitlines()[-1])
    return Memory(peak=answer["peak_bytes"], baseline=answer["baseline_bytes"])


def _measure_here(request: dict[str, Any]) -> dict[str, int]:
    config = ModelConfig.from_dict(request["model"])
    device = torch.device(request["device"])
    set_threads(request["threads"])
    baseline, _ = resident_bytes()
    model = LanguageModel(config).to(device)
    optimizer = make_optimizer(model)
    generator = torch.Generator().manual_seed(0)
    shape = (request["batch"], config.seq_len)
    tokens = torch.randint(VOCABULARY, shape, generator=generator).to(device)
    for _ in range(_STEPS):
        training_step(model, optimizer, tokens, tokens, lr=1e-3)
    if device.type == "cuda":
        return {"peak_bytes": torch.cuda.max_memory_allocated(device), "baseline_bytes": 0}
    return {"peak_bytes": resident_bytes()[1], "baseline_bytes": baseline}


if __name__ == "__main__":
    print(json.dumps(_measure_here(json.loads(sys.argv[1]))))
