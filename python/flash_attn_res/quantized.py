"""Operators over quantised sources, with gradients: ``quantize``, ``attend`` and ``read``.

They are made of the operators that write into given memory (:mod:`flash_attn_res.ops` has their
shapes), and are functional: safe under ``torch.compile`` and ``torch.export``. Numbers and scales
have no gradient, for a gradient has the dtype of its tensor. Beside each source goes its *origin*,
float32 [T, D] without memory (all strides are 0), which autograd takes for the source::

    numbers, scale, origin = quantize(terms)        d terms = d origin                 (unchanged)
    out, lse = attend(numbers, scale, origin, ...)  d origin = attend's dv, at the stored values

The rounding counts as the identity; all else is the exact gradient at the values that are stored.
The gradients of a source are summed in float32, whoever reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flash_attn_res import finite
from flash_attn_res.ops import refuse_double_backward
from flash_attn_res.storage import empty

_OPS = torch.ops.flash_attn_res
_LIBRARY = torch.library.Library("flash_attn_res", "FRAGMENT")


def _operator(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers an implementation for both devices and, as it only makes tensors, its fake."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, function, key)
        torch.library.register_fake(f"flash_attn_res::{name}", function, lib=_LIBRARY)
        return function

    return register


def _nothing(like: Tensor) -> Tensor:
    return like.new_empty((0,), dtype=torch.float32)


@_operator("quantize(Tensor[] terms, str storage, bool by_group) -> (Tensor, Tensor, Tensor)")
def _quantize(terms: list[Tensor], storage: str, by_group: bool) -> tuple[Tensor, Tensor, Tensor]:
    first = terms[0]
    values, scale = empty(first.shape, storage, first.device, by_group)
    _OPS.quantize_into(terms, values, scale)
    return values, scale, first.new_zeros((), dtype=torch.float32).expand(first.shape)


@_operator(
    "attend_quantized(Tensor[] values, Tensor[] scales, Tensor[] origins, Tensor queries,"
    " float scale, float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _attend(
    values: list[Tensor],
    scales: list[Tensor],
    origins: list[Tensor],
    queries: Tensor,
    scale: float,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (T, D), S, N = values[0].shape, queries.shape[0], len(values)
    out = queries.new_empty((S, T, D), dtype=dtype)
    lse, logits = queries.new_empty((S, T)), queries.new_empty((T, S, N))
    inv_rms = queries.new_empty((T, N))
    _OPS.attend_into(values, queries, scale, eps, out, lse, logits, inv_rms, scales)
    return out, lse, logits, inv_rms


@_operator(
    "attend_quantized_backward(Tensor? dout, Tensor? dlse, Tensor[] values, Tensor[] scales,"
    " Tensor queries, Tensor lse, Tensor logits, Tensor inv_rms, float scale, bool need_sources,"
    " bool need_queries) -> (Tensor[] dsources, Tensor dqueries)"
)
def _attend_gradients(
    dout: Tensor | None,
    dlse: Tensor | None,
    values: list[Tensor],
    scales: list[Tensor],
    queries: Tensor,
    lse: Tensor,
    logits: Tensor,
    inv_rms: Tensor,
    scale: float,
    need_sources: bool,
    need_queries: bool,
) -> tuple[list[Tensor], Tensor]:
    if dout is None:
        dout = queries.new_zeros((queries.shape[0], *values[0].shape))
    wanted = values if need_sources else []
    dsources = [value.new_empty(value.shape, dtype=torch.float32) for value in wanted]
    dqueries = queries.new_empty(queries.shape) if need_queries else None
    _OPS.attend_backward_into(
        *(dout, dlse, None, values, queries, lse, logits, inv_rms, scale, dsources, False),
        *(dqueries, False, scales),
    )
    return dsources, _nothing(queries) if dqueries is None else dqueries


@_operator(
    "read_quantized(Tensor? phase1_out, Tensor? phase1_lse, Tensor[] values, Tensor[] scales,"
    " Tensor[] origins, Tensor? partial, Tensor? update, Tensor? query, Tensor? norm_weight,"
    " float scale, float eps, bool norm, float norm_eps, ScalarType dtype)"
    " -> (Tensor x, Tensor partial_out, Tensor logits, Tensor inv_rms, Tensor mix_inv_rms)"
)
def _read(
    phase1_out: Tensor | None,
    phase1_lse: Tensor | None,
    values: list[Tensor],
    scales: list[Tensor],
    origins: list[Tensor],
    partial: Tensor | None,
    update: Tensor | None,
    query: Tensor | None,
    norm_weight: Tensor | None,
    scale: float,
    eps: float,
    norm: bool,
    norm_eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    like, T = values[0], values[0].shape[0]
    added = partial if partial is not None else update
    total = None
    if update is not None and added is not None:
        total = like.new_empty(like.shape, dtype=added.dtype)
    x = like.new_empty(like.shape, dtype=dtype)
    terms = int(phase1_out is not None) + len(values) + int(added is not None)
    logits, inv_rms, mix_inv_rms = (
        like.new_empty(shape, dtype=torch.float32)
        for shape in ((T, terms), (T, terms), (T if norm else 0,))
    )
    _OPS.read_into(
        *(phase1_out, phase1_lse, values, partial, update, query, norm_weight, scale, eps, norm),
        *(norm_eps, x, total, logits, inv_rms, mix_inv_rms if norm else None, scales),
    )
    return x, _nothing(like) if total is None else total, logits, inv_rms, mix_inv_rms


@_operator(
    "read_quantized_backward(Tensor? dx, Tensor? dpartial_out, Tensor? phase1_out, Tensor[] values,"
    " Tensor[] scales, Tensor? partial, Tensor? query, Tensor? norm_weight, Tensor logits,"
    " Tensor inv_rms, Tensor mix_inv_rms, float scale, bool norm, bool need_phase1,"
    " bool need_sources, bool need_partial, bool need_query, bool need_norm_weight)"
    " -> (Tensor dphase1_out, Tensor dphase1_lse, Tensor[] dsources, Tensor dpartial,"
    " Tensor dquery, Tensor dnorm_weight)"
)
def _read_gradients(
    dx: Tensor | None,
    dpartial_out: Tensor | None,
    phase1_out: Tensor | None,
    values: list[Tensor],
    scales: list[Tensor],
    partial: Tensor | None,
    query: Tensor | None,
    norm_weight: Tensor | None,
    logits: Tensor,
    inv_rms: Tensor,
    mix_inv_rms: Tensor,
    scale: float,
    norm: bool,
    need_phase1: bool,
    need_sources: bool,
    need_partial: bool,
    need_query: bool,
    need_norm_weight: bool,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor, Tensor, Tensor]:
    like = values[0]

    def result(given: Tensor | None, needed: bool) -> Tensor | None:
        return given.new_empty(given.shape) if needed and given is not None else None

    dh = gate = dlse = None
    if need_phase1 and phase1_out is not None:
        dh = like.new_empty(like.shape, dtype=torch.float32)
        gate, dlse = (like.new_empty(like.shape[0], dtype=torch.float32) for _ in range(2))
    wanted = values if need_sources else []
    dsources = [value.new_empty(value.shape, dtype=torch.float32) for value in wanted]
    dpartial, dquery = result(partial, need_partial), result(query, need_query)
    dweight = result(norm_weight, need_norm_weight)
    _OPS.read_backward_into(
        *(dx, dpartial_out, phase1_out, values, partial, query, norm_weight, logits, inv_rms),
        *(mix_inv_rms if norm else None, scale, norm, dh, gate, dlse, dsources, False, dpartial),
        *(dquery, False, dweight, scales),
    )
    dphase1 = None
    if dh is not None and gate is not None and phase1_out is not None:
        dphase1 = (dh * gate[:, None]).to(phase1_out.dtype)  # dh of a phase-1 result is p_0 dh
    dphase1, dlse, dpartial, dquery, dweight = (
        _nothing(like) if found is None else found
        for found in (dphase1, dlse, dpartial, dquery, dweight)
    )
    return dphase1, dlse, dsources, dpartial, dquery, dweight


# --------------------------------------------------------------------------------------- autograd


def _quantize_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.dtypes = [term.dtype for term in inputs[0]]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[:2])


def _quantize_backward(ctx: Any, _values: None, _scale: None, dorigin: Tensor | None) -> Any:
    needs = ctx.needs_input_grad[0]
    if dorigin is None:
        return [None] * len(needs), None, None
    pairs = zip(ctx.dtypes, needs, strict=True)
    return [dorigin.to(dtype) if need else None for dtype, need in pairs], None, None


def _attend_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    values, scales, _origins, queries, ctx.scale = inputs[:5]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.count = len(values)
    ctx.save_for_backward(queries, *output[1:], *values, *scales)


def _attend_backward(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_statistics: Tensor | None
) -> tuple[Any, ...]:
    queries, lse, logits, inv_rms, *stored = ctx.saved_tensors
    values, scales, none = stored[: ctx.count], stored[ctx.count :], [None] * ctx.count
    need_sources, need_queries = any(ctx.needs_input_grad[2]), ctx.needs_input_grad[3]
    dsources, dqueries = none, None
    if dout is not None or dlse is not None:
        dsources, dqueries = _OPS.attend_quantized_backward(
            *(dout, dlse, values, scales, queries, lse, logits, inv_rms, ctx.scale),
            *(need_sources, need_queries),
        )
        if finite.enabled():
            finite.check(
                "backward of attend",
                [
                    *finite.numbered("gradient of sources", dsources),
                    ("gradient of queries", dqueries),
                ],
                [("gradient of out", dout), ("gradient of lse", dlse)],
            )
    sources = dsources if need_sources else none
    return none, none, sources, dqueries if need_queries else None, None, None, None


def _read_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    phase1_out, _, values, scales, _, partial, update, query, norm_weight, ctx.scale = inputs[:10]
    ctx.norm = inputs[11]
    _x, partial_out, *statistics = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*statistics, *([partial_out] if update is None else []))
    ctx.count, ctx.has_update = len(values), update is not None
    ctx.partial_dtype = None if partial is None else partial.dtype
    ctx.update_dtype = None if update is None else update.dtype
    total = partial if update is None else partial_out
    ctx.save_for_backward(phase1_out, total, query, norm_weight, *statistics, *values, *scales)


def _read_backward(
    ctx: Any, dx: Tensor | None, dpartial_out: Tensor | None, *_statistics: Tensor | None
) -> tuple[Any, ...]:
    phase1_out, total, query, norm_weight, logits, inv_rms, mix_inv_rms, *stored = ctx.saved_tensors
    values, scales, none = stored[: ctx.count], stored[ctx.count :], [None] * ctx.count
    needs = ctx.needs_input_grad
    if dx is None and dpartial_out is None:
        return None, None, none, none, none, *(None,) * 9
    need_phase1 = phase1_out is not None and (needs[0] or needs[1])
    need_sources, need_partial = any(needs[4]), needs[5] or needs[6]
    dphase1_out, dphase1_lse, dsources, dtotal, dquery, dweight = _OPS.read_quantized_backward(
        *(dx, dpartial_out if ctx.has_update else None, phase1_out, values, scales, total, query),
        *(norm_weight, logits, inv_rms, mix_inv_rms, ctx.scale, ctx.norm),
        *(need_phase1, need_sources, need_partial, needs[7], needs[8]),
    )
    if finite.enabled():
        finite.check(
            "backward of read",
            [
                ("gradient of phase1[0]", dphase1_out),
                *finite.numbered("gradient of sources", dsources),
                ("gradient of partial", dtotal),
                ("gradient of query", dquery),
                ("gradient of norm_weight", dweight),
            ],
            [("gradient of x", dx), ("gradient of partial", dpartial_out), ("partial", total)],
        )
    return (
        dphase1_out if need_phase1 else None,
        dphase1_lse if need_phase1 else None,
        none,
        none,
        dsources if need_sources else none,
        dtotal.to(ctx.partial_dtype) if needs[5] else None,
        dtotal.to(ctx.update_dtype) if needs[6] else None,
        dquery if needs[7] else None,
        dweight if needs[8] else None,
        *(None,) * 5,
    )


for _name, _backward, _setup in (
    ("quantize", _quantize_backward, _quantize_setup),
    ("attend_quantized", _attend_backward, _attend_setup),
    ("read_quantized", _read_backward, _read_setup),
):
    torch.library.register_autograd(
        f"flash_attn_res::{_name}", _backward, setup_context=_setup, lib=_LIBRARY
    )
for _name in ("attend_quantized_backward", "read_quantized_backward"):
    torch.library.register_autograd(
        f"flash_attn_res::{_name}", refuse_double_backward(_name), lib=_LIBRARY
    )
