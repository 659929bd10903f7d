"""CPU: the library against torch.compile and eager PyTorch on the same threads.

    python benchmarks/python/cpu.py [--quick] [--threads N] [--out FILE]

Cases: one-shot (S = 1) and phase 1 (S = 8) at D = 2048, N = 4 and 8, bfloat16 and float32, forward
and backward; merge and advance for the whole stream. torch.compile gets two ways of writing the
formulas, over a list and over a stack of sources; both are reported. The working set of every case
is far larger than the last-level cache.

Backward times are of the backward alone: its forward runs before, untimed.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
from collections.abc import Callable, Iterator

import torch
from harness import (
    COPY_BYTES,
    ROOT,
    Contender,
    copy_contender,
    cpu_name,
    interleave,
    keep_freed_memory,
    write_results,
)
from torch import Tensor

from flash_attn_res import attend, read

EPS = 1e-6
DIM = 2048


# ------------------------------------------------------------------ the formulas in plain PyTorch


def inverse_rms(v: Tensor) -> Tensor:
    return torch.rsqrt(v.square().mean(-1) + EPS)


def attend_list(sources: list[Tensor], queries: Tensor) -> Tensor:
    """Source by source; [S, T, D]."""
    values = [v.float() for v in sources]
    logits = torch.stack([(v @ queries.t()) * inverse_rms(v)[:, None] for v in values])  # (N,T,S)
    p = logits.softmax(0)
    out = [sum(p[n, :, s, None] * v for n, v in enumerate(values)) for s in range(queries.shape[0])]
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
    return sum(p[n, :, None] * v for n, v in enumerate(values)).to(sources[0].dtype)


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

    def forward_contenders(self) -> list[Contender]:
        inputs = [t.detach() for t in self.inputs]

        def run(function: Callable[..., object]) -> Callable[[], object]:
            def call() -> object:
                with torch.no_grad():
                    return function(*inputs)

            return call

        return [Contender(package, run(f)) for package, f in self.functions.items()]

    def backward_contenders(self) -> list[Contender]:
        inputs = [t.detach().requires_grad_() for t in self.inputs]

        def contender(package: str, function: Callable[..., object]) -> Contender:
            def prepare() -> tuple[Tensor, ...]:
                out = function(*inputs)
                return out if isinstance(out, tuple) else (out,)

            probe = prepare()
            cotangents = [torch.randn_like(out) for out in probe]

            def run(outputs: tuple[Tensor, ...]) -> object:
                return torch.autograd.grad(outputs, inputs, cotangents)

            return Contender(package, run, prepare)

        return [contender(package, f) for package, f in self.functions.items()]


def compiled(function: Callable[..., object]) -> Callable[..., object]:
    return torch.compile(function, fullgraph=True, dynamic=False)


def cases(quick: bool) -> Iterator[Case]:
    """One at a time: inputs are large, and each case compiles afresh."""
    for dtype in (torch.bfloat16, torch.float32):
        for num_sources in (4,) if quick else (4, 8):
            for num_queries in (1, 8):
                torch.compiler.reset()
                yield mixing_case(num_sources, num_queries, dtype)
        for case in stream_cases(dtype):
            torch.compiler.reset()
            yield case


def mixing_case(num_sources: int, num_queries: int, dtype: torch.dtype) -> Case:
    n, s = num_sources, num_queries
    tokens = 4096
    sources = [torch.randn(tokens, DIM).to(dtype) for _ in range(n)]
    shape = {"N": n, "S": s, "T": tokens, "D": DIM}
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

    functions: dict[str, Callable[..., object]] = {"flash_attn_res": ours}
    for name, form in forms.items():

        def plain(*inputs: Tensor, form: Callable = form) -> Tensor:
            return form(list(inputs[:-1]), inputs[-1])

        functions[f"torch.compile ({name})"] = compiled(plain)
        if name == "stack":
            functions["eager"] = plain
    return Case(op, shape, dtype, (n + s, 2 * n + s), [*sources, query], functions)


def stream_cases(dtype: torch.dtype) -> list[Case]:
    tokens = 8192
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
        return result.x, result.partial

    return [
        Case(
            "merge",
            shape,
            dtype,
            (3, 5),
            [out, lse, partial, query],
            {
                "flash_attn_res": merge,
                "torch.compile": compiled(merge_plain),
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
                "flash_attn_res": advance,
                "torch.compile": compiled(advance_plain),
                "eager": advance_plain,
            },
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--out", type=pathlib.Path, default=ROOT / "benchmarks" / "results" / "cpu.json"
    )
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rounds = 5 if options.quick else 11
    copy = copy_contender()

    print(f"{cpu_name()}, {options.threads} threads")
    print(f"{'op':14} {'shape':22} {'dtype':9} {'package':24} {'ms':>8} {'GB/s':>7} {'% copy':>7}")
    rows = []
    copies = []
    for case in cases(options.quick):
        for direction, contenders, moved in (
            ("fwd", case.forward_contenders(), case.forward_bytes),
            ("bwd", case.backward_contenders(), case.backward_bytes),
        ):
            # The bandwidth of a shared machine comes and goes: a copy runs in the same rounds.
            copy.times.clear()
            interleave([copy, *contenders], rounds)
            rate = COPY_BYTES / copy.percentile(50)
            copies.append(rate)
            for contender in contenders:
                seconds = contender.percentile(50)
                row = {
                    "package": contender.package,
                    "op": f"{case.op}_{direction}",
                    "shape": case.shape,
                    "dtype": str(case.dtype).removeprefix("torch."),
                    "threads": options.threads,
                    "us": seconds * 1e6,
                    "us_p10": contender.percentile(10) * 1e6,
                    "us_p90": contender.percentile(90) * 1e6,
                    "bytes": moved,
                    "percent_of_copy": 100 * moved / seconds / rate,
                }
                rows.append(row)
                shape = " ".join(f"{axis}{size}" for axis, size in case.shape.items())
                print(
                    f"{row['op']:14} {shape:22} {row['dtype']:9} {contender.package:24} "
                    f"{seconds * 1e3:8.2f} {moved / seconds / 1e9:7.1f} "
                    f"{row['percent_of_copy']:7.1f}",
                    flush=True,
                )
            best = min(
                contender.percentile(50)
                for contender in contenders
                if contender.package.startswith("torch.compile")
            )
            print(
                f"{'':14} twice as fast as torch.compile: {200 * moved / best / rate:.0f} % of copy"
            )
    write_results(options.out, cpu_name(), statistics.median(copies), rows)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
