"""Measures what the first Triton package says of its kernels, on this GPU.

Usage: insights.py [--out FILE] [--rounds N]

  normalise   relative error of the merged result (phase 1, then the merge) when phase 1 stores its
              mixture normalised, or the sum weighted by exp(logit - max) or by exp(logit)
              unnormalised, in 16 bits; by the spread of the logits
  path        phase 1 by tensor cores (Hopper kernels) and element-wise (general kernels), same
              numbers but for the first eight columns of a key: those keep the call off the Hopper
              path. The forward with one query is element-wise on both and left out
  eviction    a Triton kernel of phase 1, element-wise, that loads its queries with and without
              evict-last

Writes rows {insight, variant, shape, us | rel_l2, ...}; docs/kernels.md is made from them.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import statistics

import torch
from torch import Tensor

from flash_attn_res.cli.bench import harness, kernels
from flash_attn_res.cli.bench.harness import Run, Timer

RESULT = pathlib.Path(__file__).resolve().parents[1] / "results" / "h100-insights.json"
DEVICE = torch.device("cuda")


def normalise(device: str) -> list[dict[str, object]]:
    """Errors of three ways to hand phase 1's mixture over."""
    rows: list[dict[str, object]] = []
    N, T, D = 8, 4096, 256
    v = torch.randn(N, T, D, device=device, dtype=torch.float64)  # (N,T,D)
    b = torch.randn(T, D, device=device, dtype=torch.float64)  # (T,D)
    for spread in (1.0, 4.0, 16.0, 64.0):
        logits = spread * torch.randn(N, T, device=device, dtype=torch.float64)  # (N,T)
        last = spread * torch.randn(T, device=device, dtype=torch.float64)  # (T)
        top = logits.amax(0)
        lse = logits.logsumexp(0)
        gate = torch.sigmoid(last - lse)[:, None]
        exact = (1 - gate) * torch.einsum("nt,ntd->td", logits.softmax(0), v) + gate * b
        for storage in (torch.bfloat16, torch.float16):
            forms: dict[str, Tensor] = {}
            o = torch.einsum("nt,ntd->td", logits.softmax(0), v).to(storage).double()
            forms["normalised"] = (1 - gate) * o + gate * b
            for name, shift in (("weighted by exp(l - max)", top), ("weighted by exp(l)", 0 * top)):
                # The sum is stored in 16 bits, its denominator in float32; the merge takes the
                # maximum again where there is one.
                weights = (logits - shift).exp()
                total = torch.einsum("nt,ntd->td", weights, v).to(storage).double()
                denominator = weights.sum(0).float().double()
                again = torch.maximum(top, last) if shift is top else shift
                old = (shift - again).exp()
                new = (last - again).exp().float().double()
                forms[name] = (old[:, None] * total + new[:, None] * b) / (old * denominator + new)[
                    :, None
                ]
            for name, result in forms.items():
                broken = ~torch.isfinite(result)
                error = (result - exact)[~broken].norm() / exact[~broken].norm()
                rows.append(
                    {
                        "insight": "normalise",
                        "variant": name,
                        "dtype": str(storage).removeprefix("torch."),
                        "logit_spread": spread,
                        "rel_l2": float(f"{error.item():.3e}"),
                        "not_finite": round(broken.double().mean().item(), 6),
                    }
                )
    return rows


def both_paths(N: int, S: int, T: int, D: int) -> dict[str, dict[str, Run]]:
    """Forward and backward on the Hopper path and, by a narrower key, on the general one."""
    calls: dict[str, dict[str, Run]] = {"fwd": {}, "bwd": {}}
    site = kernels.Site(N, S, T, D, DEVICE)
    sources, out, dout, dsources = site.sources(), site.rows(S), site.rows(S), site.sources()
    for variant, width in (("tensor cores", D), ("element-wise", D - 8)):
        queries = site.queries[:, :width].contiguous()
        forward, saved = site.phase1(sources, queries, out)
        forward()
        if S > 1:  # one query is a read, element-wise on both
            calls["fwd"][variant] = forward
        calls["bwd"][variant] = site.phase1_backward(sources, queries, saved, dout, dsources)
    return calls


def paths(timer: Timer, rounds: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for N, S in ((1, 1), (1, 4), (2, 1), (2, 4), (4, 1), (4, 2), (4, 4), (4, 8), (8, 1), (8, 24)):
        shape = {"N": N, "S": S, "T": 32768, "D": 2048}
        for direction, calls in both_paths(**shape).items():
            times, failures = timer.interleaved(calls, rounds)
            units = kernels.UNITS["phase1"][direction == "bwd"](N, S)
            for variant in calls:
                row: dict[str, object] = {
                    "insight": "path",
                    "variant": variant,
                    "op": f"phase1_{direction}",
                    "shape": shape,
                }
                if variant in failures:
                    row["error"] = failures[variant]
                else:
                    row["us"] = round(statistics.median(times[variant]), 2)
                    row["bytes"] = units * shape["T"] * shape["D"] * 2
                rows.append(row)
        torch.cuda.empty_cache()
    return rows


def eviction(timer: Timer, rounds: int) -> list[dict[str, object]]:
    import eviction_kernel

    rows: list[dict[str, object]] = []
    for N, S in ((4, 8), (4, 16), (8, 8)):
        T, D = 32768, 2048
        v = torch.empty(N, T, D, device=DEVICE, dtype=torch.bfloat16).normal_()
        q = torch.randn(S, D, device=DEVICE) / D**0.5
        out = torch.empty(S, T, D, device="cuda", dtype=torch.bfloat16)
        launch = eviction_kernel.phase1[(T,)]
        runs = {
            variant: functools.partial(launch, v, q, out, T, 1e-6, N, S, D, policy, num_warps=8)
            for variant, policy in (("evict-last", "evict_last"), ("no policy", ""))
        }
        for variant, run in runs.items():
            out.fill_(float("nan"))
            run()
            exact = torch.einsum(
                "nst,ntd->std",
                (
                    torch.einsum("ntd,sd->nst", v[:, :64].float(), q)
                    * torch.rsqrt(v[:, :64].float().square().mean(-1) + 1e-6)[:, None]
                ).softmax(0),
                v[:, :64].float(),
            )
            error = ((out[:, :64].float() - exact).norm() / exact.norm()).item()
            if not error < 1e-2:
                raise RuntimeError(f"{variant}: off by {error:.1e} (relative L2)")
        times, failures = timer.interleaved(runs, rounds)
        for variant in runs:
            row: dict[str, object] = {
                "insight": "eviction",
                "variant": variant,
                "shape": {"N": N, "S": S, "T": T, "D": D},
            }
            if variant in failures:
                row["error"] = failures[variant]
            else:
                row["us"] = round(statistics.median(times[variant]), 2)
                row["bytes"] = (N + S) * T * D * 2
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=RESULT)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    timer = Timer(DEVICE)
    rate = harness.measure_copy(timer, harness.copy_runner(DEVICE), options.rounds)
    rows = normalise("cuda") + paths(timer, options.rounds)
    try:
        rows += eviction(timer, options.rounds)
    except Exception as error:  # no Triton, or one that does not compile it: that is the result
        rows.append({"insight": "eviction", "error": harness.describe(error)})
    for row in rows:
        if "us" in row:
            row["percent_of_copy"] = round(100 * row["bytes"] / (row["us"] * 1e-6) / rate, 1)
        print(row)
    harness.write_results(options.out, "insights", harness.describe_machine(DEVICE), rate, rows)


if __name__ == "__main__":
    main()
