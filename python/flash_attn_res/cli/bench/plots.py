"""The plots of README and docs, each from one result file."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flash_attn_res import lens
from flash_attn_res.cli import figures
from flash_attn_res.cli.bench.harness import OURS, STORAGE_GRADIENTS, Row
from flash_attn_res.cli.bench.tables import OP_NAMES, Document, main_shapes, measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {
    OURS: "#c0392b",
    STORAGE_GRADIENTS: "#e59866",
    "plain": "#7a828e",
    "seed": "#c7a76c",
    "fla (Triton)": "#a1d99b",
    "fla (Gluon)": "#41ab5d",
    "liger": "#fdae6b",
    "fast_attnres": "#bcbddc",
    "vllm": "#f7b6d2",
    "flashinfer": "#76b7b2",
    "torch.compile": "#6baed6",
    "torch.compile (sums)": "#6baed6",
    "torch.compile (products)": "#9ecae1",
    "eager": "#bdbdbd",
    "eager (float32 inside)": "#969696",
}
LABELS = {
    OURS: "this package",
    STORAGE_GRADIENTS: "this package, grad_dtype=None",
    "plain": "plain residual",
    "seed": "first Triton package",
    "eager": "eager PyTorch",
    "eager (float32 inside)": "eager PyTorch, float32 inside",
}
FAINT = "#66707c"


KEY = "flash-attn-res"
"""Of a PNG's metadata: the hash of what the picture was drawn from."""
HEAD = ("device", "driver", "versions", "date", "copy_tb_s", "quick", "options")
"""What the plots take from a document beside its rows."""


@dataclass(frozen=True)
class Picture:
    """Something to draw, and the hash of all that it is drawn from."""

    name: str
    document: Document
    fingerprint: str
    draw: Callable[[], Figure]
    style: Any

    def save(self, path: Path) -> None:
        """Draws it into a PNG file, with the hash in its metadata."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        with pyplot.rc_context(self.style):
            figures.save(self.draw(), path, metadata={KEY: self.fingerprint})

    def is_at(self, path: Path) -> bool:
        """Whether the file was drawn from the same."""
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(path) as image:
                return bool(image.info.get(KEY) == self.fingerprint)
        except (OSError, UnidentifiedImageError):
            return False


def fingerprint(draw: Callable[..., Figure], *given: Any) -> str:
    """Changes with what is drawn and with the code of ``draw`` itself."""
    text = json.dumps([inspect.getsource(draw), *given], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def picture(name: str, document: Document) -> Picture:
    """One of :data:`PLOTS`, of a document that has rows for it."""
    plot = PLOTS[name]
    rows = plot.select(document)
    head = {member: document.get(member) for member in HEAD}
    return Picture(
        name,
        document,
        fingerprint(plot.draw, name, head, rows),
        lambda: plot.draw(document, rows),
        {**figures.STYLE, "font.size": 10, "axes.titlesize": 11, "savefig.dpi": 150},
    )


def demo_pictures(summary: Mapping[str, Any]) -> list[Picture]:
    """That of the demo which a page shows."""
    shown = {
        "options": summary["options"],
        "text": summary["text"],
        "variants": {
            name: {"depth": {"attention": entry["depth"]["attention"]}}
            for name, entry in summary["variants"].items()
        },
    }
    draw = figures.depth_attention
    return [
        Picture(
            "depth_attention",
            summary,
            fingerprint(draw, shown),
            lambda: draw(shown),
            figures.STYLE,
        )
    ]


def lens_picture(seen: Mapping[str, Any]) -> Picture:
    """What `inspect` draws, from its depth.json."""
    shown = {name: value for name, value in seen.items() if name != "file"}
    report, title = lens.DepthReport.from_dict(shown), "Depth lens: demo"
    return Picture(
        "depth-lens",
        seen,
        fingerprint(lens.figure, title, shown),
        lambda: lens.figure(report, title),
        {"savefig.dpi": 150},
    )


@dataclass(frozen=True)
class Plot:
    """One picture: of which suite, of which rows, how, and what makes those rows."""

    suite: str
    select: Callable[[Document], list[Row]]
    draw: Callable[[Document, list[Row]], Figure]
    command: str
    text: str  #: what stands where a picture cannot be seen


# ----------------------------------------------------------------------------------- what is shared


def packages_of(rows: Sequence[Row]) -> list[str]:
    """Ours first, then the others as they come."""
    found = list(dict.fromkeys(row["package"] for row in rows))
    return sorted(found, key=lambda name: (name != "plain", not name.startswith(OURS)))


def color(package: str) -> str:
    """The same in every plot."""
    return COLORS.get(package, "#444444")


def label(package: str) -> str:
    """For a legend."""
    return LABELS.get(package, package)


def headline(figure: Figure, title: str, document: Document, note: str) -> None:
    """What is shown and on which machine, and how to read it."""
    # Inches above the panels, whatever the size of the figure.
    line = 0.22 / figure.get_figheight()
    quick = "quick run; " if document.get("quick") else ""
    versions = f"torch {document['versions']['torch']}, {document['date'][:10]}"
    text = f"{quick}{note} {versions}"
    figure.text(0.01, 1 + line / 2, text, va="bottom", fontsize=8.5, color=FAINT)
    title = f"{title}: {document['device']}"
    figure.text(0.01, 1 + 1.5 * line, title, va="bottom", fontsize=13, fontweight="bold")


def below(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend for all panels, under them."""
    handles: dict[str, Any] = {}
    for each in axes:
        for handle, name in zip(*each.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=min(6, len(handles)),
    )


