"""`doctor`: what it says, and that a wrong result or a failing device is found."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from flash_attn_res import ReadResult, __version__, read
from flash_attn_res.cli import doctor, main


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
