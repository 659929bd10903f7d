"""Measures the CUDA kernels against a device copy.

Usage: cuda_kernels.py [--out FILE] [--shape A --shape B ...] [--neighbours] [--op NAME ...]
                       [--repeats N]

Shapes are A, B and C; --neighbours measures around A instead, with other N and D.

Percent of copy = the fewest bytes that the operation must move, over its time, against the rate of
a device-to-device copy in the same run (bytes read + bytes written). Every tensor is far larger
than L2. Medians; a short busy wait before each measurement keeps launch gaps out.

Bytes, in units of T * D elements (statistics of a token, a few floats, are left out):

  phase1_fwd          reads N sources, writes S mixtures
  phase1_bwd          reads N sources, S gradients and N sums, writes N sums (gated)
  oneshot_fwd         reads N sources, writes x
  oneshot_bwd         reads N sources and dx, writes N gradients
  merge_fwd           reads o and partial, writes x
  merge_bwd           reads dx, o, partial and dpartial, writes dpartial
  advance_fwd         reads partial, update and o, writes partial' and x (with the norm)
  advance_bwd         reads dx, partial', o and dpartial, writes dh and dpartial (with the norm)
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "gpu"))

import native  # noqa: E402

SHAPES = {
    "A": {"N": 4, "S": 8, "T": 65536, "D": 2048},
    "B": {"N": 8, "S": 24, "T": 8192, "D": 7168},
    "C": {"N": 10, "S": 6, "T": 16384, "D": 2304},
}
# Around A: as many elements a tensor, and no other difference than the one in the name.
NEIGHBOURS = {
    **{f"D{D}": {**SHAPES["A"], "T": 2**27 // D, "D": D} for D in (1024, 4096, 5120, 8192)},
    **{f"N{N}": {**SHAPES["A"], "N": N} for N in (1, 2, 3, 16)},
}
DTYPE = torch.bfloat16


def randn(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    out = torch.empty(*shape, device="cuda", dtype=dtype)
    return out.normal_()


def floats(*shape: int) -> Tensor:
    return torch.empty(*shape, device="cuda")


def measure(run: Callable[[], None], repeats: int) -> float:
    """Median microseconds."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(300_000)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


