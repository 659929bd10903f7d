"""The error of the quantised x of a Kimi K3 site against the exact one, on the CPU.

Usage: fp8_error.py [--out FILE]

Inputs are bfloat16, T = 512, D = 7168, 8 snapshots and a prefix; in the family "outliers" one
column in 256 is 30 times as large, as activations of language models are. The exact x is computed
in float64. rel_l2 is the norm of the error over that of x; the float32 x and its rounding to
bfloat16 stand beside it.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

import torch
from torch import Tensor

from flash_attn_res import inference, read
from flash_attn_res.cli.bench import harness

T, N, D = 512, 8, 7168
FP8 = torch.float8_e4m3fn


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    results = pathlib.Path(__file__).resolve().parents[1] / "results" / "fp8-error.json"
    parser.add_argument("--out", type=pathlib.Path, default=results)
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for family in ("normal", "outliers"):
        factor = torch.ones(D)
        if family == "outliers":
            factor[::256] = 30
        values = [(torch.randn(T, D) * factor).bfloat16() for _ in range(N + 1)]
        query, weight = torch.randn(D) / D**0.5, (torch.rand(D) + 0.5).bfloat16()
        exact = read(
            query.double(), sources=[v.double() for v in values], norm_weight=weight.double()
        ).x

        def measure(
            stored: str, scales: str, x: Tensor, exact: Tensor = exact, family: str = family
        ) -> None:
            error = x.double() - exact
            rows.append(
                {
                    "family": family,
                    "stored": stored,
                    "scales": scales,
                    "rel_l2": (error.norm() / exact.norm()).item(),
                    "max_over_rms": (error.abs().max() / exact.square().mean().sqrt()).item(),
                }
            )

        plain = torch.empty(T, D)
        inference.read_out(query, x=plain, sources=values, norm_weight=weight)
        measure("float32", "", plain)
        measure("bfloat16", "", plain.bfloat16())
        for groups in (False, True):
            for power_of_two in (False, True):
                x = torch.empty(T, D, dtype=FP8)
                scale = torch.empty(T, inference.scale_columns(D, groups))
                inference.read_out(
                    query,
                    x=x,
                    x_scale=scale,
                    sources=values,
                    norm_weight=weight,
                    power_of_two_scale=power_of_two,
                )
                width = 128 if groups else D
                name = ("a group of 128" if groups else "a token") + (
                    ", powers of two" if power_of_two else ""
                )
                measure("e4m3", name, x.float() * scale.repeat_interleave(width, 1)[:, :D])
    machine = harness.describe_machine(torch.device("cpu"))
    harness.write_results(options.out, "fp8-error", machine, None, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
