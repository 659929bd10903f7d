"""`flash-attn-res curves`: training curves of one model in every storage mode of its stream.

Matrix products, weights and optimizer are float32 in all of them: what differs is how the residual
stream keeps its values. Runs of one seed begin with the same weights and see the same batches, so
that they are compared pair by pair; what a difference means is seen beside two others: the spread
between seeds, and the control, a float32 run whose first weights differ in the last bits.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from flash_attn_res import __version__
from flash_attn_res.cli import checkpoint, data, figures, loop
from flash_attn_res.cli.accuracy.command import chosen
from flash_attn_res.cli.bench.harness import SCHEMA, text_of
from flash_attn_res.cli.device import choose_device, device_name, revision, set_threads
from flash_attn_res.cli.errors import CliError, need
from flash_attn_res.cli.model import LanguageModel, ModelConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASE, CONTROL = "float32", "float32 perturbed"
PERTURBATION = 2.0**-22  # of each weight, relative


@dataclass(frozen=True)
class Mode:
    """How a stream keeps its values."""

    stream_dtype: str
    block_storage: str | None = None
    stochastic: bool = False
    sum_dtype: str | None = None
    perturbed: bool = False


MODES = {
    BASE: Mode("float32"),
    CONTROL: Mode("float32", perturbed=True),
    "bfloat16": Mode("bfloat16"),
    "bfloat16 stochastic": Mode("bfloat16", stochastic=True),
    "float32 sums": Mode("bfloat16", sum_dtype="float32"),
    "float16 blocks": Mode("bfloat16", block_storage="float16"),
    "float8 blocks": Mode("bfloat16", block_storage="float8"),
}

SETTINGS = (
    *("layers", "dim", "heads", "block_size", "seq_len", "batch", "steps", "lr", "val_every"),
    "seeds",
)
WINDOWS = 256  # of validation
SMOOTHED = 25  # steps to a training loss of the file


def run_curves(arguments: argparse.Namespace) -> int:
    """The command: trains what FILE does not hold yet, and writes it after every run."""
    console = Console(stderr=True)
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    for name, value in settings.items():
        if not value > 0:
            raise CliError(f"--{name.replace('_', '-')} must be above 0, not {value}")
    if settings["dim"] % (2 * settings["heads"]):
        raise CliError(
            f"--dim must be a multiple of twice --heads, not {settings['dim']} for "
            f"{settings['heads']} heads"
        )
    modes = chosen("--modes", arguments.modes, MODES, list(MODES))
    checkpoint.check_file("--out", arguments.out)
    if arguments.plot is not None:
        need("matplotlib")
        checkpoint.check_file("--plot", arguments.plot)
    device = choose_device(arguments.device)
    set_threads(arguments.threads)
    corpus = data.load_corpus((), settings["seq_len"])
    document = _begin(arguments.out, settings, device, corpus.digest)
    done = {(row["mode"], row["seed"]) for row in document["rows"]}
    begun = time.perf_counter()
    before = document["seconds"]
    for seed in range(settings["seeds"]):
        for name in modes:
            if (name, seed) in done:
                continue
            with console.status(f"seed {seed}, {name}"):
                row = train(name, seed, settings, corpus, device) | {"commit": revision()}
            document["rows"].append(row)
            document["seconds"] = round(before + time.perf_counter() - begun, 1)
            checkpoint.write_atomically(arguments.out, text_of(document).encode())
            console.print(
                f"seed {seed}, {name}: {row['validation'][-1][1]:.4f} nats a byte",
                highlight=False,
            )
    show(document, Console())
    if arguments.plot is not None:
        draw(document, arguments.plot)
        console.print(f"Wrote {arguments.plot}", highlight=False, soft_wrap=True)
    return 0


def train(
    name: str, seed: int, settings: dict[str, Any], corpus: data.Corpus, device: torch.device
) -> dict[str, Any]:
    """One run; its row of the file."""
    mode = MODES[name]
    config = ModelConfig(
        variant="block",
        layers=settings["layers"],
        dim=settings["dim"],
        heads=settings["heads"],
        block_size=settings["block_size"],
        seq_len=settings["seq_len"],
        stream_dtype=mode.stream_dtype,
        block_storage=mode.block_storage,
        stochastic_rounding=seed if mode.stochastic else None,
        sum_dtype=mode.sum_dtype,
    )
    model = LanguageModel(config, seed=seed).to(device)
    if mode.perturbed:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                noise = torch.randn(weight.shape, generator=generator).to(device)
                weight.mul_(1 + PERTURBATION * noise)
    optimizer = loop.make_optimizer(model)
    validation = data.validation_batches(
        corpus.validation, windows=WINDOWS, batch=32, seq_len=settings["seq_len"]
    )
    steps, losses = settings["steps"], []
    curve = [(0, loop.evaluate(model, validation))]
    for step in range(steps):
        inputs, targets = data.training_batch(
            corpus.train,
            seed=seed,
            step=step,
            batch=settings["batch"],
            seq_len=settings["seq_len"],
        )
        lr = loop.learning_rate(
            step, peak=settings["lr"], steps=steps, warmup=max(1, min(100, steps // 10))
        )
        loss = loop.training_step(model, optimizer, inputs.to(device), targets.to(device), lr)
        if not math.isfinite(loss):
            raise CliError(f"{name}, seed {seed}: the loss is {loss} at step {step + 1}", 1)
        losses.append(loss)
        if (step + 1) % settings["val_every"] == 0 or step + 1 == steps:
            curve.append((step + 1, loop.evaluate(model, validation)))
    parts = [losses[i : i + SMOOTHED] for i in range(0, steps, SMOOTHED)]
    means = [sum(part) / len(part) for part in parts]
    return {
        "mode": name,
        "seed": seed,
        "train_loss": [round(loss, 5) for loss in means],
        "validation": [[step, round(loss, 6)] for step, loss in curve],
    }


def _begin(
    path: Path, settings: dict[str, Any], device: torch.device, digest: str
) -> dict[str, Any]:
    """An empty document, or what an interrupted call with the same options has written."""
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "suite": "storage-curves",
        "device": device_name(device),
        "driver": str(torch.version.cuda) if device.type == "cuda" else "none",
        "versions": {
            "flash_attn_res": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "commit": revision(),
        "date": datetime.date.today().isoformat(),
        "seconds": 0.0,
        "threads": torch.get_num_threads(),
        "options": settings,
        "text_digest": digest,
        "rows": [],
    }
    if not path.exists():
        return document
    try:
        old: dict[str, Any] = json.loads(path.read_text())
        same = all(old[name] == document[name] for name in ("options", "text_digest", "device"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CliError(f"--out: {path} is no file of this command; choose another name") from error
    if not same:
        raise CliError(
            f"--out: {path} holds curves of other options, another text or another machine; choose "
            "another name"
        )
    return old


# --------------------------------------------------------------------------------- what it shows


@dataclass(frozen=True)
class Finding:
    """Validation losses of a mode at the end, over the seeds, in nats a byte."""

    mode: str
    seeds: int
    loss: float  # mean
    spread: float  # standard deviation between seeds
    difference: float | None  # mean of the differences from float32 of the same seed
    error: float | None  # standard error of that mean


def findings(document: Mapping[str, Any]) -> list[Finding]:
    """One for each mode, in the order of the file."""
    ends: dict[str, dict[int, float]] = {}
    for row in document["rows"]:
        ends.setdefault(row["mode"], {})[row["seed"]] = row["validation"][-1][1]
    base = ends.get(BASE, {})
    found = []
    for mode, losses in ends.items():
        values = list(losses.values())
        gaps = [loss - base[seed] for seed, loss in losses.items() if seed in base]
        compared = mode != BASE and len(gaps) > 0
        found.append(
            Finding(
                mode,
                len(values),
                _mean(values),
                _deviation(values),
                _mean(gaps) if compared else None,
                _deviation(gaps) / len(gaps) ** 0.5 if compared else None,
            )
        )
    return found


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _deviation(values: list[float]) -> float:
    """Of a sample; 0 for a single value."""
    mean = _mean(values)
    return (sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)) ** 0.5


def show(document: Mapping[str, Any], console: Console) -> None:
    """The losses at the end, as a table."""
    grid = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1))
    grid.add_column("stream", no_wrap=True)
    for name in ("seeds", "loss", "spread", "from float32", "standard error"):
        grid.add_column(name, justify="right")
    for found in findings(document):
        grid.add_row(
            found.mode,
            str(found.seeds),
            f"{found.loss:.4f}",
            f"{found.spread:.4f}",
            "" if found.difference is None else f"{found.difference:+.4f}",
            "" if found.error is None else f"{found.error:.4f}",
        )
    console.print(grid)


COLORS = {
    BASE: "#22262b",
    CONTROL: "#a5adb8",
    "bfloat16": "#1f6fd6",
    "bfloat16 stochastic": "#2b8a3e",
    "float32 sums": "#0c8599",
    "float16 blocks": "#9c36b5",
    "float8 blocks": "#e8590c",
}


def draw(document: Mapping[str, Any], path: Path) -> None:
    """The picture of --plot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(figures.STYLE):
        figures.save(figure_of(document), path)


