"""Small batches: one reading site at T = 1 .. 16384 tokens, in CUDA graphs, cold and warm.

  advance       phase-1 result, partial sum, update, norm: 5 units of T * D elements
  oneshot       N sources: N + 1 units
  k3_site       N - 1 rows of a token-major bank, prefix, update, norm: N + 4 units
  phase1        S queries over N sources: N + S units

A time is that of a replay of a graph of many calls, divided by the calls: the gap between two
kernels of a graph is in it, the launch from the host is not. Warm: every call works on the same
tensors. Cold: the calls go round a set of tensors that is at least three times the L2 cache.
In a round every contender runs once.

Other packages come through accuracy/peers.py, vLLM and FlashInfer where they can be imported; each
is held to our result before it is timed. The forms of torch.compile are measured on request: they
compile anew for every T. On a CPU the same calls are timed one by one.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flash_attn_res import inference
from flash_attn_res.cli.accuracy import peers
from flash_attn_res.cli.accuracy.peers import UnsupportedError
from flash_attn_res.cli.bench import harness
from flash_attn_res.cli.bench.harness import OURS, Request, Row, describe
from flash_attn_res.cli.device import device_name

D, CPU_D = 7168, 256
DTYPE = torch.bfloat16
EPS = 1e-6
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
CASES = [  # operation, N, S
    ("advance", 0, 1),
    ("oneshot", 2, 1),
    ("oneshot", 9, 1),
    ("k3_site", 9, 1),
    ("phase1", 8, 24),
]
OPS = list(dict.fromkeys(case[0] for case in CASES))
MOST_SETS = 4096
WARM_CALLS = 64


@dataclasses.dataclass
class Inputs:
    """Tensors of one call. Weights are shared by the calls, as they are in a model."""

    bank: Tensor  # [T, N - 1, D], of k3_site
    sources: Tensor  # [N, T, D], of the others
    partial: Tensor  # [T, D]
    update: Tensor  # [T, D]
    out: Tensor  # [S, T, D]
    lse: Tensor  # [S, T]
    x: Tensor  # [T, D]

    def copy(self) -> Inputs:
        return Inputs(*(getattr(self, field.name).clone() for field in dataclasses.fields(self)))


@dataclasses.dataclass
class Weights:
    queries: Tensor  # [S, D] float32, folded
    query: Tensor  # [D] in the storage dtype
    key: Tensor  # [D] in the storage dtype
    norm: Tensor  # [D] float32


Call = Callable[[Inputs], Tensor]


def make_inputs(shape: peers.Case) -> Inputs:
    T, N, S, dim = shape.T, shape.N, shape.S, shape.D

    def values(*sizes: int) -> Tensor:
        return torch.empty(*sizes, device=shape.device, dtype=DTYPE).normal_()

    k3, advance = shape.op == "k3_site", shape.op == "advance"
    sums = T if k3 or advance else 0
    return Inputs(
        bank=values(T if k3 else 0, max(N - 1, 1), dim),
        sources=values(0 if k3 or advance else N, T, dim),
        partial=values(sums, dim),
        update=values(sums, dim),
        out=values(0 if shape.op in ("oneshot", "k3_site") else S, T, dim),
        lse=torch.randn(S, T, device=shape.device),
        x=values(0 if shape.op == "phase1" else T, dim),
    )


def bytes_moved(shape: peers.Case) -> int:
    N, S = shape.N, shape.S
    units = {"advance": 5, "oneshot": N + 1, "k3_site": N + 4, "phase1": N + S}[shape.op]
    return units * shape.T * shape.D * DTYPE.itemsize


# -------------------------------------------------------------------------------------- contenders
# A contender is made for a shape and gives a call: inputs to the result, x or phase 1's mixtures.


def ours(shape: peers.Case, weights: Weights, example: Inputs) -> Call:
    op, query, queries = shape.op, weights.queries[0], weights.queries

    def arguments(i: Inputs) -> dict[str, Any]:
        if op == "oneshot":
            return {"x": i.x, "sources": i.sources}
        summed = {"x": i.x, "partial": i.partial, "update": i.update, "partial_out": i.partial}
        if op == "advance":
            return {**summed, "phase1": (i.out[0], i.lse[0]), "norm_weight": weights.norm}
        return {**summed, "sources": i.bank.movedim(1, 0), "norm_weight": weights.norm}

    if op == "phase1":
        need = inference.attend_workspace_bytes(
            example.sources, queries, out=example.out, lse=example.lse
        )
        workspace = torch.empty(need, dtype=torch.uint8, device=queries.device)

        def attend(i: Inputs) -> Tensor:
            inference.attend_out(
                i.sources, queries, out=i.out, lse=i.lse, eps=EPS, workspace=workspace
            )
            return i.out

        return attend
    need = inference.read_workspace_bytes(query, **arguments(example))
    workspace = torch.empty(need, dtype=torch.uint8, device=query.device)

    def read(i: Inputs) -> Tensor:
        inference.read_out(query, **arguments(i), eps=EPS, workspace=workspace)
        return i.x

    return read


def peer(name: str, shape: peers.Case, weights: Weights) -> Call:
    """An adapter of peers.py, which says what is to be installed."""
    if shape.op not in peers.OPS:
        raise UnsupportedError("has no such operation")
    function = peers.PEERS[name](shape)
    key_values = {"queries": weights.queries}

    def call(i: Inputs) -> Tensor:
        values: dict[str, Any]
        if shape.op == "advance":
            values = {
                "o": i.out[0],
                "lse": i.lse[0],
                "partial": i.partial,
                "update": i.update,
                "weight": weights.norm,
            }
        else:
            sources = list(i.sources.unbind(0)) if name in peers.LISTS else i.sources
            values = {"sources": sources}
        return function({**key_values, **values})[0]

    return call


def vllm(shape: peers.Case, weights: Weights) -> Call:
    if shape.op != "k3_site":
        raise UnsupportedError("has the Kimi K3 site only")
    from vllm.models.kimi_k3.nvidia.ops.attn_res import attn_res

    site = (weights.key, weights.query, weights.norm.to(DTYPE))
    return lambda i: attn_res(i.partial, i.update, i.bank, *site, i.bank.shape[1], -1, EPS, EPS)


def flashinfer(shape: peers.Case, weights: Weights) -> Call:
    if shape.op != "k3_site":
        raise UnsupportedError("has the Kimi K3 site only")
    from flashinfer.kimi_k3_attn_res import kimi_k3_attn_res

    site = (weights.key, weights.query, weights.norm.to(DTYPE))
    return lambda i: kimi_k3_attn_res(
        *(i.partial, i.update, i.bank, *site, i.x),
        num_blocks=i.bank.shape[1],
        eps=EPS,
        output_norm_eps=EPS,
    )


PACKAGES = [OURS, *peers.PEERS, "vllm", "flashinfer"]
ON_REQUEST = [name for name in peers.PEERS if name.startswith(harness.COMPILED)]
"""Measured where they are named alone."""
LIMIT = 1.5e-2
"""Largest relative L2 distance of another package's result from ours."""


