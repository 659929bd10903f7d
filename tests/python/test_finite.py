"""The opt-in check for overflow: where, which tensor, and whose fault."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from flash_attn_res import BlockAttnRes, attend, check_finite, read

LARGEST = 65504.0


def half(*shape: int, value: float) -> Tensor:
    return torch.full(shape, value, dtype=torch.float16)


def test_a_sum_that_overflows() -> None:
    partial, update = half(3, 8, value=40000.0), half(3, 8, value=1.0)
    update[1, 5] = 40000.0
    free = read(partial=partial, update=update)
    assert free.partial is not None
    assert free.partial[1, 5] == torch.inf  # never clipped
    with check_finite(), pytest.raises(FloatingPointError) as error:
        read(partial=partial, update=update)
    text = str(error.value)
    for word in ("read: partial", "float16", "[3, 8]", "1 of 24", "inf at [1, 5]", "overflowed"):
        assert word in text
    assert f"{LARGEST:g}" in text


def test_inputs_that_are_not_finite_already_are_named() -> None:
    sources = [half(2, 4, value=1.0), half(2, 4, value=1.0)]
    sources[1][0, 2] = torch.nan
    query = torch.ones(4)
    with check_finite(), pytest.raises(FloatingPointError, match=r"already: sources\[1\]$"):
        read(query, sources=sources)
    with check_finite(), pytest.raises(FloatingPointError, match=r"attend: .*sources\[1\]$"):
        attend(sources, query[None])


def test_finite_results_pass_and_it_ends_with_its_block() -> None:
    values = [torch.randn(5, 16).half().requires_grad_() for _ in range(3)]
    query = torch.randn(16)
    expected = read(query, sources=values).x
    with check_finite():
        with check_finite():
            pass
        x = read(query, sources=values).x
        attend(values, query[None]).out.sum().backward()
    assert torch.equal(x, expected)
    with pytest.raises(ZeroDivisionError), check_finite():
        raise ZeroDivisionError
    read(partial=half(2, 4, value=LARGEST), update=half(2, 4, value=LARGEST))  # unchecked again


@pytest.mark.parametrize("op", ["attend", "read"])
def test_a_gradient_that_overflows(op: str) -> None:
    sources = [torch.randn(2, 4).half().requires_grad_() for _ in range(2)]
    query = 1e4 * torch.ones(1, 4)

    def gradient() -> None:
        if op == "attend":
            out = attend(sources, query, eps=1e-3).out
        else:
            out = read(query[0], sources=sources, eps=1e-3).x
        out.backward(torch.full_like(out, 60000.0) * torch.randn(4).sign().half())

    query *= 0.0
    with check_finite():
        gradient()
    # Steep logits multiply the gradient of what is mixed.
    sources[1].data.copy_(-sources[0].data)
    query += 20.0
    sources[0].data.mul_(1e-3)
    sources[1].data.mul_(1e-3)
    with check_finite(), pytest.raises(FloatingPointError, match=rf"backward of {op}: gradient of"):
        gradient()


def network(output: float, at: int, functional: bool, block_size: int = 2) -> tuple[Tensor, Tensor]:
    """A stream of constant outputs, of which the one of sublayer `at` is large."""
    module = BlockAttnRes(6, 8, block_size)
    x = half(3, 8, value=1.0).requires_grad_()
    stream = module.start(x, functional=functional)
    for index in range(6):
        h = stream.read()
        stream.write(0 * h + (output if index == at else 1.0))
    return x, stream.finish()


@pytest.mark.parametrize("at", [1, 2, 3])
def test_the_site_of_a_stream(at: int) -> None:
    # Sublayers 2 and 3 form the second block; 1 ends the first.
    for functional in (False, True):
        network(LARGEST, at, functional)  # unchecked
    with check_finite(), pytest.raises(FloatingPointError) as error:
        network(LARGEST * 1.01 + 40, at, functional=False)
    assert "the sublayer's output" in str(error.value)  # was infinite when it came
    with check_finite():
        network(1000.0, at, functional=False)[1].sum().backward()


def test_the_sum_of_a_stream_overflows() -> None:
    def run(functional: bool, block_size: int) -> None:
        stream = BlockAttnRes(6, 8, block_size).start(half(3, 8, value=1.0), functional=functional)
        for _ in range(6):
            stream.write(0 * stream.read() + 40000.0)
        stream.finish()

    with check_finite():
        with pytest.raises(FloatingPointError, match=r"read of site 2: the partial sum .*here"):
            run(False, 6)
        with pytest.raises(
            FloatingPointError, match=r"(end of block 1|read of site 2).*sum .*here"
        ):
            run(False, 2)
        with pytest.raises(FloatingPointError, match=r"read: partial .*here"):
            run(True, 6)


def test_a_gradient_of_a_stream_overflows() -> None:
    _, y = network(1.0, 0, functional=False)
    with check_finite(), pytest.raises(FloatingPointError, match=r"backward of .*gradient"):
        y.backward(torch.full_like(y, torch.inf))


def test_compiled_code_is_refused() -> None:
    function = torch.compile(lambda v: read(sources=[v]).x, fullgraph=True, backend="eager")
    with check_finite(), pytest.raises(Exception, match="check_finite cannot look"):
        function(half(2, 4, value=1.0))


@pytest.mark.parametrize(("value", "code"), [("1", 3), ("0", 0), ("yes", 4)])
def test_the_environment_variable(value: str, code: int) -> None:
    program = (
        "import sys, torch\n"
        "try:\n"
        "    from flash_attn_res import read\n"
        "except ValueError as error:\n"
        "    sys.exit(4 if 'FLASH_ATTN_RES_CHECK_FINITE' in str(error) else 5)\n"
        "large = torch.full((2, 4), 60000.0, dtype=torch.float16)\n"
        "try:\n"
        "    read(partial=large, update=large)\n"
        "except FloatingPointError:\n"
        "    sys.exit(3)\n"
    )
    environment = os.environ | {"FLASH_ATTN_RES_CHECK_FINITE": value}
    result = subprocess.run([sys.executable, "-c", program], env=environment, check=False)
    assert result.returncode == code
