"""The command `flash-attn-res`: small models, what they read, errors, benchmarks and their report.

Only argparse is imported here; what a command needs is imported when it runs.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from flash_attn_res import __version__
from flash_attn_res.cli.errors import CliError

COMMANDS = {
    "train": ("train", "run_train"),
    "sample": ("sample", "run_sample"),
    "accuracy": ("accuracy.command", "run_accuracy"),
    "curves": ("curves", "run_curves"),
    "inspect": ("inspect", "run_inspect"),
    "doctor": ("doctor", "run_doctor"),
    "bench": ("bench.command", "run_bench"),
    "report": ("bench.report", "run_report"),
    "plan": ("plan", "run_plan"),
}
"""The module and function of each; a command's module is imported when it runs."""

NEEDED = ("matplotlib", "numpy", "rich", "safetensors")
"""The extra `cli` of the package."""


class _Parser(argparse.ArgumentParser):
    """argparse, but an error is one line and leaves by the same door as every other error."""

    more: Callable[[], str] = staticmethod(lambda: "")
    """The end of the help, made when it is asked for: what it needs takes time to import."""

    def format_help(self) -> str:
        return super().format_help() + self.more()

    def error(self, message: str) -> NoReturn:
        raise CliError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """All options. Those of `train` default to None: see `options.resolve`."""
    parser = _Parser(
        prog="flash-attn-res",
        description="Train small byte-level language models with plain residuals, Block and Full "
        "Attention Residuals side by side, print text from them, show which depths a "
        "model reads, and measure errors and times of this package and of others.",
    )
    parser.add_argument("--version", action="version", version=f"flash-attn-res {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    _add_train(commands.add_parser("train", help="train the variants and compare them"))
    _add_sample(commands.add_parser("sample", help="print text from a trained model"))
    _add_accuracy(
        commands.add_parser("accuracy", help="errors of storage modes and of other packages")
    )
    _add_curves(commands.add_parser("curves", help="training curves of the storage modes"))
    _add_inspect(commands.add_parser("inspect", help="show which depths a model reads"))
    doctor = commands.add_parser("doctor", help="say what is installed and whether it computes")
    doctor.description = (
        "Says what is installed and why something fast may not be used, and checks a read, forward "
        "and backward, on every device. Leaves with 1 where a check fails."
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    _add_bench(commands.add_parser("bench", help="measure times and errors, others' beside ours"))
    _add_report(commands.add_parser("report", help="tables and plots from the results of bench"))
    _add_plan(commands.add_parser("plan", help="count memory and traffic over many devices"))
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    from flash_attn_res.cli.options import DEFAULTS

    def add(group: argparse._ArgumentGroup, flag: str, kind: type, text: str) -> None:
        name = flag.removeprefix("--").replace("-", "_")
        shown = DEFAULTS[name]
        group.add_argument(
            flag, type=kind, metavar=kind.__name__.upper(), help=f"{text} (default {shown})"
        )

    parser.description = (
        "Trains one model for each variant on the same batches, in turn, step by step, and writes "
        "checkpoints, weights, figures and summary.json to OUT/NAME. Ctrl-C stops after the "
        "current step with a checkpoint that --resume continues."
    )
    run = parser.add_argument_group("run")
    add(run, "--name", str, "name of the run, a folder under --out")
    add(run, "--out", str, "where runs are kept")
    run.add_argument("--resume", action="store_true", help="continue the run from its checkpoint")
    run.add_argument(
        "--overwrite", action="store_true", help="start anew although the run is not finished"
    )
    run.add_argument(
        "--quick", action="store_true", help="a tiny model and few steps: seconds, to try it out"
    )
    run.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="text files or folders (default: the Python standard library's sources)",
    )
    model = parser.add_argument_group("model")
    add(model, "--variants", str, "which of plain, block, full, separated by commas")
    add(model, "--layers", int, "Transformer layers, each an attention and an MLP sublayer")
    add(model, "--dim", int, "width of the residual stream")
    add(model, "--heads", int, "attention heads")
    add(model, "--block-size", int, "sublayers to a block of the block variant")
    add(model, "--seq-len", int, "bytes to a sequence")
    add(model, "--dtype", str, "float32 or bfloat16, of products and residual stream")
    training = parser.add_argument_group("training")
    add(training, "--steps", int, "optimizer steps")
    add(training, "--batch", int, "sequences to a step")
    add(training, "--lr", float, "peak learning rate")
    add(training, "--seed", int, "seed of weights and batches")
    add(training, "--val-every", int, "steps between two validations")
    add(training, "--checkpoint-every", int, "steps between two checkpoints")
    machine = parser.add_argument_group("machine")
    add(machine, "--device", str, "auto, cpu, cuda or cuda:N")
    add(machine, "--threads", int, "CPU threads, 0 for as many as PyTorch chooses")


def _add_sample(parser: argparse.ArgumentParser) -> None:
    parser.description = "Prints the prompt and its continuation, as it is made."
    parser.add_argument(
        "path", help="a run's folder, its checkpoint.safetensors, or a variant's weights"
    )
    parser.add_argument("--variant", help="which model of a run (default: block, if it is there)")
    parser.add_argument("--prompt", default="", help="text to continue (default: none)")
    parser.add_argument("--length", type=int, default=400, help="bytes to add (default 400)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest byte (default 0.8)"
    )
    parser.add_argument(
        "--top-k", type=int, default=0, help="choose among the k likeliest bytes (default 0: all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same text (default 0)")
    _add_machine(parser)


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: PyTorch's)")


def _add_accuracy(parser: argparse.ArgumentParser) -> None:
    from pathlib import Path

    parser.description = (
        "Errors of outputs and of every gradient against double precision on identical inputs: "
        "this package in its storage modes, eager PyTorch, and whichever other packages are "
        "installed."
    )
    parser.add_argument(
        "--quick", action="store_true", help="small cases, under a minute, to try it out"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all rows to this JSON file")
    parser.add_argument("--details", action="store_true", help="print every row")
    parser.add_argument(
        "--modes", metavar="NAMES", help="storage modes of this package (default: all)"
    )
    parser.add_argument(
        "--packages", metavar="NAMES", help="what to compare with (default: all but torch.compile)"
    )
    parser.add_argument("--families", metavar="NAMES", help="families of inputs (default: all)")
    parser.add_argument(
        "--sources", type=int, nargs="+", metavar="N", help="numbers of sources (default 2 8 33)"
    )
    parser.add_argument(
        "--queries", type=int, default=4, metavar="S", help="queries of phase 1 (default 4)"
    )
    parser.add_argument("--tokens", type=int, metavar="T", help="tokens (default 256)")
    parser.add_argument("--dim", type=int, metavar="D", help="width (default 512)")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="PATH",
        help="a run of train whose hidden states to use (default: train a small model now)",
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same inputs (default 0)")
    _add_machine(parser)


def _add_curves(parser: argparse.ArgumentParser) -> None:
    from pathlib import Path

    parser.description = (
        "Trains one small model with Block AttnRes in every storage mode of its residual stream, "
        "with the same first weights and batches for each seed, and compares the losses with the "
        "spread between seeds. A call that was interrupted continues with FILE."
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="write the curves to this JSON file"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them to this PNG file")
    parser.add_argument("--modes", metavar="NAMES", help="storage modes (default: all)")
    for flag, kind, default, text in (
        ("--seeds", int, 4, "seeds of weights and batches: 0, 1, ..."),
        ("--steps", int, 800, "optimizer steps"),
        ("--val-every", int, 50, "steps between two validations"),
        ("--batch", int, 8, "sequences to a step"),
        ("--seq-len", int, 64, "bytes to a sequence"),
        ("--layers", int, 8, "Transformer layers"),
        ("--dim", int, 64, "width of the residual stream"),
        ("--heads", int, 2, "attention heads"),
        ("--block-size", int, 4, "sublayers to a block"),
        ("--lr", float, 3e-3, "peak learning rate"),
    ):
        parser.add_argument(
            flag,
            type=kind,
            default=default,
            metavar=kind.__name__.upper(),
            help=f"{text} (default {default})",
        )
    _add_machine(parser)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Runs a model and writes which sources every site reads to OUT: depth.json, depth.png and "
        "depth.html, one page that works offline."
    )
    parser.add_argument(
        "path",
        help="a run's folder, its checkpoint.safetensors or a variant's weights; or "
        "FILE.py:FUNCTION, a function that returns (model, inputs)",
    )
    parser.add_argument("--variant", help="which model of a run (default: block, if it is there)")
    parser.add_argument(
        "--text", nargs="+", metavar="FILE", help="text to run a trained model on, as for train"
    )
    parser.add_argument(
        "--batches", type=int, default=8, help="batches of validation text (default 8)"
    )
    parser.add_argument("--out", default="depth", help="folder to write to (default depth)")
    _add_machine(parser)


def _bench_names() -> str:
    from flash_attn_res.cli.bench.command import names

    return "\n" + names()


def _add_bench(parser: _Parser) -> None:
    parser.more = _bench_names
    parser.description = (
        "Measures suites: kernels, step (whole networks), decode (small batches), storage, cpu, "
        "accuracy. Each writes one JSON file to OUT; report draws them. Other packages are "
        "measured where they are installed; what cannot be measured is named with its reason. "
        "Leaves with 1 where a case of this package failed."
    )
    parser.add_argument(
        "suites", nargs="*", metavar="SUITE", help="which (default: all that the device has)"
    )
    parser.add_argument("--quick", action="store_true", help="small cases and few rounds")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="where results go (default benchmark-results, with --quick its folder quick)",
    )
    _add_machine(parser)
    which = parser.add_argument_group("packages")

    def add_names(group: argparse._ArgumentGroup, flag: str, text: str) -> None:
        group.add_argument(flag, action="extend", nargs="+", metavar="NAME", default=[], help=text)

    add_names(which, "--package", "only these")
    which.add_argument("--ours", action="store_true", help="this package, and plain residuals")
    which.add_argument("--peers", action="store_true", help="with --quick too, torch.compile")
    cases = parser.add_argument_group("cases")
    add_names(cases, "--shape", "of kernels, step and storage")
    add_names(cases, "--op", "of kernels, decode, storage and cpu")
    cases.add_argument(
        "--tokens", action="extend", nargs="+", type=int, metavar="T", default=[], help="of decode"
    )
    cases.add_argument(
        "--neighbours", action="store_true", help="kernels: also the shapes around the main ones"
    )
    cases.add_argument("--scaling", action="store_true", help="step: series over L and T instead")
    cases.add_argument(
        "--checkpointed",
        choices=["no", "yes", "both"],
        help="step: sublayers that are recomputed in the backward (default both)",
    )
    cases.add_argument("--rounds", type=int, default=0, metavar="N", help="default: the suite's")
    cases.add_argument(
        "--warm",
        type=int,
        default=0,
        metavar="JOBS",
        help="kernels, step: compile beforehand, so many",
    )
    cases.add_argument(
        "--profile", action="store_true", help="step: print where the time goes instead of timing"
    )


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Makes tables and plots from result files. For the results of a checkout it fills the "
        "generated tables of README.md and docs/ and draws docs/images; else it writes report.md "
        "and plots beside the results."
    )
    parser.add_argument(
        "--results",
        metavar="DIR",
        help="default: benchmark-results; where there is none, in a checkout, benchmarks/results",
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; leave with 1 where something is stale"
    )


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Prints what the blocks and running sums of Attention Residuals take up on each device "
        "in a training step, the bubble of the pipeline, and what travels between its stages and "
        "in a tensor-parallel group. One stage a rank runs 1F1B, several run interleaved 1F1B. "
        "The defaults are of Kimi K3's size."
    )
    for flag, default, text in (
        ("--layers", 186, "sublayers; a Transformer layer has two"),
        ("--dim", 7168, "width of the residual stream"),
        ("--block-size", 24, "sublayers to a block"),
        ("--pp", 8, "ranks of the pipeline"),
        ("--vpp", 2, "virtual stages to a rank"),
        ("--tp", 1, "ranks of the tensor-parallel group"),
        ("--seq", 8192, "tokens of a micro-batch"),
        ("--micro-batches", 16, "of a step"),
    ):
        parser.add_argument(
            flag, type=int, default=default, metavar="N", help=f"{text} (default {default})"
        )
    parser.add_argument(
        "--value-bytes", type=int, choices=(1, 2, 4), default=2, help="of an element (default 2)"
    )
    parser.add_argument(
        "--sum-bytes",
        type=int,
        choices=(2, 4),
        help="of an element of a running sum (default: as --value-bytes)",
    )
    parser.add_argument(
        "--links",
        type=float,
        nargs="+",
        default=[50.0, 450.0],
        metavar="GB/S",
        help="speeds of a link, one direction (default 50 450)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0, 1 for what it found, 2 for bad input, 130 after Ctrl-C."""
    try:
        arguments = build_parser().parse_args(argv)
        module, function = COMMANDS[arguments.command]
        run = getattr(importlib.import_module(f"{__name__}.{module}"), function)
        return int(run(arguments))
    except CliError as error:
        print(f"flash-attn-res: error: {error}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        print(
            f"flash-attn-res: error: the package {error.name} is missing; the commands need "
            f"pip install {' '.join(NEEDED)}",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("\nflash-attn-res: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output went away, as `| head` does. What Python would still flush at
        # exit goes nowhere instead of raising once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
