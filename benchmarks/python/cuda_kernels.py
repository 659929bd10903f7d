"""Measures the CUDA kernels, and other packages beside them, against a device copy.

Usage: cuda_kernels.py [--out FILE] [--shape A ...] [--op phase1 | phase1_fwd ...]
                       [--package NAME ...] [--rounds N] [--neighbours]
                       [--peers] [--warm JOBS]

Percent of copy = the fewest bytes that the operation must move, over its time, against the rate of
a device-to-device copy in the same run (bytes read + bytes written). In a round every contender
and a copy run once, in turn, after L2 was filled with other data; a busy wait before each
measurement keeps launch gaps and Python out. Medians with the 10th and 90th percentile.

Other packages (peers.py) run on the same tensors once their outputs and gradients agree with the
formulas; whatever does not serve a case has a row with its reason. --warm compiles in that many
processes beforehand, so that the timed process finds its kernels in the caches of Triton and
Inductor.

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

import argparse
import concurrent.futures
import contextlib
import datetime
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Both by path: this package need not be built.
sys.path.insert(0, str(ROOT / "tests" / "gpu"))
sys.path.insert(0, str(ROOT / "python" / "flash_attn_res" / "cli" / "accuracy"))

import native  # noqa: E402
import peers  # noqa: E402

OURS = "flash_attn_res"
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
DTYPE = torch.bfloat16
FLUSH_BYTES = 2**28  # five times the L2 of an H100
WAIT_CYCLES = 1_500_000  # about a millisecond: longer than Python needs to enqueue a backward pass


def randn(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    out = torch.empty(*shape, device="cuda", dtype=dtype)
    return out.normal_()


def floats(*shape: int) -> Tensor:
    return torch.empty(*shape, device="cuda")


class Timer:
    """Times single runs, each on an L2 that holds none of its inputs."""

    def __init__(self) -> None:
        self._flush = torch.ones(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")

    def once(self, run: Callable[[], object]) -> float:
        """Microseconds."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.sum()  # read, not written: lines to write back would be on the next run's bill
        torch.cuda._sleep(WAIT_CYCLES)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3

    def interleaved(
        self, runs: dict[str, Callable[[], object]], rounds: int
    ) -> tuple[dict[str, list[float]], dict[str, str]]:
        """Microseconds of each round, sorted, and what failed with its error."""
        failures: dict[str, str] = {}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for index in range(3 + rounds):
            for name, run in runs.items():
                if name in failures:
                    continue
                try:
                    elapsed = self.once(run)
                except (RuntimeError, torch.OutOfMemoryError) as error:
                    failures[name] = describe(error)
                    continue
                if index >= 3:
                    times[name].append(elapsed)
        return {name: sorted(t) for name, t in times.items() if name not in failures}, failures


def describe(error: BaseException) -> str:
    """One line that names an error."""
    text = " ".join(str(error).split())
    kind = "" if isinstance(error, peers.UnsupportedError) else f"{type(error).__name__}: "
    return kind + (text[:297] + "..." if len(text) > 300 else text)


def percentile(ordered: list[float], percent: float) -> float:
    return ordered[min(len(ordered) - 1, int(percent / 100 * len(ordered)))]


