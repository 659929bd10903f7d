"""Errors of a tensor against its double-precision counterpart."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Errors:
    """What a row of the table says. None where it cannot be said: the tensor is not finite."""

    rel_l2: float | None  # |ours - exact| / |exact|; 0 where both are zero
    max_ulp: float | None  # largest |ours - exact|, in units in the last place (see `ulp_of`)
    cosine: float | None  # <ours, exact> / (|ours| |exact|); 1 where both are zero
    bias: float | None  # mean(ours - exact) / rms(exact): signed, 0 for rounding to nearest
    gain: float | None  # <ours - exact, exact> / |exact|^2: below 0 where values shrink
    not_finite: float  # share of elements that are infinite or not a number


def measure(ours: Tensor, exact: Tensor, storage: torch.dtype) -> Errors:
    """Errors of `ours`, any dtype, against `exact` in float64, with ulps of `storage`.

    Raises:
        ValueError: the shapes differ.
    """
    if ours.shape != exact.shape:
        raise ValueError(
            f"measure: ours has shape {list(ours.shape)}, expected {list(exact.shape)} like exact"
        )
    a, b = ours.detach().cpu().double(), exact.detach().cpu().double()
    finite = a.isfinite()
    if not finite.all():
        return Errors(None, None, None, None, None, 1 - finite.double().mean().item())
    difference = a - b
    error, size, own = (t.square().sum().sqrt().item() for t in (difference, b, a))
    if size == 0:
        relative = None if error else 0.0
        cosine = None if error else 1.0
        return Errors(relative, 0.0 if not error else None, cosine, 0.0 if not error else None,
                      0.0 if not error else None, 0.0)  # fmt: skip
    rms = size / math.sqrt(b.numel())
    return Errors(
        rel_l2=error / size,
        max_ulp=(difference.abs() / ulp_of(b, storage)).max().item(),
        cosine=((a * b).sum() / (own * size)).item() if own else 0.0,
        bias=difference.mean().item() / rms,
        gain=((difference * b).sum() / size**2).item(),
        not_finite=0.0,
    )


def ulp_of(exact: Tensor, storage: torch.dtype) -> Tensor:
    """A unit in the last place of `storage` at each value of `exact` [..., D].

    Values below the root mean square of their row count as that large: a value that is small
    because its terms cancel is no better than its terms.
    """
    rows = exact.square().mean(-1, keepdim=True).sqrt()
    size = torch.maximum(exact.abs(), rows).clamp_min(torch.finfo(torch.float64).tiny)
    _, exponent = torch.frexp(size)  # size = m * 2^exponent with 0.5 <= m < 1
    return torch.ldexp(torch.full_like(size, torch.finfo(storage).eps), exponent - 1)
