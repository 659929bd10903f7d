"""`bench` and `report`: a quick run on the CPU, result files, tables, and every bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flash_attn_res.cli import main
from flash_attn_res.cli.accuracy import peers
from flash_attn_res.cli.bench import accuracy, decode, harness, kernels, report, step, tables
from flash_attn_res.cli.bench.plots import PLOTS, exponent
from test_cli_errors import Capture, error_of

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def bench(*arguments: object) -> str:
    """In a process of its own, on one thread: the command changes how memory is kept."""
    command = [sys.executable, "-m", "flash_attn_res.cli", "bench", *map(str, arguments)]
    done = subprocess.run(
        [*command, "--threads", "1", "--device", "cpu"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def load(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    return document


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of quick runs of every suite but accuracy, whose command has tests of its own."""
    out = tmp_path_factory.mktemp("results")
    bench("kernels", "cpu", "--quick", "--out", out, "--op", "oneshot", "merge", "phase1")
    bench("step", "--quick", "--out", out, "--shape", "narrow", "--rounds", 1)
    bench("decode", "--quick", "--out", out, "--tokens", 1, 3)
    bench("storage", "--quick", "--out", out)
    return out


def test_a_result_file_says_what_it_is(folder: Path) -> None:
    paths = sorted(folder.glob("*.json"))
    names = ["cpu-decode", "cpu-kernels", "cpu-step", "cpu-storage", "cpu"]
    assert [path.stem for path in paths] == names
    for path in paths:
        document = harness.load_results(path)
        assert document["suite"] == path.stem.removeprefix("cpu-")
        assert document["quick"]
        assert document["device"]
        assert document["commit"]
        assert document["copy_tb_s"] > 0
        assert {"flash_attn_res", "python", "torch", "liger-kernel"} <= set(document["versions"])


def test_a_row_has_percentiles_and_percent_of_copy_or_a_reason(folder: Path) -> None:
    for path in folder.glob("*.json"):
        packages = set()
        for row in load(path)["rows"]:
            packages.add(row["package"])
            assert row["commit"]
            if "error" in row:
                assert row["error"]
                continue
            times = [name for name in row if f"{name}_p10" in row]
            assert times
            for name in times:
                assert 0 < row[f"{name}_p10"] <= row[name] <= row[f"{name}_p90"]
            assert row["package"] == "plain" or row["percent_of_copy"] >= 0
        assert harness.OURS in packages


def test_what_cannot_be_measured_is_named(folder: Path) -> None:
    for suite in ("kernels", "step", "decode"):
        rows = load(folder / f"cpu-{suite}.json")["rows"]
        reasons = {row["package"]: row["error"] for row in rows if "error" in row}
        assert {"seed", "fla (Triton)", "fla (Gluon)", "liger"} <= set(reasons)
        assert harness.OURS not in reasons
    out = bench("kernels", "--quick", "--out", folder / "other", "--package", "liger")
    assert "not measured: liger: has Triton kernels" in out


def test_a_run_of_some_cases_keeps_the_others(folder: Path, tmp_path: Path) -> None:
    for quick in folder.glob("*.json"):
        whole = load(quick)
        del whole["quick"]
        (tmp_path / quick.name).write_text(json.dumps(whole))
    path = tmp_path / "cpu-decode.json"
    document = load(path)
    for row in document["rows"]:
        del row["commit"]  # as files were before
    path.write_text(json.dumps(document | {"commit": "an earlier one"}))
    before = load(path)["rows"]
    bench("decode", "--out", tmp_path, "--tokens", 3, "--op", "advance", "--ours", "--rounds", 1)
    after = load(tmp_path / "cpu-decode.json")["rows"]
    assert list(map(harness.identity, after)) == list(map(harness.identity, before))
    changed = [a for a in after if a["commit"] != "an earlier one"]
    assert [(row["package"], row["op"], row["shape"]["T"]) for row in changed] == [
        (harness.OURS, "advance", 3)
    ]


