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
from typing import NamedTuple

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

    Gradients do not flow into either: in training, a stream with ``block_storage`` hands the
    gradient of the values to whatever they were made of.
    """

    values: Tensor  #: [..., D] float16 or float8_e4m3fn
    scale: Tensor  #: [..., 1] or [..., ceil(D / 128)] uint8: the bits of float8_e8m0fnu

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What they stand for, [..., D]: exact in float32, for ``float8`` in bfloat16 too."""
        factor = self.scale.view(torch.float8_e8m0fnu).float()
        if self.scale.shape[-1] > 1:
            factor = factor.repeat_interleave(SCALE_GROUP, -1)[..., : self.values.shape[-1]]
        return (self.values.float() * factor).to(dtype)


def quantize(
    terms: Tensor | Sequence[Tensor], storage: str = "float8", *, by_group: bool | None = None
) -> QuantizedSource:
    """A value, or a float32 sum of up to four, in a storage mode.

    For each token, or each group of 128 columns, with amax the largest absolute value::

        float16   scale = the power of two with  2^14 <= amax / scale < 2^15
        float8    scale = the smallest power of two with  amax / scale <= 448
        number    = value / scale, rounded to nearest even

    A NaN or an Inf makes the scale NaN: nothing is clipped silently.

    Args:
        terms: 1 to 4 values [..., D] of one shape: float32, bfloat16, float16, mixed.
        storage: ``"float8"`` or ``"float16"``.
        by_group: a scale for each 128 columns, or one for each token; by default groups for
            ``"float8"`` and tokens for ``"float16"``.

    Returns:
        QuantizedSource: values [..., D], scale [..., 1] or [..., ceil(D / 128)].

    Raises:
        ValueError, TypeError: naming the argument, its shape or dtype and what was expected.
    """
    op = "quantize"
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
    result = empty(first.shape, check_mode(op, "storage", storage), first.device, by_group)
    torch.ops.flash_attn_res.quantize_into([term.detach() for term in given], *result)
    return result


def empty(
    shape: Sequence[int], storage: str, device: torch.device, by_group: bool | None = None
) -> QuantizedSource:
    """Memory for a value [..., D] in a storage mode."""
    groups = storage == "float8" if by_group is None else by_group
    columns = -(-shape[-1] // SCALE_GROUP) if groups else 1
    return QuantizedSource(
        torch.empty(shape, dtype=_MODES[storage], device=device),
        torch.empty((*shape[:-1], columns), dtype=torch.uint8, device=device),
    )


def check_mode(op: str, name: str, given: object) -> str:
    """The name of a storage mode.

    Raises:
        ValueError: it is none.
    """
    if given not in _MODES:
        raise ValueError(f"{op}: {name} is {given!r}, expected one of {MODES}")
    return str(given)
