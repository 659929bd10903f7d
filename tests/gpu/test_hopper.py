"""Both ways through phase 1 on the same numbers: the Hopper kernels and the general ones.

The Hopper kernels take rows that are aligned to 16 bytes; the same values in misaligned rows go to
the general kernels. On other GPUs both runs are general, and must agree all the same.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import flash_attn_res  # noqa: F401  registers the operators

OPS = torch.ops.flash_attn_res
EPS = 1e-6

# N, S, T, D: every tile of sources (8, 16) and queries (8, 16, 24) and both sides of its edge, one
# to eight CTAs a token, a token count that is no multiple of the batch, one token, and enough of
# them to go round all rings several times, with and without the window.
SHAPES = [
    (4, 8, 133, 2048),
    (8, 24, 97, 7168),
    (10, 6, 101, 2304),
    (1, 8, 65, 2048),
    (2, 3, 64, 1024),
    (3, 9, 77, 264),
    (7, 16, 50, 4096),
    (9, 17, 41, 5120),
    (16, 24, 33, 1024),
    (16, 1, 129, 2048),
    (5, 4, 1, 8192),
    (4, 12, 300, 72),
    (1, 1, 9001, 512),
    (2, 1, 4001, 2048),
    (1, 2, 1001, 7168),
    (4, 8, 3001, 2048),
    (4, 16, 3001, 1024),
    (10, 6, 1501, 2304),
    (8, 24, 211, 7168),
]


def misaligned(tensor: Tensor) -> Tensor:
    """The same values, each row one element past an aligned address."""
    *lead, dim = tensor.shape
    room = tensor.new_empty(*lead, dim + 8)
    view = room[..., 1 : 1 + dim]
    view.copy_(tensor)
    return view


def run(sources: list[Tensor], queries: Tensor, dout: Tensor, dlse: Tensor, gate: Tensor) -> dict:
    out, lse, logits, inv_rms = OPS.attend(sources, queries, 0.9, EPS, None)
    dsources, dqueries = OPS.attend_backward(
        dout, dlse, gate, sources, queries, lse, logits, inv_rms, 0.9, True, True
    )
    results = {"out": out, "lse": lse, "logits": logits, "inv_rms": inv_rms, "du": dqueries}
    return results | {f"dv {n}": dv for n, dv in enumerate(dsources)}


def relative(ours: Tensor, exact: Tensor) -> float:
    assert torch.isfinite(ours).all()
    return ((ours.cpu().double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "N{}-S{}-T{}-D{}".format(*s))
def test_both_paths_agree_with_the_reference(shape: tuple[int, int, int, int]) -> None:
    num_sources, num_queries, tokens, dim = shape
    value = {"device": "cuda", "dtype": torch.bfloat16}
    sources = [torch.randn(tokens, dim, **value) for _ in range(num_sources)]
    queries = torch.randn(num_queries, dim, device="cuda") / dim**0.5
    dout = torch.randn(num_queries, tokens, dim, **value)
    dlse = torch.randn(num_queries, tokens, device="cuda")
    gate = torch.rand(num_queries, tokens, device="cuda")

    exact = run(
        [s.cpu().double() for s in sources],
        *(t.cpu().double() for t in (queries, dout, dlse, gate)),
    )
    fast = run(sources, queries, dout, dlse, gate)
    general = run([misaligned(s) for s in sources], queries, misaligned(dout), dlse, gate)
    again = run(sources, queries, dout, dlse, gate)
    for name, reference in exact.items():
        # The reference's result rounded to storage: what a perfect kernel would be off by.
        rounding = relative(reference.to(fast[name].dtype).cpu(), reference)
        for path, results in (("fast", fast), ("general", general)):
            error = relative(results[name], reference)
            assert error <= 1.1 * rounding + 1e-5, (name, path, error, rounding)
        assert torch.equal(fast[name], again[name]), f"{name} differs between two runs"


def test_few_tokens_wait_for_what_comes_before() -> None:
    """The grid may begin before the one ahead has ended; it reads no results before that."""
    fresh = torch.randn(20, 3, 4, 7168, device="cuda", dtype=torch.bfloat16)
    sources = [torch.empty_like(fresh[0, 0]) for _ in range(3)]
    queries = torch.empty(2, 7168, device="cuda")
    for values in fresh:
        for source, value in zip(sources, values, strict=True):
            source.copy_(value)
        torch.mul(values[0, :2], 0.01, out=queries)
        hurried = OPS.attend(sources, queries, 0.9, EPS, None)
        torch.cuda.synchronize()
        for ours, exact in zip(hurried, OPS.attend(sources, queries, 0.9, EPS, None), strict=True):
            assert torch.equal(ours, exact)
