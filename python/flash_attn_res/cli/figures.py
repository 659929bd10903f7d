"""The three figures of a run, drawn from its summary alone.

`loss.png`             training and validation loss of the variants
`depth_attention.png`  which depths each site reads (figure 8 of the paper)
`magnitude.png`        magnitudes and gradients over depth (figure 5 of the paper)
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flash_attn_res.cli.checkpoint import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {"plain": "#7a828e", "block": "#1f6fd6", "full": "#e8590c"}
LABELS = {"plain": "plain", "block": "Block AttnRes", "full": "Full AttnRes"}

_INK = "#22262b"
_FAINT = "#c9ced6"
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelcolor": _INK,
    "axes.edgecolor": "#8a929d",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8ebef",
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.dpi": 160,
}

DOTTED: dict[str, Any] = {"linewidth": 2.2, "markersize": 6, "markeredgecolor": "white"}
_ANNOTATED_SOURCES = 10  # up to here the heat map's cells have room for their numbers
_LABELLED_SITES = 36  # up to here every site has a label


def draw_all(summary: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes the figures that the variants of the run allow, and returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figures: dict[str, Callable[[Mapping[str, Any]], Figure]] = {
        "loss.png": loss_curves,
        "magnitude.png": magnitudes,
    }
    if any(entry["depth"]["attention"] for entry in summary["variants"].values()):
        figures["depth_attention.png"] = depth_attention
    paths = []
    with pyplot.rc_context(STYLE):
        for name, draw in figures.items():
            save(draw(summary), folder / name)
            paths.append(folder / name)
    return paths


def save(figure: Figure, path: Path, **options: Any) -> None:
    """Writes a figure as PNG, whole or not at all, and lets go of it."""
    from matplotlib import pyplot

    png = io.BytesIO()
    options = {"bbox_inches": "tight", "pad_inches": 0.25, **options}
    figure.savefig(png, format="png", **options)
    pyplot.close(figure)
    write_atomically(path, png.getvalue())


def loss_curves(summary: Mapping[str, Any]) -> Figure:
    """Left the losses; right, where there is a plain variant, how far the others are from it."""
    from matplotlib import pyplot

    variants = summary["variants"]
    compared = [name for name in variants if name != "plain"] if "plain" in variants else []
    figure, row = pyplot.subplots(
        1,
        2 if compared else 1,
        figsize=(13 if compared else 8, 5.2),
        layout="constrained",
        squeeze=False,
    )
    steps = summary["options"]["steps"]
    left = row[0, 0]
    for name, entry in variants.items():
        train = smooth(entry["train_loss"])
        left.plot(np.arange(1, len(train) + 1), train, color=COLORS[name], alpha=0.4)
        at = [step for step, _ in entry["validation"]]
        losses = [loss for _, loss in entry["validation"]]
        label = f"{LABELS[name]}  {losses[-1]:.3f}"
        left.plot(at, losses, "o-", color=COLORS[name], label=label, **DOTTED)
    left.set_title("Loss: validation (dots), training (faint)")
    left.set_ylabel("nats per byte")
    left.set_ylim(top=max(loss for e in variants.values() for _, loss in e["validation"]) * 1.03)
    left.legend(loc="upper right", title="validation loss at the end")

    for name in compared:
        own, plain = variants[name], variants["plain"]
        train = smooth(np.asarray(own["train_loss"]) - np.asarray(plain["train_loss"]))
        right = row[0, 1]
        right.plot(np.arange(1, len(train) + 1), train, color=COLORS[name], alpha=0.4)
        at = [step for step, _ in plain["validation"]]
        gaps = [
            loss - other
            for (_, loss), (_, other) in zip(own["validation"], plain["validation"], strict=True)
        ]
        right.plot(at, gaps, "o-", color=COLORS[name], label=LABELS[name], **DOTTED)
    if compared:
        right.axhline(0, color=COLORS["plain"], linewidth=2)
        right.annotate(
            "plain",
            (steps, 0),
            xytext=(0, 5),
            textcoords="offset points",
            ha="right",
            color=COLORS["plain"],
        )
        right.set_title("Difference from plain, same bytes (below: better)")
    for axes in row[0]:
        axes.set_xlabel("step")
        axes.set_xlim(0, steps * 1.02)
    _headline(figure, f"{_best(variants)} after {steps} steps", summary)
    return figure


def _best(variants: Mapping[str, Any]) -> str:
    """The headline's finding: who has the lowest validation loss, and by how much."""
    finals = {name: entry["validation"][-1][1] for name, entry in variants.items()}
    best = min(finals, key=lambda name: finals[name])
    if best == "plain" or "plain" not in finals:
        return f"{LABELS[best]} has the lowest validation loss, {finals[best]:.3f} nats per byte,"
    gain = finals["plain"] - finals[best]
    return f"{LABELS[best]} is {gain:.3f} nats per byte below plain residuals"


