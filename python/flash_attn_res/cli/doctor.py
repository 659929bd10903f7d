"""`flash-attn-res doctor`: what is installed, and whether it computes what it should."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
from importlib import metadata
from typing import Any

import torch

from flash_attn_res import __version__, read
from flash_attn_res._load import load_operators
from flash_attn_res.cli import served
from flash_attn_res.cli.device import device_name

SCHEMA = 1
OPTIONAL = ("matplotlib", "numpy", "rich", "safetensors", "triton")
OTHERS = ("flash-linear-attention", "fla-core", "liger-kernel", "fast-attnres", "flashinfer-python")
_LEAST_CAPABILITY = (8, 0)
_LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def run_doctor(arguments: argparse.Namespace) -> int:
    """Prints the findings; 0 where everything works, 1 where a check failed."""
    found = examine()
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        print("\n".join(_lines(found)))
    return 1 if any(check["error"] for check in found["checks"]) else 0


def examine() -> dict[str, Any]:
    """All findings, as JSON takes them."""
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(_gpus())]
    return {
        "schema": SCHEMA,
        "version": __version__,
        "library": str(load_operators()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "packages": {name: _version(name) for name in (*OPTIONAL, *OTHERS)},
        "cpu": {
            "name": device_name(devices[0]),
            "threads": torch.get_num_threads(),
            "torch_isa": torch.backends.cpu.get_cpu_capability(),
            "kernels": _cpu_kernels(),
            "FLASH_ATTN_RES_CPU_ISA": os.environ.get("FLASH_ATTN_RES_CPU_ISA"),
        },
        "gpus": [_gpu(device) for device in devices[1:]],
        "notes": _notes(),
        "checks": [
            {
                "device": str(device),
                "dtype": str(dtype).removeprefix("torch."),
                **_check(device, dtype),
            }
            for device in devices
            for dtype in _LIMITS
        ],
    }


def _gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _gpu(device: torch.device) -> dict[str, Any]:
    major, minor = torch.cuda.get_device_capability(device)
    kernels = served.served(device) if (major, minor) >= _LEAST_CAPABILITY else []
    return {
        "name": device_name(device),
        "capability": f"{major}.{minor}",
        "kernels": kernels,
    }


def _cpu_kernels() -> str:
    """The instruction set that every operation and dtype has its kernels in."""
    query = getattr(torch.ops.flash_attn_res, "cpu_kernels", None)
    return "unknown" if query is None else str(query())


def _notes() -> list[str]:
    """Why something fast may not be used."""
    notes = []
    if torch.version.cuda is None:
        notes.append("this PyTorch is built without CUDA: everything runs on the CPU")
    elif not _gpus():
        notes.append("PyTorch sees no GPU: everything runs on the CPU")
    for index in range(_gpus()):
        capability = torch.cuda.get_device_capability(index)
        if capability < _LEAST_CAPABILITY:
            notes.append(f"GPU {index}: capability below 8.0, which the CUDA kernels need")
        elif capability != (9, 0):
            notes.append(f"GPU {index}: not capability 9.0: the general kernels serve it")
    if isa := os.environ.get("FLASH_ATTN_RES_CPU_ISA"):
        notes.append(f"FLASH_ATTN_RES_CPU_ISA={isa} chooses the CPU kernels")
    return notes


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _check(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """A read of three sources, forward and backward, against the formulas in float64."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 33, 128, generator=generator).to(device, dtype)  # (N,T,D)
    query = (torch.randn(128, generator=generator) / 8).to(device)  # (D)
    cotangent = torch.randn(33, 128, generator=generator).to(device, dtype)  # (T,D)
    sources = [v.clone().requires_grad_() for v in values]
    exact = values.double().requires_grad_()
    try:
        x = read(query, sources=sources, eps=1e-6).x
        got = [x, *torch.autograd.grad(x, sources, cotangent)]
    except (RuntimeError, ValueError, TypeError) as error:
        return {"relative_error": None, "error": " ".join(str(error).split())}
    logits = (exact @ query.double()) * torch.rsqrt(exact.square().mean(-1) + 1e-6)
    expected = (logits.softmax(0)[..., None] * exact).sum(0)
    (gradient,) = torch.autograd.grad(expected, exact, cotangent.double())
    errors = [
        ((a.double() - b).norm() / b.norm()).item()
        for a, b in zip(got, [expected.detach(), *gradient], strict=True)
    ]
    if not all(math.isfinite(error) for error in errors):
        return {"relative_error": None, "error": "the result or a gradient is not finite"}
    worst = max(errors)
    right = worst <= _LIMITS[dtype]
    return {
        "relative_error": worst,
        "error": None if right else f"relative error {worst:.1e}, expected {_LIMITS[dtype]:.0e}",
    }


def _lines(found: dict[str, Any]) -> list[str]:
    lines = [
        f"flash-attn-res {found['version']}, {found['library']}",
        f"Python {found['python']}, PyTorch {found['torch']}, CUDA {found['torch_cuda'] or 'none'}",
        f"CPU: {found['cpu']['name']}, {found['cpu']['threads']} threads, "
        f"{found['cpu']['torch_isa']} by PyTorch",
        f"kernels on the CPU, every operation, shape and dtype: {found['cpu']['kernels']}",
    ]
    for index, gpu in enumerate(found["gpus"]):
        lines.append(f"GPU {index}: {gpu['name']}, {gpu['capability']}")
        lines += [f"kernels on GPU {index}, as they ran:"] if gpu["kernels"] else []
        lines += served.lines(gpu["kernels"])
    there = [f"{name} {version}" for name, version in found["packages"].items() if version]
    missing = [name for name, version in found["packages"].items() if not version]
    lines += [f"installed: {', '.join(there) or 'nothing'}", f"not installed: {', '.join(missing)}"]
    lines += [f"note: {note}" for note in found["notes"]]
    for check in found["checks"]:
        outcome = check["error"] or f"right, relative error {check['relative_error']:.1e}"
        lines.append(f"{check['device']:7} {check['dtype']:9} {outcome}")
    return lines
