"""The command `flash-attn-res plan`."""

from __future__ import annotations

import argparse
import math

from flash_attn_res.cli.errors import CliError


def run_plan(arguments: argparse.Namespace) -> int:
    """Prints what Attention Residuals need of a distributed network."""
    from flash_attn_res.distributed import schedule
    from flash_attn_res.distributed.planning import Estimate

    names = ("layers", "dim", "block_size", "pp", "vpp", "tp", "seq", "micro_batches")
    for name in names:
        if getattr(arguments, name) < 1:
            flag = name.replace("_", "-")
            raise CliError(f"--{flag} is {getattr(arguments, name)}, expected at least 1")
    if arguments.sum_bytes is not None and arguments.sum_bytes < arguments.value_bytes:
        raise CliError(
            f"--sum-bytes is {arguments.sum_bytes}, expected at least the "
            f"{arguments.value_bytes} of --value-bytes"
        )
    if not all(0 < link < math.inf for link in arguments.links):
        raise CliError(f"--links are {arguments.links}, expected numbers above 0, in GB/s")
    if arguments.pp * arguments.vpp > arguments.layers:
        raise CliError(
            f"--pp {arguments.pp} and --vpp {arguments.vpp} make {arguments.pp * arguments.vpp} "
            f"stages, more than the {arguments.layers} sublayers"
        )
    if arguments.pp == 1 and arguments.vpp > 1:
        raise CliError(f"--vpp is {arguments.vpp}, expected 1 for a pipeline of one rank")
    try:
        schedule.check(arguments.pp, arguments.vpp, arguments.micro_batches)
    except ValueError as error:
        raise CliError(f"--micro-batches: {error}") from None
    sizes = {name: getattr(arguments, name) for name in (*names, "value_bytes", "sum_bytes")}
    estimate = Estimate(**sizes)
    print(estimate.describe(arguments.links))
    return 0
