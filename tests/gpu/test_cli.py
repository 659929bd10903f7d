"""The commands on the GPU: doctor, and a model that is trained, sampled and looked into."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from flash_attn_res.cli import doctor, main, served

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What doctor says; once, since it runs every operation under the profiler."""
    return doctor.examine()


def test_doctor_finds_everything_right(found: dict[str, Any]) -> None:
    assert len(found["gpus"]) == torch.cuda.device_count()
    checks = [check for check in found["checks"] if check["device"].startswith("cuda")]
    assert len(checks) == 3 * len(found["gpus"])
    for check in found["checks"]:
        assert check["error"] is None, check
    json.dumps(found)
    text = "\n".join(doctor._lines(found))
    assert "kernels on GPU 0, as they ran:" in text
    assert "k3_site_fwd" in text


def test_doctor_names_the_kernels_of_every_case(found: dict[str, Any]) -> None:
    entries = found["gpus"][0]["kernels"]
    assert len(entries) == len(served.CASES) * len(served.SHAPES)
    for entry in entries:
        assert entry["kernels"], entry
    if torch.cuda.get_device_capability(0) != (9, 0):
        return
    hopper = {
        (entry["op"], entry["dtype"])
        for entry in entries
        if any(name.startswith("hopper::") for name in entry["kernels"])
    }
    assert hopper >= {
        *(("phase1_fwd", dtype) for dtype in ("bfloat16", "float16", *served.STORED)),
        *(("phase1_bwd", dtype) for dtype in ("bfloat16", *served.STORED)),
        *((f"{op}_bwd", "bfloat16") for op in ("oneshot", "oneshot_norm", "merge", "advance")),
    }
    assert not {dtype for _, dtype in hopper} & {"float32"}
    # A fast path that is not taken has its reason.
    for entry in entries:
        in_registers = entry["kernels"] in (["read_rows"], ["read_ahead"])
        assert not (in_registers and entry["note"]), entry
        if (entry["op"], entry["dtype"]) not in hopper and not in_registers:
            assert entry["note"], entry


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a quick run of all variants."""
    for name in ("matplotlib", "rich", "safetensors"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("cli")
    text = folder / "text"
    text.mkdir()
    for index in range(12):
        lines = [f"def f{index}_{line}(x):\n    return x + {line * index}" for line in range(80)]
        (text / f"{index}.py").write_text("\n".join(lines))
    place = ["--out", str(folder), "--name", "quick", "--device", "cuda"]
    assert main(["train", "--quick", "--text", str(text), *place]) == 0
    return folder / "quick"


def test_train(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["machine"]["device_type"] == "cuda"
    assert list(summary["variants"]) == ["plain", "block", "full"]
    for entry in summary["variants"].values():
        first, last = entry["validation"][0][1], entry["validation"][-1][1]
        assert math.isfinite(last)
        assert last < first - 1
        assert entry["memory"]["peak_bytes"] > 0
    assert (run / "depth_attention.png").read_bytes().startswith(b"\x89PNG")


def test_resumed_with_nothing_left_to_do(run: Path) -> None:
    before = json.loads((run / "summary.json").read_text())["variants"]["block"]["train_loss"]
    place = ["--out", str(run.parent), "--name", run.name, "--device", "cuda"]
    assert main(["train", "--resume", *place]) == 0
    after = json.loads((run / "summary.json").read_text())["variants"]["block"]["train_loss"]
    assert after == before


@pytest.mark.parametrize("variant", ["plain", "block", "full"])
def test_sample(variant: str, run: Path, capsys: Capture) -> None:
    arguments = ["sample", str(run), "--variant", variant, "--prompt", "def ", "--device", "cuda"]
    texts = []
    for _ in range(2):
        capsys.readouterr()
        assert main([*arguments, "--length", "50"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("def ")
    assert texts[0] == texts[1]


def test_inspect(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "depth"
    text = ["--text", str(run.parent / "text")]
    arguments = ["inspect", str(run), "--batches", "2", "--out", str(out), *text]
    reports = {}
    for device in ("cuda", "cpu"):
        assert main([*arguments, "--device", device]) == 0
        reports[device] = json.loads((out / "depth.json").read_text())
    on_gpu, on_cpu = (reports[device]["networks"][0]["sites"] for device in ("cuda", "cpu"))
    for site, expected in zip(on_gpu, on_cpu, strict=True):
        assert sum(site["mean"]) == pytest.approx(1, abs=1e-5)
        assert site["mean"] == pytest.approx(expected["mean"], abs=1e-2)


def test_out_of_memory_is_one_line(tmp_path: Path, run: Path, capsys: Capture) -> None:
    text = ["--text", str(run.parent / "text")]
    arguments = ["train", "--quick", "--out", str(tmp_path), "--device", "cuda", *text]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-3)  # less than the logits of 8192 sequences
    try:
        capsys.readouterr()
        assert main([*arguments, "--variants", "plain", "--batch", "8192"]) == 1
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    error = capsys.readouterr().err
    assert error.startswith("flash-attn-res: error: out of memory with --batch 8192")
    assert error.count("\n") == 1
