"""The tables of README and docs, each from one result file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flash_attn_res.cli.bench.harness import COMPILED, OURS, STORAGE_GRADIENTS, Row, commit_of
from flash_attn_res.cli.figures import LABELS
from flash_attn_res.cli.options import DEFAULTS

Document = Mapping[str, Any]


def measured(document: Document) -> list[Row]:
    """The rows with a result; the others say why they have none."""
    return [row for row in document["rows"] if "error" not in row]


def missing(command: str) -> str:
    """What stands where a table has no data yet."""
    return f"Not measured yet: `{command}` measures it."


def measured_at(document: Document, rows: Sequence[Row]) -> str:
    """The end of a caption: which commits the rows are of."""
    # A commit may be written at full length, and "-dirty" where the code had been changed.
    short = {re.sub(r"^([0-9a-f]{7})[0-9a-f]+", r"\1", commit_of(document, row)) for row in rows}
    return f"Measured at {', '.join(f'`{commit}`' for commit in sorted(short))}."


OP_NAMES = {
    "phase1": "phase 1",
    "oneshot": "one-shot",
    "oneshot_norm": "one-shot + norm",
    "merge": "merge",
    "advance": "advance",
    "k3_site": "Kimi K3 site",
    "network": "whole networks",
}


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    align = [":---" if index == 0 else "---:" for index in range(len(header))]
    lines = [header, align, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


CPU_OPS = {
    "oneshot": "one-shot `read`",
    "phase1": "`attend`",
    "merge": "merge",
    "advance": "advance",
}


def cpu(document: Document) -> str:
    """Ours against the better of torch.compile's forms and eager PyTorch, case by case."""
    cases: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in measured(document):
        key = (row["op"], row["dtype"], tuple(row["shape"].items()))
        cases.setdefault(key, {})[row["package"]] = row
    rows = []
    for (op, dtype, shape_items), packages in cases.items():
        name, direction = op.rsplit("_", 1)
        shape = dict(shape_items)
        if OURS not in packages:
            continue
        ours = packages[OURS]
        forms = [row for package, row in packages.items() if package.startswith(COMPILED)]
        compiled = min(forms, key=lambda row: float(row["us"]), default=None)
        eager = packages.get("eager")
        size = f"N={shape['N']} S={shape['S']}" if shape["N"] else ""
        line = [
            f"{CPU_OPS[name]} {'forward' if direction == 'fwd' else 'backward'} {size}".strip(),
            dtype,
            f"{ours['us'] / 1e3:.1f}",
            f"{ours['percent_of_copy']:.0f} %",
            *(
                ["-"] * 3
                if compiled is None
                else [
                    f"{compiled['us'] / 1e3:.1f}",
                    f"{compiled['us'] / ours['us']:.1f}x",
                    f"{2 * compiled['percent_of_copy']:.0f} %",
                ]
            ),
            "-" if eager is None else f"{eager['us'] / ours['us']:.1f}x",
        ]
        rows.append(line)
    header = ["operation", "dtype", "ms", "of copy", "torch.compile ms", "faster"]
    header += ["2x is, of copy", "than eager"]
    threads = document["rows"][0]["threads"]
    caption = (
        f"{document['device']}, {threads} threads, torch {document['versions']['torch']}, "
        f"copy {document['copy_tb_s'] * 1e3:.1f} GB/s; medians, `make bench` measures it here. "
        + measured_at(document, measured(document))
    )
    return caption + "\n\n" + markdown(header, rows)


