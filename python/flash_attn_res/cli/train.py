"""`flash-attn-res train`: the variants side by side on the same bytes, then the comparison.

A round is one optimizer step of every variant on the same batch. Models, optimizers, curves and
step count go to one checkpoint; the batch of a step depends on seed and step alone. A run that is
stopped and resumed on one thread therefore gives the bits of a run that was not.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import platform
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from flash_attn_res import __version__
from flash_attn_res.cli import analysis, checkpoint, data, figures, loop, measure, options
from flash_attn_res.cli.device import choose_device, device_name, set_threads
from flash_attn_res.cli.errors import CliError, need
from flash_attn_res.cli.model import LanguageModel, ModelConfig
from flash_attn_res.cli.options import TrainOptions
from flash_attn_res.cli.progress import ProgressView
from flash_attn_res.cli.sample import CHECKPOINT_NAME
from flash_attn_res.cli.summary import print_table, timing, write_summary

VALIDATION_WINDOWS = 64
PROFILE_BATCHES = 4


@dataclass
class Lane:
    """One variant: its model, its optimizer, and what was recorded so far."""

    model: LanguageModel
    optimizer: torch.optim.Optimizer
    train_loss: list[float] = field(default_factory=list)  # of each step, nats a byte
    step_seconds: list[float] = field(default_factory=list)  # of each step
    validation: list[tuple[int, float]] = field(default_factory=list)  # (steps done, nats a byte)


class Interrupt:
    """Turns the first Ctrl-C (or SIGTERM) into a flag; the second one stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


class Run:
    """A run: its options, text and lanes, and the step that it has reached."""

    def __init__(self, opts: TrainOptions, corpus: data.Corpus, device: torch.device) -> None:
        self.options = opts
        self.corpus = corpus
        self.device = device
        self.step = 0  # rounds done
        self.seconds = 0.0  # trained so far, validation included, stops excluded
        self.lanes = {variant: _make_lane(opts, variant, device) for variant in opts.variants}
        self.validation = data.validation_batches(
            corpus.validation,
            windows=VALIDATION_WINDOWS,
            batch=max(opts.batch, 16),
            seq_len=opts.seq_len,
        )

    @property
    def checkpoint_path(self) -> Path:
        """The one file that `--resume` reads."""
        return self.options.folder / CHECKPOINT_NAME

    @property
    def done(self) -> bool:
        """Whether all steps are made."""
        return self.step >= self.options.steps

    def train_round(self) -> tuple[dict[str, float], dict[str, float]]:
        """One step of every variant; losses and seconds of each."""
        opts = self.options
        inputs, targets = data.training_batch(
            self.corpus.train,
            seed=opts.seed,
            step=self.step,
            batch=opts.batch,
            seq_len=opts.seq_len,
        )
        inputs, targets = inputs.to(self.device), targets.to(self.device)
        lr = loop.learning_rate(self.step, peak=opts.lr, steps=opts.steps, warmup=opts.warmup)
        losses, seconds = {}, {}
        # Each variant comes first, second, third equally often: none profits from a place.
        turn = self.step % len(opts.variants)
        for variant in opts.variants[turn:] + opts.variants[:turn]:
            lane = self.lanes[variant]
            begin = time.perf_counter()
            loss = loop.training_step(lane.model, lane.optimizer, inputs, targets, lr)
            seconds[variant] = time.perf_counter() - begin
            if not math.isfinite(loss):
                raise CliError(
                    f"the loss of the {variant} variant is {loss} at step {self.step + 1}; a lower "
                    "--lr may help",
                    exit_code=1,
                )
            lane.train_loss.append(loss)
            lane.step_seconds.append(seconds[variant])
            losses[variant] = loss
        self.step += 1
        return losses, seconds

    def validate(self) -> None:
        """Adds the validation loss of every variant to its curve."""
        for lane in self.lanes.values():
            lane.validation.append((self.step, loop.evaluate(lane.model, self.validation)))

    def last_validation(self) -> tuple[int, dict[str, float]]:
        """Steps done at the last validation, and its losses."""
        last = {variant: lane.validation[-1] for variant, lane in self.lanes.items()}
        step = next(iter(last.values()))[0]
        return step, {variant: loss for variant, (_, loss) in last.items()}

    def save(self) -> None:
        """Writes the checkpoint."""
        tensors: dict[str, Tensor] = {}
        for variant, lane in self.lanes.items():
            for name, tensor in lane.model.state_dict().items():
                tensors[f"{variant}/model/{name}"] = tensor
            for name, tensor in checkpoint.optimizer_tensors(lane.optimizer).items():
                tensors[f"{variant}/optimizer/{name}"] = tensor
        state = {
            "options": self.options.to_dict(),
            "models": {name: lane.model.config.to_dict() for name, lane in self.lanes.items()},
            "text_digest": self.corpus.digest,
            "step": self.step,
            "seconds": self.seconds,
            "curves": {
                name: {
                    "train_loss": lane.train_loss,
                    "step_seconds": lane.step_seconds,
                    "validation": lane.validation,
                }
                for name, lane in self.lanes.items()
            },
        }
        checkpoint.write(self.checkpoint_path, checkpoint.CHECKPOINT, tensors, state)

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Takes everything over from a checkpoint of the same options."""
        if state["text_digest"] != self.corpus.digest:
            raise CliError(
                f"--resume: the text is not the one that {self.checkpoint_path} was trained on"
            )
        self.step, self.seconds = state["step"], state["seconds"]
        for variant, lane in self.lanes.items():
            lane.model.load_state_dict(checkpoint.select(tensors, f"{variant}/model/"))
            checkpoint.load_optimizer_tensors(
                lane.optimizer, checkpoint.select(tensors, f"{variant}/optimizer/")
            )
            curves = state["curves"][variant]
            lane.train_loss = curves["train_loss"]
            lane.step_seconds = curves["step_seconds"]
            lane.validation = [(step, loss) for step, loss in curves["validation"]]


def run_train(arguments: argparse.Namespace) -> int:
    """The command: resolve the options, train, report."""
    console = Console()
    need("matplotlib")
    opts, stored = _options_and_checkpoint(arguments)
    device = choose_device(opts.device)
    set_threads(opts.threads)
    corpus = data.load_corpus(opts.text, opts.seq_len)
    checkpoint.make_folder("--out", opts.folder)
    with _enough_memory(opts):
        run = Run(opts, corpus, device)
        if stored is not None:
            run.restore(*stored)
        _print_header(run, console)
        interrupted = _train(run, console)
    if interrupted:
        console.print(
            f"Stopped after step {run.step} of {opts.steps}; the checkpoint is "
            f"{run.checkpoint_path}.\nContinue with: {_resume_command(opts)}",
            highlight=False,
            soft_wrap=True,
        )
        return 130
    with _enough_memory(opts):
        _finish(run, console)
    return 0


@contextlib.contextmanager
def _enough_memory(opts: TrainOptions) -> Iterator[None]:
    """Says in one line that there is too little, and which options take less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = " ".join(str(error).split())
        # On a CPU PyTorch raises a plain RuntimeError.
        short = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not short and "can't allocate memory" not in text and "not enough memory" not in text:
            raise
        raise CliError(
            f"out of memory with --batch {opts.batch} --seq-len {opts.seq_len} --dim {opts.dim} "
            f"--layers {opts.layers}; smaller ones or fewer --variants take less ({text[:200]})",
            exit_code=1,
        ) from error


