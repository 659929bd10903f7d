"""A depth report as JSON, as one HTML page without outside resources, and as a PNG."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flash_attn_res.lens.recorder import DepthReport, NetworkReading

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DATA = "/*REPORT*/null"
_TITLE = "<!--TITLE-->"
_WRITTEN_CELLS = 12  # up to so many sources the cells have room for their numbers


def html(report: DepthReport, title: str = "Depth lens") -> str:
    """The page: its data, style and script are inside."""
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    # Inside a script element "<" could end it; in JSON it stands in strings alone.
    data = json.dumps(report.to_dict(), allow_nan=False).replace("<", "\\u003c")
    safe = title.replace("&", "&amp;").replace("<", "&lt;")
    return template.replace(_TITLE, safe).replace(_DATA, data)


def write_html(
    report: DepthReport, path: str | os.PathLike[str], title: str = "Depth lens"
) -> None:
    """Writes :func:`html` to a file."""
    Path(path).write_text(html(report, title), encoding="utf-8")


def write_json(report: DepthReport, path: str | os.PathLike[str]) -> None:
    """Writes what :meth:`DepthReport.from_dict` reads."""
    text = json.dumps(report.to_dict(), indent=1, allow_nan=False)
    Path(path).write_text(text + "\n", encoding="utf-8")


def write_png(report: DepthReport, path: str | os.PathLike[str], title: str = "Depth lens") -> None:
    """Writes :func:`figure` to a file."""
    figure(report, title).savefig(path, dpi=150, format="png")


def figure(report: DepthReport, title: str = "Depth lens") -> Figure:
    """Heat map of the probabilities and entropy of every site, a row for each network."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as NewFigure

    networks = report.networks
    heights = [min(max(0.27 * len(n.sites), 3.0), 24.0) + 1.3 for n in networks]
    widest = max(len(n.source_names) for n in networks)
    drawn = NewFigure(figsize=(min(max(0.55 * widest, 4.0), 22.0) + 5.5, sum(heights) + 0.6))
    FigureCanvasAgg(drawn)
    drawn.set_layout_engine("constrained")
    rows = drawn.subplots(
        len(networks), 2, squeeze=False, height_ratios=heights, width_ratios=(2.6, 1)
    )
    for network, (left, right) in zip(networks, rows, strict=True):
        image = _heat_map(left, network)
        drawn.colorbar(image, ax=left, fraction=0.04, pad=0.02, label="mean probability")
        _entropy(right, network)
    drawn.suptitle(title, fontsize=14, fontweight="bold")
    return drawn


def _heat_map(axes: Axes, network: NetworkReading) -> Any:
    table = [[math.nan if p is None else p for p in row] for row in network.matrix()]
    image = axes.imshow(table, cmap="YlGnBu", vmin=0, vmax=1, aspect="auto")
    sites, sources = len(table), len(network.source_names)
    every = max(1, math.ceil(sites / 48))
    axes.set_yticks(range(0, sites, every), [s.name for s in network.sites][::every], fontsize=8)
    every = max(1, math.ceil(sources / 24))
    axes.set_xticks(
        range(0, sources, every), network.source_names[::every], rotation=45, ha="right", fontsize=8
    )
    for site in network.sites:
        for source, mean in zip(site.sources, site.mean, strict=True):
            own = site.partial and source == site.sources[-1]
            if sources <= _WRITTEN_CELLS and sites <= 48:
                axes.text(
                    source,
                    site.index,
                    f"{mean:.2f}" + ("*" if own else ""),
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if mean > 0.55 else "#222222",
                )
    tokens = f"{network.tokens:,} tokens"
    star = "; * running sum of its own block" if any(s.partial for s in network.sites) else ""
    axes.set_title(f"{network.name}: what each site reads ({tokens}{star})", loc="left", fontsize=9)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return image


def _entropy(axes: Axes, network: NetworkReading) -> None:
    index = [site.index for site in network.sites]
    most = [math.log2(len(site.sources)) for site in network.sites]
    axes.barh(index, most, color="#e3e8ef", label="most possible")
    axes.barh(index, [s.entropy for s in network.sites], color="#1f6fd6", height=0.5, label="mean")
    axes.set_ylim(len(index) - 0.5, -0.5)
    axes.set_yticks([])
    axes.set_xlabel("bits")
    axes.set_title("entropy", loc="left", fontsize=9)
    axes.legend(loc="lower left", fontsize=7, bbox_to_anchor=(0.0, 1.06), ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
