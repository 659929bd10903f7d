"""Which kernels serve which shapes on a GPU, as they run: for `flash-attn-res doctor`.

Each operation runs once under PyTorch's profiler: those of the training path, phase 1 over stored
blocks, and the site of Kimi K3. What is listed is what was launched, so that no second copy of the
library's choices can be wrong about them.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from flash_attn_res.cli.bench.harness import Run
from flash_attn_res.cli.bench.kernels import Site
from flash_attn_res.cli.bench.storage import Case

OPS = (
    *("phase1_fwd", "phase1_bwd", "oneshot_fwd", "oneshot_bwd", "oneshot_norm_fwd"),
    *("oneshot_norm_bwd", "merge_fwd", "merge_bwd", "advance_fwd", "advance_bwd", "k3_site_fwd"),
)
SHAPES = [
    {"N": N, "S": S, "T": T, "D": D}
    for N, S, D in ((4, 8, 2048), (8, 24, 7168))
    for T in (16, 1024)
]
DTYPES = ("bfloat16", "float16", "float32")
STORED = {"float8 blocks": "float8", "float16 blocks": "float16"}
"""Of the sources of phase 1, with scales; its results and gradients are bfloat16."""
CASES = [
    *((op, dtype) for op in OPS for dtype in DTYPES),
    *((op, blocks) for op in OPS if op.startswith("phase1") for blocks in STORED),
]
_NAME = re.compile(r"flash_attn_res::cuda::((?:hopper::)?\w+?)_kernel\b")


def served(device: torch.device) -> list[dict[str, Any]]:
    """One entry for each operation, shape and dtype: its kernels, and why none is Hopper's."""
    capability = torch.cuda.get_device_capability(device)
    entries = []
    with torch.cuda.device(device):
        for op, dtype in CASES:
            for shape in SHAPES:
                entry: dict[str, Any] = {"op": op, "shape": shape, "dtype": dtype}
                try:
                    kernels = launched(prepared(op, shape, dtype, device), device)
                except (RuntimeError, torch.OutOfMemoryError) as error:
                    entry |= {"kernels": [], "note": " ".join(str(error).split())}
                else:
                    entry |= {"kernels": kernels, "note": note(op, dtype, capability, kernels)}
                entries.append(entry)
            torch.cuda.empty_cache()
    return entries


def prepared(op: str, shape: dict[str, int], dtype: str, device: torch.device) -> Run:
    """One operation, ready to run."""
    if dtype in STORED:
        raw = [
            torch.randn(shape["T"], shape["D"], device=device).bfloat16() for _ in range(shape["N"])
        ]
        queries = torch.randn(shape["S"], shape["D"], device=device) / shape["D"] ** 0.5
        case = Case(STORED[dtype], raw, queries)
        case.phase1_fwd()  # the backward reads what it leaves
        run: Run = getattr(case, op)
        return run
    site = Site(**shape, device=device, dtype=getattr(torch, dtype))
    if op == "k3_site_fwd":  # the bank's rows, the prefix, an update, the norm
        prefix, update, out = site.row(), site.row(), site.row()
        return site.read(
            site.N + 1, True, site.sources(), partial=prefix, update=update, partial_out=out
        )[0]
    run, _ = getattr(site, op)()
    return run


def launched(run: Run, device: torch.device) -> list[str]:
    """The kernels of one run, in their order."""
    from torch.profiler import ProfilerActivity, profile

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


def note(op: str, dtype: str, capability: tuple[int, int], kernels: list[str]) -> str | None:
    """Why the Hopper kernels did not run, where they did not and there are some."""
    if not kernels:
        return "PyTorch's profiler saw no kernel of ours"
    in_registers = {"read_rows", "read_ahead"}
    if any(name.startswith("hopper::") for name in kernels) or in_registers.issuperset(kernels):
        return None  # with a token's rows in registers `read` is as fast as it gets
    if capability != (9, 0):
        major, minor = capability
        return f"the Hopper kernels need capability 9.0, this GPU has {major}.{minor}"
    if dtype == "float32":
        stored = ", or float8 and float16 ones with scales" if op.startswith("phase1") else ""
        return f"the Hopper kernels take 16-bit values{stored}"
    if op == "phase1_bwd" and dtype == "float16":
        return "the Hopper backward of phase 1 takes output gradients in bfloat16"
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
        table.append(f"  {op:17} {dtype:14} {which}: {kernels or 'none'}{reason}")
    return table
