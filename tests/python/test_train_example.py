"""The example script runs and learns."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "train_lm" / "tiny_lm.py"


def test_example_learns() -> None:
    result = subprocess.run(
        [sys.executable, str(EXAMPLE), "61"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    losses = [float(value) for value in re.findall(r"loss (\d+\.\d+)", result.stdout)]
    assert len(losses) == 4
    assert losses[0] > 5
    assert losses[-1] < 3.5
