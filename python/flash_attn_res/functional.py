"""The functional API: ``attend`` and ``read`` on tensors of any leading shape, with autograd.

Source: Attention Residuals (arXiv 2603.15031), equations 2-6 and Algorithm 1. Formulas and their
derivations are in ``docs/math.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from flash_attn_res import _check, finite
from flash_attn_res.ops import statistics_dtype
from flash_attn_res.storage import QuantizedSource, check_source


class AttendResult(NamedTuple):
    """What :func:`attend` returns."""

    out: Tensor  #: [S, ..., D] mixtures
    lse: Tensor  #: [S, ...] logsumexp of the logits, float32
    probs: Tensor | None  #: [..., S, N] probabilities, float32, not differentiable


class ReadResult(NamedTuple):
    """What :func:`read` returns."""

    x: Tensor  #: [..., D] the mixture, normalised if asked for
    partial: Tensor | None  #: [..., D] the new partial sum; None if there is none
    mix: Tensor | None  #: [..., D] the mixture before the norm
    probs: Tensor | None  #: [..., K] probabilities, float32, not differentiable


def fold_query(query: Tensor, key_weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The folded query ``u = w * g``, in the dtype of the statistics."""
    folded = query.to(dtype)
    return folded if key_weight is None else folded * key_weight.to(dtype)


def _flatten(value: Tensor) -> Tensor:
    """[..., D] -> [T, D], a view wherever the strides allow one."""
    return value.reshape(-1, value.shape[-1])


Sources: TypeAlias = Sequence[Tensor] | Sequence[QuantizedSource] | Tensor | QuantizedSource
"""Values, or what :func:`quantize` makes of them, all in one storage mode."""


class _Sources(NamedTuple):
    """Checked sources, tokens flattened."""

    items: list[Tensor]  # [T, D] each, or one packed [N, T, D]
    scales: list[Tensor]  # of quantised ones, which are never packed here
    origins: list[Tensor]
    like: Tensor | None  # [..., D], to hold other arguments against
    name: str  # of like
    number: int  # N

    def named(self) -> finite.Named:
        """For messages. Of quantised ones the scales say whether the values are finite."""
        if self.scales:
            scales = [scale.view(torch.float8_e8m0fnu).float() for scale in self.scales]
            return finite.numbered("the scales of sources", scales)
        return finite.numbered("sources", self.items)


def _list_sources(op: str, sources: Sources, empty_ok: bool = False) -> _Sources:
    if isinstance(sources, Tensor):
        packed = _check.leading(op, "sources", sources)
        if packed.dim() < 2:
            raise ValueError(
                f"{op}: sources has shape {_check.shape_text(packed)}, expected packed "
                "[N, ..., D], or a list of [..., D]"
            )
        _check.count(op, "sources", packed.shape[0], 1, _check.MAX_SOURCES)
        item = packed.reshape(packed.shape[0], -1, packed.shape[-1])
        return _Sources([item], [], [], packed[0], "sources", packed.shape[0])
    given: Sequence[object]
    if isinstance(sources, QuantizedSource):
        given = _unpacked(op, sources)
    else:
        given = _check.sequence(op, "sources", sources)
    _check.count(op, "sources", len(given), 0 if empty_ok else 1, _check.MAX_SOURCES)
    if not given:
        return _Sources([], [], [], None, "sources", 0)
    quantized = isinstance(given[0], QuantizedSource)
    items, scales, origins, first = [], [], [], None
    for index, source in enumerate(given):
        name = f"sources[{index}]"
        if isinstance(source, QuantizedSource) != quantized:
            raise TypeError(
                f"{op}: {name} is a {type(source).__name__} but sources[0] is a "
                f"{type(given[0]).__name__}, expected one storage mode"
            )
        if isinstance(source, QuantizedSource):
            checked = check_source(op, name, source)
            if first is not None and checked.shape != first.shape:
                raise ValueError(
                    f"{op}: {name} has shape {_check.shape_text(checked)}, expected "
                    f"{_check.shape_text(first)} like sources[0]"
                )
            scales.append(_flatten(source.scale))
            origin = source.origin
            if origin is None:
                origin = checked.new_zeros((), dtype=torch.float32).expand(checked.shape)
            origins.append(_flatten(origin))
        elif first is None:
            checked = _check.leading(op, name, source)
        else:
            checked = _check.value(op, name, source, "sources[0]", first)
        first = checked if first is None else first
        _check.same_dtype(op, name, checked, "sources[0]", first)
        items.append(_flatten(checked))
    return _Sources(items, scales, origins, first, "sources[0]", len(given))