def depth_attention(summary: Mapping[str, Any]) -> Figure:
    """A heat map for each variant that attends over depth; cells without a source stay blank."""
    from matplotlib import pyplot
    from matplotlib.colors import PowerNorm

    shown = {n: e for n, e in summary["variants"].items() if e["depth"]["attention"]}
    columns = [len(entry["depth"]["attention"][-1]) for entry in shown.values()]
    sites = len(next(iter(shown.values()))["depth"]["attention"])
    height = float(np.clip(0.36 * sites, 4.5, 12))
    widths = [float(np.clip(0.42 * count, 3.6, height * 1.15)) for count in columns]
    figure, grid = pyplot.subplots(
        1,
        len(shown),
        figsize=(sum(widths) + 2.6 * len(shown), height + 1.9),
        width_ratios=widths,
        layout="constrained",
        squeeze=False,
    )
    # The first site has but one source: its 1 would take up the scale, and is cut off.
    rows = [row for entry in shown.values() for row in entry["depth"]["attention"] if len(row) > 1]
    highest = max(max(row) for row in rows)
    norm = PowerNorm(0.5, vmin=0, vmax=highest)
    image = None
    for axes, (name, entry) in zip(grid[0], shown.items(), strict=True):
        table = attention_table(entry["depth"]["attention"])
        image = axes.imshow(table, cmap=_heat_colors(), norm=norm, aspect="auto")
        _label_sites(axes, sites)
        _label_sources(axes, name, summary["options"], table.shape[1])
        if table.shape[1] <= _ANNOTATED_SOURCES and sites <= _LABELLED_SITES:
            _write_cells(axes, table, dark=0.4 * highest)
        axes.set_title(LABELS[name], color=COLORS[name])
        axes.grid(visible=False)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    assert image is not None
    bar = figure.colorbar(
        image, ax=grid[0].tolist(), fraction=0.03, pad=0.015, aspect=35, extend="max"
    )
    bar.set_label("mean probability over validation bytes")
    ticks = (0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
    bar.set_ticks([tick for tick in ticks if tick <= highest])
    bar.outline.set_visible(False)
    shares = []
    for name, entry in shown.items():
        share = np.mean([row[0] for row in entry["depth"]["attention"][1:]])
        shares.append(f"{100 * share:.0f} % in {LABELS[name]}")
    _headline(figure, f"Where each site reads: the embedding gets {', '.join(shares)}", summary)
    return figure


def magnitudes(summary: Mapping[str, Any]) -> Figure:
    """What the running sum carries, what each sublayer adds, and the gradient it receives."""
    from matplotlib import pyplot

    panels = (
        ("carried", "The sum that is carried on"),
        ("outputs", "What each sublayer adds"),
        ("gradients", "The gradient that it receives"),
    )
    figure, row = pyplot.subplots(1, 3, figsize=(16, 5.2), layout="constrained")
    for axes, (key, title) in zip(row, panels, strict=True):
        for name, entry in summary["variants"].items():
            values = entry["depth"][key]
            depth = np.arange(1, len(values) + 1)
            axes.plot(
                depth,
                values,
                "o-",
                color=COLORS[name],
                linewidth=2.2,
                markersize=5,
                markeredgecolor="white",
                label=LABELS[name],
            )
        axes.set_title(title)
        axes.set_xlabel("depth (sublayer)")
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
    row[0].set_ylabel("root mean square")
    if "block" in summary["variants"]:
        _mark_blocks(row[0], summary["options"])
    row[2].legend(loc="upper right")
    peaks = ", ".join(
        f"{LABELS[name]} {max(entry['depth']['carried']):.1f}"
        for name, entry in summary["variants"].items()
    )
    _headline(figure, f"Magnitudes over depth; largest sum carried: {peaks}", summary)
    return figure


def attention_table(attention: Sequence[Sequence[float]]) -> np.ndarray[Any, np.dtype[Any]]:
    """[sites, sources] with NaN where a site has no such source."""
    table = np.full((len(attention), max(map(len, attention))), np.nan)
    for site, row in enumerate(attention):
        table[site, : len(row)] = row
    return table


def smooth(values: Sequence[float]) -> np.ndarray[Any, np.dtype[Any]]:
    """A moving average over about a twentieth of the run, over what there is of it at the ends."""
    x = np.asarray(values, dtype=np.float64)
    half = max(1, len(x) // 40)
    sums = np.concatenate(([0.0], np.cumsum(x)))
    index = np.arange(len(x))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(x))
    return np.asarray((sums[high] - sums[low]) / (high - low))


def site_names(sublayers: int) -> list[str]:
    """The sites in order: attn 1, MLP 1, attn 2, ..., output."""
    names = [
        f"{kind} {layer}" for layer in range(1, sublayers // 2 + 1) for kind in ("attn", "MLP")
    ]
    return [*names, "output"]


def _label_sites(axes: Axes, sites: int) -> None:
    names = site_names(sites - 1)
    every = 1 if sites <= _LABELLED_SITES else 2 * -(-sites // (2 * _LABELLED_SITES))
    places = [place for place in range(sites) if place % every == 0 or place == sites - 1]
    axes.set_yticks(places, [names[place] for place in places], fontsize=10)
    axes.set_ylabel("site (what reads)")


def _label_sources(axes: Axes, variant: str, options: Mapping[str, Any], sources: int) -> None:
    if variant == "full":
        names = ["embedding", *site_names(sources - 1)[:-1]]
        every = 1 if sources <= _LABELLED_SITES else 2 * -(-sources // (2 * _LABELLED_SITES))
        axes.set_xlabel("source (output of a sublayer)")
    else:
        names = ["embedding", *(f"block {block}" for block in range(1, sources))]
        every = max(1, sources // 20)
        axes.set_xlabel(f"source (sum of {options['block_size']} sublayers)")
    places = list(range(0, sources, every))
    axes.set_xticks(
        places, [names[place] for place in places], rotation=90 if sources > 6 else 0, fontsize=10
    )


def _write_cells(axes: Axes, table: np.ndarray[Any, np.dtype[Any]], dark: float) -> None:
    for site, source in zip(*np.nonzero(~np.isnan(table)), strict=True):
        value = table[site, source]
        axes.text(
            source,
            site,
            f"{value:.2f}",
            ha="center",
            va="center",
            fontsize=8.5,
            color="white" if value > dark else _INK,
        )


def _mark_blocks(axes: Axes, options: Mapping[str, Any]) -> None:
    """Faint lines where a block of the block variant ends."""
    for edge in range(options["block_size"], 2 * options["layers"], options["block_size"]):
        axes.axvline(edge + 0.5, color=_FAINT, linewidth=1.2, linestyle=(0, (4, 3)), zorder=0)


def _heat_colors() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    stops = ["#f4f7fb", "#cfe1f5", "#8dbbe8", "#3f83cf", "#174f9c", "#08264f"]
    return LinearSegmentedColormap.from_list("depth", stops)


def _headline(figure: Figure, text: str, summary: Mapping[str, Any]) -> None:
    options = summary["options"]
    figure.suptitle(text, fontsize=16, fontweight="bold", x=0.01, y=1.02, ha="left", va="bottom")
    figure.text(
        0.01,
        -0.02,
        f"{options['layers']} Transformer layers = {2 * options['layers']} sublayers, "
        f"width {options['dim']}, blocks of {options['block_size']} sublayers; "
        f"{summary['text']['trained_bytes'] / 1e6:.2f} million bytes of "
        f"{summary['text']['description']}",
        fontsize=10.5,
        color="#66707c",
    )
