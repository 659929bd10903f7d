"""Fake implementations and autograd formulas of the operators ``torch.ops.flash_attn_res.*``.

The operators themselves are compiled (``bindings/torch/ops.cpp`` has their schemas). ``attend``,
``read`` and their backwards are functional. The same four as ``..._into`` write, or add, to tensors
that are given, have no autograd, and take values of any leading shape [..., D].
:mod:`flash_attn_res.tape` is made of those of ``attend``, and of ``read_site`` and its backward,
which are ``read`` for one site of a stream. Shapes, with T tokens, D width, N sources, S queries,
R key width, K terms:

=====================  ============================================================
``attend``             sources [T, D] or packed [n, T, D], queries [S, R] ->
                       out [S, T, D], lse [S, T], logits [T, S, N], inv_rms [T, N]
``read``               phase1_out [T, D], phase1_lse [T], sources, partial [T, D],
                       updates [T, D], query [R], norm_weight [D] ->
                       x [T, D], partial_out [T, D], mix [T, D], logits [T, K],
                       inv_rms [T, K], mix_inv_rms [T]
=====================  ============================================================

Results that were not asked for are empty tensors. ``logits``, ``inv_rms`` and ``mix_inv_rms`` are
statistics for the backward and are not differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flash_attn_res import finite

_OPS = torch.ops.flash_attn_res


def statistics_dtype(value: Tensor) -> torch.dtype:
    """Dtype of queries and statistics that goes with values like ``value``."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def count_sources(sources: Sequence[Tensor]) -> int:
    """N of a list whose items are [T, D] (one source) or packed [n, T, D] (n sources)."""
    return sum(source.shape[0] if source.dim() == 3 else 1 for source in sources)


def _leading_value(*candidates: Tensor | None) -> Tensor:
    for candidate in candidates:
        if candidate is not None:
            return candidate
    raise ValueError(
        "read: no value was given: expected at least one of phase1, sources, partial and update"
    )