def test_scaling_is_drawn(tmp_path: Path, capsys: Capture) -> None:
    bench("step", "--scaling", "--quick", "--ours", "--rounds", 1, "--out", tmp_path)
    rows = load(tmp_path / "cpu-step.json")["rows"]
    assert {row["series"] for row in rows} == {"L", "T"}
    assert main(["report", "--results", str(tmp_path)]) == 0
    assert (tmp_path / "cpu-step-scaling.png").read_bytes().startswith(b"\x89PNG")
    assert "skipped step-overhead of cpu-step: Not measured yet" in capsys.readouterr().out
    assert exponent([1, 2, 4], [3, 6, 12]) == pytest.approx(1)


def test_a_report_of_a_folder(folder: Path, capsys: Capture) -> None:
    arguments = ["report", "--results", str(folder)]
    assert main(arguments) == 0
    text = (folder / "report.md").read_text()
    assert "A quick run" in text
    assert "| one-shot forward |" in text
    for picture in ("cpu-kernels-kernels", "cpu-step-step-overhead", "cpu-decode-decode"):
        assert f"]({picture}.png)" in text
        assert (folder / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    assert main([*arguments, "--check"]) == 0
    (folder / "report.md").write_text("something else")
    (folder / "cpu-step-step-overhead.png").write_bytes(b"no picture")
    capsys.readouterr()
    assert main([*arguments, "--check"]) == 1
    complaint = capsys.readouterr().out
    for name in ("report.md", "cpu-step-step-overhead.png"):
        assert str(folder / name) in complaint
    assert "decode" not in complaint
    assert "run flash-attn-res report" in complaint


def test_pages_of_a_checkout(tmp_path: Path, capsys: Capture) -> None:
    """Stale tables are found, then filled; a quick run is no source for them."""
    results = tmp_path / "benchmarks" / "results"
    shutil.copytree(RESULTS, results)
    (tmp_path / "docs").mkdir()
    readme = tmp_path / "README.md"
    readme.write_text("<!-- generated: kernels -->\nold\n<!-- end of generated: kernels -->\n")
    arguments = ["report", "--results", str(results)]
    assert main([*arguments, "--check"]) == 1
    complaint = capsys.readouterr().out
    assert complaint.startswith("report: README.md, docs/images/")
    assert "differ from the results: run make report" in complaint
    assert main(arguments) == 0
    assert "| phase 1 forward |" in readme.read_text()
    assert main([*arguments, "--check"]) == 0
    found = report.Results(results, report.load_all(results))
    images = tmp_path / "docs" / "images"
    for name, plot in PLOTS.items():
        drawn = any(plot.select(document) for document in found.of(plot.suite))
        assert (images / f"{name}.png").exists() == drawn
    for path in results.glob("*-kernels.json"):
        path.write_text(json.dumps(load(path) | {"quick": True}))
    assert tables.missing("flash-attn-res bench kernels") in report.block(
        "kernels", report.Results(results, report.load_all(results))
    )


def test_pictures_are_held_to_what_they_were_drawn_from(tmp_path: Path, capsys: Capture) -> None:
    """To the rows, and to what a headline says of the machine."""
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (tmp_path / "README.md").touch()
    path = results / "h100-decode.json"
    shutil.copy(RESULTS / path.name, path)
    arguments = ["report", "--results", str(results)]
    assert main(arguments) == 0
    assert main([*arguments, "--check"]) == 0
    document = load(path)
    row, *others = document["rows"]
    for changed in (
        document | {"rows": [row | {"us_cold": row["us_cold"] + 1}, *others]},
        document | {"rows": others},
        document | {"device": "another GPU"},
        document | {"date": "2027-01-01"},
    ):
        path.write_text(json.dumps(changed))
        capsys.readouterr()
        assert main([*arguments, "--check"]) == 1
        assert "docs/images/decode.png differ from the results" in capsys.readouterr().out
    path.write_text(json.dumps(document))
    assert main([*arguments, "--check"]) == 0
    (tmp_path / "docs" / "images" / "decode.png").unlink()
    assert main([*arguments, "--check"]) == 1


def test_which_results_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of this folder; a checkout's pages are written by who is in it."""
    root, elsewhere = tmp_path / "checkout", tmp_path / "elsewhere"
    for folder in (root / "docs", elsewhere):
        folder.mkdir(parents=True)
    monkeypatch.setattr(report, "checkout", lambda: root)
    own = Path("benchmark-results")
    monkeypatch.chdir(elsewhere)
    assert report.default_folder() == own
    monkeypatch.chdir(root / "docs")
    assert report.default_folder() == root / "benchmarks" / "results"
    own.mkdir()
    assert report.default_folder() == own
    monkeypatch.setattr(report, "checkout", lambda: None)
    assert report.default_folder() == own


def test_tables_say_which_commits_they_are_of() -> None:
    document = {"commit": "0123456789abcdef0123456789abcdef01234567"}
    rows = [{}, {"commit": "fedcba9"}, {"commit": "fedcba9"}, {"commit": "abcdef0-dirty"}]
    expected = "Measured at `0123456`, `abcdef0-dirty`, `fedcba9`."
    assert tables.measured_at(document, rows) == expected
    for path in RESULTS.glob("*.json"):
        document = load(path)
        for suite, table, _ in tables.TABLES.values():
            # Tables of the studies have no caption of their own.
            if suite == document.get("suite") and suite not in ("fp8-error", "insights"):
                text = table(document)
                assert "Measured at `" in text or text.startswith("Not measured yet"), path


def test_the_shapes_of_errors_are_the_worst_of_all_rows() -> None:
    def row(tensor: str, ulp: float | None, cosine: float | None, bias: float | None) -> Any:
        place = {"package": harness.OURS, "storage": "bf16", "op": "phase1", "tensor": tensor}
        return place | {"max_ulp": ulp, "cosine": cosine, "bias": bias, "commit": "abcdef0"}

    rows = [
        row("output", 0.5, 1 - 1e-6, 1e-5),
        row("output", 12.0, 1 - 4e-3, -3e-2),
        row("output", None, None, None),  # not finite
        row("lse", 1e6, 1.0, 0.0),
    ]
    head = {"device": "CPU", "versions": {"torch": "2"}, "commit": "none", "rows": rows}
    text = tables.error_shapes(head)
    assert "| phase1: output | 12, 4e-3, -3e-2 |" in text
    assert "| phase1: lse | 1e6, 0, +0e0 |" in text


def test_a_run_of_some_packages_keeps_the_errors_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the suite accuracy writes them, each row with its commit."""
    path = tmp_path / "accuracy.json"
    device = torch.device("cpu")

    def rows(*packages: str) -> list[harness.Row]:
        return [
            {"package": package, "storage": "bf16", "family": family, "op": "advance"}
            | {"shape": {"N": 2}, "tensor": "output"}
            for package in packages
            for family in ("gaussian", "flat")
        ]

    monkeypatch.setenv("FLASH_ATTN_RES_COMMIT", "aaaaaaa")
    whole = harness.Store(path, "accuracy", device, quick=False, part=False)
    failures = [{"package": "liger", "error": "none"}, {"package": "seed", "error": "none"}]
    whole.write(rows(harness.OURS, "eager"), None, failures=failures)
    monkeypatch.setenv("FLASH_ATTN_RES_COMMIT", "bbbbbbb")

    def table(*given: Any) -> tuple[Any, dict[str, Any]]:
        return SimpleNamespace(rows=rows("seed", "eager")[:3], failures=[]), {"seed": 0}

    monkeypatch.setattr(accuracy.command, "run_table", table)
    options = SimpleNamespace()
    request = harness.Request(device, False, ["seed", "eager"], [], [], options)  # type: ignore
    request.store = harness.Store(path, "accuracy", device, quick=False, part=True)
    assert accuracy.run(request) == []
    document = harness.load_results(path)
    found = [(row["package"], row["family"], row["commit"]) for row in document["rows"]]
    assert found == [
        (harness.OURS, "gaussian", "aaaaaaa"),
        (harness.OURS, "flat", "aaaaaaa"),
        ("eager", "gaussian", "bbbbbbb"),
        ("eager", "flat", "aaaaaaa"),
        ("seed", "gaussian", "bbbbbbb"),
        ("seed", "flat", "bbbbbbb"),
    ]
    assert document["failures"] == failures[:1]


def test_a_part_keeps_versions_of_what_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cpu.json"
    device = torch.device("cpu")

    def write(version: str, package: str, part: bool) -> dict[str, Any]:
        found = {"torch": torch.__version__, "liger-kernel": version}
        monkeypatch.setattr(harness.peers, "versions", lambda: dict(found))
        row = {"package": package, "op": "merge_fwd", "us": 1.0}
        harness.Store(path, "cpu", device, quick=False, part=part).write([row], None)
        return harness.load_results(path)["versions"]

    assert write("0.8.5", "liger", part=False)["liger-kernel"] == "0.8.5"
    gone = harness.peers.NOT_INSTALLED
    assert write(gone, harness.OURS, part=True)["liger-kernel"] == "0.8.5"
    assert write("0.9.0", "liger", part=True)["liger-kernel"] == "0.9.0"
    assert write(gone, harness.OURS, part=False)["liger-kernel"] == gone


LINEAR = 1.15
"""Largest exponent of a step's time over depth or tokens: proportional, and some noise."""


def test_steps_stay_linear() -> None:
    """In the committed results: twice as deep, or twice as many tokens, take twice as long."""
    series: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for path in RESULTS.glob("*-step.json"):
        for row in load(path)["rows"]:
            if "series" in row and "error" not in row and row["package"].startswith(harness.OURS):
                column = {"L": "layers", "T": "tokens"}[row["series"]]
                key = (path.stem, row["package"], row["series"])
                series.setdefault(key, []).append((row[column], row["step_ms"]))
    if not series:
        pytest.skip("no series over L or T in benchmarks/results: bench step --scaling makes them")
    for key, points in series.items():
        assert len(points) > 2, key
        found = exponent(*zip(*points, strict=True))
        assert found < LINEAR, f"{key}: the power is {found:.2f}"


def test_report_shows_the_newest_gpu_or_all(tmp_path: Path) -> None:
    document = load(RESULTS / "h100-kernels.json")
    for name, gpu, date in (("h100", "GPU A", "2026-02-01"), ("h200", "GPU B", "2026-03-01")):
        changed = document | {"device": gpu, "date": f"{date}T00:00:00+00:00"}
        (tmp_path / f"{name}-kernels.json").write_text(json.dumps(changed))
    on_cpu = document | {"device": "CPU", "driver": "none", "date": "2026-04-01T00:00:00+00:00"}
    (tmp_path / "cpu-kernels.json").write_text(json.dumps(on_cpu))
    found = report.Results(tmp_path, report.load_all(tmp_path))
    newest = report.block("kernels", found)
    assert newest.startswith("GPU B")
    assert report.block("kernels all", found).startswith(f"{newest}\n\nGPU A")
    assert [each["device"] for each in found.of("kernels")] == ["GPU B", "GPU A", "CPU"]


def test_our_operations_are_those_of_the_formulas() -> None:
    """What `kernels` times computes the right thing."""
    torch.manual_seed(0)
    site = kernels.Site(3, 2, 5, 64, torch.device("cpu"))
    case = peers.Case("phase1", 3, 2, 5, 64, "cpu")
    out = site.rows(2)
    sources = list(case.inputs["sources"])
    run, _ = site.phase1(sources, case.inputs["queries"], out)
    run()
    exact, _ = peers.formula("phase1", {k: v.double() for k, v in case.inputs.items()})
    torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=2e-2)
    for op, directions in kernels.UNITS.items():
        for direction, units in zip(kernels.DIRECTIONS, directions, strict=True):
            operation, counted = getattr(site, f"{op}_{direction}")()
            operation()
            assert counted == units(3, 2)


