"""Writes the tables of README and docs from benchmarks/results/*.json.

Usage: report.py [--check] [--plots]
  --check: say whether the tables are up to date, change nothing
  --plots: also draw docs/images/kernels.png (needs matplotlib)

A table stands between "<!-- generated: NAME -->" and "<!-- end of generated: NAME -->"; NAME is a
function below.
"""

from __future__ import annotations

import json
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [
    "README.md",
    *(f"docs/{name}.md" for name in ("cpu", "inference", "kernels", "numerics", "training")),
]


def load(name: str) -> dict:
    path = RESULTS / name
    if not path.exists():
        raise SystemExit(f"report: {path.relative_to(ROOT)} is missing; run make bench")
    return json.loads(path.read_text())


def markdown(header: list[str], rows: list[list[str]]) -> str:
    align = [":---" if index == 0 else "---:" for index in range(len(header))]
    lines = [header, align, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


CPU_OPS = {
    "oneshot": "one-shot `read`",
    "phase1": "`attend`",
    "merge": "merge",
    "advance": "advance",
}


def cpu_table(with_eager: bool) -> str:
    """Ours against the better of torch.compile's forms, case by case."""
    document = load("cpu.json")
    cases: dict[tuple, dict[str, dict]] = {}
    for row in document["rows"]:
        key = (row["op"], row["dtype"], tuple(row["shape"].items()))
        cases.setdefault(key, {})[row["package"]] = row
    rows = []
    for (op, dtype, shape_items), packages in cases.items():
        name, direction = op.rsplit("_", 1)
        shape = dict(shape_items)
        ours = packages["flash_attn_res"]
        compiled = min(
            (row for package, row in packages.items() if package.startswith("torch.compile")),
            key=lambda row: row["us"],
        )
        size = f"N={shape['N']} S={shape['S']}" if shape["N"] else ""
        line = [
            f"{CPU_OPS[name]} {'forward' if direction == 'fwd' else 'backward'} {size}".strip(),
            dtype,
            f"{ours['us'] / 1e3:.1f}",
            f"{ours['percent_of_copy']:.0f} %",
            f"{compiled['us'] / 1e3:.1f}",
            f"{compiled['us'] / ours['us']:.1f}x",
            f"{2 * compiled['percent_of_copy']:.0f} %",
        ]
        if with_eager:
            line.append(f"{packages['eager']['us'] / ours['us']:.1f}x")
        rows.append(line)
    header = ["operation", "dtype", "ms", "of copy", "torch.compile ms", "faster", "2x is, of copy"]
    if with_eager:
        header.append("than eager")
    threads = document["rows"][0]["threads"]
    caption = (
        f"{document['device']}, {threads} threads, torch {document['versions']['torch']}, "
        f"copy {document['copy_tb_s'] * 1e3:.1f} GB/s; medians, `make bench` measures it here."
    )
    return caption + "\n\n" + markdown(header, rows)


def cpu() -> str:
    """The full CPU table."""
    return cpu_table(with_eager=True)


VARIANTS = {"plain": "plain", "block": "Block AttnRes", "full": "Full AttnRes"}


def demo() -> str:
    """The demo's comparison of the three residual connections."""
    document = load("demo.json")
    rows = []
    for variant, entry in document["variants"].items():
        ratio = entry["timing"]["ratio_to_plain"]
        memory = entry["memory"]
        rows.append(
            [
                VARIANTS[variant],
                f"{entry['validation_loss']:.4f}",
                f"{entry['timing']['step_ms']:.0f}",
                "" if ratio is None else f"{100 * (ratio - 1):+.1f} %",
                f"{(memory['peak_bytes'] - memory['baseline_bytes']) / 2**20:.0f}",
            ]
        )
    header = ["residual", "validation loss, nats/byte", "ms/step", "over plain", "peak MiB"]
    options = document["options"]
    caption = (
        f"`make demo`: {options['layers']} Transformer layers, width {options['dim']}, "
        f"{options['steps']} steps on the Python standard library's sources, one seed, on "
        f"{document['machine']['device']}."
    )
    return caption + "\n\n" + markdown(header, rows)


KERNEL_OPS = {
    "phase1_fwd": "phase 1 forward",
    "phase1_bwd": "phase 1 backward, accumulating, gated",
    "merge_fwd": "merge forward",
    "merge_bwd": "merge backward",
    "oneshot_fwd": "one-shot forward",
    "oneshot_bwd": "one-shot backward",
    "oneshot_norm_fwd": "one-shot forward with output norm",
    "oneshot_norm_bwd": "one-shot backward with output norm",
    "advance_fwd": "advance forward",
    "advance_bwd": "advance backward",
}


OURS = "flash_attn_res"
MAIN_SHAPES = 3  # A, B and C come first in a result file


def main_shapes(document: dict) -> list[tuple]:
    """The shapes that tables and plot show, in the order of the file."""
    shapes = dict.fromkeys(tuple(row["shape"].items()) for row in document["rows"])
    return list(shapes)[:MAIN_SHAPES]


def kernels_caption(document: dict) -> str:
    return (
        f"{document['device']}, driver {document['driver']}, "
        f"torch {document['versions']['torch']}, "
        f"bfloat16; percent of a device copy ({document['copy_tb_s']:.2f} TB/s, bytes read and "
        "written) measured in the same run."
    )


def kernels() -> str:
    """Percent of a device copy, operation by shape."""
    document = load("h100-kernels.json")
    rows = [row for row in document["rows"] if row["package"] == OURS and "us" in row]
    shapes = main_shapes(document)
    by_case = {(row["op"], tuple(row["shape"].items())): row for row in rows}
    header = ["operation"] + [
        " ".join(f"{axis}={size}" for axis, size in shape) for shape in shapes
    ]
    lines = []
    for op, name in KERNEL_OPS.items():
        line = [name]
        for shape in shapes:
            row = by_case.get((op, shape))
            line.append(
                "" if row is None else f"{row['percent_of_copy']:.0f} % ({row['us']:.0f} us)"
            )
        lines.append(line)
    return kernels_caption(document) + "\n\n" + markdown(header, lines)


def peers() -> str:
    """The same operations in other packages: percent of copy, or why there is none."""
    document = load("h100-kernels.json")
    packages = [p for p in dict.fromkeys(row["package"] for row in document["rows"]) if p != OURS]
    if not packages:
        return "Not measured yet: `cuda_kernels.py --peers` measures it."
    by_case = {
        (row["package"], row["op"], tuple(row["shape"].items())): row for row in document["rows"]
    }
    reasons: dict[str, list[str]] = {}
    lines = []
    for shape in main_shapes(document):
        for op, name in KERNEL_OPS.items():
            cells = []
            for package in [OURS, *packages]:
                row = by_case.get((package, op, shape), {})
                if "us" in row:
                    cells.append(f"{row['percent_of_copy']:.0f} %")
                else:
                    cells.append("-")
                    if why := row.get("error"):
                        reasons.setdefault(f"{package}: {why}", []).append(op)
            if any(cell != "-" for cell in cells):
                sizes = " ".join(f"{axis}={size}" for axis, size in shape)
                lines.append([name, sizes, *cells])
    versions = ", ".join(
        f"{package} {version}"
        for package, version in document["versions"].items()
        if package not in ("torch", "cuda", "python")
    )
    notes = "\n".join(
        f"- {reason} ({', '.join(dict.fromkeys(ops))})" for reason, ops in reasons.items()
    )
    table = markdown(["operation", "shape", "this package", *packages], lines)
    caption = f"{kernels_caption(document)} Versions: {versions}."
    return f"{caption}\n\n{table}\n\nWhere there is a dash:\n\n{notes}"


DECODE_OPS = {
    "advance": "advance",
    "oneshot": "one-shot",
    "k3_site": "Kimi K3 site",
    "phase1": "phase 1",
}
DECODE_TOKENS = (1, 16, 128, 1024, 8192)


def decode() -> str:
    """Small batches: microseconds in CUDA graphs, cold L2, package by package."""
    if not (RESULTS / "h100-decode.json").exists():
        return "Not measured yet: `python benchmarks/python/decode.py` writes the result file."
    document = load("h100-decode.json")
    cases: dict[tuple, dict[int, dict]] = {}
    for row in document["rows"]:
        shape = row["shape"]
        case = cases.setdefault((row["op"], shape["N"], shape["S"], row["package"]), {})
        case[shape["T"]] = row
    lines = []
    for (op, N, S, package), by_tokens in cases.items():
        sizes = [f"{axis}={size}" for axis, size in (("N", N), ("S", S)) if size > 1]
        line = [" ".join([DECODE_OPS[op], *sizes]), package]
        for tokens in DECODE_TOKENS:
            row = by_tokens.get(tokens)
            line.append("" if row is None else f"{row['us_cold']:.1f} ({row['us_warm']:.1f})")
        lines.append(line)
    header = ["operation", "package", *(f"T={tokens}" for tokens in DECODE_TOKENS)]
    caption = (
        f"{document['device']}, torch {document['versions']['torch']}, bfloat16, D=7168, CUDA "
        "graph replays: microseconds a call with a cold L2 cache (with a warm one)."
    )
    plot = ""
    if (ROOT / "docs" / "images" / "decode.svg").exists():
        plot = "![Time of a call over the number of tokens](images/decode.svg)\n\n"
    return caption + "\n\n" + plot + markdown(header, lines)


def fp8() -> str:
    """The error of a quantised x."""
    document = load("fp8-error.json")
    lines = []
    for row in document["rows"]:
        scale = f", one scale {row['scales']}" if row["scales"] else ""
        lines.append(
            [
                row["stored"] + scale,
                row["family"],
                f"{row['rel_l2']:.1e}",
                f"{row['max_over_rms']:.1e}",
            ]
        )
    return markdown(["x stored as", "inputs", "error / norm", "largest error / RMS"], lines)


def accuracy() -> str:
    """Errors of every tensor, the worst of the families."""
    if not (RESULTS / "accuracy.json").exists():
        return "Not measured yet: `flash-attn-res accuracy --out FILE` writes the result file."
    document = load("accuracy.json")
    columns = [
        ("flash_attn_res", "bf16", "ours, bf16"),
        ("eager (float32 inside)", "bf16", "eager with float32 inside, bf16"),
        ("eager", "bf16", "eager, bf16"),
        ("flash_attn_res", "fp16", "ours, fp16"),
        ("flash_attn_res", "fp32", "ours, fp32"),
    ]
    worst: dict[tuple[str, str], dict[tuple[str, str], float]] = {}
    for row in document["rows"]:
        found = worst.setdefault((row["op"], row["tensor"]), {})
        key = (row["package"], row["storage"])
        found[key] = max(found.get(key, 0.0), row["rel_l2"] or 0.0)
    lines = [
        [
            f"{op}: {tensor}",
            *(f"{found[p, s]:.1e}" if (p, s) in found else "" for p, s, _ in columns),
        ]
        for (op, tensor), found in worst.items()
    ]
    caption = (
        f"{document['device']}, torch {document['versions']['torch']}: relative L2 error against "
        "float64, the worst of all families and numbers of sources."
    )
    return caption + "\n\n" + markdown(["", *(title for *_, title in columns)], lines)


STORAGE_MODES = [
    "bf16",
    "bf16 + fp16 blocks",
    "fp32 + fp16 blocks",
    "bf16 + fp32 sum",
    "bf16 stochastic",
    "bf16 + fp8 blocks",
]


def storage() -> str:
    """Errors of our storage modes where they differ from plain bfloat16."""
    document = load("accuracy.json")
    errors: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in document["rows"]:
        if row["package"] == OURS and row["rel_l2"] is not None:
            found = errors.setdefault((row["op"], row["tensor"]), {})
            found.setdefault(row["storage"], []).append(row["rel_l2"])
    lines = []
    for (op, tensor), found in errors.items():
        cells = []
        for mode in STORAGE_MODES:
            values = sorted(found.get(mode, []))
            middle = values[len(values) // 2] if values else 0.0
            cells.append(f"{middle:.1e} ({values[-1]:.1e})" if values else "")
        if any(cells[1:]):
            lines.append([f"{op}: {tensor}", *cells])
    caption = (
        f"{document['device']}, torch {document['versions']['torch']}: relative L2 error against "
        "float64 on the values before they are stored, the median (the worst) of all families and "
        "numbers of sources. Empty: the mode changes nothing there."
    )
    return caption + "\n\n" + markdown(["", *STORAGE_MODES], lines)


def curves() -> str:
    """Validation losses of the storage modes, beside the spread between seeds."""
    document = load("storage-curves.json")
    ends: dict[str, dict[int, float]] = {}
    for row in document["rows"]:
        ends.setdefault(row["mode"], {})[row["seed"]] = row["validation"][-1][1]

    def deviation(values: list[float]) -> float:
        mean = sum(values) / len(values)
        return (sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)) ** 0.5

    lines = []
    for mode, losses in ends.items():
        values = list(losses.values())
        gaps = [loss - ends["float32"][seed] for seed, loss in losses.items()]
        mean, error = sum(gaps) / len(gaps), deviation(gaps) / len(gaps) ** 0.5
        line = [mode, f"{sum(values) / len(values):.4f}", f"{deviation(values):.4f}"]
        lines.append([*line, "" if mode == "float32" else f"{mean:+.4f} ± {error:.4f}"])
    options = document["options"]
    caption = (
        f"`flash-attn-res curves`: {options['layers']} Transformer layers, width {options['dim']}, "
        f"blocks of {options['block_size']} sublayers, {options['steps']} steps on the Python "
        f"standard library's sources, {options['seeds']} seeds, on {document['device']}, torch "
        f"{document['versions']['torch']}."
    )
    header = ["stream", "validation loss, nats/byte", "spread of seeds", "from float32, same seed"]
    return caption + "\n\n" + markdown(header, lines)


def neighbours() -> str:
    """Ours at the shapes around A, B and C."""
    document = load("h100-kernels.json")
    main = main_shapes(document)
    cases: dict[tuple, dict[str, dict]] = {}
    for row in document["rows"]:
        shape = tuple(row["shape"].items())
        if row["package"] == OURS and "us" in row and shape not in main:
            cases.setdefault(shape, {})[row["op"]] = row
    if not cases:
        return "Not measured yet: `cuda_kernels.py --neighbours` measures it."
    header = ["shape", *KERNEL_OPS.values()]
    lines = [
        [
            " ".join(f"{axis}={size}" for axis, size in shape),
            *[f"{ops[op]['percent_of_copy']:.0f} %" if op in ops else "-" for op in KERNEL_OPS],
        ]
        for shape, ops in cases.items()
    ]
    return kernels_caption(document) + "\n\n" + markdown(header, lines)


def insights() -> str:
    """The three of the five insights that benchmarks/python/insights.py measures."""
    if not (RESULTS / "h100-insights.json").exists():
        return "Not measured yet: `benchmarks/python/insights.py` measures it."
    rows = load("h100-insights.json")["rows"]
    errors: dict[tuple, dict[str, dict]] = {}
    timed: dict[tuple, dict[str, dict]] = {}
    failed = []
    for row in rows:
        if row["insight"] == "normalise":
            key = (row["dtype"], row["logit_spread"])
            errors.setdefault(key, {})[row["variant"]] = row
        elif "us" in row:
            shape = " ".join(f"{axis}={size}" for axis, size in row["shape"].items())
            key = (row["insight"], row.get("op", "element-wise Triton"), shape)
            timed.setdefault(key, {})[row["variant"]] = row
        else:
            failed.append(f"{row['insight']} {row.get('variant', '')}: {row['error']}")
    variants = list(next(iter(errors.values())))
    first = markdown(
        ["storage, standard deviation of the logits", *variants],
        [
            [
                f"{dtype}, {spread:g}",
                *[
                    f"{by[v]['rel_l2']:.1e}"
                    + (f" ({by[v]['not_finite']:.0%} not finite)" if by[v]["not_finite"] else "")
                    for v in variants
                ],
            ]
            for (dtype, spread), by in errors.items()
        ],
    )
    second = markdown(
        ["case", "variant", "us", "of copy", "against the other"],
        [
            [
                f"{op}, {shape}",
                " / ".join(by),
                " / ".join(f"{row['us']:.0f}" for row in by.values()),
                " / ".join(f"{row['percent_of_copy']:.0f} %" for row in by.values()),
                f"{list(by.values())[-1]['us'] / next(iter(by.values()))['us']:.2f}x",
            ]
            for (_, op, shape), by in timed.items()
        ],
    )
    notes = "".join(f"\n\nFailed: {text}" for text in failed)
    return (
        "Relative error of the merged result by how phase 1 stores its mixture:\n\n"
        f"{first}\n\nTimes:\n\n{second}{notes}"
    )


PLOT_OPS = {
    "phase1_fwd": "phase 1\nforward",
    "phase1_bwd": "phase 1\nbackward",
    "oneshot_fwd": "one-shot\nforward",
    "oneshot_bwd": "one-shot\nbackward",
    "oneshot_norm_fwd": "one-shot + norm\nforward",
    "oneshot_norm_bwd": "one-shot + norm\nbackward",
    "merge_fwd": "merge\nforward",
    "merge_bwd": "merge\nbackward",
    "advance_fwd": "advance\nforward",
    "advance_bwd": "advance\nbackward",
}


def plot_kernels(path: pathlib.Path) -> None:
    """Bars of percent of copy by operation and package, one row of bars a shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    document = load("h100-kernels.json")
    shapes = main_shapes(document)
    by_case = {
        (row["package"], row["op"], tuple(row["shape"].items())): row["percent_of_copy"]
        for row in document["rows"]
        if "us" in row
    }
    packages = [p for p in dict.fromkeys(row["package"] for row in document["rows"]) if p != OURS]
    packages = [OURS, *[p for p in packages if any(key[0] == p for key in by_case)]]
    others = ["#9ecae1", "#a1d99b", "#fdae6b", "#bcbddc", "#d9d9d9", "#969696", "#c7a76c"]
    colours = dict(zip(packages, ["#c0392b", *others], strict=False))
    figure, rows = pyplot.subplots(
        len(shapes), 1, figsize=(13, 2.6 * len(shapes) + 1), sharex=True, squeeze=False
    )
    for axes, shape in zip(rows[:, 0], shapes, strict=True):
        for i, op in enumerate(PLOT_OPS):
            there = [p for p in packages if (p, op, shape) in by_case]
            width = 0.84 / max(len(there), 3)
            for j, package in enumerate(there):
                value = by_case[package, op, shape]
                x = i + (j - (len(there) - 1) / 2) * width
                axes.bar(x, value, width * 0.94, color=colours[package])
                weight = "bold" if package == OURS else "normal"
                label = axes.text(x, value + 1.5, f"{value:.0f}", ha="center", fontsize=7)
                label.set_weight(weight)
                label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        axes.axhline(100, color="black", linewidth=0.8, linestyle="--", zorder=0)
        axes.set_ylim(0, 115)
        axes.set_ylabel("% of a copy")
        axes.set_title("  ".join(f"{k}={v}" for k, v in shape), fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    rows[-1, 0].set_xticks(range(len(PLOT_OPS)), PLOT_OPS.values(), fontsize=8)
    bars = [pyplot.Rectangle((0, 0), 1, 1, color=colours[p]) for p in packages]
    figure.suptitle(
        f"Attention Residuals, percent of a device copy: {document['device']}, bfloat16, "
        f"100 % = {document['copy_tb_s']:.2f} TB/s"
    )
    figure.legend(bars, packages, loc="lower center", ncols=len(packages), frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


STEP_PACKAGES = {
    "plain": "plain residual",
    "flash_attn_res": "this package",
    "flash_attn_res (storage gradients)": "this package, `grad_dtype=None`",
}


def step() -> str:
    """Whole networks: a training step and its peak memory beside a plain residual."""
    if not (RESULTS / "h100-step.json").exists():
        return "Not measured yet: `python benchmarks/python/step.py` writes the result file."
    document = load("h100-step.json")
    lines = []
    for row in document["rows"]:
        shape = f"L={row['layers']} S={row['block_size']} T={row['tokens']} D={row['dim']}" + (
            ", checkpointed" if row["checkpointed"] else ""
        )
        cells = [
            f"{row[value]:.1f} ({row[over]:.3f}x)"
            for value, over in (
                ("fwd_ms", "fwd_over_plain"),
                ("step_ms", "step_over_plain"),
                ("peak_gib", "peak_over_plain"),
            )
        ]
        lines.append([shape, STEP_PACKAGES.get(row["package"], row["package"]), *cells])
    caption = (
        f"{document['device']}, torch {document['versions']['torch']}, bfloat16, eager; SwiGLU "
        "sublayers. Medians over interleaved rounds, and of the rounds' ratios to plain. Measured "
        "at " + ", ".join(sorted({f"`{row['commit']}`" for row in document["rows"]})) + "."
    )
    header = ["network", "residual", "forward ms", "step ms", "peak GiB"]
    return caption + "\n\n" + markdown(header, lines)


TABLES = {
    "accuracy": accuracy,
    "decode": decode,
    "fp8": fp8,
    "cpu": cpu,
    "curves": curves,
    "demo": demo,
    "insights": insights,
    "kernels": kernels,
    "neighbours": neighbours,
    "peers": peers,
    "step": step,
    "storage": storage,
}


def fill(text: str) -> str:
    def replace(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- generated: {name} -->\n{TABLES[name]()}\n<!-- end of generated: {name} -->"

    return re.sub(
        r"<!-- generated: (\w+) -->\n.*?<!-- end of generated: \1 -->", replace, text, flags=re.S
    )


def main() -> int:
    if "--plots" in sys.argv[1:]:
        plot_kernels(ROOT / "docs" / "images" / "kernels.png")
    stale = []
    for name in PAGES:
        path = ROOT / name
        text = path.read_text()
        filled = fill(text)
        if filled != text:
            stale.append(name)
            if "--check" not in sys.argv[1:]:
                path.write_text(filled)
    if stale and "--check" in sys.argv[1:]:
        print(f"report: {', '.join(stale)} differ from the results: run python tools/report.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