def _options_and_checkpoint(
    arguments: argparse.Namespace,
) -> tuple[TrainOptions, tuple[dict[str, Tensor], dict[str, Any]] | None]:
    """The options, and the checkpoint to continue from where `--resume` asks for one."""
    user = options.given(arguments)
    fresh = options.resolve(user, quick=arguments.quick)
    path = fresh.folder / CHECKPOINT_NAME
    if arguments.resume:
        if arguments.overwrite:
            raise CliError("--resume and --overwrite exclude each other")
        kind, tensors, state = checkpoint.read(path)
        if kind != checkpoint.CHECKPOINT:
            raise CliError(f"{path}: holds weights only, which cannot be resumed")
        # Folder and name are those of the command line: the run may have been moved.
        user = {"name": fresh.name, "out": fresh.out} | user
        return options.resolve(user, quick=arguments.quick, stored=state["options"]), (
            tensors,
            state,
        )
    if path.exists() and not arguments.overwrite:
        _refuse_unfinished(path, fresh)
    return fresh, None


def _refuse_unfinished(path: Path, opts: TrainOptions) -> None:
    """A finished run may be made again; an unfinished one is not thrown away by accident."""
    kind, _, state = checkpoint.read(path)
    if kind != checkpoint.CHECKPOINT:
        raise CliError(f"{path}: not the checkpoint of a run; replace it with --overwrite")
    step, steps = state["step"], state["options"]["steps"]
    if step < steps:
        raise CliError(
            f"{opts.folder} holds a run stopped after step {step} of {steps}: continue it with "
            "--resume, start anew with --overwrite, or choose another --name"
        )


def _train(run: Run, console: Console) -> bool:
    """Rounds until the end or Ctrl-C; leaves a checkpoint either way. True: interrupted."""
    opts = run.options
    tokens = opts.batch * opts.seq_len
    begin = time.perf_counter() - run.seconds
    view = ProgressView(console, opts.variants, first=run.step, steps=opts.steps, tokens=tokens)
    with Interrupt() as interrupt:
        with view:
            if run.step == 0:
                run.validate()
            view.validated(*run.last_validation())
            while not run.done and not interrupt.requested:
                losses, seconds = run.train_round()
                view.step(run.step, losses, seconds)
                if run.step % opts.val_every == 0 or run.done:
                    run.validate()
                    view.validated(*run.last_validation())
                run.seconds = time.perf_counter() - begin
                if run.step % opts.checkpoint_every == 0 and not run.done:
                    run.save()
        run.save()
        return interrupt.requested and not run.done


