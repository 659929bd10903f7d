"""Which kernels serve which shapes on a GPU, as they run: for `flash-attn-res doctor`.

Each operation of the training path runs once under PyTorch's profiler. What is listed is what was
launched, so that no second copy of the library's choices can be wrong about them.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from flash_attn_res.cli.bench.kernels import Site

OPS = (
    *("phase1_fwd", "phase1_bwd", "oneshot_norm_fwd", "oneshot_norm_bwd"),
    *("advance_fwd", "advance_bwd"),
)
SHAPES = [
    {"N": N, "S": S, "T": T, "D": D}
    for N, S, D in ((4, 8, 2048), (8, 24, 7168))
    for T in (16, 1024)
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_NAME = re.compile(r"flash_attn_res::cuda::((?:hopper::)?\w+?)_kernel\b")


def served(device: torch.device) -> list[dict[str, Any]]:
    """One entry for each operation, shape and dtype: its kernels, and why none is Hopper's."""
    capability = torch.cuda.get_device_capability(device)
    entries = []
    with torch.cuda.device(device):
        for op in OPS:
            for shape in SHAPES:
                for dtype in DTYPES:
                    entry: dict[str, Any] = {
                        "op": op,
                        "shape": shape,
                        "dtype": str(dtype).removeprefix("torch."),
                    }
                    try:
                        kernels = launched(op, shape, dtype, device)
                    except (RuntimeError, torch.OutOfMemoryError) as error:
                        entry |= {"kernels": [], "note": " ".join(str(error).split())}
                    else:
                        entry |= {"kernels": kernels, "note": note(op, dtype, capability, kernels)}
                    entries.append(entry)
            torch.cuda.empty_cache()
    return entries


def launched(op: str, shape: dict[str, int], dtype: torch.dtype, device: torch.device) -> list[str]:
    """The kernels of one run, in their order."""
    from torch.profiler import ProfilerActivity, profile

    run, _ = getattr(Site(**shape, device=device, dtype=dtype), op)()
    run()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize(device)
    return names_in(event.name for event in profiled.events())


def names_in(events: Any) -> list[str]:
    """Ours among the names of events, without their namespaces and parameters."""
    found = (match[1] for event in events if (match := _NAME.search(event)))
    return list(dict.fromkeys(found))


def note(
    op: str, dtype: torch.dtype, capability: tuple[int, int], kernels: list[str]
) -> str | None:
    """Why the Hopper kernels did not run, where they did not and there are some."""
    if not kernels:
        return "PyTorch's profiler saw no kernel of ours"
    if any(name.startswith("hopper::") for name in kernels) or kernels == ["read_rows"]:
        return None  # with a token's rows in registers `read` is as fast as it gets
    if capability != (9, 0):
        major, minor = capability
        return f"the Hopper kernels need capability 9.0, this GPU has {major}.{minor}"
    if op.startswith("phase1") and dtype != torch.bfloat16:
        return "the Hopper kernels of phase 1 take bfloat16"
    if dtype == torch.float32:
        return "the Hopper kernels take 16-bit values"
    return "no Hopper kernel is planned for this shape"


def lines(entries: list[dict[str, Any]]) -> list[str]:
    """A table: a line for each operation and dtype whose shapes have the same kernels."""
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    for entry in entries:
        sizes = " ".join(f"{axis}={size}" for axis, size in entry["shape"].items())
        key = (entry["op"], entry["dtype"], ", ".join(entry["kernels"]), entry["note"] or "")
        groups.setdefault(key, []).append(sizes)
    table = []
    for (op, dtype, kernels, why), shapes in groups.items():
        which = "all shapes" if len(shapes) == len(SHAPES) else "; ".join(shapes)
        reason = f" ({why})" if why else ""
        table.append(f"  {op:17} {dtype:9} {which}: {kernels or 'none'}{reason}")
    return table