def demo(document: Document) -> str:
    """The demo's comparison of the three residual connections."""
    rows = []
    for variant, entry in document["variants"].items():
        ratio = entry["timing"]["ratio_to_plain"]
        memory = entry["memory"]
        rows.append(
            [
                LABELS[variant],
                f"{entry['validation_loss']:.4f}",
                f"{entry['timing']['step_ms']:.{0 if entry['timing']['step_ms'] >= 100 else 1}f}",
                "" if ratio is None else f"{100 * (ratio - 1):+.1f} %",
                f"{(memory['peak_bytes'] - memory['baseline_bytes']) / 2**20:.0f}",
            ]
        )
    header = ["residual", "validation loss, nats/byte", "ms/step", "over plain", "peak MiB"]
    options = document["options"]
    changed = [
        f"--{name.replace('_', '-')} {options[name]}"
        for name, usual in DEFAULTS.items()
        if name not in ("name", "out", "text", "variants") and options[name] != usual
    ]
    command = " ".join(["flash-attn-res train", *changed]) if changed else "make demo"
    caption = (
        f"`{command}`: {options['layers']} Transformer layers, width {options['dim']}, "
        f"{options['steps']} steps on the Python standard library's sources, one seed, on "
        f"{document['machine']['device']}."
    )
    return caption + "\n\n" + markdown(header, rows)


def torch_versions(document: Document) -> str:
    """On which versions of PyTorch the Python tests were run, with one wheel, and how it went."""
    rows = [
        [
            entry["torch"],
            entry["python"],
            entry["built_with"] or "",
            *(str(entry[outcome]) for outcome in ("passed", "failed", "skipped")),
            f"`{entry['commit']}`",
        ]
        for entry in document["versions"]
    ]
    header = ["PyTorch", "Python", "wheel built with", "passed", "failed", "skipped", "commit"]
    return markdown(header, rows)


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


STORAGE_OPS = {
    **KERNEL_OPS,
    "site_fwd": "read over the blocks and a partial sum, with update and output norm",
}

MAIN_SHAPES = ("A", "B", "C")


def main_shapes(document: Document) -> list[tuple[tuple[str, int], ...]]:
    """The shapes that table and plot show, in the order of the file."""
    rows = [row for row in document["rows"] if row["case"] in MAIN_SHAPES]
    return list(dict.fromkeys(tuple(row["shape"].items()) for row in rows))


def kernels_caption(document: Document, rows: Sequence[Row]) -> str:
    return (
        f"{document['device']}, driver {document['driver']}, "
        f"torch {document['versions']['torch']}, "
        f"bfloat16; percent of a device copy ({document['copy_tb_s']:.2f} TB/s, bytes read and "
        f"written) measured in the same run. {measured_at(document, rows)}"
    )


def kernels(document: Document) -> str:
    """Percent of a device copy, operation by shape."""
    rows = [row for row in measured(document) if row["package"] == OURS]
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
    shown = [row for row in rows if tuple(row["shape"].items()) in shapes]
    return kernels_caption(document, shown) + "\n\n" + markdown(header, lines)


def peers(document: Document) -> str:
    """The same operations in other packages: percent of copy, or why there is none."""
    packages = [p for p in dict.fromkeys(row["package"] for row in document["rows"]) if p != OURS]
    if not packages:
        return missing("flash-attn-res bench kernels --peers")
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
    shown = [row for row in measured(document) if row["case"] in MAIN_SHAPES]
    caption = f"{kernels_caption(document, shown)} Versions: {versions}."
    return f"{caption}\n\n{table}\n\nWhere there is a dash:\n\n{notes}"


DECODE_TOKENS = (1, 16, 128, 1024, 8192)


def decode(document: Document) -> str:
    """Small batches: microseconds in CUDA graphs, cold L2, package by package."""
    cases: dict[tuple[Any, ...], dict[int, Row]] = {}
    for row in measured(document):
        shape = row["shape"]
        case = cases.setdefault((row["op"], shape["N"], shape["S"], row["package"]), {})
        case[shape["T"]] = row
    there = dict.fromkeys(row["shape"]["T"] for row in measured(document))
    columns = [tokens for tokens in DECODE_TOKENS if tokens in there] or list(there)
    lines = []
    for (op, N, S, package), by_tokens in cases.items():
        sizes = [f"{axis}={size}" for axis, size in (("N", N), ("S", S)) if size > 1]
        line = [" ".join([OP_NAMES[op], *sizes]), package]
        for tokens in columns:
            cell = by_tokens.get(tokens)
            line.append("" if cell is None else f"{cell['us_cold']:.1f} ({cell['us_warm']:.1f})")
        lines.append(line)
    header = ["operation", "package", *(f"T={tokens}" for tokens in columns)]
    caption = (
        f"{document['device']}, torch {document['versions']['torch']}, bfloat16, "
        f"D={document['rows'][0]['shape']['D']}, "
        f"{'single calls' if document['driver'] == 'none' else 'CUDA graph replays'}: "
        "microseconds a call with a cold L2 cache (with a warm one). "
        + measured_at(document, measured(document))
    )
    return caption + "\n\n" + markdown(header, lines)


