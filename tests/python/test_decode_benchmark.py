"""The decode benchmark runs without a GPU, and its result file is what the report and plot read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks" / "python"


def run(*command: object) -> str:
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_decode_on_the_cpu(tmp_path: Path) -> None:
    results, image = tmp_path / "decode.json", tmp_path / "decode.svg"
    options = ("--device", "cpu", "--quick", "--tokens", 1, 3, "--package", "flash_attn_res")
    run(BENCHMARKS / "decode.py", *options, "--out", results)
    document = json.loads(results.read_text())
    assert document["copy_tb_s"] > 0
    cases = {(row["op"], row["shape"]["N"], row["shape"]["T"]) for row in document["rows"]}
    operations = (("advance", 0), ("oneshot", 2), ("oneshot", 9), ("k3_site", 9), ("phase1", 8))
    assert cases == {(op, n, t) for op, n in operations for t in (1, 3)}
    for row in document["rows"]:
        assert set(row) == {"package", "op", "shape", "us_cold", "us_warm", "bytes"}
        assert row["us_cold"] > 0
        assert row["us_warm"] > 0
    run(BENCHMARKS / "plot_decode.py", "--results", results, "--out", image)
    assert image.read_text().startswith("<?xml")
