"""The kernels, and other packages beside them, against a copy on the same device.

Percent of copy = the fewest bytes that the operation must move, over its time, against the rate of
a copy in the same run (bytes read + bytes written). In a round every contender and a copy run once,
in turn, after L2 was filled with other data; a busy wait before each measurement keeps launch gaps
and Python out.

Other packages (accuracy/peers.py) run on the same tensors once their outputs and gradients agree
with the formulas. ``--warm`` compiles in that many processes beforehand, so that the timed process
finds its kernels in the caches of Triton and Inductor.

Bytes, in units of T * D elements (statistics of a token, a few floats, are left out):

  phase1_fwd          reads N sources, writes S mixtures
  phase1_bwd          reads N sources, S gradients and N sums, writes N sums (gated)
  oneshot_fwd         reads N sources, writes x
  oneshot_bwd         reads N sources and dx, writes N gradients
  merge_fwd           reads o and partial, writes x
  merge_bwd           reads dx, o, partial and dpartial, writes dpartial
  advance_fwd         reads partial, update and o, writes partial' and x (with the norm)
  advance_bwd         reads dx, partial', o and dpartial, writes dh and dpartial (with the norm)

A peer that writes more (fresh gradients of every input, say) is held to the same bytes.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from flash_attn_res.cli.accuracy import peers
from flash_attn_res.cli.bench import harness
from flash_attn_res.cli.bench.harness import OURS, Request, Row, Run, Timer, describe
from flash_attn_res.cli.device import device_name

SHAPES = {
    "A": {"N": 4, "S": 8, "T": 65536, "D": 2048},
    "B": {"N": 8, "S": 24, "T": 8192, "D": 7168},
    "C": {"N": 10, "S": 6, "T": 16384, "D": 2304},
}
# One axis at a time away from N=4 S=8 D=2048; every tensor is still far larger than L2.
NEIGHBOURS = {
    **{f"D{D}": {"N": 4, "S": 8, "T": 2**27 // D // 2, "D": D} for D in (1024, 4096, 5120, 8192)},
    **{f"N{N}": {"N": N, "S": 8, "T": 32768, "D": 2048} for N in (1, 2, 3, 16)},
    **{f"S{S}": {"N": 4, "S": S, "T": 32768, "D": 2048} for S in (1, 4, 12, 16)},
}
EVERY = {**SHAPES, **NEIGHBOURS}
MOST_TOKENS = {
    ("cuda", False): 65536,
    ("cuda", True): 8192,
    ("cpu", False): 4096,
    ("cpu", True): 256,
}
"""Of a shape, by the device and whether the run is quick."""

DIRECTIONS = ("fwd", "bwd")
OPS = [*peers.OPS, *(f"{op}_{direction}" for op in peers.OPS for direction in DIRECTIONS)]
PACKAGES = [OURS, *peers.PEERS]
DTYPE = torch.bfloat16
EPS = 1e-6

Operation = tuple[Run, int]
"""One of ours, ready to run any number of times on the same memory, and its units of bytes."""


class Site:
    """The tensors of one shape, and the operations of the training path on them."""

    def __init__(
        self, N: int, S: int, T: int, D: int, device: torch.device, dtype: torch.dtype = DTYPE
    ) -> None:
        self.N, self.S, self.T, self.D, self.device, self.dtype = N, S, T, D, device, dtype
        self.queries = self.floats(S, D).normal_() / D**0.5
        self.query = self.queries[0]
        self.weight = self.floats(D).normal_()

    def rows(self, count: int) -> Tensor:
        """Normal values [count, T, D]."""
        return torch.empty(count, self.T, self.D, device=self.device, dtype=self.dtype).normal_()

    def row(self) -> Tensor:
        """Normal values [T, D]."""
        return self.rows(1)[0]

    def floats(self, *shape: int) -> Tensor:
        """Room for statistics."""
        return torch.empty(*shape, device=self.device)

    def sources(self) -> list[Tensor]:
        """N values, each in memory of its own."""
        return [self.row() for _ in range(self.N)]

    def phase1(
        self, sources: list[Tensor], queries: Tensor, out: Tensor
    ) -> tuple[Run, tuple[Tensor, Tensor, Tensor]]:
        """The forward and what it leaves for the backward: lse, logits and 1 / rms."""
        saved = (
            self.floats(self.S, self.T),
            self.floats(self.T, self.S, self.N),
            self.floats(self.T, self.N),
        )
        attend = torch.ops.flash_attn_res.attend_into.default
        return (lambda: attend(sources, queries, 1.0, EPS, out, *saved, [])), saved

    def phase1_backward(
        self,
        sources: list[Tensor],
        queries: Tensor,
        saved: tuple[Tensor, Tensor, Tensor],
        dout: Tensor,
        dsources: list[Tensor],
    ) -> Run:
        """Accumulating and gated, as the stream runs it."""
        backward = torch.ops.flash_attn_res.attend_backward_into.default
        dlse = self.floats(self.S, self.T).normal_()
        gate = self.floats(self.S, self.T).uniform_()
        dqueries = torch.empty_like(queries)
        given = (dout, dlse, gate, sources, queries, *saved, 1.0)
        return lambda: backward(*given, dsources, True, dqueries, False, [])

    def phase1_fwd(self) -> Operation:
        return self.phase1(self.sources(), self.queries, self.rows(self.S))[0], self.N + self.S

    def phase1_bwd(self) -> Operation:
        sources = self.sources()
        forward, saved = self.phase1(sources, self.queries, self.rows(self.S))
        forward()
        del forward
        run = self.phase1_backward(sources, self.queries, saved, self.rows(self.S), self.sources())
        return run, 3 * self.N + self.S

    def read(
        self,
        terms: int,
        norm: bool,
        sources: Sequence[Tensor] = (),
        phase1: tuple[Tensor | None, Tensor | None] = (None, None),
        partial: Tensor | None = None,
        update: Tensor | None = None,
        partial_out: Tensor | None = None,
    ) -> tuple[Run, tuple[Tensor, Tensor, Tensor | None]]:
        """The forward and what it leaves: logits, 1 / rms of the terms and of the mixture."""
        read = torch.ops.flash_attn_res.read_into.default
        saved = (
            self.floats(self.T, terms),
            self.floats(self.T, terms),
            self.floats(self.T) if norm else None,
        )
        weight = self.weight if norm else None
        given = (*phase1, list(sources), partial, update, self.query, weight, 1.0, EPS, norm, EPS)
        x = self.row()
        return (lambda: read(*given, x, partial_out, *saved, [])), saved

    def read_backward(
        self,
        norm: bool,
        saved: tuple[Tensor, Tensor, Tensor | None],
        sources: Sequence[Tensor] = (),
        phase1_out: Tensor | None = None,
        partial: Tensor | None = None,
        dpartial_out: Tensor | None = None,
    ) -> Run:
        backward = torch.ops.flash_attn_res.read_backward_into.default
        weight = self.weight if norm else None
        site = phase1_out is not None
        given = (self.row(), dpartial_out, phase1_out, list(sources), partial, self.query, weight)
        results = (
            self.row() if site and norm else None,  # dh: without a norm it is dx
            self.floats(self.T) if site else None,  # gate
            self.floats(self.T) if site else None,  # dphase1_lse
            [self.row() for _ in sources],
            False,
            self.row() if site else None,  # dpartial
            self.floats(self.D),
            False,
            self.floats(self.D) if norm else None,
        )
        return lambda: backward(*given, *saved, 1.0, norm, *results, [])

    def oneshot_fwd(self, norm: bool = False) -> Operation:
        return self.read(self.N, norm, self.sources())[0], self.N + 1

    def oneshot_bwd(self, norm: bool = False) -> Operation:
        sources = self.sources()
        forward, saved = self.read(self.N, norm, sources)
        forward()
        del forward
        return self.read_backward(norm, saved, sources), 2 * self.N + 1

    def oneshot_norm_fwd(self) -> Operation:
        return self.oneshot_fwd(norm=True)

    def oneshot_norm_bwd(self) -> Operation:
        return self.oneshot_bwd(norm=True)

    def phase1_result(self) -> tuple[Tensor, Tensor]:
        """A mixture and its lse."""
        return self.row(), self.floats(self.T).normal_()

    def merge_fwd(self) -> Operation:
        return self.read(2, False, phase1=self.phase1_result(), partial=self.row())[0], 3

    def site_bwd(self, norm: bool) -> Run:
        """The backward of a site in a block: phase-1 result and partial sum."""
        phase1, partial = self.phase1_result(), self.row()
        forward, saved = self.read(2, norm, phase1=phase1, partial=partial)
        forward()
        del forward
        return self.read_backward(
            norm, saved, phase1_out=phase1[0], partial=partial, dpartial_out=self.row()
        )

    def merge_bwd(self) -> Operation:
        return self.site_bwd(norm=False), 5

    def advance_fwd(self) -> Operation:
        partial, update, partial_out = self.row(), self.row(), self.row()
        run, _ = self.read(
            2,
            True,
            phase1=self.phase1_result(),
            partial=partial,
            update=update,
            partial_out=partial_out,
        )
        return run, 5

    def advance_bwd(self) -> Operation:
        return self.site_bwd(norm=True), 6


UNITS = {
    "oneshot": (lambda N, S: N + 1, lambda N, S: 2 * N + 1),
    "oneshot_norm": (lambda N, S: N + 1, lambda N, S: 2 * N + 1),
    "merge": (lambda N, S: 3, lambda N, S: 5),
    "advance": (lambda N, S: 5, lambda N, S: 6),
    "phase1": (lambda N, S: N + S, lambda N, S: 3 * N + S),
}


class Table:
    """Prints rows and keeps them for the result file."""

    def __init__(self, copy: float) -> None:
        self.rows: list[Row] = []
        self._copy = copy
        print(
            f"{'operation':17} {'shape':6} {'package':25} {'us':>9} {'p10':>9} {'p90':>9} "
            f"{'GB/s':>6} {'% copy':>7}"
        )

    def add(self, package: str, key: Row, size: int, times: list[float], **more: object) -> None:
        rate = size / (statistics.median(times) * 1e-6)
        row = {
            "package": package,
            **key,
            **harness.spread("us", times),
            "bytes": size,
            "gb_s": round(rate / 1e9, 1),
            "percent_of_copy": round(100 * rate / self._copy, 1),
            **{name: value for name, value in more.items() if value},
        }
        self.rows.append(row)
        print(
            f"{row['op']:17} {row['case']:6} {package:25} {row['us']:9.1f} {row['us_p10']:9.1f} "
            f"{row['us_p90']:9.1f} {row['gb_s']:6.0f} {row['percent_of_copy']:7.1f}",
            flush=True,
        )

    def fail(self, package: str, key: Row, why: str) -> None:
        harness.failed(self.rows, package, key, why)


def measure_case(
    op: str,
    name: str,
    shape: dict[str, int],
    request: Request,
    timer: Timer,
    copy: tuple[Run, int],
    table: Table,
    rounds: int,
    directions: Sequence[str] = DIRECTIONS,
) -> None:
    """The directions of one operation at one shape, every package beside ours and a copy."""
    keys = {
        direction: {
            "op": f"{op}_{direction}",
            "case": name,
            "shape": shape,
            "dtype": str(DTYPE).removeprefix("torch."),
        }
        for direction in directions
    }
    run_copy, copy_bytes = copy
    prepared: dict[str, peers.Prepared] = {}
    others = [package for package in request.packages if package != OURS]
    if others:
        torch._dynamo.reset()  # or a few cases later it refuses to compile the same lines again
        case = case_of(op, shape, str(request.device))
        for package in others:
            try:
                prepared[package] = peers.prepare(package, case)
            except Exception as error:  # whatever another package raises is its result
                for key in keys.values():
                    table.fail(package, key, describe(error))
            _free(request)
    for direction, key in keys.items():
        runs: dict[str, Run | harness.Staged] = {"copy": run_copy}
        units = UNITS[op][DIRECTIONS.index(direction)](shape["N"], shape["S"])
        if OURS in request.packages:
            try:
                site = Site(**shape, device=request.device, dtype=DTYPE)
                runs[OURS], own_units = getattr(site, f"{op}_{direction}")()
                assert own_units == units
            except (RuntimeError, torch.OutOfMemoryError) as error:
                table.fail(OURS, key, describe(error))
        for package, peer in prepared.items():
            runs[package] = peer.forward if direction == "fwd" else peer.backward
        times, failures = timer.interleaved(runs, rounds)
        size = units * shape["T"] * shape["D"] * DTYPE.itemsize
        rate = copy_bytes / (statistics.median(times.pop("copy")) * 1e-6)
        for package, measured in times.items():
            peer_of = prepared.get(package)
            table.add(
                package,
                key,
                size,
                measured,
                copy_in_rounds_tb_s=round(rate / 1e12, 4),
                note=peer_of.note if peer_of else "",
                rel_l2={k: float(f"{e:.2e}") for k, e in peer_of.errors.items()} if peer_of else {},
            )
        for package, why in failures.items():
            table.fail(package, key, why)
        runs.clear()
        _free(request)


def _free(request: Request) -> None:
    if request.cuda:
        torch.cuda.empty_cache()


def case_of(op: str, shape: dict[str, int], device: str) -> peers.Case:
    """What peers are given."""
    return peers.Case(op, shape["N"], shape["S"], shape["T"], shape["D"], device)


def warm(cases: Sequence[tuple[str, str]], packages: Sequence[str], jobs: int) -> None:
    """Compiles every peer at every case in `jobs` processes; failures show up when timed."""
    todo = [(op, name, package) for op, name in cases for package in packages if package != OURS]
    harness.in_processes(__name__, todo, jobs)


def _compile(op: str, name: str, package: str) -> None:
    prepared = peers.prepare(package, case_of(op, EVERY[name], "cuda"))
    prepared.forward()
    prepared.backward()
    torch.cuda.synchronize()


def run(request: Request) -> list[Row]:
    """Measures and writes after each case."""
    wanted: dict[str, list[str]] = {}  # directions of each operation
    for op in request.ops or peers.OPS:
        base, _, direction = op.rpartition("_")
        known = direction in DIRECTIONS
        wanted.setdefault(base if known else op, []).extend([direction] if known else DIRECTIONS)
    options = request.options
    names = request.shapes or list(EVERY if options.neighbours else SHAPES)
    if request.quick and not request.shapes:
        names = ["A"]
    cases = [
        (op, name)
        for name in names
        for op in wanted
        # S says nothing to a read, nor N to a merge.
        if not (name[1:] and name[0] == "S" and op != "phase1")
        and not (name[1:] and name[0] == "N" and op in ("merge", "advance"))
    ]
    if options.warm and request.cuda:
        warm(cases, request.packages, options.warm)
    rounds = options.rounds or (3 if request.quick else 11)
    timer = Timer(request.device)
    copy = harness.copy_runner(request.device)
    rate = harness.measure_copy(timer, copy, rounds)
    print(f"{device_name(request.device)}, copy {rate / 1e12:.3f} TB/s")
    table = Table(rate)
    most = MOST_TOKENS[request.device.type, request.quick]
    for op, name in cases:
        shape = dict(EVERY[name])
        shape["T"] = min(shape["T"], most)
        measure_case(op, name, shape, request, timer, copy, table, rounds, wanted[op])
        request.store.write(table.rows, rate)
    return table.rows


if __name__ == "__main__":
    _compile(*sys.argv[1:])
