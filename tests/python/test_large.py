"""Tensors whose elements a 32-bit number cannot count, on the CPU.

Memory is mapped without being committed: only pages that are written take any. So rows may lie
gigabytes apart, and a dense input that is zero but for a few rows costs those rows.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from flash_attn_res import attend, read

OPS = torch.ops.flash_attn_res
MAP_FIXED = 0x10
MAP_NORESERVE = 0x4000  # mmap has the name since Python 3.13
FAR = 2**30 + 3  # between rows: the third is 2^31 elements after the first, the fifth 2^32


def lazy_zeros(
    shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, dense: bool = False
) -> Tensor:
    last = sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    try:
        pages = mmap.mmap(-1, (last + 1) * dtype.itemsize, flags=flags)
    except (OSError, OverflowError) as error:
        pytest.skip(f"no {(last + 1) * dtype.itemsize / 2**30:.0f} GiB of address space: {error}")
    # A row far from others is to cost its own pages, not 2 MiB; filling them all is to be quick.
    pages.madvise(mmap.MADV_HUGEPAGE if dense else mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).as_strided(shape, stride)


def far(near: Tensor) -> Tensor:
    """The same values in rows (and, where packed, sources) far apart."""
    lead = near.shape[:-1]
    stride = [FAR * lead[i + 1 :].numel() for i in range(len(lead))]
    return lazy_zeros(near.shape, [*stride, 1], near.dtype).copy_(near)


def shared_zeros(shape: Sequence[int], dtype: torch.dtype, own: Sequence[int]) -> Tensor:
    """A dense tensor whose bytes share a little memory, but for the rows of ``own``.

    It is for results of which only those rows are looked at: others may overwrite each other.
    """
    result = lazy_zeros(shape, (shape[1], 1), dtype, dense=True)
    row_bytes = shape[1] * dtype.itemsize
    if row_bytes % mmap.PAGESIZE:
        pytest.skip(f"pages have {mmap.PAGESIZE} bytes, rows {row_bytes}")
    most = 4096  # rows a piece
    memory = os.memfd_create("rows")
    os.ftruncate(memory, most * row_bytes)
    remap = ctypes.CDLL(None, use_errno=True).mmap
    remap.restype = ctypes.c_void_p
    remap.argtypes = [*[ctypes.c_size_t] * 2, *[ctypes.c_int] * 3, ctypes.c_long]
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | MAP_FIXED
    for row, end in itertools.pairwise(sorted({-1, *own, shape[0]})):
        for begin in range(row + 1, end, most):
            address = result.data_ptr() + begin * row_bytes
            size = min(most, end - begin) * row_bytes
            assert remap(address, size, protection, flags, memory, 0) == address
    os.close(memory)
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_rows_far_apart(dtype: torch.dtype, packed: bool) -> None:
    T, D, N, S = 5, 72, 3, 2
    sources = torch.randn(N, T, D).to(dtype)
    partial, update, phase1, dx = torch.randn(4, T, D).to(dtype).unbind()
    lse = torch.randn(T)
    queries, norm_weight = torch.randn(S, D) / 8, torch.rand(D) + 0.5
    douts = torch.randn(S, T, D).to(dtype)

    def compute(sources: Tensor, *values: Tensor) -> list[Tensor]:
        """Results of attend and read, and gradients of all values."""
        douts, dx, *values = values
        items = [sources] if packed else sources.unbind()
        leaves = [v.detach().requires_grad_() for v in (*items, *values, queries, norm_weight)]
        given, (partial, update, phase1), (u, g) = leaves[:-5], leaves[-5:-2], leaves[-2:]
        result = attend(given[0] if packed else given, u)
        site = read(
            u[0],
            phase1=(phase1, lse),
            sources=given[0] if packed else given,
            partial=partial,
            update=update,
            norm_weight=g,
            return_mix=True,
        )
        outputs = [result.out, result.lse, site.x, site.partial, site.mix]
        grads = torch.autograd.grad(
            [result.out, site.x, site.partial], leaves, [douts, dx, dx], allow_unused=False
        )
        return [*outputs, *grads]

    near = (sources, douts, dx, partial, update, phase1)
    for a, b in zip(compute(*map(far, near)), compute(*near), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_far_apart(dtype: torch.dtype) -> None:
    """What is written or added to: the operators of the tape and of inference."""
    T, D, N, S = 5, 72, 3, 2
    sources = list(torch.randn(N, T, D).to(dtype).unbind())
    partial, update, dx, dpartial = torch.randn(4, T, D).to(dtype).unbind()
    queries, norm_weight = torch.randn(S, D) / 8, torch.rand(D) + 0.5
    douts = torch.randn(S, T, D).to(dtype)
    dsources = list(torch.randn(N, T, D).to(dtype).unbind())

    def compute(place) -> list[Tensor]:
        out = torch.zeros(S, T, D, dtype=dtype)
        x, total = (place(torch.zeros(T, D, dtype=dtype)) for _ in range(2))
        lse = place(torch.zeros(S, T))
        logits, inv_rms = torch.zeros(T, S, N), place(torch.zeros(T, N))
        OPS.attend_into(sources, queries, 1.0, 1e-6, out, lse, logits, inv_rms, [])
        grads = [place(d) for d in dsources]
        dqueries = place(torch.zeros(S, D))
        OPS.attend_backward_into(
            *(douts, None, None, sources, queries, lse, logits, inv_rms, 1.0),
            *(grads, True, dqueries, False, []),
        )
        site_logits, site_inv_rms = (place(torch.zeros(T, N + 1)) for _ in range(2))
        mix_inv_rms = torch.zeros(T)
        OPS.read_into(
            *(None, None, sources, partial, update, queries[0], norm_weight, 1.0, 1e-6, True),
            *(1e-6, x, total, site_logits, site_inv_rms, mix_inv_rms, []),
        )
        total_grad = place(torch.zeros(T, D, dtype=dtype))
        dquery, dnorm_weight = torch.zeros(D), torch.zeros(D)
        site_grads = [place(d) for d in dsources]
        OPS.read_backward_into(
            *(dx, dpartial, None, sources, total, queries[0], norm_weight),
            *(site_logits, site_inv_rms, mix_inv_rms, 1.0, True, None, None, None),
            *(site_grads, True, total_grad, dquery, False, dnorm_weight, []),
        )
        made = [out, lse, logits, inv_rms, *grads, dqueries, x, total, *site_grads, total_grad]
        return [*made, dquery, dnorm_weight]

    for a, b in zip(compute(far), compute(torch.clone), strict=True):
        assert torch.equal(a, b)


def test_more_elements_than_32_bits_count() -> None:
    D = 2048
    T = 2**31 // D + 100
    # Rows that overlap: all different, and of no size.
    source = torch.randn(T + D - 1).bfloat16().unfold(0, D, 1)
    query = torch.randn(D) / 16
    rows = [0, 1, 2**30 // D, T // 2, 2**31 // D - 1, 2**31 // D, T - 1]

    def zeros(rows: int) -> Tensor:
        return lazy_zeros((rows, D), (D, 1), torch.bfloat16, dense=True)

    def mostly_zeros() -> Tensor:
        result = zeros(T)
        result[rows] = torch.randn(len(rows), D).bfloat16()
        return result

    partial, dx = mostly_zeros(), mostly_zeros()
    # Those of attend are [2, T - middle, D]: of the second query, they end beyond 2^31.
    middle = T // 2
    late = [row - middle for row in rows if row >= middle]
    results = shared_zeros(
        (T, D), torch.bfloat16, [*rows, *late, *(row + T - middle for row in late)]
    )

    def forward(source: Tensor, partial: Tensor, x: Tensor) -> list[Tensor]:
        logits, inv_rms = (torch.empty(len(x), 2) for _ in range(2))
        OPS.read_into(
            *(None, None, [source], partial, None, query, None, 1.0, 1e-6, False, 1e-6),
            *(x, None, logits, inv_rms, None, []),
        )
        return [logits, inv_rms]

    few = zeros(len(rows))
    saved = forward(source, partial, results)
    few_saved = forward(source[rows], partial[rows], few)
    assert results.numel() > 2**31
    assert few.isfinite().all()
    assert torch.equal(results[rows], few)

    def backward(
        dx: Tensor, source: Tensor, partial: Tensor, saved: list[Tensor], dpartial: Tensor
    ) -> Tensor:
        dquery = torch.empty(D)
        OPS.read_backward_into(
            *(dx, None, None, [source], partial, query, None, *saved, None, 1.0, False),
            *(None, None, None, [], False, dpartial, dquery, False, None, []),
        )
        return dquery

    dquery = backward(dx, source, partial, saved, results)
    few_dquery = backward(dx[rows], source[rows], partial[rows], few_saved, few)
    assert torch.equal(results[rows], few)
    # The other rows add zeros, but which rows are added up first depends on where they are.
    assert (dquery - few_dquery).abs().max() <= 1e-6 * few_dquery.abs().max()

    def attend_into(sources: list[Tensor], out: Tensor) -> None:
        tokens = out.shape[1]
        lse, logits, inv_rms = (
            torch.empty(2, tokens),
            torch.empty(tokens, 2, 2),
            torch.empty(tokens, 2),
        )
        queries = torch.stack([query, -query])
        OPS.attend_into(sources, queries, 1.0, 1e-6, out, lse, logits, inv_rms, [])

    tail = slice(middle, T)
    out = results[: 2 * (T - middle)].view(2, -1, D)
    attend_into([source[tail], partial[tail]], out)
    few = zeros(2 * len(late)).view(2, -1, D)
    attend_into([source[tail][late], partial[tail][late]], few)
    assert torch.equal(out[:, late], few)
