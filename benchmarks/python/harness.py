"""What every benchmark program shares: timing, bytes, and the result file.

Times are medians over rounds; in a round every contender runs once, so that drift of the machine
hits all alike. Bytes are the minimum traffic of docs/math.md (each input read once, each output
written once), and percents are against a copy measured in the same run.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]


@dataclasses.dataclass
class Contender:
    """One way to compute a case: ``prepare`` runs untimed before each timed ``run``."""

    package: str
    run: Callable[..., object]
    prepare: Callable[[], Any] | None = None
    times: list[float] = dataclasses.field(default_factory=list)

    def time_once(self) -> None:
        held = () if self.prepare is None else (self.prepare(),)
        start = time.perf_counter()
        self.run(*held)
        self.times.append(time.perf_counter() - start)

    def percentile(self, percent: float) -> float:
        ordered = sorted(self.times)
        return ordered[min(len(ordered) - 1, int(percent / 100 * len(ordered)))]


def interleave(contenders: list[Contender], rounds: int, warmup: int = 2) -> None:
    """Runs all contenders ``rounds`` times each, alternating."""
    for round_index in range(warmup + rounds):
        for contender in contenders:
            contender.time_once()
            if round_index < warmup:
                contender.times.clear()


COPY_BYTES = 2 * (256 << 20)
"""Read plus written by one run of :func:`copy_contender`."""


def copy_contender() -> Contender:
    """A copy on all threads, to run in the same rounds as what is held against it.

    Make one for a whole program: how fast a copy runs depends on which pages it was given (by half
    as much again, between allocations of one process), and every case should face the same one.
    """
    source = torch.ones(COPY_BYTES // 8)
    target = torch.empty_like(source)
    return Contender("copy", lambda: target.copy_(source))


def keep_freed_memory() -> None:
    """Restarts the program so that malloc reuses large blocks, for every contender alike.

    By default glibc returns a freed tensor to the system, and the next one of that size costs a
    page fault every 4 KiB: more than most kernels here take, and no property of any of them.
    """
    settings = {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
        "MALLOC_TOP_PAD_": str(1 << 30),
    }
    if any(os.environ.get(name) != value for name, value in settings.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **settings})


def cpu_name() -> str:
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str:
    try:
        return subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_results(path: pathlib.Path, device: str, copy: float | None, rows: list[dict]) -> None:
    """Writes a result file, whole or not at all. ``copy`` is bytes per second, if that matters."""
    document = {
        "device": device,
        "driver": "none" if not torch.cuda.is_available() else str(torch.version.cuda),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "copy_tb_s": None if copy is None else copy / 1e12,
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(partial, path)
