"""What the documentation says is what the code does."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from flash_attn_res import BlockAttnRes
from flash_attn_res.cli import COMMANDS
from flash_attn_res.cli.bench import plots

ROOT = pathlib.Path(__file__).resolve().parents[2]


PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("examples/**/*.md")),
]
FENCE = re.compile(
    r"(?:<!-- (?P<mark>[^>]*?)\s*-->\n)?```(?P<info>[^\n]*)\n(?P<code>.*?)^```$", re.S | re.M
)

# What the blocks of a page take as given.
SETUP = {
    "inference.md": "",  # its block has a test of its own, the other one needs a GPU
    "training.md": """
import torch
from torch import nn
from flash_attn_res import BlockAttnRes
attn_res = BlockAttnRes(32, 64, 8)
layers, norms, final_norm = [nn.Linear(64, 64) for _ in range(32)], [torch.ones(64)] * 32, None
embedding = torch.randn(2, 3, 64)
""",
}


def blocks(page: pathlib.Path) -> list[re.Match[str]]:
    return list(FENCE.finditer(page.read_text()))


def python_pages() -> list[pathlib.Path]:
    return [
        page
        for page in PAGES
        if page.name not in ("api.md", "inference.md")
        and any(block["info"].startswith("python") for block in blocks(page))
    ]


@pytest.mark.parametrize("page", python_pages(), ids=lambda page: page.name)
def test_python_in_the_documentation_runs(page: pathlib.Path) -> None:
    """The blocks of a page run in their order, as one program; errors are those that are quoted."""
    setup = re.search(r"<!-- setup\n(.*?)-->", page.read_text(), re.S)
    namespace: dict = {}
    exec(setup[1] if setup else SETUP.get(page.name, ""), namespace)
    raised = None
    for block in blocks(page):
        if (block["mark"] or "").startswith("needs "):
            continue  # the mark says what, and which test runs such a program
        line = page.read_text()[: block.start("code")].count("\n")
        if block["info"].startswith("python"):
            program = compile("\n" * line + block["code"], str(page), "exec")
            if block["mark"] == "raises":
                with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
                    exec(program, namespace)
                raised = str(caught.value)
            else:
                exec(program, namespace)
        elif raised is not None:
            assert block["info"] == "text"
            assert block["code"].strip() in raised, f"{page.name}:{line}"
            raised = None
    assert raised is None, "an error that no block quotes"


def test_blocks_that_show_a_file_are_that_file() -> None:
    shown = [
        (mark[1], block)
        for page in PAGES
        for block in blocks(page)
        if (mark := re.fullmatch(r"file: (.*)", block["mark"] or ""))
    ]
    assert shown
    for name, block in shown:
        assert block["code"] == (ROOT / name).read_text()


def test_cpp_in_the_documentation_is_compiled() -> None:
    """It is part of programs that are built and run by the tests of the C++ package."""
    programs = [ROOT / "examples/cpp/main.cpp", ROOT / "tests/cpp/documentation_test.cpp"]
    text = "".join(path.read_text() for path in programs)
    shown = [
        block["code"]
        for page in PAGES
        if page.name != "api.md"
        for block in blocks(page)
        if block["info"] == "cpp"
    ]
    assert shown
    for code in shown:
        assert code in text


def test_commands_in_the_documentation_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    cli = subprocess.run(
        [sys.executable, "-m", "flash_attn_res.cli", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    text = "\n".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"(?:^|`)(?:[A-Z]+=\S+ )?make ([a-z-]+)", text, re.M))
    assert named
    assert named <= targets, named - targets
    commands = set(re.findall(r"(?:`|^\s*)flash-attn-res ([a-z]+)", text, re.M))
    assert commands == set(COMMANDS)  # each has a word in the documentation, and there is no other
    assert commands <= set(re.findall(r"\w+", cli))
    for script in set(re.findall(r"`(?:python )?((?:tools|benchmarks)/[\w/]+\.py)", text)):
        assert (ROOT / script).exists(), script


def test_errors_that_need_another_machine_are_quoted_as_they_are() -> None:
    """The others of docs/errors.md are raised by the blocks above them."""
    files = [*ROOT.glob("src/**/*.cpp"), *ROOT.glob("bindings/**/*.h")]
    sources = "".join(path.read_text() for path in files)
    page = (ROOT / "docs" / "errors.md").read_text().partition("## Questions")[2]
    quoted = re.findall(r'"([^"]{20,})"', page)
    assert quoted
    for text in quoted:
        assert text in sources, text


def test_presets_in_the_documentation_exist() -> None:
    text = (ROOT / "docs" / "building.md").read_text()
    presets = (ROOT / "CMakePresets.json").read_text()
    for name in re.findall(r"--preset (\w+)", text):
        assert f'"name": "{name}"' in presets


def test_the_site_builds(tmp_path: pathlib.Path) -> None:
    """In strict mode: a page that is not listed, a link or an anchor that is dead fails it."""
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "BlockAttnRes" in (tmp_path / "api.html").read_text()
    assert "Attention Residuals" in (tmp_path / "index.html").read_text()


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


def test_the_example_of_quantised_snapshots_runs() -> None:
    text = (ROOT / "docs" / "inference.md").read_text()
    found = re.findall(r"<!-- test: quantized_snapshots -->\n```python\n(.*?)```", text, re.S)
    (example,) = found
    T, D = 5, 200
    values = [torch.randn(T, D).bfloat16() for _ in range(7)]
    x = torch.full((T, D), torch.nan)
    namespace: dict = {
        "blocks": list(zip(values[:3], values[3:6], strict=True)),
        "query": torch.zeros(D),
        "norm_weight": torch.ones(D),
        "prefix": values[6],
        "x": x,
    }
    # The names of the loop are those of a comprehension: `prefix` behind it is the running one.
    exec(compile(example, "inference.md", "exec"), namespace)
    sums = [a.float() + b.float() for a, b in namespace["blocks"]]
    mean = torch.stack([*sums, values[6].float()]).mean(0)
    exact = torch.nn.functional.rms_norm(mean, (D,), eps=1e-6)
    assert (x - exact).norm() <= 2.0**-4 * exact.norm()


def test_the_plan_in_the_page_on_training_is_the_plan() -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    assert str(BlockAttnRes(32, 2048, 8).plan(tokens=8192)) in text


@pytest.mark.parametrize(
    "command",
    [
        [ROOT / "tools" / "api_doc.py"],
        ["-m", "flash_attn_res.cli", "report", "--results", ROOT / "benchmarks" / "results"],
    ],
    ids=["api", "report"],
)
def test_generated_pages_are_up_to_date(command: list[str | pathlib.Path]) -> None:
    result = subprocess.run(
        [sys.executable, *map(str, command), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_pictures_of_the_documentation_are_of_results() -> None:
    """`report --check` holds each to what it was drawn from, by the hash that it carries."""
    shown = {
        (page.parent / name).resolve()
        for page in PAGES
        for name in re.findall(r"!\[[^]]*\]\(([^)]*images/[^)]+)\)", page.read_text())
    }
    assert shown == set((ROOT / "docs" / "images").iterdir())
    for path in shown:
        with Image.open(path) as image:
            assert plots.KEY in image.info, path.name


def test_links_between_pages_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/*.md")]
    assert pages
    for page in pages:
        text = FENCE.sub("", page.read_text())  # in code, [](int x) is no link
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