def storage(document: Document) -> str:
    """Phase 1 and sites over stored blocks: percent of a copy, and against bfloat16."""
    cases: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in measured(document):
        key = (row["op"], tuple(row["shape"].items()))
        cases.setdefault(key, {})[row["dtype"]] = row
    lines = []
    for (op, shape), rows in cases.items():
        line = [STORAGE_OPS[op], *(str(size) for _, size in shape)]
        for dtype in ("bfloat16", "float16", "float8"):
            found = rows.get(dtype)
            line.append(
                "" if found is None else f"{found['us']:.0f} us, {found['percent_of_copy']:.0f} %"
            )
        line += [f"{rows[d]['speedup']:.2f}x" if d in rows else "" for d in ("float16", "float8")]
        lines.append(line)
    header = ["", "N", "S", "T", "D", "bfloat16", "float16 with scales", "float8 with scales"]
    header += ["float16 is faster", "float8 is faster"]
    caption = (
        f"{document['device']}, driver {document['driver']}, torch "
        f"{document['versions']['torch']}: time and percent of a device copy "
        f"({document['copy_tb_s']:.2f} TB/s) of the storage's own bytes. Mixtures and gradients "
        f"are bfloat16. {measured_at(document, measured(document))}"
    )
    return caption + "\n\n" + markdown(header, lines)


def fp8(document: Document) -> str:
    """The error of a quantised x."""
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


ACCURACY_COLUMNS = [
    (OURS, "bf16", "ours, bf16"),
    ("eager (float32 inside)", "bf16", "eager with float32 inside, bf16"),
    ("eager", "bf16", "eager, bf16"),
    (OURS, "fp16", "ours, fp16"),
    (OURS, "fp32", "ours, fp32"),
]


def accuracy(document: Document) -> str:
    """Errors of every tensor, the worst of the families."""
    columns = ACCURACY_COLUMNS
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
        "float64, the worst of all families and numbers of sources. "
        + measured_at(document, document["rows"])
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


def storage_errors(document: Document) -> str:
    """Errors of our storage modes where they differ from plain bfloat16."""
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
        "numbers of sources. Empty: the mode changes nothing there. "
        + measured_at(document, document["rows"])
    )
    return caption + "\n\n" + markdown(["", *STORAGE_MODES], lines)


def error_shapes(document: Document) -> str:
    """What else is measured of every tensor's error: ulps, the angle, the mean; in every mode."""
    modes = [column for column in ACCURACY_COLUMNS if column[0] != "eager"]
    modes += [(OURS, mode, f"ours, {mode}") for mode in STORAGE_MODES[1:]]
    worst: dict[tuple[str, str], dict[tuple[str, str], tuple[float, float, float]]] = {}
    for row in document["rows"]:
        if row["max_ulp"] is None:
            continue
        found = worst.setdefault((row["op"], row["tensor"]), {})
        key = (row["package"], row["storage"])
        ulp, angle, bias = found.get(key, (0.0, 0.0, 0.0))
        found[key] = (
            max(ulp, row["max_ulp"]),
            max(angle, 1 - row["cosine"]),
            max(bias, row["bias"], key=abs),
        )
    parts = []
    for some in (modes[:4], modes[4:]):
        lines = [
            [
                f"{op}: {tensor}",
                *(_error_shape(*found[p, s]) if (p, s) in found else "" for p, s, _ in some),
            ]
            for (op, tensor), found in worst.items()
        ]
        lines = [line for line in lines if any(line[1:])]
        parts.append(markdown(["", *(title for *_, title in some)], lines))
    caption = (
        f"{document['device']}, torch {document['versions']['torch']}: the largest error in ulps, "
        "1 - cosine and bias, each the worst of all families and numbers of sources. "
        + measured_at(document, document["rows"])
    )
    return "\n\n".join([caption, *parts])


