"""Writes the tables of README and docs from benchmarks/results/*.json.

Usage: report.py [--check]    (--check: say whether the tables are up to date, change nothing)

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
PAGES = ["README.md", "docs/cpu.md", "docs/inference.md", "docs/kernels.md"]


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
        ]
        if with_eager:
            line.append(f"{packages['eager']['us'] / ours['us']:.1f}x")
        rows.append(line)
    header = ["operation", "dtype", "ms", "of copy", "torch.compile ms", "faster"]
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


def kernels() -> str:
    """Percent of a device copy, operation by shape."""
    document = load("h100-kernels.json")
    rows = [row for row in document["rows"] if row["package"] == "flash_attn_res"]
    shapes = list(dict.fromkeys(tuple(row["shape"].items()) for row in rows))
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
    caption = (
        f"{document['device']}, driver {document['driver']}, "
        f"torch {document['versions']['torch']}, "
        f"bfloat16; percent of a device copy ({document['copy_tb_s']:.2f} TB/s, bytes read and "
        "written) measured in the same run."
    )
    return caption + "\n\n" + markdown(header, lines)


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


TABLES = {"cpu": cpu, "decode": decode, "demo": demo, "fp8": fp8, "kernels": kernels}


def fill(text: str) -> str:
    def replace(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- generated: {name} -->\n{TABLES[name]()}\n<!-- end of generated: {name} -->"

    return re.sub(
        r"<!-- generated: (\w+) -->\n.*?<!-- end of generated: \1 -->", replace, text, flags=re.S
    )


def main() -> int:
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
