"""CPU: the library against torch.compile and eager PyTorch on the same threads.

Cases: one-shot (S = 1) and phase 1 (S = 8) at D = 2048, N = 4 and 8, bfloat16 and float32, forward
and backward; merge and advance for the whole stream. torch.compile gets two ways of writing the
formulas, over a list and over a stack of sources; both are reported. The working set of every case
is far larger than the last-level cache.

Backward times are of the backward alone: its forward runs before, untimed.
"""

from __future__ import annotations

import functools
import operator
import statistics
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from flash_attn_res import attend, read
from flash_attn_res.cli.bench import harness
from flash_attn_res.cli.bench.harness import COMPILED, OURS, Request, Row, Run, Staged, Timer
from flash_attn_res.cli.device import device_name

EPS = 1e-6
DIM = 2048
OPS = ["oneshot", "phase1", "merge", "advance"]
PACKAGES = [
    OURS,
    *(f"{COMPILED} (list)", f"{COMPILED} (stack)", COMPILED),  # the last is of the stream's
    "eager",
]


# ------------------------------------------------------------------ the formulas in plain PyTorch


def inverse_rms(v: Tensor) -> Tensor:
    return torch.rsqrt(v.square().mean(-1) + EPS)


def total(terms: Iterable[Tensor]) -> Tensor:
    return functools.reduce(operator.add, terms)


def attend_list(sources: list[Tensor], queries: Tensor) -> Tensor:
    """Source by source; [S, T, D]."""
    values = [v.float() for v in sources]
    logits = torch.stack([(v @ queries.t()) * inverse_rms(v)[:, None] for v in values])  # (N,T,S)
    p = logits.softmax(0)
    out = [
        total(p[n, :, s, None] * v for n, v in enumerate(values)) for s in range(queries.shape[0])
    ]
    return torch.stack(out).to(sources[0].dtype)


def attend_stack(sources: list[Tensor], queries: Tensor) -> Tensor:
    """Over a stack of sources; [S, T, D]."""
    v = torch.stack(sources).float()  # (N,T,D)
    logits = torch.einsum("ntd,sd->snt", v, queries) * inverse_rms(v)  # (S,N,T)
    return torch.einsum("snt,ntd->std", logits.softmax(1), v).to(sources[0].dtype)


def one_shot_list(sources: list[Tensor], query: Tensor) -> Tensor:
    """One query, source by source; [T, D]. This form fuses best."""
    values = [v.float() for v in sources]
    logits = torch.stack([(v * query).sum(-1) * inverse_rms(v) for v in values])  # (N,T)
    p = logits.softmax(0)
    return total(p[n, :, None] * v for n, v in enumerate(values)).to(sources[0].dtype)


def one_shot_stack(sources: list[Tensor], query: Tensor) -> Tensor:
    return attend_stack(sources, query[None])[0]


def merge_plain(out: Tensor, lse: Tensor, partial: Tensor, query: Tensor) -> Tensor:
    o, b = out.float(), partial.float()
    q = torch.sigmoid((b * query).sum(-1) * inverse_rms(b) - lse)
    return (o + q[:, None] * (b - o)).to(out.dtype)