def _unpacked(op: str, packed: QuantizedSource) -> list[QuantizedSource]:
    """The sources [..., D] of numbers [N, ..., D], views."""
    values = check_source(op, "sources", packed)
    if values.dim() < 2:
        raise ValueError(
            f"{op}: sources.values has shape {_check.shape_text(values)}, expected packed "
            "[N, ..., D], or a list of [..., D]"
        )
    origins = [None] * len(values) if packed.origin is None else packed.origin.unbind()
    parts = zip(values.unbind(), packed.scale.unbind(), origins, strict=True)
    return [QuantizedSource(*part) for part in parts]


def attend(
    sources: Sources,
    queries: Tensor,
    key_weight: Tensor | None = None,
    *,
    scale: float = 1.0,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    return_probs: bool = False,
) -> AttendResult:
    """S queries over N sources: phase 1 of Block Attention Residuals.

    For each token and query, with k_n the last R coordinates of v_n and u_s = w_s * g_s::

        r_n      = rsqrt(mean(k_n^2) + eps)
        logit_sn = scale * r_n * <u_s, k_n>
        out_s    = sum_n softmax_n(logit_s)_n v_n        lse_s = logsumexp_n(logit_s)

    Args:
        sources: N tensors [..., D] of one dtype, or one packed tensor [N, ..., D] (any strides:
            ``bank.movedim(-2, 0)`` reads a token-major bank without a copy). 1 <= N <= 512. Or
            N :class:`QuantizedSource` of one storage mode, or one packed, for the values that they
            stand for; the gradient of those goes straight through to what was quantised.
        queries: [S, R] pseudo-queries, R <= D (R < D: the keys are the last R coordinates).
        key_weight: RMSNorm weight of the keys, [S, R] or [R]; None for ones.
        scale: factor of the logits.
        eps: added to the mean square of a key.
        dtype: of ``out``; by default that of the sources, float32 for quantised ones.
        return_probs: also return the probabilities.

    Returns:
        AttendResult: out [S, ..., D], lse [S, ...] float32, probs [..., S, N] or None.

    Raises:
        ValueError, TypeError: naming the argument, its shape or dtype and what was expected.
        RuntimeError: a transform of ``torch.func`` is active.
    """
    op = "attend"
    _check.no_transform(op)
    listed = _list_sources(op, sources)
    items, like, like_name = listed.items, listed.like, listed.name
    assert like is not None
    queries = _check.query(op, "queries", queries, 2, like_name, like)
    if key_weight is not None:
        key_weight = _check.key_weight(op, key_weight, "queries", queries)
    scale = _check.finite(op, "scale", scale)
    eps = _check.positive(op, "eps", eps)
    _check.result_dtype(op, "dtype", dtype)

    folded = fold_query(queries, key_weight, statistics_dtype(like))
    if listed.scales:
        out, lse, logits, _ = torch.ops.flash_attn_res.attend_quantized(
            *(items, listed.scales, listed.origins, folded, scale, eps, dtype or torch.float32)
        )
    else:
        out, lse, logits, _ = torch.ops.flash_attn_res.attend(items, folded, scale, eps, dtype)
    if finite.enabled():
        given = [*listed.named(), ("queries", folded)]
        finite.check(op, [("lse", lse), ("out", out)], given)
    lead = like.shape[:-1]
    num_queries = queries.shape[0]
    probs = None
    if return_probs:
        probs = (logits - lse.detach().t().unsqueeze(-1)).exp()
        probs = probs.reshape(*lead, num_queries, listed.number)
    return AttendResult(
        out.reshape(num_queries, *like.shape), lse.reshape(num_queries, *lead), probs
    )


