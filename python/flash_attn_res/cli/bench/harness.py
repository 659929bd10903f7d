"""What the suites share: timing, the copy they are held against, the result file.

Times are medians over rounds with the 10th and 90th percentile; in a round every contender runs
once, so that drift of the machine hits all alike. Bytes are the minimum traffic of docs/math.md
(each input read once, each output written once), and percents are of the rate of a copy that was
measured in the same run.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import datetime
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flash_attn_res import __version__
from flash_attn_res.cli.accuracy import peers
from flash_attn_res.cli.checkpoint import write_atomically
from flash_attn_res.cli.device import device_name, revision
from flash_attn_res.cli.errors import CliError

SCHEMA = 1
"""Of the result files; docs/benchmarks.md describes it. Readers refuse any other."""

OURS = "flash_attn_res"
STORAGE_GRADIENTS = f"{OURS} (storage gradients)"
"""Our stream with ``grad_dtype=None``."""
COMPILED = "torch.compile"
"""How the names of compiled contenders begin: a minute of compiling and more for each case."""

Row = dict[str, Any]
Run = Callable[[], object]


@dataclasses.dataclass
class Request:
    """What one suite is asked for: the options of the command that it takes."""

    device: torch.device
    quick: bool
    packages: list[str]
    shapes: list[str]
    ops: list[str]
    options: argparse.Namespace
    store: Store = dataclasses.field(init=False)

    @property
    def cuda(self) -> bool:
        """Whether it runs on a GPU."""
        return self.device.type == "cuda"


def keep_freed_memory() -> None:
    """Makes glibc's malloc reuse large blocks, for every contender alike.

    By default it returns a freed tensor to the system, and the next one of that size costs a page
    fault every 4 KiB: more than most kernels here take on a CPU, and no property of any of them.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)
    mallopt(top_pad, 1 << 30)


# ---------------------------------------------------------------------------------------- timing


@dataclasses.dataclass
class Staged:
    """A run whose ``prepare`` runs untimed before it, and hands it what it made."""

    prepare: Callable[[], Any]
    run: Callable[[Any], object]


class Timer:
    """Times single runs in microseconds; on a GPU each on an L2 that holds none of its inputs."""

    flush_bytes = 2**28  # five times the L2 of an H100
    wait_cycles = 1_500_000  # a millisecond or so: Python enqueues a backward pass meanwhile

    def __init__(self, device: torch.device) -> None:
        self._flush = None
        if device.type == "cuda":
            self._flush = torch.ones(self.flush_bytes // 4, dtype=torch.int32, device=device)

    def once(self, run: Run | Staged) -> float:
        """One timed run."""
        if isinstance(run, Staged):
            held = run.prepare()
            timed = run.run
            return self._once(lambda: timed(held))
        return self._once(run)

    def _once(self, run: Run) -> float:
        if self._flush is None:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e6
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.sum()  # read, not written: lines to write back would be on the next run's bill
        torch.cuda._sleep(self.wait_cycles)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3

    def interleaved(
        self, runs: Mapping[str, Run | Staged], rounds: int, warmup: int = 3
    ) -> tuple[dict[str, list[float]], dict[str, str]]:
        """Times of all rounds, sorted, and what failed with its error."""
        failures: dict[str, str] = {}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for index in range(warmup + rounds):
            for name, run in runs.items():
                if name in failures:
                    continue
                try:
                    elapsed = self.once(run)
                except Exception as error:  # whatever another package raises is its result
                    failures[name] = describe(error)
                    continue
                if index >= warmup:
                    times[name].append(elapsed)
        return {name: sorted(t) for name, t in times.items() if name not in failures}, failures


def in_processes(module: str, calls: Sequence[Sequence[str]], jobs: int) -> None:
    """Runs ``python -m module`` with the arguments of each call, so many at a time.

    What a process prints and whether it fails is lost: the caches that it leaves are what counts.
    """

    def one(call: Sequence[str]) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(
                [sys.executable, "-m", module, *call],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                check=False,
                timeout=900,
            )

    begin = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, calls))
    print(f"compiled {len(calls)} cases in {time.monotonic() - begin:.0f} s", flush=True)


def describe(error: BaseException) -> str:
    """One line that names an error."""
    text = " ".join(str(error).split())
    kind = "" if isinstance(error, peers.UnsupportedError) else f"{type(error).__name__}: "
    return kind + (text[:297] + "..." if len(text) > 300 else text)