@pytest.mark.parametrize("two_phase", [False, True])
def test_what_is_compiled_beforehand_is_what_a_network_calls(
    two_phase: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same operators with the same shapes and the same need of gradients, in any order."""
    seen: set[tuple[Any, ...]] = set()

    def noted(name: str, function: Any) -> Any:
        def call(*given: Any) -> Any:
            sources = given[0] if isinstance(given[0], list) else [given[0]]
            told = len(sources), tuple(sources[0].shape), torch.is_grad_enabled()
            last = given[-1]
            seen.add((name, *told, None if last is None else tuple(last.shape)))
            return function(*given)

        return call

    def make(network: step.Network) -> step.Operators:
        one_shot = noted("one-shot", step.formula_one_shot)
        if not two_phase:
            return step.Operators(one_shot)
        phase1 = noted("phase 1", step.formula_phase1)
        return step.Operators(one_shot, phase1, noted("merge", step.formula_merge))

    shape = step.Shape(layers=4, block_size=2, tokens=step.CHECKED_TOKENS + 44, dim=16)
    monkeypatch.setitem(step.OPERATORS, "formulas", make)
    monkeypatch.setitem(step.PACKAGES, "formulas", lambda network: step.over(make, network))
    torch.manual_seed(0)
    network = step.Network(shape, "cpu", torch.float32)
    x = torch.randn(1, shape.tokens, shape.dim).requires_grad_()
    prepared = step.prepare(network, "formulas", x, torch.ones_like(x), False)
    assert isinstance(prepared, step.Contender), prepared
    called = set(seen)
    seen.clear()

    def run(module: str, calls: list[list[str]], jobs: int) -> None:
        assert (module, jobs) == (step.__name__, 3)
        for package, *numbers in calls:
            *sizes, count = map(int, numbers)
            step.compile_one(package, step.Shape(*sizes), count, "cpu", torch.float32)

    monkeypatch.setattr(harness, "in_processes", run)
    step.compile_beforehand([shape], ["plain", "formulas"], 3)
    assert seen >= called


def test_a_package_that_fails_is_a_row() -> None:
    def broken() -> None:
        raise RuntimeError("out of\nluck")

    timer = harness.Timer(torch.device("cpu"))
    times, failures = timer.interleaved({"good": lambda: None, "bad": broken}, 4)
    assert len(times["good"]) == 4
    assert failures == {"bad": "RuntimeError: out of luck"}


def test_a_case_of_ours_that_fails_is_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def broken(*given: Any) -> decode.Call:
        raise RuntimeError("no kernel here")

    monkeypatch.setattr(decode, "ours", broken)
    monkeypatch.setattr(harness, "keep_freed_memory", lambda: None)
    arguments = ["bench", "decode", "--quick", "--tokens", "1", "--device", "cpu"]
    assert main([*arguments, "--ours", "--op", "advance", "--out", str(tmp_path)]) == 1
    assert "not measured: flash_attn_res: RuntimeError: no kernel here" in capsys.readouterr().out
    (row,) = load(tmp_path / "cpu-decode.json")["rows"]
    assert row["error"] == "RuntimeError: no kernel here"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["kernel"], ["unknown suite 'kernel'", "kernels, step, decode, storage, cpu, accuracy"]),
        (["step", "--package", "ligre"], ["--package", "unknown 'ligre'", "liger"]),
        (["step", "--shape", "wide"], ["--shape", "unknown 'wide'", "kimi-k3"]),
        (["kernels", "--op", "attend"], ["--op", "unknown 'attend'", "phase1_fwd"]),
        (["cpu", "--shape", "A"], ["--shape is no option of cpu"]),
        (["decode", "--scaling"], ["--scaling is no option of decode"]),
        (["decode", "--tokens", "0"], ["--tokens", "at least 1", "0"]),
        (["decode", "--tokens", "few"], ["--tokens", "few"]),
        (["step", "--rounds", "-1"], ["--rounds", "-1"]),
        (["step", "--threads", "-1"], ["--threads", "-1"]),
        (["step", "--checkpointed", "some"], ["--checkpointed", "some"]),
        (["step", "--ours", "--package", "liger"], ["--ours", "--package"]),
        (["kernels", "--device", "cuda:99"], ["--device cuda:99", "CUDA devices"]),
        (["kernels", "--device", "abacus"], ["--device", "abacus"]),
    ],
)
def test_bad_options(arguments: list[str], words: list[str], capsys: Capture) -> None:
    message = error_of(capsys, "bench", *arguments, "--quick")
    for word in words:
        assert word in message


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file", tmp_path / "file" / "out", Path("/proc/results")):
        message = error_of(capsys, "bench", "step", "--quick", "--out", str(place))
        assert f"--out: cannot write to {place}" in message


@pytest.mark.parametrize("schema", [0, harness.SCHEMA + 1, None])
def test_another_schema(schema: int | None, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "cpu-step.json"
    path.write_text(json.dumps({"schema": schema, "suite": "step", "rows": []}))
    assert f"{path}: schema {schema}, expected {harness.SCHEMA}" in error_of(
        capsys, "report", "--results", str(tmp_path)
    )
    # It is not overwritten by a run that would keep its rows.
    some = ("bench", "step", "--shape", "narrow", "--device", "cpu", "--out", str(tmp_path))
    assert "schema" in error_of(capsys, *some)


def test_bad_results(tmp_path: Path, capsys: Capture) -> None:
    assert "is no folder" in error_of(capsys, "report", "--results", str(tmp_path / "none"))
    assert "no result files" in error_of(capsys, "report", "--results", str(tmp_path))
    (tmp_path / "quick").mkdir()
    message = error_of(capsys, "report", "--results", str(tmp_path))
    assert f"those of a quick run are in {tmp_path}/quick" in message
    (tmp_path / "cpu.json").write_text("{")
    assert "cpu.json: cannot be read" in error_of(capsys, "report", "--results", str(tmp_path))
    (tmp_path / "cpu.json").write_text("[]")
    assert "cpu.json: cannot be read" in error_of(capsys, "report", "--results", str(tmp_path))
    (tmp_path / "cpu.json").write_text('{"rows": "none"}')
    assert "not a result file" in error_of(capsys, "report", "--results", str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"suite": None}, "has no suite"),
        ({"device": None}, "has no device"),
        ({"driver": 5}, "has no driver"),
        ({"commit": None}, "has no commit"),
        ({"date": None}, "has no date"),
        ({"versions": {}}, "which PyTorch"),
        ({"rows": [1]}, "a row is no object"),
        ({"copy_tb_s": None}, "the table of kernels cannot be made"),
        ({"rows": [{"package": harness.OURS, "case": "A"}]}, "a row lacks 'shape'"),
    ],
)
def test_results_that_lack_something(
    changes: dict[str, Any], words: str, tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "h100-kernels.json"
    document = load(RESULTS / path.name) | changes
    path.write_text(json.dumps(document))
    message = error_of(capsys, "report", "--results", str(tmp_path))
    assert str(path) in message
    assert words in message


def test_a_row_without_its_percent_is_named(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "h100-kernels.json"
    document = load(RESULTS / path.name)
    del document["rows"][3]["percent_of_copy"]
    path.write_text(json.dumps(document))
    message = error_of(capsys, "report", "--results", str(tmp_path))
    assert f"{path}: the table of kernels cannot be made: a row lacks 'percent_of_copy'" in message


def test_a_picture_that_cannot_be_written(tmp_path: Path, capsys: Capture) -> None:
    shutil.copy(RESULTS / "h100-decode.json", tmp_path)
    (tmp_path / "h100-decode-decode.png").mkdir()
    message = error_of(capsys, "report", "--results", str(tmp_path))
    assert f"cannot write {tmp_path / 'h100-decode-decode.png'}" in message


def test_every_suite_has_its_table() -> None:
    assert {suite for suite, _, _ in tables.TABLES.values()} > {"kernels", "step", "decode", "cpu"}
    assert set(step.SHAPES) == set(step.ON_CPU) == set(step.SMALL)
