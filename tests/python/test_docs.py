"""What the documentation says is what the code does."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest
import torch

from flash_attn_res import BlockAttnRes

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_the_example_of_the_readme_runs() -> None:
    text = (ROOT / "README.md").read_text()
    (example,) = re.findall(r"<!-- test: usage -->\n```python\n(.*?)```", text, re.S)
    assert len([line for line in example.splitlines() if line.strip()]) <= 16
    namespace: dict = {}
    exec(compile(example, "README.md", "exec"), namespace)
    assert namespace["y"].shape == (2, 16, 256)
    assert torch.isfinite(namespace["y"]).all()


def test_the_plan_in_the_page_on_training_is_the_plan() -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    assert str(BlockAttnRes(32, 2048, 8).plan(tokens=8192)) in text


@pytest.mark.parametrize("tool", ["api_doc.py", "report.py"])
def test_generated_pages_are_up_to_date(tool: str) -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "tools" / tool), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_links_between_pages_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/*.md")]
    assert pages
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