def read(
    query: Tensor | None = None,
    key_weight: Tensor | None = None,
    *,
    phase1: tuple[Tensor, Tensor] | None = None,
    sources: Sources = (),
    partial: Tensor | None = None,
    update: Tensor | Sequence[Tensor] | None = None,
    scale: float = 1.0,
    eps: float = 1e-6,
    norm: bool = False,
    norm_weight: Tensor | None = None,
    norm_eps: float | None = None,
    round_mix: bool = False,
    dtype: torch.dtype | None = None,
    return_mix: bool = False,
    return_probs: bool = False,
) -> ReadResult:
    """One reading site: a query over a phase-1 result, sources and the running partial sum.

    The pending update is added to the partial sum first (in float32, rounded to the sum's dtype).
    Then one softmax over all terms z_j that were given, and the sublayer's pre-norm::

        h = sum_j p_j z_j
        x = h * rsqrt(mean(h^2) + norm_eps) * norm_weight

    ============================  ==========================================
    case                          given
    ============================  ==========================================
    one-shot, Full AttnRes        ``sources``
    merge (phase 2)               ``phase1``, ``partial``
    advance                       ``phase1``, ``partial``, ``update``, norm
    Kimi K3 site                  ``sources``, ``partial``, ``update``, norm
    ============================  ==========================================

    Args:
        query: [R] pseudo-query; may be None when there is a single term.
        key_weight: [R] RMSNorm weight of the keys; None for ones.
        phase1: ``(out, lse)`` of one query of :func:`attend`: [..., D] and [...].
        sources: as for :func:`attend`; may be empty. With quantised ones there are at most one
            update, no ``round_mix`` and no ``return_mix``.
        partial: [..., D] running sum of the current block.
        update: [..., D] output to add to the sum first, or up to two of them.
        scale, eps: as for :func:`attend`.
        norm: normalise the mixture; implied by ``norm_weight`` [D].
        norm_eps: of that norm; by default ``eps``.
        round_mix: round the mixture to the dtype of x before the norm, as some engines do.
        dtype: of x and mix; by default that of the first term, float32 where that is quantised.
        return_mix, return_probs: also return the mixture before the norm / the probabilities.

    Returns:
        ReadResult: x, the new partial sum, mix, probs [..., K] with the terms in the order phase 1,
        sources, partial sum.

    Raises:
        ValueError, TypeError: naming the argument, its shape or dtype and what was expected.
        RuntimeError: a transform of ``torch.func`` is active.
    """
    op = "read"
    _check.no_transform(op)
    listed = _list_sources(op, sources, empty_ok=True)
    items, like, like_name, num_sources = listed.items, listed.like, listed.name, listed.number
    if update is None or isinstance(update, Tensor):
        updates: list[Any] = [] if update is None else [update]
    else:
        updates = list(_check.sequence(op, "update", update))
    _check.count(op, "update", len(updates), 0, _check.MAX_UPDATES)

    values: list[tuple[str, object]] = []
    if phase1 is not None:
        if not isinstance(phase1, tuple) or len(phase1) != 2:
            raise TypeError(f"{op}: phase1 is a {type(phase1).__name__}, expected (out, lse)")
        values.append(("phase1[0]", phase1[0]))
    if partial is not None:
        values.append(("partial", partial))
    values += [(f"update[{i}]", item) for i, item in enumerate(updates)]
    for name, given in values:
        if like is None:
            like, like_name = _check.leading(op, name, given), name
        else:
            _check.value(op, name, given, like_name, like)
    if like is None:
        raise ValueError(
            f"{op}: no value was given: expected at least one of phase1, sources, partial and "
            "update"
        )
    lead = like.shape[:-1]
    statistics = statistics_dtype(like)

    phase1_out = phase1_lse = None
    if phase1 is not None:
        phase1_out = _flatten(phase1[0])
        lse = _check.tensor(op, "phase1[1]", phase1[1])
        if lse.shape != lead or lse.dtype != statistics:
            raise ValueError(
                f"{op}: phase1[1] is {lse.dtype} of shape {_check.shape_text(lse)}, expected "
                f"{statistics} of shape {list(lead)}"
            )
        _check.same_device(op, "phase1[1]", lse, like_name, like)
        phase1_lse = lse.reshape(-1)

    num_terms = int(phase1 is not None) + num_sources + int(partial is not None or len(updates) > 0)
    folded = None
    if query is not None:
        query = _check.query(op, "query", query, 1, like_name, like)
        if key_weight is not None:
            key_weight = _check.key_weight(op, key_weight, "query", query)
        folded = fold_query(query, key_weight, statistics)
    elif num_terms > 1:
        raise ValueError(
            f"{op}: query is missing, expected shape [R]: there are {num_terms} terms to choose "
            "from"
        )
    if norm_weight is not None:
        norm_weight = _check.weight(op, "norm_weight", norm_weight, like_name, like)
        norm_weight = norm_weight.to(statistics) if statistics == torch.float64 else norm_weight
    scale = _check.finite(op, "scale", scale)
    eps = _check.positive(op, "eps", eps)
    _check.result_dtype(op, "dtype", dtype)
    norm_eps = eps if norm_eps is None else _check.positive(op, "norm_eps", norm_eps)

    addends = [_flatten(item) for item in updates]
    total = None if partial is None else _flatten(partial)
    norm = norm or norm_weight is not None
    mix = None
    if listed.scales:
        asked = {"round_mix": round_mix, "return_mix": return_mix, "two updates": len(updates) > 1}
        for name, given in asked.items():
            if given:
                raise ValueError(
                    f"{op}: {name} was given with quantised sources, expected none: "
                    "flash_attn_res.inference.read_out has it, without gradients"
                )
        if dtype is None:
            dtype = torch.float32 if phase1_out is None else phase1_out.dtype
        x, partial_out, logits, _, _ = torch.ops.flash_attn_res.read_quantized(
            *(phase1_out, phase1_lse, items, listed.scales, listed.origins, total),
            *(addends[0] if addends else None, folded, norm_weight, scale, eps, norm, norm_eps),
            dtype,
        )
    else:
        x, partial_out, mix, logits, _, _ = torch.ops.flash_attn_res.read(
            *(phase1_out, phase1_lse, items, total, addends, folded, norm_weight, scale, eps),
            *(norm, norm_eps, round_mix, return_mix, dtype),
        )
    if finite.enabled():
        finite.check(
            op,
            [("partial", partial_out), ("x", x), ("mix", mix)],
            [
                ("phase1[0]", phase1_out),
                ("phase1[1]", phase1_lse),
                *listed.named(),
                ("partial", partial),
                *finite.numbered("update", updates),
                ("query", folded),
                ("norm_weight", norm_weight),
            ],
        )
    return ReadResult(
        x.reshape(like.shape),
        partial_out.reshape(like.shape) if updates else partial,
        mix.reshape(like.shape) if return_mix and mix is not None else None,
        logits.softmax(-1).reshape(*lead, num_terms) if return_probs else None,
    )


