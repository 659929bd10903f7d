"""How a value [..., D] travels between stages: as it is, or in a format of fewer bytes.

A payload turns a value into a tuple of floating-point tensors and back. Gradients travel in the
same format: the rounding of a format counts as the identity in the backward.

``Scaled`` is the format of fewer bytes: each token has a scale s = max |v| / top in float32, and
v / s is stored in float16 (top = 65504) or float8_e4m3fn (top = 448). float8 travels as pairs of
bytes that bfloat16 tensors hold: nothing computes with them, and every backend carries them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function


class Payload(Protocol):
    """A format for values that travel."""

    name: str  #: all stages of a pipeline must agree on it

    def encode(self, value: Tensor) -> tuple[Tensor, ...]:
        """[..., D] to floating-point tensors whose shapes depend on that of the value alone."""

    def decode(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Back to [..., D] of the stream's dtype."""


class Plain:
    """Values travel as they are."""

    name = "plain"

    def encode(self, value: Tensor) -> tuple[Tensor, ...]:
        """The value itself."""
        return (value,)

    def decode(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The value itself."""
        return tensors[0]


class Scaled:
    """A scale for each token, and values of 2 bytes (float16) or 1 byte (float8_e4m3fn).

    Args:
        dtype: torch.float16 or torch.float8_e4m3fn; the width D must be even for the latter.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        if dtype not in (torch.float16, torch.float8_e4m3fn):
            raise TypeError(
                f"Scaled: dtype is {dtype}, expected torch.float16 or torch.float8_e4m3fn"
            )
        self.dtype, self.top = dtype, torch.finfo(dtype).max
        self.name = f"scaled {str(dtype).removeprefix('torch.')}"

    def encode(self, value: Tensor) -> tuple[Tensor, ...]:
        """(v / s in the format, s [...] float32)."""
        if self.dtype.itemsize == 1 and value.shape[-1] % 2:
            raise ValueError(
                f"{self.name}: value has shape {list(value.shape)}, expected an even width"
            )
        exact = value.float()
        scale = exact.abs().amax(-1) / self.top
        scale = torch.where(scale > 0, scale, 1.0)
        # Of a subnormal scale, the quotient may pass the format's largest value.
        stored = (exact / scale[..., None]).clamp(-self.top, self.top).to(self.dtype)
        if self.dtype.itemsize == 1:
            stored = stored.view(torch.bfloat16)
        return stored, scale

    def decode(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """V = s times what is stored."""
        stored, scale = tensors
        if self.dtype.itemsize == 1:
            stored = stored.view(self.dtype)
        return (stored.float() * scale[..., None]).to(dtype)


class _Encode(Function):
    """What a value travels as; the gradients that come back are in the same format."""

    @staticmethod
    def forward(ctx: Any, payload: Payload, value: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.payload, ctx.dtype = payload, value.dtype
        return payload.encode(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, Tensor | None]:
        given = [gradient for gradient in gradients if gradient is not None]
        if len(given) < len(gradients):
            return None, None
        return None, ctx.payload.decode(given, ctx.dtype)


class _Decode(Function):
    """A value from what it travelled as."""

    @staticmethod
    def forward(ctx: Any, payload: Payload, dtype: torch.dtype, *tensors: Tensor) -> Tensor:
        ctx.payload = payload
        return payload.decode(tensors, dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return None, None, *ctx.payload.encode(gradient)


def encode(payload: Payload, value: Tensor) -> tuple[Tensor, ...]:
    """``payload.encode``, through which gradients flow."""
    if isinstance(payload, Plain):
        return (value,)
    encoded: tuple[Tensor, ...] = _Encode.apply(payload, value)
    return encoded


def decode(payload: Payload, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """``payload.decode``, through which gradients flow."""
    if isinstance(payload, Plain):
        return tensors[0]
    decoded: Tensor = _Decode.apply(payload, dtype, *tensors)
    return decoded