def _error_shape(ulp: float, angle: float, bias: float) -> str:
    ulps = f"{ulp:.2f}" if ulp < 10 else f"{ulp:.0f}" if ulp < 1e5 else f"{ulp:.0e}"
    angles = f"{angle:.0e}" if angle else "0"  # below the digits of the file
    return f"{ulps}, {angles}, {bias:+.0e}".replace("e-0", "e-").replace("e+0", "e")


def curves(document: Document) -> str:
    """Validation losses of the storage modes, beside the spread between seeds."""
    from flash_attn_res.cli.curves import findings

    lines = [
        [
            found.mode,
            f"{found.loss:.4f}",
            f"{found.spread:.4f}",
            "" if found.difference is None else f"{found.difference:+.4f} ± {found.error:.4f}",
        ]
        for found in findings(document)
    ]
    options = document["options"]
    caption = (
        f"`flash-attn-res curves`: {options['layers']} Transformer layers, width {options['dim']}, "
        f"blocks of {options['block_size']} sublayers, {options['steps']} steps on the Python "
        f"standard library's sources, {options['seeds']} seeds, on {document['device']}, torch "
        f"{document['versions']['torch']}. {measured_at(document, document['rows'])}"
    )
    header = ["stream", "validation loss, nats/byte", "spread of seeds", "from float32, same seed"]
    return caption + "\n\n" + markdown(header, lines)


def neighbours(document: Document) -> str:
    """Ours at the shapes around A, B and C."""
    main = main_shapes(document)
    cases: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in document["rows"]:
        shape = tuple(row["shape"].items())
        if row["package"] == OURS and "us" in row and shape not in main:
            cases.setdefault(shape, {})[row["op"]] = row
    if not cases:
        return missing("flash-attn-res bench kernels --neighbours")
    header = ["shape", *KERNEL_OPS.values()]
    lines = [
        [
            " ".join(f"{axis}={size}" for axis, size in shape),
            *[f"{ops[op]['percent_of_copy']:.0f} %" if op in ops else "-" for op in KERNEL_OPS],
        ]
        for shape, ops in cases.items()
    ]
    shown = [row for ops in cases.values() for row in ops.values()]
    return kernels_caption(document, shown) + "\n\n" + markdown(header, lines)


def insights(document: Document) -> str:
    """Three of the five insights of docs/kernels.md."""
    rows = document["rows"]
    errors: dict[tuple[Any, ...], dict[str, Row]] = {}
    timed: dict[tuple[Any, ...], dict[str, Row]] = {}
    failed = []
    for row in rows:
        key: tuple[Any, ...]
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


STEP_PACKAGES = {
    "plain": "plain residual",
    "flash_attn_res": "this package",
    STORAGE_GRADIENTS: "this package, `grad_dtype=None`",
}


def step(document: Document) -> str:
    """Whole networks: a training step and its peak memory beside a plain residual."""
    lines = []
    rows = [row for row in measured(document) if "series" not in row]
    if not rows:
        return missing("flash-attn-res bench step")
    for row in rows:
        shape = f"L={row['layers']} S={row['block_size']} T={row['tokens']} D={row['dim']}" + (
            ", checkpointed" if row["checkpointed"] else ""
        )
        cells = [
            "" if row[value] is None else f"{row[value]:.1f} ({row.get(over, 1):.3f}x)"
            for value, over in (
                ("fwd_ms", "fwd_over_plain"),
                ("step_ms", "step_over_plain"),
                ("peak_gib", "peak_over_plain"),
            )
        ]
        host = f"{row['host_ms']:.0f}" if "host_ms" in row else ""
        name = str(STEP_PACKAGES.get(row["package"], row["package"]))
        lines.append([shape, name, *cells, host])
    caption = (
        f"{document['device']}, torch {document['versions']['torch']}, "
        f"{rows[0].get('dtype', 'bfloat16')}, eager; SwiGLU sublayers. Medians over "
        "interleaved rounds, and of the rounds' ratios to plain; host: until a step has been "
        "issued. " + measured_at(document, rows)
    )
    header = ["network", "residual", "forward ms", "step ms", "peak GiB", "host ms"]
    return caption + "\n\n" + markdown(header, lines)


