"""How a value [..., D] travels between stages: as it is, or in a format of fewer bytes.

A payload turns a value into a tuple of floating-point tensors and back. Gradients travel in the
same format: the rounding of a format counts as the identity in the backward.

``Scaled`` is the format of fewer bytes: each token has a scale s = max |v| / top in float32, and
v / s is stored in float16 (top = 65504) or float8_e4m3fn (top = 448). float8 travels as pairs of
bytes that bfloat16 tensors hold: nothing computes with them, and every backend carries them.

``Stored`` is the format of :mod:`flash_attn_res.storage`. Blocks that a stage stores in that mode
travel as they are stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from flash_attn_res import storage
from flash_attn_res.storage import SCALE_GROUP, QuantizedSource


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


class Stored:
    """Numbers and scales of a storage mode: powers of two, for a token or for 128 columns.

    Bytes a token: 2 D + 2 for ``"float16"``; D and one for each 128 columns, rounded up to an even
    number, for ``"float8"``, whose width D must be even. The embedding and running sums, which are
    not stored, travel as they are: a forward over a pipeline has the bits of one process whose
    ``block_storage`` is the same. Gradients are rounded to the mode.

    Args:
        mode: ``"float16"`` or ``"float8"``.
    """

    def __init__(self, mode: str) -> None:
        self.mode = storage.check_mode("Stored", "mode", mode)
        self.name = f"stored {mode}"

    def encode(self, value: Tensor) -> tuple[Tensor, ...]:
        """The value, quantised."""
        if value.is_meta:
            return self.pack(QuantizedSource(*storage.empty(value.shape, self.mode, value.device)))
        return self.pack(storage.quantize(value, self.mode))

    def decode(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """What the numbers stand for."""
        return self.unpack(tensors).dequantize(dtype)

    def pack(self, stored: QuantizedSource) -> tuple[Tensor, Tensor]:
        """What is stored, as floating-point tensors; the scales are bytes in bfloat16 tensors."""
        values, scale, _ = stored
        if values.dtype.itemsize == 1:
            if values.shape[-1] % 2:
                raise ValueError(
                    f"{self.name}: value has shape {list(values.shape)}, expected an even width"
                )
            values = values.view(torch.bfloat16)
        if scale.shape[-1] % 2:
            scale = torch.nn.functional.pad(scale, (0, 1))
        return values, scale.view(torch.bfloat16)

    def unpack(self, tensors: Sequence[Tensor]) -> QuantizedSource:
        """What is stored."""
        values, scale = (tensor.detach() for tensor in tensors)
        columns = 1
        if self.mode == "float8":
            values = values.view(torch.float8_e4m3fn)
            columns = -(-values.shape[-1] // SCALE_GROUP)
        return QuantizedSource(values, scale.view(torch.uint8)[..., :columns].contiguous())


class _Encode(Function):
    """What a value travels as; the gradients that come back are in the same format."""

    @staticmethod
    def forward(
        ctx: Any, payload: Payload, value: Tensor, stored: QuantizedSource | None
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.payload, ctx.dtype = payload, value.dtype
        if stored is not None and isinstance(payload, Stored):
            return payload.pack(QuantizedSource(stored.values.detach(), stored.scale.detach()))
        return payload.encode(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, Tensor | None, None]:
        given = [gradient for gradient in gradients if gradient is not None]
        if len(given) < len(gradients):
            return None, None, None
        return None, ctx.payload.decode(given, ctx.dtype), None


class _Decode(Function):
    """A value from what it travelled as."""

    @staticmethod
    def forward(ctx: Any, payload: Payload, dtype: torch.dtype, *tensors: Tensor) -> Tensor:
        ctx.payload = payload
        return payload.decode(tensors, dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return None, None, *ctx.payload.encode(gradient)


def encode(
    payload: Payload, value: Tensor, stored: QuantizedSource | None = None
) -> tuple[Tensor, ...]:
    """``payload.encode``, through which gradients flow; of ``stored`` the numbers as they are."""
    if isinstance(payload, Plain):
        return (value,)
    encoded: tuple[Tensor, ...] = _Encode.apply(payload, value, stored)
    return encoded


def decode(payload: Payload, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """``payload.decode``, through which gradients flow."""
    if isinstance(payload, Plain):
        return tensors[0]
    decoded: Tensor = _Decode.apply(payload, dtype, *tensors)
    return decoded
