"""Small batches: one reading site at T = 1 .. 16384 tokens, in CUDA graphs, cold and warm.

Usage: decode.py [--out FILE] [--tokens T ...] [--op NAME ...] [--package NAME ...] [--quick]
                 [--device cuda|cpu]

  advance       phase-1 result, partial sum, update, norm: 5 units of T * D elements
  oneshot       N sources: N + 1 units
  k3_site       N - 1 rows of a token-major bank, prefix, update, norm: N + 4 units
  phase1        S queries over N sources: N + S units

A time is that of a replay of a graph of many calls, divided by the calls: the gap between two
kernels of a graph is in it, the launch from the host is not. Warm: every call works on the same
tensors. Cold: the calls go round a set of tensors that is at least three times the L2 cache.
Medians over replays; in a round every contender runs once.

Other packages are measured where they can be imported (`pip install flash-linear-attention
liger-kernel vllm flashinfer-python`); what cannot run here is left out and named at the end.
On the CPU the same calls are timed one by one, to see that the program works.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import harness
import torch
from torch import Tensor

from flash_attn_res import inference
from flash_attn_res.compat.vllm import fold_once

D = 7168
DTYPE = torch.bfloat16
EPS = 1e-5
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
CASES = [  # operation, N, S
    ("advance", 0, 1),
    ("oneshot", 2, 1),
    ("oneshot", 9, 1),
    ("k3_site", 9, 1),
    ("phase1", 8, 24),
]
MOST_SETS = 4096
WARM_CALLS = 64


@dataclasses.dataclass
class Inputs:
    """Tensors of one call. Weights are shared by the calls, as they are in a model."""

    bank: Tensor  # [T, N, D]
    rows: list[Tensor]  # N x [T, D], contiguous
    partial: Tensor  # [T, D]
    update: Tensor  # [T, D]
    out: Tensor  # [S, T, D]
    lse: Tensor  # [S, T]
    x: Tensor  # [T, D]


@dataclasses.dataclass
class Weights:
    queries: Tensor  # [S, D] float32, folded
    query: Tensor  # [D] in the storage dtype
    key: Tensor  # [D]
    norm: Tensor  # [D]


Call = Callable[[Inputs], object]


def make_inputs(op: str, N: int, S: int, T: int, dim: int, device: str) -> Inputs:
    def values(*shape: int) -> Tensor:
        return torch.empty(*shape, device=device, dtype=DTYPE).normal_()

    k3 = op == "k3_site"
    sums = 0 if op in ("oneshot", "phase1") else T
    return Inputs(
        bank=values(T if k3 else 0, max(N - 1, 1), dim),
        rows=[values(T, dim) for _ in range(0 if k3 or op == "advance" else N)],
        partial=values(sums, dim),
        update=values(sums, dim),
        out=values(S if op in ("advance", "phase1") else 0, T, dim),
        lse=torch.randn(S, T, device=device),
        x=values(0 if op == "phase1" else T, dim),
    )


def bytes_moved(op: str, N: int, S: int, T: int, dim: int) -> int:
    units = {"advance": 5, "oneshot": N + 1, "k3_site": N - 1 + 5, "phase1": N + S}[op]
    return units * T * dim * DTYPE.itemsize


# -------------------------------------------------------------------------------------- contenders


def ours(op: str, weights: Weights, example: Inputs) -> Call:
    query, queries = weights.queries[0], weights.queries
    norm = weights.norm

    def arguments(i: Inputs) -> dict:
        if op == "oneshot":
            return {"x": i.x, "sources": i.rows}
        summed = {"x": i.x, "partial": i.partial, "update": i.update, "partial_out": i.partial}
        if op == "advance":
            return {**summed, "phase1": (i.out[0], i.lse[0]), "norm_weight": norm}
        return {**summed, "sources": i.bank.movedim(1, 0), "norm_weight": norm}

    if op == "phase1":
        need = inference.attend_workspace_bytes(
            example.rows, queries, out=example.out, lse=example.lse
        )
        workspace = torch.empty(need, dtype=torch.uint8, device=queries.device)
        return lambda i: inference.attend_out(
            i.rows, queries, out=i.out, lse=i.lse, eps=EPS, workspace=workspace
        )
    need = inference.read_workspace_bytes(query, **arguments(example))
    workspace = torch.empty(need, dtype=torch.uint8, device=query.device)
    return lambda i: inference.read_out(query, **arguments(i), eps=EPS, workspace=workspace)


def fla(op: str, weights: Weights, example: Inputs) -> Call | None:
    from fla.ops.attnres import fused_attnres

    if op != "oneshot":
        return None
    return lambda i: fused_attnres(weights.query, i.rows, weights.key, rms_eps=EPS)


def liger(op: str, weights: Weights, example: Inputs) -> Call | None:
    from liger_kernel.ops.attn_res import attn_res_forward

    if op != "oneshot":
        return None
    return lambda i: attn_res_forward(i.rows, weights.query, weights.key, EPS)


def vllm(op: str, weights: Weights, example: Inputs) -> Call | None:
    from vllm.models.kimi_k3.nvidia.ops.attn_res import attn_res

    if op != "k3_site":
        return None
    site = (weights.key, weights.query, weights.norm)
    return lambda i: attn_res(i.partial, i.update, i.bank, *site, i.bank.shape[1], -1, EPS, EPS)


def flashinfer(op: str, weights: Weights, example: Inputs) -> Call | None:
    from flashinfer.kimi_k3_attn_res import kimi_k3_attn_res

    if op != "k3_site":
        return None
    site = (weights.key, weights.query, weights.norm)
    return lambda i: kimi_k3_attn_res(
        *(i.partial, i.update, i.bank, *site, i.x),
        num_blocks=i.bank.shape[1],
        eps=EPS,
        output_norm_eps=EPS,
    )


PACKAGES: dict[str, Callable[[str, Weights, Inputs], Call | None]] = {
    "flash_attn_res": ours,
    "flash-linear-attention": fla,
    "liger-kernel": liger,
    "vllm": vllm,
    "flashinfer": flashinfer,
}


# ------------------------------------------------------------------------------------------ timing


def capture(call: Call, sets: list[Inputs], calls: int) -> tuple[Callable[[], float], int]:
    """A function that replays `calls` calls, going round the sets, and gives microseconds each."""
    if sets[0].x.device.type != "cuda":

        def run() -> float:
            start = time.perf_counter()
            for index in range(calls):
                call(sets[index % len(sets)])
            return (time.perf_counter() - start) / calls * 1e6

        return run, calls
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compilation and tuning happen here
            call(sets[0])
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(calls):
            call(sets[index % len(sets)])

    def replay() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / calls * 1e3

    return replay, calls


def cold_sets(op: str, N: int, S: int, T: int, dim: int, device: str) -> list[Inputs]:
    """As many sets of tensors as are three times the L2 cache, at least two."""
    if device != "cuda":
        return [make_inputs(op, N, S, T, dim, device) for _ in range(2)]
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    count = 3 * l2 // bytes_moved(op, N, S, T, dim) + 1
    return [make_inputs(op, N, S, T, dim, device) for _ in range(max(2, min(count, MOST_SETS)))]


def measure_case(
    op: str,
    N: int,
    S: int,
    T: int,
    options: argparse.Namespace,
    missing: dict[str, str],
) -> list[dict]:
    device, dim = options.device, options.dim
    generator = torch.Generator(device).manual_seed(1)

    def vector(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    key, query = vector(dim), vector(dim) / dim**0.5
    queries = vector(S, dim, dtype=torch.float32) / dim**0.5
    queries[0] = fold_once(key, query)
    weights = Weights(queries, query, key, vector(dim))
    sets = cold_sets(op, N, S, T, dim, device)
    rounds = 3 if options.quick else 15
    calls = max(len(sets), 4) if options.quick else max(len(sets), WARM_CALLS)
    timers: dict[str, list[Callable[[], float]]] = {}
    for package in options.package:
        try:
            call = PACKAGES[package](op, weights, sets[0])
            if call is None:
                continue
            with torch.no_grad():
                timers[package] = [
                    capture(call, sets, calls)[0],
                    capture(call, sets[:1], 4 if options.quick else WARM_CALLS)[0],
                ]
        except Exception as error:  # another package's limits are no failure of this program
            if package == "flash_attn_res":
                raise
            missing[package] = f"{op} T={T}: {type(error).__name__}: {error}".splitlines()[0]
    times: dict[str, list[list[float]]] = {package: [[], []] for package in timers}
    with torch.no_grad():
        for _ in range(rounds + 2):
            for package, pair in timers.items():
                for kept, timer in zip(times[package], pair, strict=True):
                    kept.append(timer())
    return [
        {
            "package": package,
            "op": op,
            "shape": {"N": N, "S": S, "T": T, "D": dim},
            "us_cold": round(statistics.median(cold[2:]), 3),
            "us_warm": round(statistics.median(warm[2:]), 3),
            "bytes": bytes_moved(op, N, S, T, dim),
        }
        for package, (cold, warm) in times.items()
    ]


def measure_copy(device: str) -> float:
    """Bytes per second, read and written, of a copy."""
    count = (1 << 30) if device == "cuda" else harness.COPY_BYTES // 2
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            target.copy_(source)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e-3)
        else:
            start = time.perf_counter()
            target.copy_(source)
            times.append(time.perf_counter() - start)
    return 2 * count / statistics.median(times[2:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--op", nargs="+", choices=sorted({case[0] for case in CASES}))
    parser.add_argument("--package", nargs="+", choices=PACKAGES, default=list(PACKAGES))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="few rounds and sizes")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("decode: there is no GPU here that PyTorch can use; --device cpu tries the program")
        return 1
    options.dim = D if options.device == "cuda" else 256
    tokens = options.tokens or ([1, 64] if options.quick else TOKENS)
    missing: dict[str, str] = {}
    rows: list[dict] = []
    copy = measure_copy(options.device)
    for op, N, S in CASES:
        if options.op and op not in options.op:
            continue
        for T in tokens:
            measured = measure_case(op, N, S, T, options, missing)
            rows += measured
            for row in measured:
                print(
                    f"{op:8} N={N} S={S} T={T:<6} {row['package']:24} "
                    f"cold {row['us_cold']:9.2f} us  warm {row['us_warm']:9.2f} us  "
                    f"{100 * row['bytes'] / (row['us_cold'] * 1e-6) / copy:5.1f} % of copy",
                    flush=True,
                )
            if options.device == "cuda":
                torch.cuda.empty_cache()
    for package, reason in missing.items():
        print(f"left out: {package} ({reason})")
    name = torch.cuda.get_device_name() if options.device == "cuda" else harness.cpu_name()
    out = options.out
    if out is None and options.device == "cuda" and not options.quick:
        out = harness.ROOT / "benchmarks" / "results" / "h100-decode.json"
    if out is not None:
        harness.write_results(out, name, copy, rows)
        print(f"wrote {out}")
    else:
        print(json.dumps(rows[:1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