def figure_of(document: Mapping[str, Any]) -> Figure:
    """Left the validation losses; right, by seed, how far each mode is from float32."""
    from matplotlib import pyplot

    curves: dict[str, dict[int, list[list[float]]]] = {}
    for row in document["rows"]:
        curves.setdefault(row["mode"], {})[row["seed"]] = row["validation"]
    steps = document["options"]["steps"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5.2), layout="constrained")
    for mode, by_seed in curves.items():
        at = [step for step, _ in next(iter(by_seed.values()))]
        losses = [[point[1] for point in curve] for curve in by_seed.values()]
        mean = [_mean(list(column)) for column in zip(*losses, strict=True)]
        left.plot(at, mean, color=COLORS[mode], label=f"{mode}  {mean[-1]:.4f}", linewidth=1.6)
    for found in findings(document):
        if found.difference is None or found.error is None:
            continue
        by_seed = curves[found.mode]
        pairs = [(by_seed[seed], base) for seed, base in curves[BASE].items() if seed in by_seed]
        gaps = [[a[1] - b[1] for a, b in zip(own, base, strict=True)] for own, base in pairs]
        at = [step for step, _ in pairs[0][0]]
        mean = [_mean(list(column)) for column in zip(*gaps, strict=True)]
        for gap in gaps:
            right.plot(at, gap, color=COLORS[found.mode], linewidth=0.8, alpha=0.35)
        label = f"{found.mode}  {found.difference:+.4f} ± {found.error:.4f}"
        right.plot(at, mean, "o-", color=COLORS[found.mode], label=label, **figures.DOTTED)
    right.axhline(0, color=COLORS[BASE], linewidth=1.2)
    left.set_title("Validation loss, mean over seeds")
    left.set_ylabel("nats per byte")
    low, high = right.get_ylim()
    right.set_ylim(low - 0.1 * (high - low), high + 0.4 * (high - low))  # room for text
    spread = next((f.spread for f in findings(document) if f.mode == BASE), 0.0)
    right.set_title("From float32 of the same seed: mean (dots), seeds (thin)")
    right.text(
        0.02,
        0.02,
        f"standard deviation between seeds of float32: {spread:.4f}",
        transform=right.transAxes,
        fontsize=10,
    )
    left.legend(loc="upper right", title="at the end")
    right.legend(loc="upper right", title="at the end, ± standard error", fontsize=10)
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.set_xlim(0, steps * 1.02)
    return figure
