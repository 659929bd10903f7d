"""What the documentation says is what the code does."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

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


def test_the_kimi_k3_example_runs(tmp_path: pathlib.Path) -> None:
    text = (ROOT / "docs" / "inference.md").read_text()
    (example,) = re.findall(r"<!-- test: kimi_k3 -->\n```python\n(.*?)```", text, re.S)
    T, D, num_layers = 3, 16, 26  # three blocks, the last one short
    tensors = {
        "model.norm.weight": torch.ones(D),
        "model.output_attn_res_norm.weight": torch.ones(D),
        "model.output_attn_res_proj.weight": torch.zeros(1, D),
    }
    for layer in range(num_layers):
        for name in ("self_attention_res", "mlp_res"):
            tensors[f"model.layers.{layer}.{name}_proj.weight"] = torch.zeros(1, D)
            tensors[f"model.layers.{layer}.{name}_norm.weight"] = torch.ones(D)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.ones(D)
    save_file(tensors, tmp_path / "model.safetensors")
    embedding = torch.randn(T, D).bfloat16()
    sublayer = SimpleNamespace(attention=torch.sin, mlp=torch.cos)
    namespace: dict = {
        "checkpoint": tmp_path,
        "layers": [sublayer] * num_layers,
        "head": lambda y: y.clone(),
        "embedding": embedding,
    }
    exec(compile(example, "inference.md", "exec"), namespace)
    # Queries of zero weigh all sources alike: the mean of the snapshots and the prefix.
    sources, total = [embedding.float()], torch.zeros(T, D)

    def site(*values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(torch.stack(values).mean(0), (D,), eps=1e-5)

    for layer in range(num_layers):
        if layer % 12 == 0 and layer > 0:
            x = site(*sources, total)
            sources.append(total)
            total = torch.sin(x)
        else:
            total = total + torch.sin(site(*sources, *([total] if layer else [])))
        total = total + torch.cos(site(*sources, total))
    torch.testing.assert_close(
        namespace["logits"].float(), site(*sources, total), rtol=0.05, atol=0.05
    )


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
