"""Where a command runs, and what it costs there: device, threads, commit, time and memory."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import torch

from flash_attn_res import __version__
from flash_attn_res.cli.errors import CliError


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise CliError(f"--device must be auto, cpu, cuda or cuda:N, not {name!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise CliError(f"--device {name}: PyTorch sees {count} CUDA devices here")
    return device


MOST_THREADS = max(1024, os.cpu_count() or 1)
"""More than a machine may have: where the system runs out of them, PyTorch crashes."""


def set_threads(count: int) -> None:
    """What --threads asks for; 0 leaves PyTorch's own choice."""
    if not 0 <= count <= MOST_THREADS:
        raise CliError(f"--threads must be at least 0 and at most {MOST_THREADS}, not {count}")
    if count > 0:
        torch.set_num_threads(count)


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what was asked of it, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """The model of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return "CPU"


def checkout() -> Path | None:
    """The repository that this package is run from, if it is run from one."""
    root = Path(__file__).resolve().parents[3]
    return root if (root / "src" / "reference").is_dir() else None


def revision() -> str:
    """The commit of the checkout, by FLASH_ATTN_RES_COMMIT where its history is not at hand."""
    if given := os.environ.get("FLASH_ATTN_RES_COMMIT"):
        return given
    root = checkout()
    if root is None:
        return f"release {__version__}"

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        described = git("describe", "--always")
        # What a run writes does not make it a run of other code.
        results = (":!benchmarks/results", ":!docs/images")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *results)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described + ("-dirty" if changed else "")


def resident_bytes() -> tuple[int, int]:
    """Memory of this process: what it holds now, and the most that it ever held.

    /proc is asked first, since `getrusage` reports the parent's peak in a child that holds less.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        values = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Vm")}
        return int(values["VmRSS"]) * 1024, int(values["VmHWM"]) * 1024
    except (OSError, KeyError, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024
        return peak, peak
