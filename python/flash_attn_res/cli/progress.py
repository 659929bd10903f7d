"""What is seen while the variants train: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from flash_attn_res.cli.figures import COLORS, LABELS

_SMOOTHING = 0.9  # of the losses and the speed that are shown
_LINES = 20  # plain lines to a run, besides those of the validations


@dataclass
class Row:
    """What is known of a variant."""

    train: float = math.nan  # smoothed, nats a byte
    validation: float = math.nan
    seconds: float = math.nan  # to a step, smoothed

    def update(self, loss: float, seconds: float) -> None:
        """Takes the loss and the time of a step."""
        self.train = _mix(self.train, loss)
        self.seconds = _mix(self.seconds, seconds)


class ProgressView:
    """Use as a context manager; call `step` after each round of steps."""

    def __init__(
        self, console: Console, variants: tuple[str, ...], *, first: int, steps: int, tokens: int
    ) -> None:
        self._console = console
        self._steps = steps
        self._tokens = tokens  # of one variant's step
        self._round_seconds = math.nan
        self._rows = {variant: Row() for variant in variants}
        self._line_every = max(1, steps // _LINES)
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None, complete_style="blue"),
            TextColumn("{task.fields[speed]}"),
            TextColumn("{task.fields[left]}"),
            console=console,
            expand=True,
        )
        self._task = self._bar.add_task("", total=steps, completed=first, speed="", left="")
        self._live = (
            Live(self._render(), console=console, refresh_per_second=8)
            if console.is_terminal
            else None
        )

    def __enter__(self) -> ProgressView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.update(self._render())
            self._live.stop()

    def validated(self, step: int, losses: Mapping[str, float]) -> None:
        """Takes the validation losses after `step` steps."""
        for variant, loss in losses.items():
            self._rows[variant].validation = loss
        if self._live is None:
            parts = "  ".join(f"{variant} {loss:.3f}" for variant, loss in losses.items())
            self._print(f"step {step}/{self._steps}  validation loss:  {parts}")
        else:
            self._live.update(self._render())

    def step(self, done: int, losses: Mapping[str, float], seconds: Mapping[str, float]) -> None:
        """Takes training losses and times of the round that made `done` steps complete."""
        for variant, loss in losses.items():
            self._rows[variant].update(loss, seconds[variant])
        self._round_seconds = _mix(self._round_seconds, sum(seconds.values()))
        speed = len(self._rows) * self._tokens / self._round_seconds
        left = _clock(self._round_seconds * (self._steps - done))
        self._bar.update(
            self._task, completed=done, speed=f"{_thousands(speed)} tokens/s", left=f"{left} left"
        )
        if self._live is not None:
            self._live.update(self._render())
        elif done % self._line_every == 0 or done == self._steps:
            parts = "  ".join(f"{variant} {row.train:.3f}" for variant, row in self._rows.items())
            self._print(
                f"step {done}/{self._steps}  training loss:  {parts}  "
                f"{_thousands(speed)} tokens/s  {left} left"
            )

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)

    def _render(self) -> Group:
        table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
        table.add_column("")
        for column in ("training loss", "validation loss", "bits/byte", "ms/step"):
            table.add_column(column, justify="right")
        for variant, row in self._rows.items():
            table.add_row(
                f"[{COLORS[variant]}]● {LABELS[variant]}[/]",
                number(row.train),
                number(row.validation),
                number(row.validation / math.log(2)),
                number(1e3 * row.seconds, 0),
            )
        return Group(self._bar, table)


def number(value: float, digits: int = 3) -> str:
    """A figure for a table; a dash where there is none yet."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def _mix(old: float, new: float) -> float:
    return new if math.isnan(old) else _SMOOTHING * old + (1 - _SMOOTHING) * new


def _thousands(value: float) -> str:
    return f"{value / 1e3:.1f}k" if value < 1e6 else f"{value / 1e6:.2f}M"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