def network_name(row: Row) -> str:
    """L, S, T and D of a whole network."""
    sizes = f"L={row['layers']} S={row['block_size']}\nT={row['tokens']} D={row['dim']}"
    return sizes + ("\ncheckpointed" if row["checkpointed"] else "")


def grouped_bars(
    axes: Axes,
    groups: Mapping[str, Mapping[str, float]],
    packages: Sequence[str],
    text: Callable[[float], str],
    ranges: Mapping[tuple[str, str], tuple[float, float]] | None = None,
) -> None:
    """Vertical bars, one group beside the other, with their numbers."""
    for index, (group, bars) in enumerate(groups.items()):
        there = [package for package in packages if package in bars]
        width = 0.84 / max(len(there), 3)
        for place, package in enumerate(there):
            x = index + (place - (len(there) - 1) / 2) * width
            value = bars[package]
            axes.bar(x, value, width * 0.94, color=color(package))
            low, high = (ranges or {}).get((group, package), (value, value))
            if high > low:
                axes.vlines(x, low, high, color="#22262b", linewidth=1)
            axes.annotate(
                text(value),
                (x, max(value, high, 0)),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=7.5,
                fontweight="bold" if package == OURS else "normal",
            )
    for package in packages:
        axes.bar(0, 0, color=color(package), label=label(package))
    axes.set_xticks(range(len(groups)), list(groups), fontsize=8)
    axes.grid(visible=False, axis="x")


# ------------------------------------------------------------------------------------------ kernels


def bar_name(op: str) -> str:
    """An operation and its direction, in two lines."""
    name, _, direction = op.rpartition("_")
    return f"{OP_NAMES[name]}\n{'forward' if direction == 'fwd' else 'backward'}"


def kernel_rows(document: Document) -> list[Row]:
    shapes = main_shapes(document)
    return [row for row in measured(document) if tuple(row["shape"].items()) in shapes]


