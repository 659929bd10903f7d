"""How this package stores values: every storage mode as an entry.

A mode says in which dtypes completed blocks and the running partial sum are kept, and how its
operations and its network are called. A new storage adds an entry to :data:`MODES`; the tables, the
command's options and the tests follow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flash_attn_res import attend, read
from flash_attn_res.cli.accuracy.peers import EPS


@dataclass(frozen=True)
class Mode:
    """Storage of one way to run this package."""

    name: str
    value: torch.dtype  # of sources, phase-1 results, updates and x
    partial: torch.dtype  # of the running sum
    # Operations in which it differs from the mode that keeps everything in `value`.
    ops: tuple[str, ...] = ("phase1", "oneshot_norm", "advance", "network")

    def store(self, name: str, value: Tensor) -> Tensor:
        """An input of an operation, drawn in float32, as this mode keeps it."""
        if name in ("queries", "key_weight", "weight", "lse"):
            return value.float()
        return value.to(self.partial if name == "partial" else self.value)

    def run(self, op: str, x: dict[str, Tensor]) -> list[Tensor]:
        """An operation of `peers.OPS` on leaves named as in `peers.Case`."""
        return run(op, x)


def run(op: str, x: dict[str, Tensor]) -> list[Tensor]:
    """This package's operations, in whatever dtype the leaves have; float64 is the reference."""
    queries, weights = x["queries"], x["key_weight"]
    if op == "phase1":
        return list(attend(x["sources"], queries, weights, eps=EPS)[:2])
    site = (queries[0], weights[0])
    if op in ("oneshot", "oneshot_norm"):
        norm = x.get("weight")
        return [read(*site, sources=x["sources"], norm_weight=norm, eps=EPS).x]
    result = read(
        *site,
        phase1=(x["o"], x["lse"]),
        partial=x["partial"],
        update=x.get("update"),
        norm_weight=x.get("weight"),
        eps=EPS,
    )
    if op == "merge":
        return [result.x]
    assert result.partial is not None
    return [result.x, result.partial]


MODES = {
    mode.name: mode
    for mode in (
        Mode("bf16", torch.bfloat16, torch.bfloat16),
        Mode("fp16", torch.float16, torch.float16),  # without a scale
        Mode("fp32", torch.float32, torch.float32),
        Mode("bf16 + fp32 sum", torch.bfloat16, torch.float32, ("advance", "network")),
    )
}
