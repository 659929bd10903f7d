"""Errors against float64: the command `accuracy`, into a result file beside the others."""

from __future__ import annotations

from flash_attn_res.cli.accuracy import command, peers
from flash_attn_res.cli.bench.harness import OURS, Request, Row

PACKAGES = [OURS, *peers.EAGER, *peers.PEERS]
ON_REQUEST = list(command.SLOW)


def run(request: Request) -> list[Row]:
    """All families; writes once, at the end. Prints what was not run, and returns what of ours.

    A run of some packages keeps the rows and failures of the others.
    """
    from flash_attn_res.cli import build_parser

    quick = ["--quick"] if request.quick else []
    arguments = build_parser().parse_args(["accuracy", *quick, "--device", str(request.device)])
    found, more = command.run_table(arguments, [name for name in request.packages if name != OURS])
    others = [
        entry
        for entry in request.store.kept("failures")
        if entry["package"] not in (OURS, *request.packages)
    ]
    request.store.write(found.rows, None, **more | {"failures": others + found.failures})
    return [
        {"package": entry["package"], "op": ", ".join(entry["where"]), "error": entry["error"]}
        for entry in found.failures
        if entry["package"] == OURS
    ]