def contender(package: str, shape: peers.Case, weights: Weights, example: Inputs) -> Call:
    """The call of a package, held to our result on the same inputs before it is timed."""
    reference = ours(shape, weights, example)
    if package == OURS:
        return reference
    own = {"vllm": vllm, "flashinfer": flashinfer}
    call = own[package](shape, weights) if package in own else peer(package, shape, weights)
    want, got = reference(example.copy()).float(), call(example.copy()).float()
    distance = ((got.reshape(want.shape) - want).norm() / want.norm()).item()
    if not distance <= LIMIT:
        raise UnsupportedError(f"disagrees: relative L2 distance {distance:.1e}")
    return call


# ------------------------------------------------------------------------------------------ timing


def capture(call: Call, sets: list[Inputs], calls: int) -> Callable[[], float]:
    """A function that replays `calls` calls, going round the sets, and gives microseconds each."""
    if sets[0].x.device.type != "cuda":

        def run() -> float:
            start = time.perf_counter()
            for index in range(calls):
                call(sets[index % len(sets)])
            return (time.perf_counter() - start) / calls * 1e6

        return run
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

    return replay


def cold_sets(shape: peers.Case) -> list[Inputs]:
    """As many sets of tensors as are three times the L2 cache, at least two."""
    count = 2
    if shape.device.startswith("cuda"):
        l2 = torch.cuda.get_device_properties(shape.device).L2_cache_size
        count = max(2, min(3 * l2 // bytes_moved(shape) + 1, MOST_SETS))
    return [make_inputs(shape) for _ in range(count)]


def measure_case(shape: peers.Case, request: Request, copy: float) -> list[Row]:
    """Every package at one operation and number of tokens."""
    device, dim = shape.device, shape.D
    key, query = (torch.randn(dim, device=device).to(DTYPE) for _ in range(2))
    query = query / dim**0.5
    # Values that bfloat16 has: a peer that stores its queries so loses nothing by it.
    queries = (torch.randn(shape.S, dim, device=device) / dim**0.5).to(DTYPE).float()
    if shape.op == "k3_site":
        queries[0] = key.float() * query.float()
    weights = Weights(queries, query, key, torch.rand(dim, device=device) + 0.5)
    sets = cold_sets(shape)
    rounds = request.options.rounds or (3 if request.quick else 15)
    warm_calls = 4 if request.quick else WARM_CALLS
    sizes = {"N": shape.N, "S": shape.S, "T": shape.T, "D": dim}
    where = {"op": shape.op, "shape": sizes, "dtype": str(DTYPE).removeprefix("torch.")}
    rows: list[Row] = []
    timers: dict[str, list[Callable[[], float]]] = {}
    for package in request.packages:
        try:
            with torch.no_grad():
                call = contender(package, shape, weights, sets[0])
                timers[package] = [
                    capture(call, sets, max(len(sets), warm_calls)),
                    capture(call, sets[:1], warm_calls),
                ]
        except Exception as error:  # noqa: PERF203 - whatever a package raises is its result
            harness.failed(rows, package, where, describe(error))
    times: dict[str, list[list[float]]] = {package: [[], []] for package in timers}
    with torch.no_grad():
        for _ in range(rounds + 2):
            for package, pair in timers.items():
                for kept, timer in zip(times[package], pair, strict=True):
                    kept.append(timer())
    size = bytes_moved(shape)
    for package, (cold, warm) in times.items():
        rate = size / (statistics.median(cold[2:]) * 1e-6)
        row = {
            "package": package,
            **where,
            **harness.spread("us_cold", cold[2:], 3),
            **harness.spread("us_warm", warm[2:], 3),
            "bytes": size,
            "percent_of_copy": round(100 * rate / copy, 1),
        }
        rows.append(row)
        print(
            f"{shape.op:8} N={shape.N} S={shape.S} T={shape.T:<6} {package:24} "
            f"cold {row['us_cold']:9.2f} us ({row['us_cold_p10']:.2f} to {row['us_cold_p90']:.2f}) "
            f" warm {row['us_warm']:9.2f} us  {row['percent_of_copy']:5.1f} % of copy",
            flush=True,
        )
    return rows


def run(request: Request) -> list[Row]:
    """Measures and writes after each case."""
    tokens = request.options.tokens or ([1, 64] if request.quick else TOKENS)
    timer = harness.Timer(request.device)
    copy = harness.measure_copy(timer, harness.copy_runner(request.device), 3)
    print(f"{device_name(request.device)}, copy {copy / 1e12:.3f} TB/s")
    rows: list[Row] = []
    for op, N, S in CASES:
        if request.ops and op not in request.ops:
            continue
        for T in tokens:
            dim = D if request.cuda else CPU_D
            # Each call has inputs of its own; an adapter asks the case for their names alone.
            name = "sources" if op in ("oneshot", "phase1") else "partial"
            given = {name: torch.empty(0)}
            shape = peers.Case(op, N, S, T, dim, str(request.device), inputs=given)
            rows += measure_case(shape, request, copy)
            request.store.write(rows, copy)
            if request.cuda:
                torch.cuda.empty_cache()
    return rows