def stochastic_add(terms: Sequence[Tensor], seed: int | Tensor, *, site: int = 0) -> Tensor:
    """The sum of up to four values, rounded to bfloat16 stochastically.

    .. code-block:: text

        total = terms[0] + terms[1] + ...    in float32, from left to right
        out   = one of the two bfloat16 values next to total, whose expectation is total

    The random bits are those of Philox 4x32-10, keyed by seed, step, site and the position of the
    element: the same call gives the same bits on every device, whatever the strides.

    Args:
        terms: 1 to 4 values [..., D] of one shape: float32, bfloat16, float16, mixed.
        seed: a number, or an int64 tensor [2] of seed and step on the device of the terms. A
            captured CUDA graph reads the tensor at each replay: advance the step in place
            (``seed[1] += 1``), inside the graph or between replays.
        site: 0 to 2^32 - 1. Sums of one step that are to be rounded independently take different
            sites.

    Returns:
        [..., D] bfloat16. Gradients pass straight through: each term gets that of the result.

    Raises:
        ValueError, TypeError: naming the argument, its shape or dtype and what was expected.
        RuntimeError: a transform of ``torch.func`` is active.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
    """
    op = "stochastic_add"
    _check.no_transform(op)
    if not 1 <= len(terms) <= _check.MAX_STOCHASTIC_TERMS:
        raise ValueError(
            f"{op}: terms has {len(terms)} items, expected 1 to {_check.MAX_STOCHASTIC_TERMS}"
        )
    first = _check.leading(op, "terms[0]", terms[0])
    for i, term in enumerate(terms):
        _check.value(op, f"terms[{i}]", term, "terms[0]", first)
    if first.dtype == torch.float64:
        raise TypeError(
            f"{op}: terms[0] is torch.float64, expected torch.float32, torch.bfloat16 or "
            "torch.float16: stochastic rounding is from float32 to bfloat16"
        )
    if not 0 <= site < 2**32:
        raise ValueError(f"{op}: site is {site}, expected 0 to 2^32 - 1")
    state = _check.rounding_seed(op, "seed", seed, "terms[0]", first)
    result: Tensor = torch.ops.flash_attn_res.stochastic_add(list(terms), state, site)
    return result
