"""The depth lens: its numbers against the formulas, its page in a browser, the command."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flash_attn_res import BlockAttnRes
from flash_attn_res.cli import main
from flash_attn_res.cli.sample import load_model
from flash_attn_res.lens import DepthLens, DepthReport, html, write_html, write_json, write_png
from test_train import train_tiny

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SUBLAYERS, DIM = 7, 24


class Network(nn.Module):
    def __init__(self, block_size: int) -> None:
        super().__init__()
        self.attn_res = BlockAttnRes(SUBLAYERS, DIM, block_size)
        nn.init.normal_(self.attn_res.queries)
        self.layers = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(SUBLAYERS))

    def forward(self, x: Tensor, checkpoint: bool = False) -> Tensor:
        stream = self.attn_res.start(x)
        for layer in self.layers:
            stream.sublayer(layer, checkpoint=checkpoint)
        return stream.finish()


def expected_probabilities(network: Network, x: Tensor) -> list[Tensor]:
    """By the formulas, in float64: one [T, K] for each site."""
    module = network.attn_res
    assert module.key_weight is not None
    queries = (module.queries * module.key_weight).double()
    sources, partial = [x.double()], None
    found = []
    for site in range(SUBLAYERS + 1):
        if site and (site % module.block_size == 0 or site == SUBLAYERS):
            sources, partial = [*sources, partial], None
        v = torch.stack(sources if partial is None else [*sources, partial])  # (N,T,D)
        logits = (v @ queries[site]) * torch.rsqrt(v.square().mean(-1) + module.eps)
        p = logits.softmax(0)
        found.append(p.T)
        if site < SUBLAYERS:
            layer = network.layers[site]
            h = (p[..., None] * v).sum(0)
            y = h @ layer.weight.double().T + layer.bias.double()
            partial = y if partial is None else partial + y
    return found


@pytest.mark.parametrize("block_size", [1, 3, 7])
@pytest.mark.parametrize("grad", [False, True])
def test_means_over_all_passes(block_size: int, grad: bool) -> None:
    network = Network(block_size)
    inputs = [torch.randn(tokens, DIM) for tokens in (5, 1, 12)]
    with DepthLens(network) as lens, torch.set_grad_enabled(grad):
        for x in inputs:
            network(x)
    (reading,) = lens.report().networks
    assert (reading.name, reading.tokens) == ("attn_res", 18)
    with torch.no_grad():
        parts = [expected_probabilities(network, x) for x in inputs]
    for site, probabilities in zip(reading.sites, zip(*parts, strict=True), strict=True):
        p = torch.cat(probabilities)
        assert len(site.sources) == p.shape[1]
        near = {"rtol": 0, "atol": 1e-5}
        torch.testing.assert_close(torch.tensor(site.mean).double(), p.mean(0), **near)
        deviation = p.std(0, correction=0)
        torch.testing.assert_close(
            torch.tensor(site.std).double(), deviation, rtol=0, atol=1e-3
        )  # a difference of squares: its root shows the errors of its terms
        bits = -(p * p.log2()).sum(1).mean().item()
        assert site.entropy == pytest.approx(bits, abs=1e-4)


def test_labels() -> None:
    network = Network(3)
    with DepthLens(network) as lens:
        network(torch.randn(2, DIM))
    (reading,) = lens.report().networks
    assert reading.source_names == ["embedding", "block 1", "block 2", "block 3"]
    assert [site.sources for site in reading.sites] == [
        *([0], [0, 1], [0, 1], [0, 1], [0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 2, 3])
    ]
    assert [site.partial for site in reading.sites] == [
        *(False, True, True, False, True, True, False, False)
    ]
    table = reading.matrix()
    assert table[1][2:] == [None, None]
    found = reading.readers(0, count=99)
    assert 0 not in [site for site, _ in found]  # it has no choice
    assert found == sorted(found, key=lambda pair: -pair[1])
    with pytest.raises(ValueError, match="source is 4, expected 0 to 3"):
        reading.readers(4)


def test_closed_lens_leaves_nothing_and_open_one_changes_nothing() -> None:
    network = Network(3)
    x = torch.randn(4, DIM)
    before = dict(network.attn_res.__dict__)
    plain = network(x)
    lens = DepthLens(network)

    def run_and_fail() -> None:
        with lens:
            assert torch.equal(network(x), plain)
            assert torch.equal(network(x, checkpoint=True), plain)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_and_fail()
    assert network.attn_res.__dict__ == before
    assert network.attn_res.start(x).probabilities == []
    assert lens.report().networks[0].tokens == 8


def test_compiled_model() -> None:
    network = Network(3)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    x = torch.randn(4, DIM)
    before = compiled(x)
    with DepthLens(compiled) as lens:
        torch.testing.assert_close(compiled(x), before)
    assert lens.report().networks[0].tokens == 4
    assert torch.equal(compiled(x), before)
    assert lens.report().networks[0].tokens == 4


def test_gradients_under_the_lens() -> None:
    network = Network(3)
    x = torch.randn(4, DIM)
    network(x, checkpoint=True).sum().backward()
    expected = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    network.zero_grad()
    with DepthLens(network) as lens:
        network(x, checkpoint=True).sum().backward()
    got = [p.grad for p in network.parameters() if p.grad is not None]
    assert expected
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    assert lens.report().networks[0].tokens == 4


def test_keeps_probabilities_that_were_asked_for() -> None:
    module = Network(3).attn_res
    with DepthLens(module):
        stream = module.start(torch.randn(4, DIM), return_probs=True)
        stream.read()
        assert [p.shape for p in stream.probabilities] == [(4, 1)]


def test_errors() -> None:
    with pytest.raises(ValueError, match="Linear contains no BlockAttnRes"):
        DepthLens(nn.Linear(2, 2))
    network = Network(3)
    with pytest.raises(ValueError, match="site_names has 2 names"):
        DepthLens(network, ["a", "b"])
    lens = DepthLens(network)
    with pytest.raises(RuntimeError, match="no forward pass"):
        lens.report()
    with lens:
        with pytest.raises(RuntimeError, match="open on this model already"):
            DepthLens(network).__enter__()
        network.attn_res.start(torch.randn(2, DIM)).read()
    with pytest.raises(RuntimeError, match=r"did not reach stream\.finish"):
        lens.report()


def a_report() -> DepthReport:
    network = Network(3)
    with DepthLens(network, [f"</script><b>{i}" for i in range(8)]) as lens:
        network(torch.randn(6, DIM))
    return lens.report()


def test_json_round_trip_and_versions() -> None:
    report = a_report()
    values = json.loads(json.dumps(report.to_dict()))
    assert DepthReport.from_dict(values) == report
    with pytest.raises(ValueError, match="schema is 99, this version reads 1"):
        DepthReport.from_dict({**values, "schema": 99})
    with pytest.raises(ValueError, match="not a report"):
        DepthReport.from_dict({"schema": 1})


def test_what_is_not_finite_is_null_in_json(tmp_path: Path) -> None:
    network = Network(3)
    x = torch.randn(6, DIM)
    x[2] = torch.nan
    with DepthLens(network) as lens:
        network(x)
    report = lens.report()
    write_json(report, tmp_path / "depth.json")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    values = json.loads((tmp_path / "depth.json").read_text(), parse_constant=refuse)
    site = values["networks"][0]["sites"][1]
    assert site["mean"] == [None, None]
    assert site["entropy"] is None
    (network_read,) = DepthReport.from_dict(values).networks
    assert all(math.isnan(p) for p in network_read.sites[1].mean)
    assert "NaN" not in html(report).partition("const report = ")[2].partition("\n")[0]
    write_png(report, tmp_path / "depth.png")


def test_page_names_no_outside_resource() -> None:
    page = html(a_report(), "<img src=x>")
    assert not re.search(r"https?:|//[a-z]|<link|<img|\bsrc=[^x]|@import|url\(", page)
    assert page.count("</script>") == 1


def test_page_in_a_browser(tmp_path: Path) -> None:
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        missing = f"no browser here to draw the page: none of {', '.join(BROWSERS)} is installed"
        if os.environ.get("FLASH_ATTN_RES_BROWSER") == "required":  # .ci/run has installed one
            pytest.fail(missing)
        pytest.skip(missing)
    report = a_report()
    page = tmp_path / "depth.html"
    write_html(report, page, "a & b")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    ran = subprocess.run(
        [browser, *options, "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert 'data-ready="true"' in ran.stdout, ran.stderr
    dom = ran.stdout.partition("<main")[2].partition("</main>")[0]  # without the script's text
    drawn = {
        (int(site), int(source)): float(p)
        for site, source, p in re.findall(
            r'data-site="(\d+)" data-source="(\d+)" data-p="([\d.]+)"', dom
        )
    }
    expected = {
        (site.index, source): mean
        for site in report.networks[0].sites
        for source, mean in zip(site.sources, site.mean, strict=True)
    }
    assert drawn == pytest.approx(expected, abs=6e-5)
    assert dom.count('class="entropy"') == 8
    assert "&lt;/script&gt;&lt;b&gt;3" in dom  # a name is text, never markup
    assert "<b>3</b>" not in dom.partition("<svg")[2]
    assert "</script>" not in dom


FILE = """
import torch
from flash_attn_res import BlockAttnRes

