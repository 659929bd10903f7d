"""mypy checks a user's file against the installed package's annotations."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

GOOD = """
from torch import Tensor
from flash_attn_res import BlockAttnRes, Stream, attend, read
from flash_attn_res.lens import DepthLens, DepthReport

def run(x: Tensor, query: Tensor) -> Tensor:
    stream: Stream = BlockAttnRes(num_sublayers=1, dim=8, block_size=1).start(x)
    stream.write(stream.read())
    y: Tensor = stream.finish()
    out: Tensor = attend([x], query).out
    return read(query, sources=[x, y]).x + out

def look(model: BlockAttnRes) -> DepthReport:
    with DepthLens(model) as lens:
        return lens.report()
"""

BAD = """
from flash_attn_res import BlockAttnRes
module = BlockAttnRes(num_sublayers="one", dim=8)
name: str = module.start(module.queries).finish()
module.begin()
"""


def check(tmp_path: Path, text: str) -> str:
    file = tmp_path / "user.py"
    file.write_text(text)
    ran = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file=", "--follow-imports=silent", str(file)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=900,
        check=False,
    )
    assert ran.returncode in (0, 1), ran.stderr
    return ran.stdout


def test_user_file(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="mypy is not installed here")
    good = check(tmp_path, GOOD)
    assert good.startswith("Success"), good
    bad = check(tmp_path, BAD)
    assert 'Argument "num_sublayers" to "BlockAttnRes" has incompatible type "str"' in bad
    assert "Incompatible types in assignment" in bad
    assert "import-untyped" not in bad
    assert bad.strip().endswith("(checked 1 source file)")
