"""Storage modes of completed blocks: float16 or float8 numbers with powers of two as scales.

============  =========================  ===============================  =======================
mode          numbers                    scale (e8m0 bits, uint8)          bytes a value
============  =========================  ===============================  =======================
``float16``   float16, 11 bits           one a token                      2
``float8``    float8_e4m3fn, 4 bits      one for each 128 columns         1 + 1/128
============  =========================  ===============================  =======================

A value is ``scale * number``, exactly: in float32 for both, in bfloat16 for ``float8``. The kernels
multiply where they load, so that nobody writes the values out. ``docs/numerics.md`` has the error
bounds and what they do to a network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn_res import _check

SCALE_GROUP = 128
"""Columns that share a scale where a row has several."""

_MODES = {"float16": torch.float16, "float8": torch.float8_e4m3fn}

MODES = tuple(_MODES)
"""The names that ``storage`` may have."""


class QuantizedSource(NamedTuple):
    """Numbers with their scales, as :func:`quantize` makes them.

    Gradients do not flow into either, for they would have their dtypes. They flow through
    ``origin`` to what was quantised: the gradient of the values, taken where they are after
    rounding, goes to every term unchanged (straight through), in float32 until it gets there.
    """

    values: Tensor  #: [..., D] float16 or float8_e4m3fn
    scale: Tensor  #: [..., 1] or [..., ceil(D / 128)] uint8: the bits of float8_e8m0fnu
    origin: Tensor | None = None  #: [..., D] float32 without memory; None where no term needs it

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What they stand for, [..., D]: exact in float32, for ``float8`` in bfloat16 too.

        Its gradient is that of the values: see above.
        """
        factor = self.scale.view(torch.float8_e8m0fnu).float()
        if self.scale.shape[-1] > 1:
            factor = factor.repeat_interleave(SCALE_GROUP, -1)[..., : self.values.shape[-1]]
        value = (self.values.float() * factor).to(dtype)
        if self.origin is None:
            return value
        through: Tensor = _Through.apply(value, self.origin)
        return through


class _Through(torch.autograd.Function):
    """A value whose gradient goes to an origin."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, origin: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient.float()


def quantize(
    terms: Tensor | Sequence[Tensor], storage: str = "float8", *, by_group: bool | None = None
) -> QuantizedSource:
    """A value, or a float32 sum of up to four, in a storage mode.

    For each token, or each group of 128 columns, with amax the largest absolute value::

        float16   scale = the power of two with  2^14 <= amax / scale < 2^15
        float8    scale = the smallest power of two with  amax / scale <= 448
        number    = value / scale, rounded to nearest even

    A NaN or an Inf makes the scale NaN: nothing is clipped silently. In the backward the rounding
    is the identity: each term gets the gradient of the values.

    Args:
        terms: 1 to 4 values [..., D] of one shape: float32, bfloat16, float16, mixed.
        storage: ``"float8"`` or ``"float16"``.
        by_group: a scale for each 128 columns, or one for each token; by default groups for
            ``"float8"`` and tokens for ``"float16"``.

    Returns:
        QuantizedSource: values [..., D], scale [..., 1] or [..., ceil(D / 128)]; origin where a
        term requires a gradient.

    Raises:
        ValueError, TypeError: naming the argument, its shape or dtype and what was expected.
        RuntimeError: a transform of ``torch.func`` is active.
    """
    op = "quantize"
    _check.no_transform(op)
    given = [terms] if isinstance(terms, Tensor) else list(terms)
    if not 1 <= len(given) <= _check.MAX_QUANTIZE_TERMS:
        raise ValueError(
            f"{op}: terms has {len(given)} items, expected 1 to {_check.MAX_QUANTIZE_TERMS}"
        )
    first = _check.leading(op, "terms[0]", given[0])
    for i, term in enumerate(given):
        _check.value(op, f"terms[{i}]", term, "terms[0]", first)
        if term.dtype == torch.float64:
            raise TypeError(
                f"{op}: terms[{i}] is torch.float64, expected torch.float32, torch.bfloat16 or "
                "torch.float16"
            )
    check_mode(op, "storage", storage)
    groups = storage == "float8" if by_group is None else by_group
    values, scale, origin = torch.ops.flash_attn_res.quantize(given, storage, groups)
    return QuantizedSource(values, scale, origin if origin.requires_grad else None)


def empty(
    shape: Sequence[int], storage: str, device: torch.device, by_group: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Memory for a value [..., D] in a storage mode: numbers and scales."""
    groups = storage == "float8" if by_group is None else by_group
    columns = -(-shape[-1] // SCALE_GROUP) if groups else 1
    return (
        torch.empty(shape, dtype=_MODES[storage], device=device),
        torch.empty((*shape[:-1], columns), dtype=torch.uint8, device=device),
    )


def check_source(op: str, name: str, source: QuantizedSource) -> Tensor:
    """The numbers of a quantised source [..., D], checked with their scales."""
    values = _check.tensor(op, f"{name}.values", source.values)
    scale = _check.tensor(op, f"{name}.scale", source.scale)
    columns = 1 if scale.shape[-1:] == (1,) else -(-values.shape[-1] // SCALE_GROUP)
    if scale.shape != (*values.shape[:-1], columns):
        raise ValueError(
            f"{op}: {name}.scale has shape {_check.shape_text(scale)}, expected "
            f"{[*values.shape[:-1], 1]} or "
            f"{[*values.shape[:-1], -(-values.shape[-1] // SCALE_GROUP)]}"
        )
    if scale.dtype != torch.uint8:
        raise TypeError(
            f"{op}: {name}.scale is {scale.dtype}, expected torch.uint8, the bits of float8_e8m0fnu"
        )
    if values.dtype not in _MODES.values():
        raise TypeError(
            f"{op}: {name}.values is {values.dtype}, expected torch.float16 or torch.float8_e4m3fn"
        )
    _check.same_device(op, f"{name}.scale", scale, f"{name}.values", values)
    return values


def check_mode(op: str, name: str, given: object) -> str:
    """The name of a storage mode.

    Raises:
        ValueError: it is none.
    """
    if given not in _MODES:
        raise ValueError(f"{op}: {name} is {given!r}, expected one of {MODES}")
    return str(given)
