"""`flash-attn-res bench`: checks the options, runs the suites, says what was not measured."""

from __future__ import annotations

import argparse
import importlib
import textwrap
import time
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

import torch

from flash_attn_res.cli.bench import harness
from flash_attn_res.cli.bench.harness import COMPILED, OURS, Request, Row, Store
from flash_attn_res.cli.checkpoint import make_folder
from flash_attn_res.cli.device import choose_device, set_threads
from flash_attn_res.cli.errors import CliError

SUITES = {
    "kernels": ("shape", "neighbours", "op", "rounds", "warm"),
    "step": ("shape", "rounds", "checkpointed", "scaling", "profile", "warm"),
    "decode": ("op", "tokens", "rounds"),
    "storage": ("shape", "op", "rounds"),
    "cpu": ("op", "rounds"),
    "accuracy": (),
}
"""The suites, and of the options that not every suite has, those that each takes."""

BY_DEFAULT = {
    "cuda": ("kernels", "step", "decode", "storage", "accuracy"),
    "cpu": ("cpu", "step", "decode", "accuracy"),
}
SELECTING = ("shape", "op", "tokens")


def run_bench(arguments: argparse.Namespace) -> int:
    """0 where every case of this package was measured, 1 where one failed."""
    device = choose_device(arguments.device)
    for suite in arguments.suites:
        if suite not in SUITES:
            raise CliError(f"unknown suite {suite!r}; known: {', '.join(SUITES)}")
    suites = list(dict.fromkeys(arguments.suites)) or list(BY_DEFAULT[device.type])
    if "cpu" in suites and device.type != "cpu":
        if arguments.device != "auto" or len(suites) > 1:
            raise CliError("the suite cpu measures the CPU: run it alone, or with --device cpu")
        device = torch.device("cpu")
    _check(arguments, suites)
    set_threads(arguments.threads)
    modules = {name: importlib.import_module(f"{__package__}.{name}") for name in suites}
    requests = {
        name: request
        for name, module in modules.items()
        if (request := _request(name, module, arguments, device, modules.values()))
    }
    folder = _folder(arguments)
    for name, request in requests.items():
        request.store = _store(name, folder, arguments, device)
    if device.type == "cpu":
        harness.keep_freed_memory()
    else:  # events, streams and graphs are of the current device
        torch.cuda.set_device(device.index or 0)
    failed = 0
    for name, request in requests.items():
        print(f"== {name}", flush=True)
        begin = time.monotonic()
        try:
            rows = modules[name].run(request)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            # Of this package or of the machine: another package's are rows. The next suite runs.
            traceback.print_exc()
            print(f"{name}: failed: {harness.describe(error)}", flush=True)
            failed += 1
            continue
        failed += _conclude(name, request, rows, time.monotonic() - begin)
    return 1 if failed else 0


def _conclude(name: str, request: Request, rows: Sequence[Row], seconds: float) -> int:
    """Says what was not measured; the number of cases of ours among it."""
    harness.print_failures(rows)
    own = sum("error" in row and row["package"] == OURS for row in rows)
    written = "nothing" if request.options.profile else request.store.path
    print(f"{name}: {seconds:.0f} s, wrote {written}", flush=True)
    return own


def _check(arguments: argparse.Namespace, suites: Sequence[str]) -> None:
    """Refuses options that no chosen suite has, and numbers out of range."""
    for option in dict.fromkeys(option for taken in SUITES.values() for option in taken):
        if getattr(arguments, option) and not any(option in SUITES[name] for name in suites):
            raise CliError(f"--{option} is no option of {', '.join(suites)}")
    for option in ("rounds", "warm"):
        if getattr(arguments, option) < 0:
            raise CliError(f"--{option} must be at least 0, not {getattr(arguments, option)}")
    if min(arguments.tokens, default=1) < 1:
        raise CliError(f"--tokens must be at least 1, not {min(arguments.tokens)}")
    if arguments.ours and arguments.package:
        raise CliError("--ours and --package exclude each other")


def _known(what: str, modules: Iterable[ModuleType]) -> list[str]:
    """The packages, shapes or operations of all the suites, each once."""
    names: list[str] = []
    for module in modules:
        for attribute in (what, "NEIGHBOURS") if what == "SHAPES" else (what,):
            names += getattr(module, attribute, ())
    return list(dict.fromkeys(names))


def names() -> str:
    """For the help: the packages, shapes and operations that each suite knows."""
    lines = ["what the suites know:"]
    for suite in SUITES:
        module = importlib.import_module(f"{__package__}.{suite}")
        for option, what in (("package", "PACKAGES"), ("shape", "SHAPES"), ("op", "OPS")):
            known = ", ".join(_known(what, [module]))
            if known and (option == "package" or option in SUITES[suite]):
                title = f"{suite} --{option}"
                lines += textwrap.wrap(
                    f"{title:20}{known}", 96, initial_indent="  ", subsequent_indent=" " * 22
                )
    return "\n".join(lines) + "\n"


def _request(
    name: str,
    module: ModuleType,
    arguments: argparse.Namespace,
    device: torch.device,
    modules: Iterable[ModuleType],
) -> Request | None:
    """What the suite is asked for, or None where the names that were given are other suites'."""
    chosen = {}
    for option, what in (("package", "PACKAGES"), ("shape", "SHAPES"), ("op", "OPS")):
        given = list(dict.fromkeys(getattr(arguments, option)))
        everything = _known(what, modules)
        for each in given:
            if each not in everything:
                known = ", ".join(everything) or "none"
                raise CliError(f"--{option}: unknown {each!r}; known: {known}")
        own = _known(what, [module])
        chosen[option] = [each for each in given if each in own]
        if given and own and not chosen[option]:
            print(f"{name}: left out, has no {option} {', '.join(given)}")
            return None
    return Request(
        device=device,
        quick=arguments.quick,
        packages=chosen["package"] or _packages(name, module, arguments),
        shapes=chosen["shape"],
        ops=chosen["op"],
        options=arguments,
    )


def _packages(name: str, module: ModuleType, arguments: argparse.Namespace) -> list[str]:
    """What is measured where no package is named."""
    everything: list[str] = list(module.PACKAGES)
    if arguments.ours:
        return [each for each in everything if each == "plain" or each.startswith(OURS)]
    on_request = getattr(module, "ON_REQUEST", ())
    left_out = [
        each
        for each in everything
        if not arguments.peers
        and (each in on_request or (arguments.quick and each.startswith(COMPILED)))
    ]
    if left_out:
        print(f"{name}: without {', '.join(left_out)}: --package or --peers takes them")
    return [each for each in everything if each not in left_out]


def _folder(arguments: argparse.Namespace) -> Path:
    """The folder of the results, made and tried before the work."""
    default = "benchmark-results/quick" if arguments.quick else "benchmark-results"
    folder = Path(arguments.out or default)
    make_folder("--out", folder)
    return folder


def _store(name: str, folder: Path, arguments: argparse.Namespace, device: torch.device) -> Store:
    plain = device.type == "cpu" and name in ("cpu", "accuracy")
    stem = name if plain else f"{harness.short_name(device)}-{name}"
    part = bool(arguments.package or arguments.ours or arguments.scaling) or any(
        getattr(arguments, option) for option in SELECTING
    )
    return Store(folder / f"{stem}.json", name, device, arguments.quick, part)
