"""`flash-attn-res curves`: what it writes, that it continues, and how it compares."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from flash_attn_res.cli import main
from flash_attn_res.cli.curves import BASE, CONTROL, MODES, findings
from test_cli_errors import error_of

Capture = pytest.CaptureFixture[str]
TINY = (
    *("--layers", "2", "--dim", "16", "--heads", "2", "--block-size", "2", "--seq-len", "16"),
    *("--batch", "2", "--steps", "4", "--val-every", "2", "--threads", "1"),
)


def run(path: Path, *more: str) -> dict[str, Any]:
    assert main(["curves", "--out", str(path), *TINY, *more]) == 0
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def test_every_mode_is_trained_and_repeats(tmp_path: Path, capsys: Capture) -> None:
    document = run(tmp_path / "a.json", "--seeds", "2", "--plot", str(tmp_path / "a.png"))
    rows = {(row["mode"], row["seed"]): row for row in document["rows"]}
    assert list(rows) == [(mode, seed) for seed in (0, 1) for mode in MODES]
    for row in rows.values():
        assert [step for step, _ in row["validation"]] == [0, 2, 4]
        assert all(math.isfinite(loss) for _, loss in row["validation"])
        assert len(row["train_loss"]) == 1
    ends = {key: row["validation"][-1][1] for key, row in rows.items()}
    assert ends[BASE, 0] != ends[BASE, 1]
    assert ends["float8 blocks", 0] != ends["bfloat16", 0] != ends[BASE, 0]
    # Far closer to each other than two seeds are.
    for mode in MODES:
        assert abs(ends[mode, 0] - ends[BASE, 0]) < 0.5 * abs(ends[BASE, 1] - ends[BASE, 0])
    assert abs(ends[CONTROL, 0] - ends[BASE, 0]) < 1e-4
    assert (tmp_path / "a.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert all(mode in shown for mode in MODES)
    again = run(tmp_path / "b.json", "--modes", "float8 blocks,bfloat16 stochastic", "--seeds", "1")
    for row in again["rows"]:
        assert row == rows[row["mode"], 0]


def test_it_continues_a_file_of_the_same_options_only(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "a.json"
    run(path, "--modes", "float32", "--seeds", "1")
    document = run(path, "--modes", "float32,bfloat16", "--seeds", "1")
    assert [row["mode"] for row in document["rows"]] == ["float32", "bfloat16"]
    given = ("curves", "--out", str(path), *TINY, "--seeds", "1")
    assert "other options" in error_of(capsys, *given, "--lr", "0.1")
    path.write_text("[]")
    assert "no file of this command" in error_of(capsys, *given)


def test_findings() -> None:
    def row(mode: str, seed: int, loss: float) -> dict[str, Any]:
        return {"mode": mode, "seed": seed, "validation": [[0, 5.0], [4, loss]]}

    rows = [row(BASE, 0, 1.0), row(BASE, 1, 2.0), row("bfloat16", 0, 1.25), row("bfloat16", 1, 2.5)]
    base, other = findings({"rows": rows})
    assert (base.loss, base.difference) == (1.5, None)
    assert base.spread == pytest.approx(0.5**0.5)
    assert other.difference == pytest.approx(0.375)
    assert other.error == pytest.approx(0.125)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--modes", "float7"], ["--modes", "float7", "float8 blocks"]),
        (["--steps", "0"], ["--steps", "0"]),
        (["--lr", "-1"], ["--lr", "-1"]),
        (["--dim", "30", "--heads", "4"], ["--dim", "30", "--heads"]),
    ],
)
def test_errors(arguments: list[str], words: list[str], tmp_path: Path, capsys: Capture) -> None:
    err = error_of(capsys, "curves", "--out", str(tmp_path / "a.json"), *arguments)
    for word in words:
        assert word in err
    err = error_of(capsys, "curves", "--out", str(tmp_path / "none" / "a.json"))
    assert "none" in err
