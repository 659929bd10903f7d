"""Measures phase 1 over blocks in float8 and float16 with scales, beside bfloat16 ones.

Usage: storage.py [--out FILE] [--rounds N]

Each storage has its own bytes: a source is D, 2 D + 1 or 2 D bytes a token (float8 also one scale
for 128 columns), mixtures and gradients are bfloat16, sums over gradients are bfloat16 read and
written. Percent of copy is of those bytes; `speedup` is the time of bfloat16 over that of the
storage. Rounds interleave the storages and a copy, each on an L2 that holds none of their inputs.
"""

from __future__ import annotations

import argparse
import json
import pathlib

import cuda_kernels as kernels
import torch
from torch import Tensor

from flash_attn_res import QuantizedSource, quantize

OPS = torch.ops.flash_attn_res
STORAGES = ("bfloat16", "float8", "float16")
SHAPES = [
    *({"N": 8, "S": S, "T": 16384, "D": D} for D in (2048, 2304, 4096, 7168) for S in (1, 4, 8)),
    {"N": 4, "S": 4, "T": 32768, "D": 2048},
    {"N": 8, "S": 24, "T": 8192, "D": 7168},
    {"N": 16, "S": 4, "T": 16384, "D": 2048},
]


class Case:
    """Phase 1 of one shape and storage, forward and backward."""

    def __init__(self, storage: str, raw: list[Tensor], queries: Tensor) -> None:
        S, D = queries.shape
        N, T = len(raw), raw[0].shape[0]
        self.values, self.scales = raw, []
        if storage != "bfloat16":
            stored: list[QuantizedSource] = [quantize(v, storage) for v in raw]
            self.values = [s.values for s in stored]
            self.scales = [s.scale for s in stored]
        self.queries = queries
        self.out = torch.empty(S, T, D, dtype=torch.bfloat16, device="cuda")
        self.lse = torch.empty(S, T, device="cuda")
        self.logits = torch.empty(T, S, N, device="cuda")
        self.inv_rms = torch.empty(T, N, device="cuda")
        self.dsources = [torch.zeros_like(v) for v in raw]
        self.dqueries = torch.empty_like(queries)
        self.dlse, self.gate = torch.randn_like(self.lse), torch.rand_like(self.lse)
        self.dout = torch.randn_like(self.out)
        bank = sum(t.numel() * t.element_size() for t in (*self.values, *self.scales))
        row = T * D * 2
        self.bytes = {"forward": bank + S * row, "backward": bank + (S + 2 * N) * row}

    def forward(self) -> None:
        OPS.attend_into(
            *(self.values, self.queries, 1.0, 1e-6, self.out, self.lse, self.logits, self.inv_rms),
            self.scales,
        )

    def backward(self) -> None:
        OPS.attend_backward_into(
            *(self.dout, self.dlse, self.gate, self.values, self.queries, self.lse, self.logits),
            *(self.inv_rms, 1.0, self.dsources, True, self.dqueries, False, self.scales),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    timer = kernels.Timer()
    copy, copy_bytes = kernels.copy_runner()
    rows = []
    for shape in SHAPES:
        raw = [kernels.randn(shape["T"], shape["D"]) for _ in range(shape["N"])]
        queries = kernels.floats(shape["S"], shape["D"]).normal_() / shape["D"] ** 0.5
        cases = {storage: Case(storage, raw, queries) for storage in STORAGES}
        for direction in ("forward", "backward"):
            runs = {storage: getattr(case, direction) for storage, case in cases.items()}
            times, failed = timer.interleaved({**runs, "copy": copy}, args.rounds)
            rate = copy_bytes / kernels.percentile(times["copy"], 50)
            for storage, case in cases.items():
                row = {"op": f"phase1_{direction}", "storage": storage, **shape}
                rows.append(row)
                if storage in failed:
                    row["failure"] = failed[storage]
                    continue
                median = kernels.percentile(times[storage], 50)
                row |= {
                    "us": median,
                    "us_p10": kernels.percentile(times[storage], 10),
                    "us_p90": kernels.percentile(times[storage], 90),
                    "percent_of_copy": 100 * case.bytes[direction] / median / rate,
                    "speedup": kernels.percentile(times["bfloat16"], 50) / median,
                }
                print(
                    f"{row['op']:16} N={shape['N']:<2} S={shape['S']:<2} D={shape['D']} "
                    f"{storage:8} {median:8.1f} us {row['percent_of_copy']:5.1f} % of copy "
                    f"{row['speedup']:.2f}x",
                    flush=True,
                )
        del cases, raw
    if args.out:
        result = {"machine": kernels.describe_machine(), "rows": rows}
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
