"""`flash-attn-res accuracy`: checks the options, runs the table, prints it and stores it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from flash_attn_res.cli import checkpoint
from flash_attn_res.cli.accuracy import families, peers, states, table
from flash_attn_res.cli.accuracy.modes import MODES
from flash_attn_res.cli.bench.harness import describe_machine, write_results
from flash_attn_res.cli.device import choose_device, set_threads
from flash_attn_res.cli.errors import CliError

SOURCES = (2, 8, 33)
QUICK_SOURCES = (2, 8)
WIDTH = 128  # columns that the printed tables need
SLOW = ("torch.compile (sums)", "torch.compile (products)")  # minutes of compiling: by name alone


def run_accuracy(arguments: argparse.Namespace) -> int:
    """The command: 0 when the table is complete, whatever it says."""
    known = [*peers.EAGER, *peers.PEERS]
    packages = chosen(
        "--packages", arguments.packages, known, [name for name in known if name not in SLOW]
    )
    if arguments.out is not None:
        checkpoint.check_file("--out", arguments.out)
    found, more = run_table(arguments, packages)
    if arguments.out is not None:
        machine = describe_machine(choose_device(arguments.device))
        rows = [{**row, "commit": machine["commit"]} for row in found.rows]
        write_results(arguments.out, "accuracy", machine, None, rows, arguments.quick, **more)
        Console(stderr=True).print(f"Wrote {arguments.out}", highlight=False, soft_wrap=True)
    return 0


def run_table(
    arguments: argparse.Namespace, packages: Sequence[str]
) -> tuple[table.Table, dict[str, Any]]:
    """Checks the other options, measures and prints; also what else a result file has to say."""
    console = Console(stderr=True)
    device = choose_device(arguments.device)
    set_threads(arguments.threads)
    plan = _plan(arguments, device)
    modes = chosen("--modes", arguments.modes, MODES, list(MODES))
    if arguments.checkpoint is not None and families.DEPTH not in plan.families:
        raise CliError(
            f"--checkpoint is for the family {families.DEPTH!r}, which --families leaves out"
        )

    begin = time.perf_counter()
    found, origin = measure(plan, modes, packages, arguments, console)
    seconds = time.perf_counter() - begin
    out = Console()
    if not out.is_terminal or out.width < WIDTH:
        out = Console(width=WIDTH)
    show(found, out, details=arguments.details)
    return found, {
        "seconds": round(seconds, 1),
        "seed": plan.seed,
        "hidden_states": origin,
        "failures": found.failures,
    }


def measure(
    plan: table.Plan,
    modes: Sequence[str],
    packages: Sequence[str],
    arguments: argparse.Namespace,
    console: Console,
) -> tuple[table.Table, dict[str, Any] | None]:
    """Runs everything; also where the hidden states come from, if they were needed."""
    field = table.contenders(modes, packages)
    held: list[states.States] = []

    def hidden_states() -> states.States:
        if not held:
            if arguments.checkpoint is not None:
                held.append(states.from_checkpoint(arguments.checkpoint))
            else:
                held.append(states.trained(plan.seed, arguments.quick))
        return held[0]

    if families.DEPTH in plan.families and arguments.checkpoint is not None:
        hidden_states()  # a bad file is known now, not after the other families
    found = table.Table()
    with console.status("measuring") as status:
        for name, add in table.steps(plan, field, hidden_states):
            status.update(name)
            add(found)
    return found, held[0].origin if held else None


def _plan(arguments: argparse.Namespace, device: torch.device) -> table.Plan:
    everything = list(families.ALL)
    for name in ("tokens", "dim", "queries"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise CliError(f"--{name} must be at least 1, not {value}")
    if not 0 <= arguments.seed < 2**63:
        raise CliError(f"--seed must be at least 0 and below 2^63, not {arguments.seed}")
    sources = arguments.sources or (QUICK_SOURCES if arguments.quick else SOURCES)
    if min(sources) < 1 or max(sources) > 512:
        raise CliError(f"--sources must be from 1 to 512, not {' '.join(map(str, sources))}")
    if arguments.queries > 128:
        raise CliError(f"--queries must be at most 128, not {arguments.queries}")
    quick = arguments.quick
    default = [name for name in everything if not quick or name != families.LONGEST]
    return table.Plan(
        families=tuple(chosen("--families", arguments.families, everything, default)),
        sources=tuple(dict.fromkeys(sources)),
        queries=arguments.queries,
        tokens=arguments.tokens or (64 if quick else 256),
        dim=arguments.dim or (128 if quick else 512),
        device=str(device),
        seed=arguments.seed,
    )


def chosen(
    flag: str, given: str | None, known: Sequence[str] | dict[str, Any], default: list[str]
) -> list[str]:
    """The names that an option lists, separated by commas."""
    if given is None:
        return default
    names = [part.strip() for part in given.split(",")]
    for name in names:
        if name not in known:
            raise CliError(f"{flag}: unknown {name!r}; known: {', '.join(known)}")
    if len(set(names)) != len(names):
        raise CliError(f"{flag} names one twice: {given}")
    return names


# --------------------------------------------------------------------------------- printing


def show(found: table.Table, console: Console, *, details: bool) -> None:
    """Worst cases by operation and tensor (or every row), comparisons, and what did not run."""
    for op in dict.fromkeys(row["op"] for row in found.rows):
        _print_worst([row for row in found.rows if row["op"] == op], op, console)
    if details:
        _print_rows(found.rows, console)
    _print_comparison(found.rows, console)
    for failure in found.failures:
        console.print(
            f"not run: {failure['package']} ({failure['storage']}): {failure['error']} "
            f"({', '.join(failure['where'])})",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )


TITLES = {
    "phase1": "attend (phase 1)",
    "oneshot_norm": "one-shot read with output norm",
    "advance": "advance: phase-1 result, partial sum, update, norm",
    "network": "whole networks",
}


def _print_worst(rows: list[dict[str, Any]], op: str, console: Console) -> None:
    cases: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        own = cases.setdefault((row["package"], row["storage"]), {})
        own.setdefault(row["tensor"], []).append(row)
    tensors = list(dict.fromkeys(row["tensor"] for row in rows))
    title = f"{TITLES[op]}: relative L2 error, worst of the families"
    grid = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1), title=title, title_justify="left")
    grid.add_column("package, storage", no_wrap=True, vertical="bottom")
    for tensor in tensors:
        grid.add_column(tensor.replace(" ", "\n"), justify="right", vertical="bottom", min_width=7)
    for (package, storage), own in cases.items():
        name = "ours" if package == table.OURS else package
        grid.add_row(f"{name}, {storage}", *(worst(own.get(tensor, [])) for tensor in tensors))
    console.print(grid)


def worst(rows: Sequence[dict[str, Any]]) -> str:
    """The largest relative error, or that something is not finite."""
    if not rows:
        return "-"
    if any(row["rel_l2"] is None for row in rows):
        return "inf" if any(row.get("not_finite") for row in rows) else "not 0"
    return f"{max(row['rel_l2'] for row in rows):.1e}"


def _print_rows(rows: Sequence[dict[str, Any]], console: Console) -> None:
    grid = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in ("package", "storage", "family", "op", "N", "tensor"):
        grid.add_column(name, no_wrap=True)
    for name in ("rel_l2", "max_ulp", "1 - cosine", "bias", "gain"):
        grid.add_column(name, justify="right")
    for row in rows:
        numbers = [
            row["rel_l2"],
            row["max_ulp"],
            None if row["cosine"] is None else 1 - row["cosine"],
            row["bias"],
            row["gain"],
        ]
        grid.add_row(
            *(row[name] for name in ("package", "storage", "family", "op")),
            str(row["shape"]["N"]),
            row["tensor"],
            *("-" if number is None else f"{number:.1e}" for number in numbers),
        )
    console.print(grid)


def _print_comparison(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Where another package is more accurate than ours in the same storage, and by how much."""
    pairs = table.comparisons(rows)
    better = [
        (own, other)
        for own, others in pairs
        for other in others
        if own["rel_l2"] is None or other["rel_l2"] < own["rel_l2"]
    ]
    console.print(
        f"{len(pairs)} rows of ours beside other packages' of 16 or 32 bits alike; another one is "
        f"more accurate in {len(better)} comparisons, the largest of them:",
        highlight=False,
        soft_wrap=True,
    )
    scale = {n: torch.finfo(d).eps for n, d in table.STORAGE.items()}

    def excess(pair: tuple[dict[str, Any], dict[str, Any]]) -> float:
        own, other = pair
        if own["rel_l2"] is None:
            return float("inf")
        return float((own["rel_l2"] - other["rel_l2"]) / scale[other["storage"]])

    for own, other in sorted(better, key=excess, reverse=True)[:8]:
        console.print(
            f"  {own['family']}, N = {own['shape']['N']}, {own['op']}, {own['tensor']}, "
            f"{own['storage']}: {own['rel_l2']}, {other['package']} {other['rel_l2']} "
            f"({excess((own, other)):.2g} ulp more)",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )
