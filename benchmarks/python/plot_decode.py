"""Draws docs/images/decode.svg from benchmarks/results/h100-decode.json: time over T.

Usage: plot_decode.py [--results FILE] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = pathlib.Path(__file__).resolve().parents[2]
TITLES = {
    "advance": "advance",
    "oneshot": "one-shot",
    "k3_site": "Kimi K3 site",
    "phase1": "phase 1",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    results = ROOT / "benchmarks" / "results" / "h100-decode.json"
    parser.add_argument("--results", type=pathlib.Path, default=results)
    image = ROOT / "docs" / "images" / "decode.svg"
    parser.add_argument("--out", type=pathlib.Path, default=image)
    options = parser.parse_args()
    document = json.loads(options.results.read_text())
    cases: dict[tuple, dict[str, list[dict]]] = {}
    for row in document["rows"]:
        key = (row["op"], row["shape"]["N"], row["shape"]["S"])
        cases.setdefault(key, {}).setdefault(row["package"], []).append(row)

    matplotlib.rcParams.update({"svg.hashsalt": "decode", "font.size": 8})
    figure, axes = plt.subplots(1, len(cases), figsize=(3.1 * len(cases), 3), squeeze=False)
    packages = list(dict.fromkeys(row["package"] for row in document["rows"]))
    for axis, ((op, N, S), contenders) in zip(axes[0], cases.items(), strict=True):
        for package, rows in contenders.items():
            color = f"C{packages.index(package)}"
            tokens = [row["shape"]["T"] for row in rows]
            axis.plot(tokens, [row["us_cold"] for row in rows], color=color, label=package)
            axis.plot(tokens, [row["us_warm"] for row in rows], color=color, linestyle=":")
        rows = next(iter(contenders.values()))
        limit = [row["bytes"] / document["copy_tb_s"] / 1e6 for row in rows]
        tokens = [row["shape"]["T"] for row in rows]
        axis.plot(tokens, limit, color="0.6", linestyle="--", label="copy of the bytes")
        sizes = ", ".join(f"{k}={v}" for k, v in (("N", N), ("S", S)) if v > 1)
        axis.set(title=f"{TITLES[op]} {sizes}".strip(), xscale="log", yscale="log", xlabel="T")
        axis.set_xticks([1, 16, 256, 4096], ["1", "16", "256", "4096"])
    axes[0][0].set_ylabel("microseconds (dotted: warm L2)")
    handles = {}
    for axis in axes[0]:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=len(handles))
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, metadata={"Date": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