def measure_copy(repeats: int) -> float:
    """Bytes per second of a copy of 1 GiB, read + written."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda").fill_(1)
    target = torch.empty_like(source)
    return 2 * source.numel() / (measure(lambda: target.copy_(source), repeats) * 1e-6)


class Site:
    """The tensors of one shape, made when first asked for."""

    def __init__(self, N: int, S: int, T: int, D: int) -> None:
        self.N, self.S, self.T, self.D = N, S, T, D
        self.queries = randn(S, D, dtype=torch.float32) / D**0.5
        self.query = self.queries[:1]
        self.weight = randn(1, D, dtype=torch.float32)

    def rows(self, count: int) -> list[Tensor]:
        return [randn(self.T, self.D) for _ in range(count)]

    def phase1(self, sources: list[Tensor]) -> tuple[native.Call, dict[str, Tensor]]:
        saved = {
            "lse": floats(self.S, self.T),
            "logits": floats(self.T, self.S * self.N),
            "inv_rms": floats(self.T, self.N),
        }
        call = native.Call(
            "attend", sources=sources, queries=self.queries, out=self.rows(self.S), **saved
        )
        return call, saved

    def phase1_fwd(self) -> tuple[native.Call, int]:
        return self.phase1(self.rows(self.N))[0], self.N + self.S

    def phase1_bwd(self) -> tuple[native.Call, int]:
        sources = self.rows(self.N)
        forward, saved = self.phase1(sources)
        forward.run()
        del forward
        call = native.Call(
            "attend_backward",
            sources=sources,
            queries=self.queries,
            dout=self.rows(self.S),
            gate=torch.rand(self.S, self.T, device="cuda"),
            dlse=floats(self.S, self.T).normal_(),
            dsources=self.rows(self.N),
            accumulate_dsources=1,
            dqueries=floats(self.S, self.D),
            **saved,
        )
        return call, 3 * self.N + self.S

    def read(
        self, terms: int, norm: bool, **given: object
    ) -> tuple[native.Call, dict[str, Tensor]]:
        saved = {"logits": floats(self.T, terms), "inv_rms": floats(self.T, terms)}
        options: dict[str, object] = {}
        if norm:
            saved["mix_inv_rms"] = floats(1, self.T)
            options = {"norm": 1, "norm_weight": self.weight}
        call = native.Call("read", query=self.query, x=self.rows(1)[0], **given, **saved, **options)
        return call, {**saved, **options}

    def oneshot_fwd(self, norm: bool = False) -> tuple[native.Call, int]:
        return self.read(self.N, norm, sources=self.rows(self.N))[0], self.N + 1

    def oneshot_bwd(self, norm: bool = False) -> tuple[native.Call, int]:
        sources = self.rows(self.N)
        forward, saved = self.read(self.N, norm, sources=sources)
        forward.run()
        gradients = {"dnorm_weight": floats(1, self.D)} if norm else {}
        call = native.Call(
            "read_backward",
            sources=sources,
            query=self.query,
            dx=self.rows(1)[0],
            dsources=self.rows(self.N),
            dquery=floats(1, self.D),
            **saved,
            **gradients,
        )
        return call, 2 * self.N + 1

    def oneshot_norm_fwd(self) -> tuple[native.Call, int]:
        return self.oneshot_fwd(norm=True)

    def oneshot_norm_bwd(self) -> tuple[native.Call, int]:
        return self.oneshot_bwd(norm=True)

    def phase1_result(self) -> dict[str, Tensor]:
        return {"phase1_out": self.rows(1)[0], "phase1_lse": floats(1, self.T).normal_()}

    def merge_fwd(self) -> tuple[native.Call, int]:
        return self.read(2, False, **self.phase1_result(), partial=self.rows(1)[0])[0], 3

    def site_bwd(self, norm: bool) -> native.Call:
        phase1, partial = self.phase1_result(), self.rows(1)[0]
        forward, saved = self.read(2, norm, **phase1, partial=partial)
        forward.run()
        extra: dict[str, object] = {}
        if norm:
            extra = {"dh": self.rows(1)[0], "dnorm_weight": floats(1, self.D)}
        dpartial = self.rows(1)[0]
        return native.Call(
            "read_backward",
            phase1_out=phase1["phase1_out"],
            partial=partial,
            query=self.query,
            dx=self.rows(1)[0],
            dpartial_out=dpartial,
            dpartial=self.rows(1)[0],
            dphase1_lse=floats(1, self.T),
            gate=floats(1, self.T),
            dquery=floats(1, self.D),
            **saved,
            **extra,
        )

    def merge_bwd(self) -> tuple[native.Call, int]:
        return self.site_bwd(norm=False), 5

    def advance_fwd(self) -> tuple[native.Call, int]:
        partial, update, partial_out = self.rows(3)
        call, _ = self.read(
            2,
            True,
            **self.phase1_result(),
            partial=partial,
            updates=[update],
            partial_out=partial_out,
        )
        return call, 5

    def advance_bwd(self) -> tuple[native.Call, int]:
        return self.site_bwd(norm=True), 6


OPS = [
    "oneshot_fwd",
    "oneshot_bwd",
    "oneshot_norm_fwd",
    "oneshot_norm_bwd",
    "merge_fwd",
    "merge_bwd",
    "advance_fwd",
    "advance_bwd",
    "phase1_fwd",
    "phase1_bwd",
]


def describe_machine() -> dict[str, object]:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    commit = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    outputs = [
        subprocess.run(c, capture_output=True, text=True, check=False).stdout
        for c in (query, commit)
    ]
    driver, revision = (output.partition("\n")[0].strip() or "unknown" for output in outputs)
    # A copy of the tree without its history is told which commit it is.
    revision = os.environ.get("FLASH_ATTN_RES_COMMIT", revision)
    return {
        "device": torch.cuda.get_device_name(),
        "driver": driver,
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
        "commit": revision,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--shape", action="append", choices=[*SHAPES, *NEIGHBOURS])
    parser.add_argument("--neighbours", action="store_true")
    parser.add_argument("--op", action="append", choices=OPS)
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args()

    # A single measurement of the copy now and then reads a seventh too low, which would flatter the
    # kernels: the best of several stands.
    copy = max(measure_copy(options.repeats) for _ in range(3))
    print(f"{torch.cuda.get_device_name()}, copy {copy / 1e12:.3f} TB/s")
    print(f"{'operation':18} {'shape':5} {'us':>9} {'GB/s':>7} {'% copy':>7}")
    rows = []
    shapes = {**SHAPES, **NEIGHBOURS}
    for name in options.shape or (NEIGHBOURS if options.neighbours else SHAPES):
        shape = shapes[name]
        for op in options.op or OPS:
            call, units = getattr(Site(**shape), op)()
            microseconds = measure(call.run, options.repeats)
            size = units * shape["T"] * shape["D"] * DTYPE.itemsize
            rate = size / (microseconds * 1e-6)
            print(
                f"{op:18} {name:5} {microseconds:9.1f} {rate / 1e9:7.0f} {100 * rate / copy:7.1f}",
                flush=True,
            )
            rows.append(
                {
                    "package": "flash_attn_res",
                    "op": op,
                    "shape": shape,
                    "dtype": "bfloat16",
                    "us": round(microseconds, 2),
                    "bytes": size,
                    "percent_of_copy": round(100 * rate / copy, 1),
                }
            )
            del call
            torch.cuda.empty_cache()
    if options.out:
        result = {**describe_machine(), "copy_tb_s": round(copy / 1e12, 4), "rows": rows}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
