"""`bench` and `report`: a quick run on the CPU, result files, tables, and every bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flash_attn_res.cli import main
from flash_attn_res.cli.accuracy import peers
from flash_attn_res.cli.bench import decode, harness, kernels, report, step, tables
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
    before = load(tmp_path / "cpu-decode.json")["rows"]
    bench("decode", "--out", tmp_path, "--tokens", 3, "--op", "advance", "--ours", "--rounds", 1)
    after = load(tmp_path / "cpu-decode.json")["rows"]
    assert list(map(harness.identity, after)) == list(map(harness.identity, before))
    changed = [a for a, b in zip(after, before, strict=True) if a != b]
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
    capsys.readouterr()
    assert main([*arguments, "--check"]) == 1
    assert "run flash-attn-res report" in capsys.readouterr().out


def test_pages_of_a_checkout(tmp_path: Path, capsys: Capture) -> None:
    """Stale tables are found, then filled; a quick run is no source for them."""
    results = tmp_path / "benchmarks" / "results"
    shutil.copytree(RESULTS, results)
    (tmp_path / "docs").mkdir()
    readme = tmp_path / "README.md"
    readme.write_text("<!-- generated: kernels -->\nold\n<!-- end of generated: kernels -->\n")
    arguments = ["report", "--results", str(results)]
    assert main([*arguments, "--check"]) == 1
    assert "README.md differ from the results: run make report" in capsys.readouterr().out
    assert main(arguments) == 0
    assert "| phase 1 forward |" in readme.read_text()
    assert main([*arguments, "--check"]) == 0
    found = report.Results(results, report.load_all(results))
    for name, plot in PLOTS.items():
        drawn = any(plot.select(document) for document in found.of(plot.suite))
        assert (tmp_path / "docs" / "images" / f"{name}.png").exists() == drawn
    for path in results.glob("*-kernels.json"):
        path.write_text(json.dumps(load(path) | {"quick": True}))
    assert tables.missing("flash-attn-res bench kernels") in report.block(
        "kernels", report.Results(results, report.load_all(results))
    )


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
    (tmp_path / "cpu.json").write_text("{")
    assert "cpu.json: cannot be read" in error_of(capsys, "report", "--results", str(tmp_path))
    (tmp_path / "cpu.json").write_text('{"rows": "none"}')
    assert "not a result file" in error_of(capsys, "report", "--results", str(tmp_path))


def test_every_suite_has_its_table() -> None:
    assert {suite for suite, _, _ in tables.TABLES.values()} > {"kernels", "step", "decode", "cpu"}
    assert set(step.SHAPES) == set(step.SMALL)