def copy_runner() -> tuple[Callable[[], object], int]:
    """A copy of 1 GiB, and the bytes that it reads and writes."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda").fill_(1)
    target = torch.empty_like(source)
    return (lambda: target.copy_(source)), 2 * source.numel()


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
        "versions": {
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            **peers.versions(),
        },
        "commit": revision,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


UNITS = {
    "oneshot": (lambda N, S: N + 1, lambda N, S: 2 * N + 1),
    "oneshot_norm": (lambda N, S: N + 1, lambda N, S: 2 * N + 1),
    "merge": (lambda N, S: 3, lambda N, S: 5),
    "advance": (lambda N, S: 5, lambda N, S: 6),
    "phase1": (lambda N, S: N + S, lambda N, S: 3 * N + S),
}


DIRECTIONS = ("fwd", "bwd")


class Table:
    """Prints rows and keeps them for the result file."""

    def __init__(self, copy: float) -> None:
        self.rows: list[dict[str, object]] = []
        self._copy = copy
        print(
            f"{'operation':17} {'shape':6} {'package':25} {'us':>9} {'p10':>9} {'p90':>9} "
            f"{'GB/s':>6} {'% copy':>7}"
        )

    def _key(self, package: str, op: str, name: str, shape: dict[str, int]) -> dict[str, object]:
        return {
            "package": package,
            "op": op,
            "case": name,
            "shape": shape,
            "dtype": str(DTYPE).removeprefix("torch."),
        }

    def add(
        self,
        package: str,
        op: str,
        name: str,
        shape: dict[str, int],
        size: int,
        times: list[float],
        **more: object,
    ) -> None:
        median, low, high = statistics.median(times), percentile(times, 10), percentile(times, 90)
        rate = size / (median * 1e-6)
        print(
            f"{op:17} {name:6} {package:25} {median:9.1f} {low:9.1f} {high:9.1f} "
            f"{rate / 1e9:6.0f} {100 * rate / self._copy:7.1f}",
            flush=True,
        )
        self.rows.append(
            {
                **self._key(package, op, name, shape),
                "us": round(median, 2),
                "us_p10": round(low, 2),
                "us_p90": round(high, 2),
                "bytes": size,
                "gb_s": round(rate / 1e9, 1),
                "percent_of_copy": round(100 * rate / self._copy, 1),
                **{key: value for key, value in more.items() if value},
            }
        )

    def fail(self, package: str, op: str, name: str, shape: dict[str, int], why: str) -> None:
        print(f"{op:17} {name:6} {package:25} failed: {why}", flush=True)
        self.rows.append({**self._key(package, op, name, shape), "error": why})


def measure_case(
    op: str,
    name: str,
    shape: dict[str, int],
    packages: list[str],
    timer: Timer,
    table: Table,
    rounds: int,
    directions: Sequence[str] = DIRECTIONS,
) -> None:
    """The directions of one operation at one shape, every package beside ours and a copy."""
    copy, copy_bytes = copy_runner()
    prepared: dict[str, peers.Prepared] = {}
    others = [package for package in packages if package != OURS]
    if others:
        torch._dynamo.reset()  # or a few cases later it refuses to compile the same lines again
        case = peers.Case(op, **shape)
        for package in others:
            try:
                prepared[package] = peers.prepare(package, case)
            except Exception as error:  # whatever another package raises is its result
                for direction in directions:
                    table.fail(package, f"{op}_{direction}", name, shape, describe(error))
            torch.cuda.empty_cache()
    for direction in directions:
        index = DIRECTIONS.index(direction)
        full = f"{op}_{direction}"
        runs: dict[str, Callable[[], object]] = {"copy": copy}
        if OURS in packages:
            call, units = getattr(Site(**shape), full)()
            runs[OURS] = call.run
            assert units == UNITS[op][index](shape["N"], shape["S"])
        for package, peer in prepared.items():
            runs[package] = peer.forward if direction == "fwd" else peer.backward
        times, failures = timer.interleaved(runs, rounds)
        size = UNITS[op][index](shape["N"], shape["S"]) * shape["T"] * shape["D"] * DTYPE.itemsize
        rate = copy_bytes / (statistics.median(times.pop("copy")) * 1e-6)
        for package, measured in times.items():
            peer_of = prepared.get(package)
            table.add(
                package,
                full,
                name,
                shape,
                size,
                measured,
                copy_in_rounds_tb_s=round(rate / 1e12, 4),
                note=peer_of.note if peer_of else "",
                rel_l2={k: float(f"{e:.2e}") for k, e in peer_of.errors.items()} if peer_of else {},
            )
        for package, why in failures.items():
            table.fail(package, full, name, shape, why)
        runs.clear()
        call = None
        torch.cuda.empty_cache()


def warm(cases: list[tuple[str, str]], packages: list[str], jobs: int) -> None:
    """Compiles every peer at every case in `jobs` processes; failures show up when timed."""

    def one(job: tuple[str, str, str]) -> None:
        op, name, package = job
        command = [sys.executable, __file__, "--compile-only", "--op", op, "--shape", name]
        subprocess.run(
            [*command, "--package", package],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
            timeout=900,
        )

    todo = [(op, name, package) for op, name in cases for package in packages if package != OURS]
    begin = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for job in [pool.submit(one, job) for job in todo]:
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.result()
    print(f"compiled {len(todo)} cases in {time.monotonic() - begin:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--shape", action="append", choices=[*SHAPES, *NEIGHBOURS])
    parser.add_argument("--neighbours", action="store_true", help="A, B, C and all of them")
    parser.add_argument(
        "--op",
        action="append",
        choices=[
            *peers.OPS,
            *(f"{op}_{direction}" for op in peers.OPS for direction in DIRECTIONS),
        ],
    )
    parser.add_argument("--package", action="append", choices=[OURS, *peers.PEERS])
    parser.add_argument("--peers", action="store_true", help="ours and every other package")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--warm", type=int, default=0, metavar="JOBS")
    parser.add_argument("--compile-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()

    every = {**SHAPES, **NEIGHBOURS}
    names = options.shape or list(every if options.neighbours else SHAPES)
    packages = options.package or ([OURS, *peers.PEERS] if options.peers else [OURS])
    wanted: dict[str, list[str]] = {}  # directions of each operation
    for op in options.op or peers.OPS:
        base, _, direction = op.rpartition("_")
        known = direction in DIRECTIONS
        wanted.setdefault(base if known else op, []).extend([direction] if known else DIRECTIONS)
    cases = [
        (op, name)
        for name in names
        for op in wanted
        # S says nothing to a read, nor N to a merge.
        if not (name[1:] and name[0] == "S" and op != "phase1")
        and not (name[1:] and name[0] == "N" and op in ("merge", "advance"))
    ]
    if options.compile_only:
        for op, name in cases:
            case = peers.Case(op, **every[name])
            for package in packages:
                prepared = peers.prepare(package, case)
                prepared.forward()
                prepared.backward()
        torch.cuda.synchronize()
        return
    if options.warm:
        warm(cases, packages, options.warm)

    # A single measurement of the copy now and then reads a seventh too low, which would flatter the
    # kernels: the best of several stands.
    timer = Timer()
    run, size = copy_runner()
    medians = [
        statistics.median(timer.interleaved({"copy": run}, options.rounds)[0]["copy"])
        for _ in range(3)
    ]
    copy = size / (min(medians) * 1e-6)
    del run
    print(f"{torch.cuda.get_device_name()}, copy {copy / 1e12:.3f} TB/s")
    table = Table(copy)
    for op, name in cases:
        try:
            measure_case(op, name, every[name], packages, timer, table, options.rounds, wanted[op])
        except (RuntimeError, torch.OutOfMemoryError) as error:
            for direction in wanted[op]:
                table.fail(OURS, f"{op}_{direction}", name, every[name], describe(error))
        torch.cuda.empty_cache()
        if options.out:  # after each case: a run cut short leaves what it measured
            result = {**describe_machine(), "copy_tb_s": round(copy / 1e12, 4)}
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps({**result, "rows": table.rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