class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn_res = BlockAttnRes(2, 8, 1)
    def forward(self, x):
        stream = self.attn_res.start(x)
        stream.write(stream.read())
        stream.write(stream.read())
        return stream.finish()

def make():
    return Network(), torch.randn(3, 8)

def plain():
    return torch.nn.Linear(8, 8), torch.randn(3, 8)

def wrong():
    return 1

def raises():
    return 1 / 0

def leaves():
    raise SystemExit(3)

def misfit():
    return Network(), torch.randn(3, 9)
"""


def test_command_on_a_trained_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train_tiny(tmp_path, "--steps", "2")
    out = tmp_path / "depth"
    arguments = ["--variant", "block", "--batches", "2", "--out", str(out), "--device", "cpu"]
    assert main(["inspect", str(run), *arguments]) == 0
    report = DepthReport.from_dict(json.loads((out / "depth.json").read_text()))
    model = load_model(run, "block")
    (reading,) = report.networks
    assert len(reading.sites) == model.config.sublayers + 1
    assert reading.tokens % model.config.seq_len == 0
    for site in reading.sites:
        assert sum(site.mean) == pytest.approx(1, abs=1e-5)
    assert main(["inspect", str(run), "--variant", "plain", "--out", str(out)]) == 2
    assert "contains no BlockAttnRes" in capsys.readouterr().err


def test_command_on_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "model.py", tmp_path / "out"
    file.write_text(FILE)
    assert main(["inspect", f"{file}:make", "--out", str(out), "--device", "cpu"]) == 0
    assert "attn_res: 3 sites, 3 tokens" in capsys.readouterr().out
    report = DepthReport.from_dict(json.loads((out / "depth.json").read_text()))
    # Zero queries: every site takes the same of all.
    assert report.networks[0].sites[2].mean == pytest.approx([1 / 3] * 3, abs=1e-6)
    assert (out / "depth.png").read_bytes().startswith(b"\x89PNG")
    assert "sublayer 2" in (out / "depth.html").read_text()


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("model.py:plain", [], "Linear contains no BlockAttnRes"),
        ("model.py:wrong", [], r"must return \(model, inputs\)"),
        ("model.py:none", [], "has no function 'none'"),
        ("other.py:make", [], "there is no such file"),
        ("model.py:make", ["--batches", "0"], "--batches must be at least 1"),
        ("model.py:make", ["--variant", "block"], "are for a trained run"),
        ("model.py:make", ["--out", "model.py/x"], "--out: cannot write to model.py/x"),
        ("model.py", [], "name the function .*: model.py:FUNCTION"),
        ("model.py:raises", [], "model.py:raises, line 25: ZeroDivisionError: division by zero"),
        ("model.py:leaves", [], "model.py:leaves, line 28: SystemExit: 3"),
        ("model.py:misfit", [], "model.py:misfit, line 1[0-9]: .*width of 8"),
        ("syntax.py:make", [], "syntax.py: SyntaxError: .*line 1"),
        ("imports.py:make", [], "imports.py, line 1: ModuleNotFoundError"),
        ("model.py:make", ["--device", "cuda:99"], "PyTorch sees"),
        ("nothing", [], "nothing"),
    ],
)
def test_command_errors(
    path: str,
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.py").write_text(FILE)
    Path("syntax.py").write_text("def make(:\n")
    Path("imports.py").write_text("import nothing_of_this_name\n")
    assert main(["inspect", path, *options]) == 2
    text = capsys.readouterr().err
    assert re.search(message, text), text
    assert text.count("\n") == 1
