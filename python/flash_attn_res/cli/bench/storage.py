"""Phase 1 and reading sites over blocks in float8 and float16 with scales, beside bfloat16 ones.

Each storage has its own bytes: a source takes D, 2 D or 2 D bytes a token and its scales (one for
128 columns in float8, one in float16); mixtures, their gradients, the sums that the backward adds
to and the rows of a site beside its blocks (partial sum, update, new partial sum, x) are bfloat16.
Percent of copy is of those bytes. `speedup` is the time of bfloat16, in the same rounds, over that
of the storage.
"""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

from flash_attn_res.cli.bench import harness
from flash_attn_res.cli.bench.harness import OURS, Request, Row, Run, Timer
from flash_attn_res.cli.device import device_name
from flash_attn_res.storage import quantize

PACKAGES = [OURS]
BASELINE = "bfloat16"
STORAGES = (BASELINE, "float8", "float16")
OPS = ["phase1_fwd", "phase1_bwd", "site_fwd"]
SHAPES = {
    **{
        f"D{D}-S{S}": {"N": 8, "S": S, "T": 16384, "D": D}
        for D in (2048, 2304, 4096, 7168)
        for S in (1, 4, 8)
    },
    "N4": {"N": 4, "S": 4, "T": 32768, "D": 2048},
    "N16": {"N": 16, "S": 4, "T": 16384, "D": 2048},
    "B": {"N": 8, "S": 24, "T": 8192, "D": 7168},
}
MOST_TOKENS = {"cuda": 32768, "cpu": 1024}
EPS = 1e-6


class Case:
    """Phase 1 of one shape and storage."""

    def __init__(self, storage: str, raw: list[Tensor], queries: Tensor) -> None:
        S, D = queries.shape
        N, T = len(raw), raw[0].shape[0]
        device = queries.device
        self.values, self.scales = raw, []
        if storage != BASELINE:
            stored = [quantize(value, storage) for value in raw]
            self.values = [source.values for source in stored]
            self.scales = [source.scale for source in stored]
        self.queries = queries
        self.out = torch.empty(S, T, D, dtype=torch.bfloat16, device=device)
        self.lse = torch.empty(S, T, device=device)
        self.logits = torch.empty(T, S, N, device=device)
        self.inv_rms = torch.empty(T, N, device=device)
        self.dsources = [torch.zeros_like(value) for value in raw]
        self.dqueries = torch.empty_like(queries)
        self.dlse, self.gate = torch.randn_like(self.lse), torch.rand_like(self.lse)
        self.dout = torch.randn_like(self.out)
        self.rows = torch.randn(2, T, D, device=device).bfloat16()  # partial sum and update
        self.x, self.new_partial = torch.empty_like(self.rows[0]), torch.empty_like(self.rows[0])
        self.terms = torch.empty(2, T, N + 1, device=device)  # logits and 1 / rms
        self.mix_inv_rms, self.weight = torch.empty(T, device=device), torch.rand_like(queries[0])
        bank = sum(t.numel() * t.element_size() for t in (*self.values, *self.scales))
        row = T * D * self.out.element_size()
        self.bytes = {
            "phase1_fwd": bank + S * row,
            "phase1_bwd": bank + (S + 2 * N) * row,
            "site_fwd": bank + 4 * row,
        }

    def phase1_fwd(self) -> None:
        """The forward of phase 1."""
        torch.ops.flash_attn_res.attend_into(
            *(self.values, self.queries, 1.0, EPS, self.out, self.lse, self.logits, self.inv_rms),
            self.scales,
        )

    def phase1_bwd(self) -> None:
        """Its backward, gated and accumulating, as the stream runs it."""
        torch.ops.flash_attn_res.attend_backward_into(
            *(self.dout, self.dlse, self.gate, self.values, self.queries, self.lse, self.logits),
            *(self.inv_rms, 1.0, self.dsources, True, self.dqueries, False, self.scales),
        )

    def site_fwd(self) -> None:
        """A read over the blocks and the partial sum, which takes up an update, with its norm."""
        torch.ops.flash_attn_res.read_into(
            *(None, None, self.values, self.rows[0], self.rows[1], self.queries[0], self.weight),
            *(1.0, EPS, True, EPS, self.x, self.new_partial, self.terms[0], self.terms[1]),
            *(self.mix_inv_rms, self.scales),
        )


def run(request: Request) -> list[Row]:
    """Measures and writes after each shape."""
    rounds = request.options.rounds or (3 if request.quick else 15)
    timer = Timer(request.device)
    copy = harness.copy_runner(request.device)
    rate = harness.measure_copy(timer, copy, rounds)
    print(f"{device_name(request.device)}, copy {rate / 1e12:.3f} TB/s")
    print(f"{'operation':11} {'shape':9} {'storage':9} {'us':>9} {'% copy':>7} {'speedup':>8}")
    rows: list[Row] = []
    names = request.shapes or (list(SHAPES)[:1] if request.quick else list(SHAPES))
    for name in names:
        shape = dict(SHAPES[name])
        shape["T"] = min(shape["T"], MOST_TOKENS[request.device.type])
        raw = [
            torch.randn(shape["T"], shape["D"], device=request.device).bfloat16()
            for _ in range(shape["N"])
        ]
        queries = torch.randn(shape["S"], shape["D"], device=request.device) / shape["D"] ** 0.5
        cases = {storage: Case(storage, raw, queries) for storage in STORAGES}
        for case in cases.values():
            case.phase1_fwd()  # the backward reads what it leaves
        for op in OPS:
            # S says nothing to a read.
            if (request.ops and op not in request.ops) or (op == "site_fwd" and shape["S"] > 1):
                continue
            key = {"op": op, "case": name, "shape": shape}
            runs: dict[str, Run | harness.Staged] = {"copy": copy[0]}
            runs |= {storage: getattr(case, op) for storage, case in cases.items()}
            times, failures = timer.interleaved(runs, rounds)
            copied = copy[1] / statistics.median(times["copy"])
            for storage, case in cases.items():
                of_storage = {**key, "dtype": storage}
                if storage in failures:
                    harness.failed(rows, OURS, of_storage, failures[storage])
                    continue
                median = statistics.median(times[storage])
                row = {
                    "package": OURS,
                    **of_storage,
                    **harness.spread("us", times[storage]),
                    "bytes": case.bytes[op],
                    "percent_of_copy": round(100 * case.bytes[op] / median / copied, 1),
                }
                if BASELINE in times:
                    row["speedup"] = round(statistics.median(times[BASELINE]) / median, 3)
                rows.append(row)
                print(
                    f"{row['op']:11} {name:9} {storage:9} {row['us']:9.1f} "
                    f"{row['percent_of_copy']:7.1f} {row.get('speedup', 0):7.2f}x",
                    flush=True,
                )
        del cases, raw
        request.store.write(rows, rate)
    return rows
