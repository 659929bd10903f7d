"""`doctor`: what it says, and that a wrong result or a failing device is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from flash_attn_res import ReadResult, __version__, read
from flash_attn_res.cli import doctor, main, served


def test_right_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["schema"], found["version"]) == (1, __version__)
    assert found["torch"] == torch.__version__
    checks = [check for check in found["checks"] if check["device"] == "cpu"]
    assert [check["dtype"] for check in checks] == ["float32", "float16", "bfloat16"]
    assert all(0 <= check["relative_error"] < 0.02 for check in checks)


def test_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ATTN_RES_CPU_ISA", "portable")
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"flash-attn-res {__version__}, " in text
    assert "note: FLASH_ATTN_RES_CPU_ISA=portable chooses the CPU kernels" in text
    assert f"every operation, shape and dtype: {torch.ops.flash_attn_res.cpu_kernels()}" in text


@pytest.mark.parametrize("isa", ["portable", "nonsense"])
def test_the_kernels_of_the_cpu(isa: str) -> None:
    """In a process of its own: the choice is made once."""
    command = [sys.executable, "-m", "flash_attn_res.cli", "doctor", "--json"]
    environment = {**os.environ, "FLASH_ATTN_RES_CPU_ISA": isa}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    kernels = json.loads(done.stdout)["cpu"]["kernels"]
    assert kernels in ("portable", "neon", "avx2", "avx512", "avx512_bf16")
    assert isa == "nonsense" or kernels == isa


def test_the_kernels_of_a_gpu() -> None:
    """Names as the profiler gives them, and why no kernel of Hopper ran."""
    hopper = "void flash_attn_res::cuda::hopper::attend_kernel<1, 8, 2>(AttendParams)"
    general = "void flash_attn_res::cuda::attend_mix_kernel<__nv_bfloat16>(AttendMixParams)"
    assert served.names_in([hopper, "Memset (Device)", general]) == ["hopper::attend", "attend_mix"]

    def why(op: str, dtype: str, minor: int, *kernels: str) -> str:
        return served.note(op, dtype, (9, minor), list(kernels)) or ""

    assert why("phase1_fwd", "bfloat16", 0, "hopper::attend") == ""
    assert why("oneshot_norm_fwd", "bfloat16", 1, "read_rows") == ""
    assert "this GPU has 9.1" in why("phase1_fwd", "bfloat16", 1, "attend_mix")
    assert "float8 and float16 ones with" in why("phase1_fwd", "float32", 0, "attend_mix")
    assert "gradients in bfloat16" in why("phase1_bwd", "float16", 0, "attend_dsources")
    assert "for this shape" in why("phase1_fwd", "float16", 0, "attend_mix")
    assert "for this shape" in why("phase1_bwd", "float8 blocks", 0, "attend_dsources")
    assert why("advance_bwd", "float32", 0, "read_backward_staged").endswith("16-bit values")
    assert "for this shape" in why("advance_bwd", "float16", 0, "read_backward_staged")
    assert "saw no kernel" in why("advance_bwd", "float16", 0)
    entries = [
        {"op": "advance_fwd", "shape": shape, "dtype": "float16", "kernels": ["read_rows"]}
        | {"note": None}
        for shape in served.SHAPES
    ]
    assert served.lines(entries) == ["  advance_fwd       float16        all shapes: read_rows"]


def test_every_operation_that_is_listed_runs() -> None:
    for op, dtype in served.CASES:
        run = served.prepared(op, {"N": 3, "S": 2, "T": 5, "D": 256}, dtype, torch.device("cpu"))
        run()
        run()
    listed = {op.rpartition("_")[0] for op, _ in served.CASES}
    assert listed == {"phase1", "oneshot", "oneshot_norm", "merge", "advance", "k3_site"}


def test_wrong_result_is_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def off(*given: Any, **options: Any) -> ReadResult:
        result = read(*given, **options)
        return ReadResult(result.x * 1.05, *list(result)[1:])

    monkeypatch.setattr(doctor, "read", off)
    assert main(["doctor"]) == 1
    assert "relative error 5.0e-02, expected" in capsys.readouterr().out


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_result_that_is_not_finite_is_found(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any, **options: Any) -> ReadResult:
        result = read(*given, **options)
        return ReadResult(result.x * value, *list(result)[1:])

    monkeypatch.setattr(doctor, "read", broken)
    for check in doctor.examine()["checks"]:
        assert check["error"] == "the result or a gradient is not finite"


def test_gradient_that_is_not_finite_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dx: torch.Tensor) -> torch.Tensor:
            return dx * float("nan")

    def broken(*given: Any, sources: list[torch.Tensor], **options: Any) -> ReadResult:
        return read(*given, sources=[*sources[:2], Broken.apply(sources[2])], **options)

    monkeypatch.setattr(doctor, "read", broken)
    for check in doctor.examine()["checks"]:
        assert check["error"] == "the result or a gradient is not finite"


def test_error_is_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*given: Any, **options: Any) -> ReadResult:
        raise RuntimeError("no kernel here")

    monkeypatch.setattr(doctor, "read", failing)
    assert main(["doctor"]) == 1
    assert "no kernel here" in capsys.readouterr().out