DISTRIBUTED_PACKAGES = {
    "plain": "plain residual",
    "flash_attn_res": "this package",
    "flash_attn_res, no overlap": "this package, `overlap=False`",
}


def distributed(document: Document) -> str:
    """Over two devices: a pipeline's step, and a tensor-parallel prefill with its profile."""
    rows = measured(document)
    if not rows:
        return missing("benchmarks/python/distributed.py")
    steps, prefills = [], []
    for row in rows:
        network = " ".join(
            f"{axis}={row[name]}"
            for axis, name in (("L", "layers"), ("S", "block_size"), ("T", "tokens"), ("D", "dim"))
        )
        peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
        spread = f"{row['ratio_p10']:.3f} - {row['ratio_p90']:.3f}"
        package = str(DISTRIBUTED_PACKAGES.get(row["package"], row["package"]))
        cells = [package, f"{row['ms']:.1f}", f"{row['ratio']:.3f}x", spread, peak]
        if row["test"] == "pipeline":
            stages = "1F1B" if row["virtual"] == 1 else f"interleaved, {row['virtual']} a rank"
            steps.append([f"{network}, {row['micro_batches']} micro-batches, {stages}", *cells])
            continue
        ranks = row.get("profile", [])
        collectives = [rank["all_gather_ms"] + rank["reduce_scatter_ms"] for rank in ranks]
        profile = (
            collectives,
            [rank["phase1_ms"] for rank in ranks],
            [rank["both_ms"] for rank in ranks],
        )
        timed = [" / ".join(f"{value:.1f}" for value in values) for values in profile]
        prefills.append([network, *cells, *timed])
    caption = (
        f"{document['device']}, linked by {document.get('link', 'unknown')}, torch "
        f"{document['versions']['torch']}, bfloat16, eager; SwiGLU sublayers. Medians over "
        "interleaved rounds; ratios are of a round's times, with their 10th and 90th percentile. "
        + measured_at(document, rows)
    )
    header = ["network", "residual", "ms", "over plain", "p10 - p90", "peak GiB"]
    parts = [caption]
    if steps:
        parts += ["A training step of a pipeline of two ranks:", markdown(header, steps)]
    if prefills:
        header = [*header, "collectives ms", "phase 1 ms", "both at a time ms"]
        parts += [
            "Prefill in a tensor-parallel group of two; the last columns are of one run on either "
            "rank, collectives with their waiting for the other:",
            markdown(header, prefills),
        ]
    return "\n\n".join(parts)


TABLES: dict[str, tuple[str, Callable[[Document], str], str]] = {
    "accuracy": ("accuracy", accuracy, "flash-attn-res bench accuracy"),
    "error_shapes": ("accuracy", error_shapes, "flash-attn-res bench accuracy"),
    "decode": ("decode", decode, "flash-attn-res bench decode"),
    "distributed": ("distributed", distributed, "benchmarks/python/distributed.py"),
    "fp8": ("fp8-error", fp8, "benchmarks/python/fp8_error.py"),
    "cpu": ("cpu", cpu, "flash-attn-res bench cpu"),
    "curves": ("storage-curves", curves, "flash-attn-res curves"),
    "insights": ("insights", insights, "benchmarks/python/insights.py"),
    "kernels": ("kernels", kernels, "flash-attn-res bench kernels"),
    "neighbours": ("kernels", neighbours, "flash-attn-res bench kernels --neighbours"),
    "peers": ("kernels", peers, "flash-attn-res bench kernels --peers"),
    "step": ("step", step, "flash-attn-res bench step"),
    "storage": ("storage", storage, "flash-attn-res bench storage"),
    "storage_errors": ("accuracy", storage_errors, "flash-attn-res bench accuracy"),
}
"""By the name of its place in a page: the suite that a table is made from, and what measures it."""
