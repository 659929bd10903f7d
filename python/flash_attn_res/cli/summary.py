"""The end of a run: numbers to `summary.json`, a table for people, figures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from flash_attn_res.cli.checkpoint import write_atomically
from flash_attn_res.cli.figures import COLORS, LABELS
from flash_attn_res.cli.progress import number

_WARMUP_ROUNDS = 5  # of the timing: first calls allocate


def timing(seconds: Sequence[float], baseline: Sequence[float] | None) -> dict[str, Any]:
    """Milliseconds to a step, and the ratio to the plain variant's step of the same round.

    The variants take their steps in turn, in changing order, so that whatever else the machine
    does meets all of them; the median of the rounds' ratios is then steadier than a ratio of
    medians.
    """
    skip = min(_WARMUP_ROUNDS, len(seconds) // 4)
    own = np.asarray(seconds[skip:]) * 1e3
    low, median, high = np.percentile(own, (10, 50, 90))
    result: dict[str, Any] = {
        "step_ms": float(median),
        "step_ms_p10": float(low),
        "step_ms_p90": float(high),
        "ratio_to_plain": None,
        "ratio_to_plain_quartiles": None,
        "rounds": len(own),
    }
    if baseline is not None:
        ratios = own / (np.asarray(baseline[skip:]) * 1e3)
        lower, ratio, upper = np.percentile(ratios, (25, 50, 75))
        result["ratio_to_plain"] = float(ratio)
        result["ratio_to_plain_quartiles"] = [float(lower), float(upper)]
    return result


def write_summary(summary: Mapping[str, Any], path: Path) -> None:
    """JSON that every reader takes: NaN and infinities become null."""
    text = json.dumps(_finite(summary), indent=1, allow_nan=False)
    write_atomically(path, text.encode() + b"\n")


def print_table(summary: Mapping[str, Any], console: Console) -> None:
    """One row a variant."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("variant", vertical="bottom", no_wrap=True)
    for column in (
        "params",
        "validation\nnats/byte",
        "bits/byte",
        "median\nms/step",
        "over\nplain",
        "peak\nMiB",
    ):
        table.add_column(column, justify="right", vertical="bottom")
    for variant, entry in summary["variants"].items():
        table.add_row(
            f"[{COLORS[variant]}]{LABELS[variant]}[/]",
            f"{entry['parameters']:,}",
            number(entry["validation_loss"], 4),
            number(entry["validation_loss"] / math.log(2)),
            number(entry["timing"]["step_ms"], 1),
            _overhead(entry["timing"]["ratio_to_plain"]) if variant != "plain" else "",
            _mebibytes(entry["memory"]),
        )
    console.print()
    console.print(table)
    if "plain" in summary["variants"]:
        console.print(
            "Over plain: median over all rounds of this variant's step time by plain's.",
            style="dim",
            highlight=False,
        )
    memory = next(iter(summary["variants"].values()))["memory"]
    if memory is not None and memory["baseline_bytes"]:
        console.print(
            "Peak: memory of a process that trains this variant alone, less the "
            f"{memory['baseline_bytes'] / 2**20:.0f} MiB that Python and PyTorch take.",
            style="dim",
            highlight=False,
        )


def _overhead(ratio: float | None) -> str:
    return "-" if ratio is None else f"{100 * (ratio - 1):+.1f} %"


def _mebibytes(memory: Mapping[str, int] | None) -> str:
    if memory is None:
        return "-"
    return f"{(memory['peak_bytes'] - memory['baseline_bytes']) / 2**20:.0f}"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
