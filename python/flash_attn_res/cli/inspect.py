"""`flash-attn-res inspect`: which depths a model reads, as JSON, PNG and an HTML page."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flash_attn_res import lens
from flash_attn_res.cli import data
from flash_attn_res.cli.checkpoint import make_folder
from flash_attn_res.cli.device import choose_device, set_threads
from flash_attn_res.cli.errors import CliError, need
from flash_attn_res.cli.figures import site_names
from flash_attn_res.cli.model import LanguageModel
from flash_attn_res.cli.sample import load_model

_BATCH = 4  # sequences


def run_inspect(arguments: argparse.Namespace) -> int:
    """Runs the model on its inputs under the lens and writes what was seen."""
    if arguments.batches < 1:
        raise CliError(f"--batches must be at least 1, not {arguments.batches}")
    need("matplotlib")
    device = choose_device(arguments.device)
    set_threads(arguments.threads)
    folder = Path(arguments.out)
    make_folder("--out", folder)
    file, _, function = arguments.path.rpartition(":")
    if arguments.path.endswith(".py"):
        raise CliError(
            f"{arguments.path}: name the function that returns (model, inputs): "
            f"{arguments.path}:FUNCTION"
        )
    if file.endswith(".py"):
        if arguments.variant is not None or arguments.text is not None:
            raise CliError("--variant and --text are for a trained run, not for FILE.py:FUNCTION")
        model, inputs = _from_file(Path(file), function)
        batches: Iterator[tuple[Any, ...]] = iter([inputs])
        names = None
    else:
        model, batches = _trained(arguments)
        names = site_names(model.config.sublayers)
    model = model.to(device).eval()
    try:
        opened = lens.DepthLens(model, names)
    except ValueError as error:
        raise CliError(f"{arguments.path}: {error}") from error
    users = _named_errors(arguments.path) if file.endswith(".py") else contextlib.nullcontext()
    with users, torch.inference_mode(), opened as seeing:
        for inputs in batches:
            model(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in inputs))
    try:
        report = seeing.report()
    except RuntimeError as error:
        raise CliError(f"{arguments.path}: {error}") from error
    title = f"Depth lens: {Path(arguments.path).name}"
    try:
        lens.write_json(report, folder / "depth.json")
        lens.write_png(report, folder / "depth.png", title)
        lens.write_html(report, folder / "depth.html", title)
    except OSError as error:
        raise CliError(f"--out: cannot write {error.filename}: {error.strerror}") from error
    for network in report.networks:
        print(f"{network.name}: {len(network.sites)} sites, {network.tokens} tokens")
        for source, name in enumerate(network.source_names):
            most = ", ".join(
                f"{network.sites[site].name} {100 * p:.0f} %" for site, p in network.readers(source)
            )
            print(f"  {name:14} most read by {most or 'sites with no choice'}")
    print(f"wrote {folder}/depth.json, depth.png and depth.html")
    return 0


def _trained(arguments: argparse.Namespace) -> tuple[LanguageModel, Iterator[tuple[Any, ...]]]:
    model = load_model(Path(arguments.path), arguments.variant)
    seq_len = model.config.seq_len
    corpus = data.load_corpus(arguments.text or [], seq_len)
    pairs = data.validation_batches(
        corpus.validation, windows=_BATCH * arguments.batches, batch=_BATCH, seq_len=seq_len
    )
    return model, ((inputs,) for inputs, _ in pairs)


@contextlib.contextmanager
def _named_errors(where: str) -> Iterator[None]:
    """An exception of a user's code becomes one line with its place, the innermost of that file."""
    file = Path(where.partition(".py")[0] + ".py")
    try:
        yield
    except CliError:
        raise
    except (Exception, SystemExit) as error:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if file.exists() and Path(frame.filename).exists() and file.samefile(frame.filename)
        ]
        place = f", line {lines[-1]}" if lines else ""
        text = " ".join(str(error).split())
        raise CliError(f"{where}{place}: {type(error).__name__}: {text}") from error


def _from_file(path: Path, function: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """What FUNCTION in FILE.py returns: (model, inputs), inputs one value or a tuple of them."""
    if not path.is_file():
        raise CliError(f"{path}: there is no such file")
    spec = importlib.util.spec_from_file_location("inspected", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # As for a script: its neighbours can be imported, now or when the model runs, and dataclasses
    # find the module that they are of.
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.resolve().parent))
    with _named_errors(str(path)):
        spec.loader.exec_module(module)
    made = getattr(module, function, None)
    if not callable(made):
        raise CliError(f"{path} has no function {function!r}")
    with _named_errors(f"{path}:{function}"):
        result = made()
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], nn.Module)):
        raise CliError(f"{function} in {path} must return (model, inputs)")
    model, inputs = result
    return model, inputs if isinstance(inputs, tuple) else (inputs,)
