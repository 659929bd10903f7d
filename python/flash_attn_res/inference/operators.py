"""``attend_out`` and ``read_out``: the two operations into memory of the caller's.

The operators ``torch.ops.flash_attn_res.{attend_out, read_out}`` are compiled
(``bindings/torch/inference_ops.cpp``); their fake implementations are here. Tokens are flattened:
a value is [T, D] and may have any row stride, such as a row of a bank [T, N, D].
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flash_attn_res import _check
from flash_attn_res.functional import Sources, fold_query
from flash_attn_res.ops import count_sources, statistics_dtype
from flash_attn_res.storage import SCALE_GROUP, QuantizedSource, check_source

FP8 = torch.float8_e4m3fn


# What the library says begins with the operation; behind it stand shapes where CUDA failed.
_WORDS = re.compile(r"flash_attn_res: (\w+(:| \().*)")
_NO_DEVICE = re.compile(r"no CUDA kernels|compute capability")


def in_words(error: RuntimeError) -> Exception:
    """What an operator raised, in the words of the library alone.

    A ``ValueError`` where it names an argument that it does not take; a device that it cannot use
    or a launch that failed stays a ``RuntimeError``.
    """
    words = _WORDS.search(str(error))
    if words is None:
        return error
    about_arguments = words[2] == ":" and not _NO_DEVICE.search(words[1])
    return (ValueError if about_arguments else RuntimeError)(words[1])


def scale_columns(dim: int, groups: bool) -> int:
    """Columns of ``x_scale``: 1 for a scale a token, ceil(D / 128) for one a group."""
    return -(-dim // SCALE_GROUP) if groups else 1


@torch.library.register_fake("flash_attn_res::attend_out")
def _(
    sources: list[Tensor],
    source_scales: list[Tensor],
    queries: Tensor,
    scale: float,
    eps: float,
    out: Tensor,
    lse: Tensor,
    workspace: Tensor | None,
) -> None:
    return None


@torch.library.register_fake("flash_attn_res::read_out")
def _(
    phase1_out: Tensor | None,
    phase1_lse: Tensor | None,
    sources: list[Tensor],
    source_scales: list[Tensor],
    partial: Tensor | None,
    updates: list[Tensor],
    query: Tensor | None,
    norm_weight: Tensor | None,
    scale: float,
    eps: float,
    norm: bool,
    norm_eps: float,
    round_mix: bool,
    power_of_two_scale: bool,
    x: Tensor,
    x_scale: Tensor | None,
    partial_out: Tensor | None,
    snapshot: Tensor | None,
    mix: Tensor | None,
    probs: Tensor | None,
    workspace: Tensor | None,
) -> None:
    return None


def _refuse_gradients(op: str, function: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(
            f"{op}: an input requires a gradient, which this operation does not have; call it "
            f"under torch.no_grad() or torch.inference_mode(), or use flash_attn_res.{function}"
        )


def _token_value(op: str, name: str, given: object) -> Tensor:
    checked = _check.leading(op, name, given)
    if checked.dim() != 2:
        raise ValueError(f"{op}: {name} has shape {_check.shape_text(checked)}, expected [T, D]")
    _dense_rows(op, name, checked)
    return checked


def _dense_rows(op: str, name: str, given: Tensor) -> None:
    if given.shape[-1] > 1 and given.stride(-1) != 1:
        raise ValueError(
            f"{op}: {name} has stride {given.stride(-1)} in its last dimension, expected 1: a copy "
            "would have to be allocated"
        )


def _list_sources(
    op: str, sources: Sources, empty_ok: bool
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """The items for the operator, checked, their scales, and the first value [T, D]."""
    single = isinstance(sources, (Tensor, QuantizedSource))
    given: list[Any] = [sources] if single else list(sources)
    quantized = len(given) > 0 and isinstance(given[0], QuantizedSource)
    items: list[Tensor] = []
    scales: list[Tensor] = []
    first: Tensor | None = None
    for index, item in enumerate(given):
        name = "sources" if single else f"sources[{index}]"
        if isinstance(item, QuantizedSource) != quantized:
            raise TypeError(
                f"{op}: {name} is a {type(item).__name__} but sources[0] is a "
                f"{type(given[0]).__name__}, expected one storage mode"
            )
        if quantized:
            checked = check_source(op, name, item)
            _refuse_gradients(op, "attend" if op.startswith("attend") else "read", item.origin)
            _dense_rows(op, f"{name}.scale", item.scale)
            scales.append(item.scale)
        else:
            checked = _check.leading(op, name, item)
        items.append(checked)
        if checked.dim() not in (2, 3):
            raise ValueError(
                f"{op}: {name} has shape {_check.shape_text(checked)}, expected [T, D], or packed "
                "[n, T, D]"
            )
        _dense_rows(op, name, checked)
        value = checked if checked.dim() == 2 else checked.select(0, 0) if len(checked) else None
        if value is None:
            raise ValueError(f"{op}: {name} has shape {_check.shape_text(checked)}: no source")
        if first is None:
            first = value
        else:
            if not quantized:
                _check.value(op, name, value, "sources[0]", first)
            elif value.shape != first.shape:
                raise ValueError(
                    f"{op}: {name} has shape {_check.shape_text(value)}, expected "
                    f"{_check.shape_text(first)} like sources[0]"
                )
            _check.same_dtype(op, name, value, "sources[0]", first)
    _check.count(op, "sources", count_sources(items), 0 if empty_ok else 1, _check.MAX_SOURCES)
    return items, scales, first


def _result(
    op: str, name: str, given: object, shape: tuple[int, ...], like_name: str, like: Tensor
) -> Tensor:
    checked = _check.tensor(op, name, given)
    if tuple(checked.shape) != shape:
        raise ValueError(
            f"{op}: {name} has shape {_check.shape_text(checked)}, expected {list(shape)}"
        )
    _check.same_device(op, name, checked, like_name, like)
    _dense_rows(op, name, checked)
    return checked


def _statistic(
    op: str, name: str, given: object, shape: tuple[int, ...], like_name: str, like: Tensor
) -> Tensor:
    checked = _result(op, name, given, shape, like_name, like)
    if checked.dtype != statistics_dtype(like):
        raise TypeError(f"{op}: {name} is {checked.dtype}, expected {statistics_dtype(like)}")
    return checked


def _workspace(op: str, given: Tensor | None, like_name: str, like: Tensor) -> Tensor | None:
    if given is None:
        return None
    checked = _check.tensor(op, "workspace", given)
    if checked.dtype != torch.uint8 or checked.dim() != 1 or not checked.is_contiguous():
        raise TypeError(
            f"{op}: workspace is {checked.dtype} of shape {_check.shape_text(checked)}, expected "
            "contiguous bytes (torch.uint8) of shape [bytes]"
        )
    _check.same_device(op, "workspace", checked, like_name, like)
    return checked


def _attend_arguments(
    op: str,
    sources: Sources,
    queries: Tensor,
    key_weight: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    eps: float,
) -> tuple[Any, ...]:
    items, scales, like = _list_sources(op, sources, empty_ok=False)
    assert like is not None
    queries = _check.query(op, "queries", queries, 2, "sources[0]", like)
    if key_weight is not None:
        key_weight = _check.key_weight(op, key_weight, "queries", queries)
    shape = (queries.shape[0], *like.shape)
    _check.value_dtype(op, "out", _result(op, "out", out, shape, "sources[0]", like))
    _statistic(op, "lse", lse, shape[:2], "sources[0]", like)
    _refuse_gradients(op, "attend", *items, queries, key_weight)
    folded = fold_query(queries, key_weight, statistics_dtype(like))
    scale, eps = _check.finite(op, "scale", scale), _check.positive(op, "eps", eps)
    return items, scales, folded, scale, eps, out, lse


def attend_out(
    sources: Sources,
    queries: Tensor,
    key_weight: Tensor | None = None,
    *,
    out: Tensor,
    lse: Tensor,
    scale: float = 1.0,
    eps: float = 1e-6,
    workspace: Tensor | None = None,
) -> None:
    """:func:`flash_attn_res.attend` into ``out`` and ``lse``.

    Nothing is allocated when a workspace is given and the queries are folded already (float32, no
    key weight), so that the call can be captured into a CUDA graph.

    Args:
        sources: N values [T, D] of one dtype, or packed [n, T, D] (any strides but in the last
            dimension); or as many :class:`flash_attn_res.QuantizedSource` of one storage mode.
        queries: [S, R] pseudo-queries, R <= D.
        key_weight: RMSNorm weight of the keys, [S, R] or [R]; None for ones.
        out: [S, T, D], written.
        lse: [S, T] float32, written.
        scale, eps: as for :func:`flash_attn_res.attend`.
        workspace: at least :func:`attend_workspace_bytes` bytes, uint8.

    Raises:
        ValueError, TypeError: naming the argument, its shape or dtype and what was expected;
            results overlap other arguments; the workspace is too small.
        RuntimeError: an input requires a gradient; a launch failed.
    """
    op = "attend_out"
    arguments = _attend_arguments(op, sources, queries, key_weight, out, lse, scale, eps)
    scratch = _workspace(op, workspace, "out", out)
    try:
        torch.ops.flash_attn_res.attend_out(*arguments, scratch)
    except RuntimeError as error:
        raise in_words(error) from None


def attend_workspace_bytes(sources: Sources, queries: Tensor, *, out: Tensor, lse: Tensor) -> int:
    """Bytes of workspace that :func:`attend_out` needs for tensors of these shapes and dtypes."""
    arguments = _attend_arguments(
        "attend_workspace_bytes", sources, queries, None, out, lse, 1.0, 1e-6
    )
    return int(torch.ops.flash_attn_res.attend_out_workspace(*arguments))


def _read_arguments(
    op: str,
    query: Tensor | None,
    key_weight: Tensor | None,
    phase1: tuple[Tensor, Tensor] | None,
    sources: Sources,
    partial: Tensor | None,
    update: Tensor | Sequence[Tensor] | None,
    scale: float,
    eps: float,
    norm: bool,
    norm_weight: Tensor | None,
    norm_eps: float | None,
    round_mix: bool,
    power_of_two_scale: bool,
    x: Tensor,
    x_scale: Tensor | None,
    partial_out: Tensor | None,
    snapshot: Tensor | None,
    mix: Tensor | None,
    probs: Tensor | None,
) -> tuple[Any, ...]:
    items, scales, like = _list_sources(op, sources, empty_ok=True)
    name = "sources[0]"
    updates = [update] if isinstance(update, Tensor) else list(update or ())
    _check.count(op, "update", len(updates), 0, _check.MAX_UPDATES)
    values: list[tuple[str, object]] = []
    if phase1 is not None:
        if not isinstance(phase1, tuple) or len(phase1) != 2:
            raise TypeError(f"{op}: phase1 is a {type(phase1).__name__}, expected (out, lse)")
        values.append(("phase1[0]", phase1[0]))
    if partial is not None:
        values.append(("partial", partial))
    values += [(f"update[{i}]", item) for i, item in enumerate(updates)]
    for value_name, given in values:
        if like is None:
            like, name = _token_value(op, value_name, given), value_name
        else:
            _dense_rows(op, value_name, _check.value(op, value_name, given, name, like))
    if like is None:
        raise ValueError(
            f"{op}: no value was given: expected at least one of phase1, sources, partial and "
            "update"
        )
    tokens, dim = like.shape
    statistics = statistics_dtype(like)
    phase1_out, phase1_lse = phase1 if phase1 is not None else (None, None)
    if phase1_lse is not None:
        _statistic(op, "phase1[1]", phase1_lse, (tokens,), name, like)
    has_sum = partial is not None or len(updates) > 0
    terms = int(phase1 is not None) + count_sources(items) + int(has_sum)
    folded = None
    if query is not None:
        query = _check.query(op, "query", query, 1, name, like)
        if key_weight is not None:
            key_weight = _check.key_weight(op, key_weight, "query", query)
        folded = fold_query(query, key_weight, statistics)
    elif terms > 1:
        raise ValueError(
            f"{op}: query is missing, expected shape [R]: there are {terms} terms to choose from"
        )
    if norm_weight is not None:
        norm_weight = _check.weight(op, "norm_weight", norm_weight, name, like)

    _result(op, "x", x, (tokens, dim), name, like)
    if x.dtype == FP8:
        if x_scale is None:
            raise ValueError(
                f"{op}: x is {x.dtype} but x_scale is missing, expected float32 of shape "
                f"{[tokens, 1]} or {[tokens, scale_columns(dim, True)]}"
            )
        columns = 1 if x_scale.dim() == 2 and x_scale.shape[1] == 1 else scale_columns(dim, True)
        _result(op, "x_scale", x_scale, (tokens, columns), name, like)
        if x_scale.dtype != torch.float32:
            raise TypeError(f"{op}: x_scale is {x_scale.dtype}, expected torch.float32")
    elif x_scale is not None:
        raise ValueError(f"{op}: x_scale was given but x is {x.dtype}, expected {FP8}")
    else:
        _check.value_dtype(op, "x", x)
    if updates and partial_out is None:
        raise ValueError(f"{op}: partial_out is missing, expected shape {[tokens, dim]}")
    for result_name, result in (
        ("partial_out", partial_out),
        ("snapshot", snapshot),
        ("mix", mix),
    ):
        if result is not None:
            _result(op, result_name, result, (tokens, dim), name, like)
            _check.value_dtype(op, result_name, result)
            if result_name != "mix" and not has_sum:
                raise ValueError(f"{op}: {result_name} was given without partial or update")
    if probs is not None:
        _statistic(op, "probs", probs, (tokens, terms), name, like)
    _refuse_gradients(op, "read", phase1_out, *items, partial, *updates, query, norm_weight)
    scale, eps = _check.finite(op, "scale", scale), _check.positive(op, "eps", eps)
    norm_eps = eps if norm_eps is None else _check.positive(op, "norm_eps", norm_eps)
    return (
        *(phase1_out, phase1_lse, items, scales, partial, updates, folded, norm_weight, scale, eps),
        *(norm or norm_weight is not None, norm_eps, round_mix, power_of_two_scale),
        *(x, x_scale, partial_out, snapshot, mix, probs),
    )


def read_out(
    query: Tensor | None = None,
    key_weight: Tensor | None = None,
    *,
    x: Tensor,
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
    power_of_two_scale: bool = False,
    x_scale: Tensor | None = None,
    partial_out: Tensor | None = None,
    snapshot: Tensor | None = None,
    mix: Tensor | None = None,
    probs: Tensor | None = None,
    workspace: Tensor | None = None,
) -> None:
    """:func:`flash_attn_res.read` into given tensors: one reading site without an allocation.

    The mixture and its norm are those of :func:`flash_attn_res.read`. An ``x`` of dtype
    float8_e4m3fn is quantised, with one scale a token or a group of 128 columns::

        scale    = max(amax / 448, 2^-126)       power_of_two_scale: up to the next power of two
        stored_d = e4m3(x_d * (1 / scale))       nearest, ties to even, saturating at +-448

    so that x is ``stored * scale``. A NaN or Inf makes the scale of its group NaN or Inf.

    Args:
        query, key_weight, phase1, sources, partial, update, scale, eps, norm, norm_weight,
            norm_eps, round_mix: as for :func:`flash_attn_res.read`, tokens flattened: values are
            [T, D], the lse of phase 1 is [T]. Sources may be quantised, as for
            :func:`attend_out`.
        x: [T, D], written.
        power_of_two_scale: round the scales up to powers of two.
        x_scale: [T, 1] or [T, ceil(D / 128)] float32, written; with a quantised x only.
        partial_out: [T, D], the new partial sum, needed with an update; may be ``partial`` or an
            update itself.
        snapshot: [T, D], the new partial sum once more, such as a row of a bank.
        mix: [T, D], the mixture before the norm.
        probs: [T, K] float32, the probabilities.
        workspace: at least :func:`read_workspace_bytes` bytes, uint8.

    Raises:
        ValueError, TypeError: naming the argument, its shape or dtype and what was expected;
            results overlap other arguments; the workspace is too small; ``round_mix`` with a
            quantised x of 16-bit values on CUDA.
        RuntimeError: an input requires a gradient; a launch failed.
    """
    op = "read_out"
    arguments = _read_arguments(
        *(op, query, key_weight, phase1, sources, partial, update, scale, eps, norm, norm_weight),
        *(norm_eps, round_mix, power_of_two_scale, x, x_scale, partial_out, snapshot, mix, probs),
    )
    scratch = _workspace(op, workspace, "x", x)
    try:
        torch.ops.flash_attn_res.read_out(*arguments, scratch)
    except RuntimeError as error:
        raise in_words(error) from None


def read_workspace_bytes(
    query: Tensor | None = None,
    *,
    x: Tensor,
    phase1: tuple[Tensor, Tensor] | None = None,
    sources: Sources = (),
    partial: Tensor | None = None,
    update: Tensor | Sequence[Tensor] | None = None,
    norm: bool = False,
    norm_weight: Tensor | None = None,
    x_scale: Tensor | None = None,
    partial_out: Tensor | None = None,
    snapshot: Tensor | None = None,
    mix: Tensor | None = None,
    probs: Tensor | None = None,
) -> int:
    """Bytes of workspace that :func:`read_out` needs for tensors of these shapes and dtypes."""
    arguments = _read_arguments(
        *("read_workspace_bytes", query, None, phase1, sources, partial, update, 1.0, 1e-6, norm),
        *(norm_weight, None, False, False, x, x_scale, partial_out, snapshot, mix, probs),
    )
    return int(torch.ops.flash_attn_res.read_out_workspace(*arguments))