def kernels(document: Document, rows: list[Row]) -> Figure:
    """Percent of copy by operation and package, one row of bars a shape."""
    from matplotlib import pyplot

    shapes = main_shapes(document)
    packages = packages_of(rows)
    there = {row["op"] for row in rows}
    ops = [op for name in OP_NAMES for op in (f"{name}_fwd", f"{name}_bwd") if op in there]
    figure, grid = pyplot.subplots(
        len(shapes),
        1,
        figsize=(13, 2.4 * len(shapes) + 1),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, shape in zip(grid[:, 0], shapes, strict=True):
        groups: dict[str, dict[str, float]] = {bar_name(op): {} for op in ops}
        for row in rows:
            if tuple(row["shape"].items()) == shape:
                groups[bar_name(row["op"])][row["package"]] = row["percent_of_copy"]
        grouped_bars(axes, groups, packages, lambda value: f"{value:.0f}")
        axes.axhline(100, color="black", linewidth=0.8, linestyle="--", zorder=0)
        axes.set_ylim(0, 118)
        axes.set_ylabel("% of a copy")
        axes.set_title("  ".join(f"{axis}={size}" for axis, size in shape))
    below(figure, list(grid[:, 0]))
    headline(
        figure,
        "Kernels, percent of what a copy moves",
        document,
        f"Larger is better; 100 % is a device copy, {document['copy_tb_s']:.2f} TB/s read and "
        f"written. {rows[0]['dtype']},",
    )
    return figure


# ----------------------------------------------------------------------------------- whole networks


def step_rows(document: Document) -> list[Row]:
    rows = [row for row in measured(document) if "series" not in row]
    return rows if any("step_over_plain" in row for row in rows) else []


def memory_rows(document: Document) -> list[Row]:
    return [row for row in step_rows(document) if row["peak_gib"] is not None]


def bars_width(groups: Mapping[str, Mapping[str, float]]) -> float:
    """Inches that bars with their numbers take."""
    return max(8.0, sum(0.7 + 0.36 * len(bars) for bars in groups.values()))


def two_digits(value: float) -> str:
    return f"{value:+.1f}" if abs(value) < 10 else f"{value:+.0f}"


def step_overhead(document: Document, rows: list[Row]) -> Figure:
    """Percent over plain residuals of a training step, by network and package."""
    from matplotlib import pyplot

    groups: dict[str, dict[str, float]] = {}
    ranges = {}
    for row in rows:
        if row["package"] == "plain" or "step_over_plain" not in row:
            continue
        name = network_name(row)
        groups.setdefault(name, {})[row["package"]] = 100 * (row["step_over_plain"] - 1)
        low, high = row["step_over_plain_range"]
        ranges[name, row["package"]] = (100 * (low - 1), 100 * (high - 1))
    packages = [name for name in packages_of(rows) if name != "plain"]
    figure, axes = pyplot.subplots(figsize=(bars_width(groups), 4.6), layout="constrained")
    grouped_bars(axes, groups, packages, two_digits, ranges)
    axes.axhline(0, color="#22262b", linewidth=0.8)
    axes.set_ylabel("% over plain residuals")
    below(figure, [axes])
    headline(
        figure,
        "Training step, time over plain residuals",
        document,
        "Smaller is better; bars: medians over rounds, lines: all rounds. "
        f"{rows[0].get('dtype', 'bfloat16')}, SwiGLU sublayers, eager,",
    )
    return figure


def step_memory(document: Document, rows: list[Row]) -> Figure:
    """Peak memory of a step, by network and package."""
    from matplotlib import pyplot

    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        groups.setdefault(network_name(row), {})[row["package"]] = row["peak_gib"]
    figure, axes = pyplot.subplots(figsize=(bars_width(groups), 4.6), layout="constrained")
    grouped_bars(axes, groups, packages_of(rows), lambda value: f"{value:.1f}")
    axes.margins(y=0.12)
    axes.set_ylabel("peak GiB of a step")
    below(figure, [axes])
    headline(
        figure,
        "Training step, peak memory",
        document,
        "Smaller is better; weights, input and gradients included. "
        f"{rows[0].get('dtype', 'bfloat16')}, SwiGLU sublayers, eager,",
    )
    return figure


def scaling_rows(document: Document) -> list[Row]:
    return [row for row in measured(document) if "series" in row]


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the power law through the points, by least squares."""
    a, b = [math.log(v) for v in x], [math.log(v) for v in y]
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    over = sum((p - mean_a) ** 2 for p in a)
    return sum((p - mean_a) * (q - mean_b) for p, q in zip(a, b, strict=True)) / over


def scaling(document: Document, rows: list[Row]) -> Figure:
    """Milliseconds of a step over L and over T, and what it is over plain."""
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, NullLocator

    series = {axis: [row for row in rows if row["series"] == axis] for axis in ("L", "T")}
    series = {axis: found for axis, found in series.items() if found}
    figure, grid = pyplot.subplots(
        1, len(series), figsize=(6.2 * len(series), 4.6), squeeze=False, layout="constrained"
    )
    for axes, (axis, found) in zip(grid[0], series.items(), strict=True):
        column = {"L": "layers", "T": "tokens"}[axis]
        for package in packages_of(found):
            own = sorted((row for row in found if row["package"] == package), key=_by(column))
            x, y = [row[column] for row in own], [row["step_ms"] for row in own]
            power = f", {axis}^{exponent(x, y):.2f}" if len(x) > 1 else ""
            axes.plot(
                x,
                y,
                "o-",
                color=color(package),
                label=label(package) + power,
                linewidth=2.4 if package == OURS else 1.6,
                zorder=3 if package == OURS else 2,
            )
        own = sorted((row for row in found if row["package"] == OURS), key=_by(column))
        if own:
            x = [row[column] for row in own]
            last = own[-1]["step_ms"] / x[-1]
            axes.plot(x, [last * v for v in x], ":", color="0.5", label="proportional")
        ticks = sorted({row[column] for row in found})
        axes.set(xscale="log", yscale="log", xlabel=column, ylabel="ms of a training step")
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticklabels([str(tick) for tick in ticks], fontsize=8)
        other = {"L": ("tokens", "T"), "T": ("layers", "L")}[axis]
        axes.set_title(f"over {column}; {other[1]}={found[0][other[0]]} D={found[0]['dim']}")
        axes.legend(fontsize=8)
    headline(
        figure,
        "Training step over depth and tokens",
        document,
        "Eight blocks; the legend has the exponent of the power law through the points. "
        f"{rows[0]['dtype']},",
    )
    return figure


def _by(column: str) -> Callable[[Row], Any]:
    return lambda row: row[column]


# ------------------------------------------------------------------------------------ small batches


def decode(document: Document, rows: list[Row]) -> Figure:
    """Microseconds over T, cold and warm, with the time of a copy of the bytes."""
    from matplotlib import pyplot

    cases: dict[tuple[str, int, int], dict[str, list[Row]]] = {}
    for row in rows:
        key = (row["op"], row["shape"]["N"], row["shape"]["S"])
        cases.setdefault(key, {}).setdefault(row["package"], []).append(row)
    figure, grid = pyplot.subplots(
        1, len(cases), figsize=(3.1 * len(cases) + 0.5, 3.6), squeeze=False, layout="constrained"
    )
    for axes, ((op, N, S), contenders) in zip(grid[0], cases.items(), strict=True):
        for package, found in contenders.items():
            own = sorted(found, key=lambda row: row["shape"]["T"])
            tokens = [row["shape"]["T"] for row in own]
            style = {"color": color(package), "linewidth": 2.2 if package == OURS else 1.4}
            axes.plot(tokens, [row["us_cold"] for row in own], label=label(package), **style)
            axes.plot(tokens, [row["us_warm"] for row in own], linestyle=":", **style)
        own = sorted(next(iter(contenders.values())), key=lambda row: row["shape"]["T"])
        tokens = [row["shape"]["T"] for row in own]
        limit = [row["bytes"] / document["copy_tb_s"] / 1e6 for row in own]
        axes.plot(tokens, limit, color="0.6", linestyle="--", label="copy of as many bytes")
        sizes = " ".join(f"{axis}={size}" for axis, size in (("N", N), ("S", S)) if size > 1)
        axes.set(xscale="log", yscale="log", xlabel="tokens")
        axes.set_title(f"{OP_NAMES[op]} {sizes}".strip())
        ticks = [t for t in (1, 16, 256, 4096) if t <= tokens[-1]]
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.set_ylim(bottom=min(row["us_warm"] for row in rows) / 2)
    grid[0, 0].set_ylabel("microseconds a call")
    below(figure, list(grid[0]))
    headline(
        figure,
        "Small batches, time of a call",
        document,
        f"Smaller is better; full lines: cold L2, dotted: warm. D={rows[0]['shape']['D']}, "
        "bfloat16,",
    )
    return figure


# ----------------------------------------------------------------------------------------- accuracy


def accuracy_rows(document: Document) -> list[Row]:
    return [row for row in document["rows"] if row["storage"] == "bf16"]


def two_lines(name: str) -> str:
    """Long names broken at their last space."""
    return "\n".join(name.rsplit(" ", 1)) if len(name) > 9 else name


def accuracy(document: Document, rows: list[Row]) -> Figure:
    """The worst relative error of every tensor, ours beside others', in bfloat16."""
    from matplotlib import pyplot

    worst: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        found = worst.setdefault(row["op"], {}).setdefault(two_lines(row["tensor"]), {})
        found[row["package"]] = max(found.get(row["package"], 0.0), row["rel_l2"] or 0.0)
    packages = packages_of(rows)
    figure, grid = pyplot.subplots(
        2, 2, figsize=(15, 7), width_ratios=(1.5, 1), layout="constrained", squeeze=False
    )
    for axes, (op, tensors) in zip(grid.flat, worst.items(), strict=False):
        grouped_bars(axes, tensors, packages, lambda value: f"{value:.0e}".replace("e-0", "e-"))
        axes.set_yscale("log")
        axes.margins(y=0.12)
        axes.set_title(OP_NAMES[op])
        axes.set_ylabel("relative L2 error")
    for axes in list(grid.flat)[len(worst) :]:
        axes.set_visible(False)
    below(figure, list(grid.flat))
    headline(
        figure,
        "Errors in bfloat16 against float64",
        document,
        "Smaller is better; the worst of all families and numbers of sources.",
    )
    return figure


def storage_curves(document: Document, rows: list[Row]) -> Figure:
    """Training curves of the storage modes."""
    from flash_attn_res.cli.curves import figure_of

    return figure_of({**document, "rows": rows})


PLOTS = {
    "step-overhead": Plot(
        "step",
        step_rows,
        step_overhead,
        "flash-attn-res bench step",
        "Time of a training step over plain residuals",
    ),
    "kernels": Plot(
        "kernels",
        kernel_rows,
        kernels,
        "flash-attn-res bench kernels",
        "Percent of a device copy by operation",
    ),
    "step-memory": Plot(
        "step",
        memory_rows,
        step_memory,
        "flash-attn-res bench step",
        "Peak memory of a training step",
    ),
    "decode": Plot(
        "decode", measured, decode, "flash-attn-res bench decode", "Time of a call over the tokens"
    ),
    "scaling": Plot(
        "step",
        scaling_rows,
        scaling,
        "flash-attn-res bench step --scaling",
        "Time of a training step over depth and tokens",
    ),
    "accuracy": Plot(
        "accuracy",
        accuracy_rows,
        accuracy,
        "flash-attn-res bench accuracy",
        "Relative errors against float64",
    ),
    "storage-curves": Plot(
        "storage-curves",
        measured,
        storage_curves,
        "flash-attn-res curves",
        "Training curves of the storage modes",
    ),
}