def percentile(times: Iterable[float], percent: float) -> float:
    """Of the times as they are, without interpolation."""
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, int(percent / 100 * len(ordered)))]


def spread(name: str, times: Sequence[float], digits: int = 2) -> Row:
    """The median as ``name``, with ``name_p10`` and ``name_p90``."""
    return {
        name: round(statistics.median(times), digits),
        f"{name}_p10": round(percentile(times, 10), digits),
        f"{name}_p90": round(percentile(times, 90), digits),
    }


def copy_runner(device: torch.device) -> tuple[Run, int]:
    """A copy, and the bytes that it reads and writes; on a CPU on all threads of PyTorch.

    Make one for a whole suite: how fast a copy runs on a CPU depends on which pages it was given
    (by half as much again, between allocations of one process), and every case should face the
    same one.
    """
    count = 2**30 if device.type == "cuda" else 2**28
    source = torch.empty(count // 8, dtype=torch.int64, device=device).fill_(1)
    target = torch.empty_like(source)
    return (lambda: target.copy_(source)), 2 * count


def measure_copy(timer: Timer, copy: tuple[Run, int], rounds: int) -> float:
    """Bytes per second of a copy, read + written.

    A single measurement now and then reads a seventh too low, which would flatter the kernels: the
    best of three medians stands.
    """
    run, size = copy
    medians = [
        statistics.median(timer.interleaved({"copy": run}, rounds)[0]["copy"]) for _ in range(3)
    ]
    return size / (min(medians) * 1e-6)


# --------------------------------------------------------------------------------------- machine


def _smi(device: torch.device, *fields: str) -> list[str]:
    """What nvidia-smi says of the device, "unknown" where it says nothing."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    for which in ([f"--id=GPU-{uuid}"], []):  # without, it tells of the first GPU
        try:
            answer = subprocess.run(
                [*command, *which], capture_output=True, text=True, check=True
            ).stdout
        except (OSError, subprocess.CalledProcessError):
            continue
        values = [value.strip() for value in answer.partition("\n")[0].split(",")]
        if len(values) == len(fields):
            return values
    return ["unknown"] * len(fields)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Device, driver, clocks as they are now, versions and commit."""
    driver, clocks = "none", {}
    if device.type == "cuda":
        names = ("sm", "sm_max", "memory", "memory_max")
        driver, *numbers = _smi(
            device,
            "driver_version",
            *("clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem"),
        )
        clocks = {
            f"{name}_mhz": int(number)
            for name, number in zip(names, numbers, strict=True)
            if number.isdigit()
        }
    return {
        "device": device_name(device),
        "driver": driver,
        "clocks": clocks,
        "versions": {
            "flash_attn_res": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **({"cuda": torch.version.cuda} if torch.version.cuda else {}),
            **peers.versions(),
        },
        "commit": revision(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def short_name(device: torch.device) -> str:
    """The device in a file's name: h100, rtx-4090, cpu."""
    if device.type == "cpu":
        return "cpu"
    words = []
    for word in device_name(device).replace("NVIDIA", "").replace("GeForce", "").split():
        words.append(word.partition("-")[0])
        if re.search(r"\d", word):
            break
    return "-".join(words).lower() or "gpu"


# ---------------------------------------------------------------------------------- result files

IDENTITY = (
    *("package", "op", "case", "shape", "dtype", "threads"),
    *("layers", "block_size", "tokens", "dim", "checkpointed", "series"),
    *("storage", "family", "tensor"),
)
"""Of a row, what says which measurement it is; the rest is the measurement."""


def identity(row: Row) -> str:
    """Equal for two rows that measure the same."""
    return json.dumps([row.get(name) for name in IDENTITY], sort_keys=True)


MEMBERS = ("suite", "device", "driver", "commit", "date")
"""Texts that every result file has."""


def commit_of(document: Mapping[str, Any], row: Row) -> str:
    """Which code a row measures: its own commit, in files of a single run the file's."""
    return str(row.get("commit", document["commit"]))


def load_results(path: Path) -> dict[str, Any]:
    """A result file, of this schema or refused."""
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise CliError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CliError(f"{path}: cannot be read: {error}") from None
    if not isinstance(document, dict) or not isinstance(document.get("rows"), list):
        raise CliError(f"{path}: not a result file of flash-attn-res bench")
    if document.get("schema") != SCHEMA:
        raise CliError(
            f"{path}: schema {document.get('schema', 'none')}, expected {SCHEMA}: measure again "
            "with flash-attn-res bench of this version"
        )
    for name in MEMBERS:
        if not isinstance(document.get(name), str):
            raise CliError(f"{path}: has no {name}, which every result file has")
    versions = document.get("versions")
    if not isinstance(versions, dict) or not isinstance(versions.get("torch"), str):
        raise CliError(f"{path}: its versions do not say which PyTorch it was measured with")
    if not all(isinstance(row, dict) for row in document["rows"]):
        raise CliError(f"{path}: a row is no object")
    return document


def text_of(document: Mapping[str, Any]) -> str:
    """JSON with a line for each row: there are thousands, and people read them now and then."""
    head = json.dumps({k: v for k, v in document.items() if k != "rows"}, indent=1)
    rows = ",\n".join("  " + json.dumps(row, allow_nan=False) for row in document["rows"])
    return head.removesuffix("\n}") + ',\n "rows": [\n' + rows + "\n ]\n}\n"


def write_results(
    path: Path,
    suite: str,
    machine: dict[str, Any],
    copy: float | None,
    rows: list[Row],
    quick: bool = False,
    **more: Any,
) -> None:
    """Writes a result file, whole or not at all; ``copy`` is in bytes per second.

    ``more`` are further members of the file.
    """
    document = {
        "schema": SCHEMA,
        "suite": suite,
        **({"quick": True} if quick else {}),
        **machine,
        "copy_tb_s": None if copy is None else round(copy / 1e12, 4),
        **more,
        "rows": rows,
    }
    write_atomically(path, text_of(document).encode())


@dataclasses.dataclass
class Store:
    """The result file of a suite, written after each case: a run cut short leaves what it has.

    A run of some of the cases (``part``) keeps the others of a file from the same machine; the rows
    say which commit each is of.
    """

    path: Path
    suite: str
    device: torch.device
    quick: bool
    part: bool
    before: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.part and self.path.exists():
            self.before = load_results(self.path)

    def kept(self, member: str) -> list[Row]:
        """What a run of some of the cases keeps of a list in the file."""
        same = self.before.get("device") == device_name(self.device)
        return list(self.before.get(member, [])) if same else []

    def write(self, rows: list[Row], copy: float | None, **more: Any) -> None:
        """Writes the file, whole or not at all; ``copy`` is in bytes per second."""
        machine = describe_machine(self.device)
        if old_rows := self.kept("rows"):
            # Of a package that is not there now, and whose rows are kept, the version then.
            absent = [k for k, v in machine["versions"].items() if v == peers.NOT_INSTALLED]
            versions = self.before.get("versions", {})
            machine["versions"] |= {name: versions[name] for name in absent if name in versions}
        new = {identity(row): {**row, "commit": machine["commit"]} for row in rows}
        old = [{**row, "commit": commit_of(self.before, row)} for row in old_rows]
        # In the place of the old ones: the order of a file is that of its tables.
        merged = [new.pop(identity(row), row) for row in old] + list(new.values())
        write_results(self.path, self.suite, machine, copy, merged, self.quick, **more)


def failed(rows: list[Row], package: str, key: Row, error: str) -> None:
    """Adds the row of what was not measured, with its reason."""
    rows.append({"package": package, **key, "error": error})


def print_failures(rows: Iterable[Row]) -> None:
    """What was not measured, by package and reason, with the cases."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "error" in row:
            case = " ".join(str(row[k]) for k in ("op", "case") if k in row)
            reasons.setdefault((row["package"], row["error"]), []).append(case or _network(row))
    for (package, error), where in reasons.items():
        cases = ", ".join(dict.fromkeys(where))
        print(f"not measured: {package}: {error} ({cases})", flush=True)


def _network(row: Row) -> str:
    sizes = " ".join(
        f"{axis}={row[name]}"
        for axis, name in (("L", "layers"), ("S", "block_size"), ("T", "tokens"), ("D", "dim"))
        if name in row
    )
    return sizes + (" checkpointed" if row.get("checkpointed") else "")
