"""How this package stores values: every storage mode as an entry.

A mode says in which dtypes completed blocks and the running partial sum are kept, and how its
operations and its network are called. A new storage adds an entry to :data:`MODES`; the tables, the
command's options and the tests follow.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flash_attn_res import attend, quantize, read, stochastic_add
from flash_attn_res.cli.accuracy.peers import EPS

ALL = ("phase1", "oneshot_norm", "advance", "network")
READS_BLOCKS = ("phase1", "oneshot_norm", "network")
SUMS = ("advance", "network")
SEED = 1  # of stochastic rounding


@dataclass(frozen=True)
class Mode:
    """Storage of one way to run this package."""

    name: str
    value: torch.dtype  # of sources, phase-1 results, updates and x
    partial: torch.dtype  # of the running sum
    # Operations in which it differs from the mode that keeps everything in `value`.
    ops: tuple[str, ...] = ALL
    # Storage of the packages whose errors it may not exceed; None for a mode that rounds more
    # coarsely than any of them, by its nature.
    bar: str | None = None
    # Arguments of `BlockAttnRes`.
    options: dict[str, Any] = field(default_factory=dict)

    def store(self, name: str, value: Tensor) -> Tensor:
        """An input of an operation, drawn in float32, as this mode keeps it."""
        if name in ("queries", "key_weight", "weight", "lse"):
            return value.float()
        if name == "sources" and "block_storage" in self.options:
            return value.float()  # `run` quantises it
        return value.to(self.partial if name == "partial" else self.value)

    def run(self, op: str, x: dict[str, Tensor]) -> list[Tensor]:
        """An operation of `peers.OPS` on leaves named as in `peers.Case`."""
        storage = self.options.get("block_storage")
        if storage is not None and op in ("phase1", "oneshot_norm"):
            return run_stored(op, x, storage, self.value)
        if "stochastic_rounding" in self.options and op == "advance":
            total = stochastic_add([x["partial"], x["update"]], SEED)
            rest = {name: value for name, value in x.items() if name != "update"}
            return [*run("merge", rest | {"partial": total}), total]
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


def run_stored(op: str, x: dict[str, Tensor], storage: str, dtype: torch.dtype) -> list[Tensor]:
    """`run` over quantised sources, as a stream with `block_storage` has them; results in dtype."""
    sources = [quantize(source, storage) for source in x["sources"].unbind(0)]
    queries, weights = x["queries"], x["key_weight"]
    if op == "phase1":
        return list(attend(sources, queries, weights, eps=EPS, dtype=dtype)[:2])
    site = (queries[0], weights[0])
    return [read(*site, sources=sources, norm_weight=x["weight"], eps=EPS, dtype=dtype).x]


_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32

MODES = {
    mode.name: mode
    for mode in (
        Mode("bf16", _BF16, _BF16, bar="bf16"),
        Mode("fp16", _FP16, _FP16, bar="fp16"),  # without a scale
        Mode("fp32", _FP32, _FP32, bar="fp32"),
        Mode("bf16 + fp32 sum", _BF16, _FP32, SUMS, "bf16", {"sum_dtype": _FP32}),
        Mode(
            "bf16 + fp16 blocks", _BF16, _BF16, READS_BLOCKS, "bf16", {"block_storage": "float16"}
        ),
        Mode(
            "fp32 + fp16 blocks", _FP32, _FP32, READS_BLOCKS, "fp16", {"block_storage": "float16"}
        ),
        Mode("bf16 + fp8 blocks", _BF16, _BF16, READS_BLOCKS, None, {"block_storage": "float8"}),
        # A single rounding errs by up to a unit, to nearest by half of one.
        Mode("bf16 stochastic", _BF16, _BF16, SUMS, None, {"stochastic_rounding": SEED}),
    )
}
