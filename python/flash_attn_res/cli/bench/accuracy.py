"""Errors against float64: the command `accuracy`, into a result file beside the others."""

from __future__ import annotations

from flash_attn_res.cli.accuracy import command, peers
from flash_attn_res.cli.bench.harness import OURS, Request, Row

PACKAGES = [OURS, *peers.EAGER, *peers.PEERS]
ON_REQUEST = list(command.SLOW)


def run(request: Request) -> list[Row]:
    """All families; writes once, at the end. Prints what was not run, and returns what of ours."""
    from flash_attn_res.cli import build_parser

    quick = ["--quick"] if request.quick else []
    place = ["--device", str(request.device), "--out", str(request.store.path)]
    arguments = build_parser().parse_args(["accuracy", *quick, *place])
    found = command.run_table(arguments, [name for name in request.packages if name != OURS])
    return [
        {"package": entry["package"], "op": ", ".join(entry["where"]), "error": entry["error"]}
        for entry in found.failures
        if entry["package"] == OURS
    ]
