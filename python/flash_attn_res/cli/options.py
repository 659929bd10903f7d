"""The options of `train`: defaults, checks, and agreement with a checkpoint.

An option that is not given takes the checkpoint's value when a run is resumed, else that of
`--quick`, else the default. One that is given must be a legal value, and, where it decides what is
computed, the checkpoint's.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flash_attn_res.cli.errors import CliError

VARIANTS = ("plain", "block", "full")
DTYPES = ("float32", "bfloat16")

# Made for two CPU cores: three models, about three minutes.
DEFAULTS: dict[str, Any] = {
    "name": "demo",
    "out": "runs",
    "text": (),
    "variants": "plain,block,full",
    "layers": 8,
    "dim": 128,
    "heads": 4,
    "block_size": 4,
    "seq_len": 128,
    "dtype": "float32",
    "steps": 250,
    "batch": 8,
    "lr": 3e-3,
    "seed": 0,
    "val_every": 25,
    "checkpoint_every": 50,
    "device": "auto",
    "threads": 0,
}

QUICK: dict[str, Any] = {
    "layers": 3,
    "dim": 48,
    "heads": 2,
    "block_size": 2,
    "seq_len": 64,
    "steps": 60,
    "batch": 8,
    "val_every": 20,
    "checkpoint_every": 20,
}

# What a resumed run may change: where it runs and how often it reports, not what it computes.
FREE_ON_RESUME = frozenset(("name", "out", "val_every", "checkpoint_every", "device", "threads"))


@dataclass(frozen=True)
class TrainOptions:
    """A checked set of options."""

    name: str
    out: str
    text: tuple[str, ...]
    variants: tuple[str, ...]
    layers: int
    dim: int
    heads: int
    block_size: int
    seq_len: int
    dtype: str
    steps: int
    batch: int
    lr: float
    seed: int
    val_every: int
    checkpoint_every: int
    device: str
    threads: int

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return Path(self.out) / self.name

    @property
    def warmup(self) -> int:
        """Steps over which the learning rate rises."""
        return max(1, min(100, self.steps // 10))

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `resolve` takes it as `stored`."""
        return asdict(self)


def given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that the user named, as they will be stored."""
    values = {name: getattr(arguments, name) for name in DEFAULTS}
    values = {name: value for name, value in values.items() if value is not None}
    if "text" in values:
        values["text"] = tuple(values["text"])
    return values


def resolve(
    user: Mapping[str, Any], *, quick: bool = False, stored: Mapping[str, Any] | None = None
) -> TrainOptions:
    """Puts the options together and checks them. `stored`: those of the checkpoint to resume."""
    if stored is None:
        values = DEFAULTS | (QUICK if quick else {}) | dict(user)
    else:
        values = dict(stored) | {"text": tuple(stored["text"])} | dict(user)
    if isinstance(values["variants"], str):
        values["variants"] = tuple(part.strip() for part in values["variants"].split(","))
    else:
        values["variants"] = tuple(values["variants"])
    options = TrainOptions(**values)
    check(options)
    if stored is not None:
        _check_agreement(options, stored, quick)
    return options


def check(options: TrainOptions) -> None:
    """Raises a `CliError` that names the option and its value; device.py checks its own two."""
    if not options.name or options.name in (".", "..") or Path(options.name).name != options.name:
        raise CliError(f"--name must be a plain folder name, not {options.name!r}")
    for variant in options.variants:
        if variant not in VARIANTS:
            raise CliError(f"--variants: unknown variant {variant!r}; known: {', '.join(VARIANTS)}")
    if len(set(options.variants)) != len(options.variants):
        raise CliError(f"--variants names a variant twice: {','.join(options.variants)}")
    if options.dtype not in DTYPES:
        raise CliError(f"--dtype must be {' or '.join(DTYPES)}, not {options.dtype!r}")
    for name in ("layers", "dim", "heads", "block_size", "seq_len", "steps", "batch"):
        _check_positive(name, getattr(options, name))
    for name in ("val_every", "checkpoint_every"):
        _check_positive(name, getattr(options, name))
    if options.dim % options.heads:
        raise CliError(f"--dim {options.dim} must be divisible by --heads {options.heads}")
    head_dim = options.dim // options.heads
    if head_dim % 2:
        raise CliError(
            f"--dim / --heads = {head_dim} must be even: rotary positions turn pairs of coordinates"
        )
    if not (math.isfinite(options.lr) and options.lr > 0):
        raise CliError(f"--lr must be a positive finite number, not {options.lr}")
    if not 0 <= options.seed < 2**63:
        raise CliError(f"--seed must be at least 0 and below 2^63, not {options.seed}")


def flag(name: str) -> str:
    """The option as it is typed."""
    return "--" + name.replace("_", "-")


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise CliError(f"{flag(name)} must be at least 1, not {value}")


def _check_agreement(options: TrainOptions, stored: Mapping[str, Any], quick: bool) -> None:
    values = options.to_dict()
    wanted = values | (QUICK if quick else {})
    for name, old in stored.items():
        old = tuple(old) if isinstance(old, list) else old
        if name not in FREE_ON_RESUME and wanted[name] != old:
            raise CliError(
                f"--resume: the checkpoint of run {options.name!r} was made with "
                f"{flag(name)} {_shown(old)}, not {_shown(wanted[name])}"
            )


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "(the standard library)"
    return str(value)