@torch.library.register_fake("flash_attn_res::attend")
def _(
    sources: list[Tensor],
    queries: Tensor,
    scale: float,
    eps: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = sources[0]
    tokens, dim = like.shape[-2:]
    num_queries, num_sources = queries.shape[0], count_sources(sources)
    statistics = statistics_dtype(like)
    return (
        like.new_empty((num_queries, tokens, dim), dtype=dtype or like.dtype),
        like.new_empty((num_queries, tokens), dtype=statistics),
        like.new_empty((tokens, num_queries, num_sources), dtype=statistics),
        like.new_empty((tokens, num_sources), dtype=statistics),
    )


@torch.library.register_fake("flash_attn_res::attend_backward")
def _(
    dout: Tensor | None,
    dlse: Tensor | None,
    gate: Tensor | None,
    sources: list[Tensor],
    queries: Tensor,
    lse: Tensor,
    logits: Tensor,
    inv_rms: Tensor,
    scale: float,
    need_sources: bool,
    need_queries: bool,
) -> tuple[list[Tensor], Tensor]:
    statistics = statistics_dtype(sources[0])
    return (
        [source.new_empty(source.shape) for source in sources] if need_sources else [],
        sources[0].new_empty(queries.shape if need_queries else (0,), dtype=statistics),
    )


@torch.library.register_fake("flash_attn_res::read")
def _(
    phase1_out: Tensor | None,
    phase1_lse: Tensor | None,
    sources: list[Tensor],
    partial: Tensor | None,
    updates: list[Tensor],
    query: Tensor | None,
    norm_weight: Tensor | None,
    scale: float,
    eps: float,
    norm: bool,
    norm_eps: float,
    round_mix: bool,
    return_mix: bool,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    like = _leading_value(phase1_out, *sources[:1], partial, *updates[:1])
    shape = like.shape[-2:]
    tokens = shape[0]
    terms = (
        int(phase1_out is not None)
        + count_sources(sources)
        + int(partial is not None or len(updates) > 0)
    )
    statistics = statistics_dtype(like)
    x_dtype = dtype or like.dtype
    sum_dtype = partial.dtype if partial is not None else (updates[0].dtype if updates else x_dtype)
    return (
        like.new_empty(shape, dtype=x_dtype),
        like.new_empty(shape if updates else (0,), dtype=sum_dtype),
        like.new_empty(shape if return_mix else (0,), dtype=x_dtype),
        like.new_empty((tokens, terms), dtype=statistics),
        like.new_empty((tokens, terms), dtype=statistics),
        like.new_empty((tokens,) if norm else (0,), dtype=statistics),
    )


@torch.library.register_fake("flash_attn_res::read_backward")
def _(
    dx: Tensor | None,
    dpartial_out: Tensor | None,
    dmix: Tensor | None,
    phase1_out: Tensor | None,
    sources: list[Tensor],
    partial: Tensor | None,
    query: Tensor | None,
    norm_weight: Tensor | None,
    logits: Tensor,
    inv_rms: Tensor,
    mix_inv_rms: Tensor,
    scale: float,
    norm: bool,
    round_mix: bool,
    need_phase1: bool,
    need_sources: bool,
    need_partial: bool,
    need_query: bool,
    need_norm_weight: bool,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor, Tensor, Tensor]:
    like = _leading_value(phase1_out, *sources[:1], partial)
    shape = like.shape[-2:]
    statistics = statistics_dtype(like)

    def result(given: Tensor | None, needed: bool) -> Tensor:
        if given is None or not needed:
            return like.new_empty((0,))
        return given.new_empty(given.shape)

    has_phase1 = need_phase1 and phase1_out is not None
    has_query = need_query and query is not None
    return (
        result(phase1_out, need_phase1),
        like.new_empty((shape[0],) if has_phase1 else (0,), dtype=statistics),
        [source.new_empty(source.shape) for source in sources] if need_sources else [],
        result(partial, need_partial),
        like.new_empty(query.shape if has_query and query is not None else (0,), dtype=statistics),
        result(norm_weight, need_norm_weight),
    )


@torch.library.register_fake("flash_attn_res::attend_into")
@torch.library.register_fake("flash_attn_res::attend_backward_into")
@torch.library.register_fake("flash_attn_res::read_into")
@torch.library.register_fake("flash_attn_res::read_backward_into")
@torch.library.register_fake("flash_attn_res::quantize_into")
def _into(*_arguments: Any) -> None:
    """Results go into what is given: there is nothing to make."""


@torch.library.register_fake("flash_attn_res::read_site")
def _(
    phase1_out: Tensor | None,
    phase1_lse: Tensor | None,
    slot: int,
    sources: list[Tensor],
    source_scales: list[Tensor],
    partial: Tensor | None,
    update: Tensor | None,
    queries: Tensor,
    site: int,
    norm_weight: Tensor | None,
    scale: float,
    eps: float,
    norm_eps: float,
    dtype: torch.dtype,
    sum_dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    like = _leading_value(phase1_out, partial, *sources)
    shape = like.shape if phase1_out is None else like.shape[1:]
    x = like.new_empty(shape, dtype=dtype)
    terms = int(phase1_out is not None) + len(sources) + int(partial is not None)
    size = x.numel() // shape[-1] * (2 * terms + int(norm_weight is not None))
    return (
        x,
        None if update is None else like.new_empty(shape, dtype=sum_dtype),
        like.new_empty((size,), dtype=queries.dtype) if keep else None,
    )


@torch.library.register_fake("flash_attn_res::read_site_backward")
def _(
    dx: Tensor | None,
    dtotal: Tensor | None,
    phase1_out: Tensor | None,
    gate: Tensor | None,
    dphase1_lse: Tensor | None,
    slot: int,
    sources: list[Tensor],
    source_scales: list[Tensor],
    total: Tensor | None,
    queries: Tensor,
    site: int,
    norm_weight: Tensor | None,
    statistics: Tensor,
    scale: float,
    dsources: list[Tensor],
    accumulate_dsources: bool,
    need_total: bool,
    dqueries: Tensor | None,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    def gradient_of(value: Tensor | None, needed: bool) -> Tensor:
        if value is None or not needed:
            return statistics.new_empty((0,))
        return value.new_empty(value.shape)

    return gradient_of(total, need_total), gradient_of(norm_weight, need_weight)


def _attend_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    sources, queries, scale, _eps, _dtype = inputs
    _out, lse, logits, inv_rms = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(logits, inv_rms)
    ctx.save_for_backward(queries, lse, logits, inv_rms, *sources)
    ctx.scale = scale


def _attend_backward(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_statistics: Tensor | None
) -> tuple[Any, ...]:
    queries, lse, logits, inv_rms, *sources = ctx.saved_tensors
    if dout is None and dlse is None:
        return [None] * len(sources), None, None, None, None
    need_sources, need_queries = any(ctx.needs_input_grad[0]), ctx.needs_input_grad[1]
    dsources, dqueries = _OPS.attend_backward(
        dout,
        dlse,
        None,
        sources,
        queries,
        lse,
        logits,
        inv_rms,
        ctx.scale,
        need_sources,
        need_queries,
    )
    if finite.enabled():
        finite.check(
            "backward of attend",
            [
                *finite.numbered("gradient of sources", dsources),
                ("gradient of queries", dqueries if need_queries else None),
            ],
            [
                ("gradient of out", dout),
                ("gradient of lse", dlse),
                *finite.numbered("sources", sources),
            ],
        )
    return (
        dsources if need_sources else [None] * len(sources),
        dqueries if need_queries else None,
        None,
        None,
        None,
    )


def _read_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    phase1_out, _phase1_lse, sources, partial, updates, query, norm_weight = inputs[:7]
    scale, _eps, norm, _norm_eps, round_mix, return_mix, _dtype = inputs[7:]
    _x, partial_out, mix, logits, inv_rms, mix_inv_rms = output
    ctx.set_materialize_grads(False)
    unused = ([] if updates else [partial_out]) + ([] if return_mix else [mix])
    ctx.mark_non_differentiable(logits, inv_rms, mix_inv_rms, *unused)
    # The sum takes the place of its addends: this is all that is kept of them.
    total = partial_out if updates else partial
    ctx.save_for_backward(
        phase1_out, total, query, norm_weight, logits, inv_rms, mix_inv_rms, *sources
    )
    ctx.scale, ctx.norm, ctx.round_mix = scale, norm, round_mix
    ctx.num_updates = len(updates)
    ctx.partial_dtype = None if partial is None else partial.dtype
    ctx.update_dtypes = [update.dtype for update in updates]


def _read_backward(
    ctx: Any,
    dx: Tensor | None,
    dpartial_out: Tensor | None,
    dmix: Tensor | None,
    *_statistics: Tensor | None,
) -> tuple[Any, ...]:
    phase1_out, total, query, norm_weight, logits, inv_rms, mix_inv_rms, *sources = (
        ctx.saved_tensors
    )
    num_sources = len(sources)
    no_options = (None,) * 7
    if dx is None and dpartial_out is None and dmix is None:
        return (
            *(None, None, [None] * num_sources, None, [None] * ctx.num_updates, None, None),
            *no_options,
        )
    needs = ctx.needs_input_grad
    need_phase1 = phase1_out is not None and (needs[0] or needs[1])
    need_sources = num_sources > 0 and any(needs[2])
    need_partial = needs[3] or (ctx.num_updates > 0 and any(needs[4]))
    dphase1_out, dphase1_lse, dsources, dtotal, dquery, dnorm_weight = _OPS.read_backward(
        dx,
        dpartial_out if ctx.num_updates else None,
        dmix,
        phase1_out,
        sources,
        total,
        query,
        norm_weight,
        logits,
        inv_rms,
        mix_inv_rms,
        ctx.scale,
        ctx.norm,
        ctx.round_mix,
        need_phase1,
        need_sources,
        need_partial,
        needs[5],
        needs[6],
    )
    if finite.enabled():
        finite.check(
            "backward of read",
            [
                ("gradient of phase1[0]", dphase1_out),
                *finite.numbered("gradient of sources", dsources),
                ("gradient of partial", dtotal),
                ("gradient of query", dquery),
                ("gradient of norm_weight", dnorm_weight),
            ],
            [
                ("gradient of x", dx),
                ("gradient of partial", dpartial_out),
                ("gradient of mix", dmix),
                ("phase1[0]", phase1_out),
                *finite.numbered("sources", sources),
                ("partial", total),
            ],
        )
    return (
        dphase1_out if need_phase1 else None,
        dphase1_lse if need_phase1 else None,
        dsources if need_sources else [None] * num_sources,
        dtotal.to(ctx.partial_dtype) if needs[3] else None,
        [dtotal.to(dtype) if need_partial else None for dtype in ctx.update_dtypes],
        dquery if needs[5] else None,
        dnorm_weight if needs[6] else None,
        *no_options,
    )


@torch.library.register_fake("flash_attn_res::stochastic_add")
def _(terms: list[Tensor], seed: Tensor, site: int) -> Tensor:
    return terms[0].new_empty(terms[0].shape, dtype=torch.bfloat16)


@torch.library.register_fake("flash_attn_res::stochastic_add_into")
def _(terms: list[Tensor], seed: Tensor, site: int, out: Tensor) -> None:
    return None


def _stochastic_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.dtypes = [term.dtype for term in inputs[0]]


def _stochastic_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    """Straight through: the rounding counts as the identity."""
    needs = ctx.needs_input_grad[0]
    grads = [gradient.to(d) if need else None for d, need in zip(ctx.dtypes, needs, strict=True)]
    return grads, None, None


def refuse_double_backward(name: str) -> Any:
    """The backward of an operator that is one."""

    def backward(ctx: Any, *_grads: Any) -> Any:
        raise RuntimeError(
            f"flash_attn_res: {name} has no second derivative; call backward once, "
            "without create_graph=True"
        )

    return backward


torch.library.register_autograd(
    "flash_attn_res::attend", _attend_backward, setup_context=_attend_setup
)
torch.library.register_autograd("flash_attn_res::read", _read_backward, setup_context=_read_setup)
torch.library.register_autograd(
    "flash_attn_res::stochastic_add", _stochastic_backward, setup_context=_stochastic_setup
)
for _name in ("attend_backward", "read_backward"):
    torch.library.register_autograd(f"flash_attn_res::{_name}", refuse_double_backward(_name))