def _finish(run: Run, console: Console) -> None:
    """Weights, memory, figures, summary, table."""
    folder = run.options.folder
    for variant, lane in run.lanes.items():
        checkpoint.write(
            folder / f"{variant}.safetensors",
            checkpoint.WEIGHTS,
            lane.model.state_dict(),
            {"model": lane.model.config.to_dict(), "step": run.step},
        )
    _remove_others(run)
    with console.status("measuring memory, drawing figures"):
        summary = summarise(run)
        write_summary(summary, folder / "summary.json")
        drawn = figures.draw_all(summary, folder)
    print_table(summary, console)
    console.print(f"\nFigures: {'  '.join(str(path) for path in drawn)}", soft_wrap=True)
    console.print(f"Numbers: {folder / 'summary.json'}", soft_wrap=True)
    console.print(f"Text:    flash-attn-res sample {folder} --prompt 'def '", soft_wrap=True)


def _remove_others(run: Run) -> None:
    """Removes what an earlier run of this name left and this one does not make."""
    names = [f"{variant}.safetensors" for variant in options.VARIANTS if variant not in run.lanes]
    if set(run.lanes) == {"plain"}:  # it reads no depths
        names.append("depth_attention.png")
    for name in names:
        (run.options.folder / name).unlink(missing_ok=True)


def summarise(run: Run) -> dict[str, Any]:
    """Everything that was measured, as JSON."""
    opts = run.options
    plain = run.lanes["plain"].step_seconds if "plain" in run.lanes else None
    variants = {}
    for variant, lane in run.lanes.items():
        memory = measure.measure(
            lane.model.config,
            batch=opts.batch,
            device=str(run.device),
            threads=torch.get_num_threads(),
        )
        variants[variant] = {
            "parameters": sum(weight.numel() for weight in lane.model.parameters()),
            "validation_loss": lane.validation[-1][1],
            "validation_bits_per_byte": lane.validation[-1][1] / math.log(2),
            "timing": timing(lane.step_seconds, plain),
            "memory": None
            if memory is None
            else {"peak_bytes": memory.peak, "baseline_bytes": memory.baseline},
            "depth": asdict(analysis.depth_profile(lane.model, run.validation[:PROFILE_BATCHES])),
            "train_loss": lane.train_loss,
            "validation": lane.validation,
            "step_seconds": lane.step_seconds,
        }
    corpus = run.corpus
    return {
        "options": opts.to_dict(),
        "text": {
            "description": _describe_text(opts),
            "train_bytes": len(corpus.train),
            "validation_bytes": len(corpus.validation),
            "train_files": len(corpus.train_files),
            "validation_files": list(corpus.validation_files),
            "trained_bytes": run.step * opts.batch * opts.seq_len,
            "digest": corpus.digest,
        },
        "machine": {
            "device": device_name(run.device),
            "device_type": run.device.type,
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "flash_attn_res": __version__,
        },
        "seconds": run.seconds,
        "variants": variants,
    }


def _make_lane(opts: TrainOptions, variant: str, device: torch.device) -> Lane:
    config = ModelConfig(
        variant=variant,
        layers=opts.layers,
        dim=opts.dim,
        heads=opts.heads,
        block_size=opts.block_size,
        seq_len=opts.seq_len,
        dtype=opts.dtype,
    )
    model = LanguageModel(config, seed=opts.seed).to(device)
    return Lane(model, loop.make_optimizer(model))


def _print_header(run: Run, console: Console) -> None:
    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    opts, corpus = run.options, run.corpus
    files = f"{len(corpus.train_files)} files" if len(corpus.train_files) > 1 else "1 file"
    say(
        f"Text: {_describe_text(opts)}: {files}, {len(corpus.train) / 1e6:.2f} MB to train on, "
        f"{len(corpus.validation) / 1e6:.2f} MB to validate on"
    )
    say(
        f"Models: {', '.join(figures.LABELS[name] for name in opts.variants)}; {opts.layers} "
        f"layers = {2 * opts.layers} sublayers, width {opts.dim}, {opts.heads} heads, blocks of "
        f"{opts.block_size}, {opts.batch} x {opts.seq_len} bytes a step, {opts.dtype}"
    )
    say(f"Machine: {device_name(run.device)}, {torch.get_num_threads()} threads")
    if run.step:
        say(f"Resuming {run.checkpoint_path} after step {run.step} of {opts.steps}")


def _describe_text(opts: TrainOptions) -> str:
    if not opts.text:
        return "Python standard library source"
    names = [Path(name).name or name for name in opts.text]
    return ", ".join(names[:3]) + (" and more" if len(names) > 3 else "")


def _resume_command(opts: TrainOptions) -> str:
    out = "" if opts.out == options.DEFAULTS["out"] else f" --out {opts.out}"
    return f"flash-attn-res train --name {opts.name}{out} --resume"
