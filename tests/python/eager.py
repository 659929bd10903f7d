"""The formulas in plain eager PyTorch, in the dtype of the inputs, and the rule that tests use.

This is what a user would write without the library, so its error on the same inputs is the measure
of what an error may be.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def key_of(value: Tensor, width: int) -> Tensor:
    return value[..., value.shape[-1] - width :]


def rms_norm(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def attend(
    sources: Sequence[Tensor], queries: Tensor, scale: float = 1.0, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """out [S, ..., D] and lse [S, ...] of sources N x [..., D] and queries [S, R]."""
    v = torch.stack(list(sources))  # (N,...,D)
    k = rms_norm(key_of(v, queries.shape[-1]), eps)  # (N,...,R)
    logits = scale * torch.einsum("n...r,sr->sn...", k, queries.to(v.dtype))  # (S,N,...)
    p = logits.softmax(1)
    return torch.einsum("sn...,n...d->s...d", p, v), logits.logsumexp(1)


def read(
    query: Tensor | None,
    *,
    phase1: tuple[Tensor, Tensor] | None = None,
    sources: Sequence[Tensor] = (),
    partial: Tensor | None = None,
    updates: Sequence[Tensor] = (),
    scale: float = 1.0,
    eps: float = 1e-6,
    norm: bool = False,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """x, the new partial sum and the mixture of one site."""
    for update in updates:
        partial = update if partial is None else partial + update.to(partial.dtype)
    terms = [*([] if phase1 is None else [phase1[0]]), *sources]
    terms += [] if partial is None else [partial]
    dtype = terms[0].dtype
    z = torch.stack([term.to(dtype) for term in terms])  # (K,...,D)
    if len(terms) == 1:
        h = z[0]
    else:
        assert query is not None
        k = rms_norm(key_of(z, query.shape[-1]), eps)
        logits = scale * torch.einsum("k...r,r->k...", k, query.to(dtype))
        if phase1 is not None:
            logits = torch.cat([phase1[1].to(dtype)[None], logits[1:]])
        h = torch.einsum("k...,k...d->...d", logits.softmax(0), z)
    x = rms_norm(h, norm_eps) if norm else h
    if norm_weight is not None:
        x = x * norm_weight.to(dtype)
    return x, partial, h


def assert_close_enough(
    name: str,
    ours: Tensor,
    exact: Tensor,
    eager: Tensor,
    ulps: float = 3.0,
    magnitude: float = 0.0,
) -> None:
    """err(ours) <= 2 err(eager) + a few ulp, and finite.

    Args:
        name: of the tensor, for the message.
        ours: the result under test, in its storage dtype.
        exact: the double-precision reference on identical inputs.
        eager: plain eager PyTorch in the same dtype.
        ulps: allowance in units in the last place of the largest value.
        magnitude: of the terms whose sum the result is. Where they cancel (the gradient of a
            softmax is a difference), float32 sums are good to a few float32 ulp of the terms.
    """
    assert ours.shape == exact.shape == eager.shape, (name, ours.shape, exact.shape, eager.shape)
    if ours.numel() == 0:
        return
    assert torch.isfinite(ours).all(), f"{name} is not finite"
    error = (ours.double() - exact).abs().max().item()
    # Plain float16 overflows now and then; that is no licence for us.
    eager_errors = (eager.double() - exact).abs()
    eager_error = eager_errors.where(eager_errors.isfinite(), 0).max().item()
    ulp = torch.finfo(ours.dtype).eps * exact.abs().max().item()
    allowed = 2 * eager_error + ulps * ulp + ulps * torch.finfo(torch.float32).eps * magnitude
    assert error <= allowed, (
        f"{name}: error {error:.3e} exceeds {allowed:.3e} "
        f"(eager's error {eager_error:.3e}, one ulp {ulp:.3e})"
    )