def advance_plain(
    out: Tensor, lse: Tensor, partial: Tensor, update: Tensor, query: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    total = partial + update
    h = merge_plain(out, lse, total, query).float()
    return (h * inverse_rms(h)[:, None] * weight).to(out.dtype), total


# ------------------------------------------------------------------------------------------ cases


class Case:
    """Inputs, contenders and minimum bytes of one operation at one shape."""

    def __init__(
        self,
        op: str,
        shape: dict[str, int],
        dtype: torch.dtype,
        units: tuple[int, int],
        inputs: list[Tensor],
        functions: dict[str, Callable[..., object]],
    ) -> None:
        self.op, self.shape, self.dtype, self.inputs = op, shape, dtype, inputs
        unit = shape["T"] * shape["D"] * dtype.itemsize
        self.forward_bytes, self.backward_bytes = units[0] * unit, units[1] * unit
        self.functions = functions

    def forward_runs(self, packages: list[str]) -> dict[str, Run | Staged]:
        """The forward of every package that has one."""
        inputs = [t.detach() for t in self.inputs]

        def run(function: Callable[..., object]) -> Run:
            def call() -> object:
                with torch.no_grad():
                    return function(*inputs)

            return call

        return {name: run(f) for name, f in self.functions.items() if name in packages}

    def backward_runs(self, packages: list[str]) -> dict[str, Run | Staged]:
        """The backward, each after an untimed forward."""
        inputs = [t.detach().requires_grad_() for t in self.inputs]

        def staged(function: Callable[..., object]) -> Staged:
            cotangents: list[Tensor] = []

            def prepare() -> tuple[Tensor, ...]:
                out = function(*inputs)
                outputs = out if isinstance(out, tuple) else (out,)
                if not cotangents:
                    cotangents.extend(torch.randn_like(out) for out in outputs)
                return outputs

            def run(outputs: tuple[Tensor, ...]) -> object:
                return torch.autograd.grad(outputs, inputs, cotangents)

            return Staged(prepare, run)

        return {name: staged(f) for name, f in self.functions.items() if name in packages}


def compiled(function: Callable[..., object]) -> Callable[..., object]:
    return torch.compile(function, fullgraph=True, dynamic=False)


def cases(quick: bool) -> Iterator[Case]:
    """One at a time: inputs are large, and each case compiles afresh."""
    for dtype in (torch.bfloat16, torch.float32):
        for num_sources in (4,) if quick else (4, 8):
            for num_queries in (1, 8):
                torch.compiler.reset()
                yield mixing_case(num_sources, num_queries, dtype, 512 if quick else 4096)
        for case in stream_cases(dtype, 1024 if quick else 8192):
            torch.compiler.reset()
            yield case


def mixing_case(num_sources: int, num_queries: int, dtype: torch.dtype, tokens: int) -> Case:
    n, s = num_sources, num_queries
    sources = [torch.randn(tokens, DIM).to(dtype) for _ in range(n)]
    shape = {"N": n, "S": s, "T": tokens, "D": DIM}
    forms: dict[str, Callable[[list[Tensor], Tensor], Tensor]]
    if s == 1:
        forms = {"list": one_shot_list, "stack": one_shot_stack}
        query = torch.randn(DIM) / DIM**0.5
        op = "oneshot"

        def ours(*inputs: Tensor) -> Tensor:
            return read(inputs[-1], sources=inputs[:-1], eps=EPS).x
    else:
        forms = {"list": attend_list, "stack": attend_stack}
        query = torch.randn(s, DIM) / DIM**0.5
        op = "phase1"

        def ours(*inputs: Tensor) -> Tensor:
            return attend(inputs[:-1], inputs[-1], eps=EPS).out

    functions: dict[str, Callable[..., object]] = {OURS: ours}
    for name, form in forms.items():

        def plain(*inputs: Tensor, form: Callable[..., Tensor] = form) -> Tensor:
            return form(list(inputs[:-1]), inputs[-1])

        functions[f"{COMPILED} ({name})"] = compiled(plain)
        if name == "stack":
            functions["eager"] = plain
    return Case(op, shape, dtype, (n + s, 2 * n + s), [*sources, query], functions)


def stream_cases(dtype: torch.dtype, tokens: int) -> list[Case]:
    out, partial, update = (torch.randn(tokens, DIM).to(dtype) for _ in range(3))
    lse = torch.randn(tokens)
    query = torch.randn(DIM) / DIM**0.5
    weight = torch.ones(DIM)
    shape = {"N": 0, "S": 1, "T": tokens, "D": DIM}

    def merge(out: Tensor, lse: Tensor, partial: Tensor, query: Tensor) -> Tensor:
        return read(query, phase1=(out, lse), partial=partial, eps=EPS).x

    def advance(
        out: Tensor, lse: Tensor, partial: Tensor, update: Tensor, query: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        result = read(
            query, phase1=(out, lse), partial=partial, update=update, norm_weight=weight, eps=EPS
        )
        assert result.partial is not None
        return result.x, result.partial

    return [
        Case(
            "merge",
            shape,
            dtype,
            (3, 5),
            [out, lse, partial, query],
            {
                OURS: merge,
                COMPILED: compiled(merge_plain),
                "eager": merge_plain,
            },
        ),
        Case(
            "advance",
            shape,
            dtype,
            (5, 6),
            [out, lse, partial, update, query, weight],
            {
                OURS: advance,
                COMPILED: compiled(advance_plain),
                "eager": advance_plain,
            },
        ),
    ]


def run(request: Request) -> list[Row]:
    """Measures and writes after each case."""
    threads = torch.get_num_threads()
    rounds = request.options.rounds or (3 if request.quick else 11)
    torch.manual_seed(0)
    timer = Timer(request.device)
    run_copy, copy_bytes = harness.copy_runner(request.device)

    print(f"{device_name(request.device)}, {threads} threads")
    print(
        f"{'op':14} {'shape':22} {'dtype':9} {'package':24} {'ms':>8} {'p10':>8} {'p90':>8} "
        f"{'GB/s':>7} {'% copy':>7}"
    )
    rows: list[Row] = []
    copies = []
    for case in cases(request.quick):
        if request.ops and case.op not in request.ops:
            continue
        for direction, runs, moved in (
            ("fwd", case.forward_runs(request.packages), case.forward_bytes),
            ("bwd", case.backward_runs(request.packages), case.backward_bytes),
        ):
            key = {
                "op": f"{case.op}_{direction}",
                "shape": case.shape,
                "dtype": str(case.dtype).removeprefix("torch."),
                "threads": threads,
            }
            # The bandwidth of a shared machine comes and goes: a copy runs in the same rounds.
            times, failures = timer.interleaved({"copy": run_copy, **runs}, rounds, warmup=2)
            rate = copy_bytes / (statistics.median(times.pop("copy")) * 1e-6)
            copies.append(rate)
            for package, measured in times.items():
                row = {
                    "package": package,
                    **key,
                    **harness.spread("us", measured),
                    "bytes": moved,
                    "percent_of_copy": round(
                        100 * moved / (statistics.median(measured) * 1e-6) / rate, 1
                    ),
                }
                rows.append(row)
                shape = " ".join(f"{axis}{size}" for axis, size in case.shape.items())
                print(
                    f"{row['op']:14} {shape:22} {row['dtype']:9} {package:24} "
                    f"{row['us'] / 1e3:8.2f} {row['us_p10'] / 1e3:8.2f} {row['us_p90'] / 1e3:8.2f} "
                    f"{moved / row['us'] / 1e3:7.1f} {row['percent_of_copy']:7.1f}",
                    flush=True,
                )
            for package, why in failures.items():
                harness.failed(rows, package, key, why)
        request.store.write(rows, statistics.median(copies))
    return rows
