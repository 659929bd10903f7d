"""Storage modes: quantize against its definition, and attend, read and streams over stored blocks.

A quantised source stands for values that float64 holds exactly, so that the double-precision
reference on those values is the oracle of everything that reads them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor, nn

import eager
from eager import assert_close_enough
from flash_attn_res import BlockAttnRes, QuantizedSource, attend, check_finite, quantize, read
from flash_attn_res.inference import attend_out, read_out
from flash_attn_res.plan import Plan
from stream_networks import (
    Network,
    Trace,
    assert_equal,
    assert_gradients,
    gradients,
    large_saved,
    make,
    tensors_of,
)

OPS = torch.ops.flash_attn_res
EPS = 1e-6
GROUP = 128
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STORAGE = [("float8", True), ("float8", False), ("float16", False), ("float16", True)]
MODES = ["float16", "float8"]
every_storage = pytest.mark.parametrize(("storage", "by_group"), STORAGE)
every_mode = pytest.mark.parametrize("storage", MODES)
NAN = float("nan")


# -------------------------------------------------------------------------------- quantize


def sum_of(terms: list[Tensor]) -> Tensor:
    """In float32, from left to right."""
    total = terms[0].float()
    for term in terms[1:]:
        total = total + term.float()
    return total


def rounded(y: Tensor, bits: int, smallest: int) -> Tensor:
    """Y in float64 to `bits` bits, half to even; below 2^smallest the grid stays as it is."""
    _, exponent = torch.frexp(y)  # |y| = m 2^exponent with 0.5 <= m < 1
    step = torch.ldexp(torch.ones_like(y), exponent.clamp_min(smallest + 1) - bits)
    return (y / step).round() * step


def definition(total: Tensor, storage: str, by_group: bool) -> tuple[Tensor, Tensor]:
    """Numbers in float64 and exponents of the scales; where a group is not finite, both are NaN."""
    dim = total.shape[-1]
    width = GROUP if by_group else dim
    groups = -(-dim // width)
    padded = nn.functional.pad(total.double(), (0, groups * width - dim))
    rows = padded.unflatten(-1, (groups, width))
    largest = rows.abs().amax(-1)
    _, exponent = torch.frexp(largest.where(largest.isfinite(), 1.0))
    exponent = exponent - 1  # 2^exponent <= largest < 2^(exponent + 1)
    if storage == "float16":
        exponent = exponent - 14
    else:
        exponent = exponent - 8
        exponent = exponent + (torch.ldexp(largest, -exponent) > 448).int()
    exponent = exponent.double().where(largest > 0, -126.0).clamp(-126, 127)
    exponent = exponent.where(largest.isfinite(), NAN)
    bits, smallest = (11, -14) if storage == "float16" else (4, -6)
    numbers = rounded(rows * torch.exp2(-exponent)[..., None], bits, smallest)
    return numbers.flatten(-2)[..., :dim], exponent


def assert_quantized(terms: list[Tensor], storage: str, by_group: bool) -> None:
    given = quantize(terms, storage, by_group=by_group)
    numbers, exponent = definition(sum_of(terms), storage, by_group)
    dtype = torch.float16 if storage == "float16" else torch.float8_e4m3fn
    assert given.values.dtype == dtype
    assert given.values.shape == terms[0].shape
    assert given.scale.dtype == torch.uint8
    columns = -(-terms[0].shape[-1] // GROUP) if by_group else 1
    assert given.scale.shape == (*terms[0].shape[:-1], columns)
    expected = torch.where(exponent.isnan(), 255, exponent.nan_to_num() + 127)
    assert torch.equal(given.scale.double(), expected)
    good = ~numbers.isnan()
    assert torch.equal(given.values.double()[good], numbers[good])
    assert torch.equal(given.values[good].float().signbit(), sum_of(terms)[good].signbit())
    assert given.dequantize()[~good].isnan().all()
    factor = torch.exp2(exponent).repeat_interleave(GROUP if by_group else numbers.shape[-1], -1)
    exact = numbers * factor[..., : numbers.shape[-1]]
    exact = exact.float().double()  # what rounds up to 2^128 is infinite, as in bfloat16
    for wide in (torch.float64, torch.float32):
        assert torch.equal(given.dequantize(wide)[good].double(), exact[good])
    if storage == "float8":
        normal = good & ((exact.abs() >= 2.0**-120) | (exact == 0))
        assert torch.equal(given.dequantize(torch.bfloat16)[normal].double(), exact[normal])


@every_storage
@hypothesis.settings(max_examples=40)
@hypothesis.given(
    seed=st.integers(0, 2**20),
    lead=st.sampled_from([(1,), (7,), (3, 5), (2, 1, 4), (67,), (0,)]),
    dim=st.sampled_from([1, 7, 8, 100, 127, 128, 129, 256, 300, 520]),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=4),
    strided=st.booleans(),
)
def test_quantize_is_its_definition(storage, by_group, seed, lead, dim, dtypes, strided) -> None:
    torch.manual_seed(seed)
    terms = []
    for dtype in dtypes:
        magnitude = torch.exp2(torch.randint(-12, 12, (*lead, 1)).float())
        term = (torch.randn(*lead, dim) * magnitude).to(dtype)
        terms.append(nn.functional.pad(term, (3, 2))[..., 3 : dim + 3] if strided else term)
    assert_quantized(terms, storage, by_group)


@every_storage
def test_quantize_at_the_edges(storage: str, by_group: bool) -> None:
    """Zeros, subnormals, the largest floats, both sides of every threshold, NaN and Inf."""
    dim = 2 * GROUP + 40
    rows = [torch.zeros(dim), -torch.zeros(dim)]
    for exponent in range(-149, 128):
        power = 2.0**exponent
        for largest in (1.0, 1.75, 1.75 + 2**-23, 2 - 2**-23):
            row = (2 * torch.rand(dim) - 1).double() * largest * power
            row[:: GROUP // 2] = largest * power * torch.randn(1).sign()
            rows.append(row.float())
    # Halfway between two numbers, for both parities, with scale 1.
    ties = torch.arange(dim).double()
    rows.append((32768 - 16 - 16 * ties).float() if storage == "float16" else (448 - ties).float())
    for bad in (NAN, float("inf"), -float("inf")):
        row = torch.randn(dim)
        row[torch.randint(dim, (1,))] = bad
        rows.append(row)
    assert_quantized([torch.stack(rows)], storage, by_group)


def test_a_sum_that_overflows_in_float32_is_not_hidden() -> None:
    large = torch.full((2, 4), 3e38)
    large[1] = 1.0
    for storage in MODES:
        given = quantize([large, large], storage)
        assert given.dequantize()[0].isnan().all()
        assert given.dequantize()[1].eq(2).all()


def test_defaults_and_gradients() -> None:
    value = torch.randn(5, 300, requires_grad=True)
    assert quantize(value).scale.shape == (5, 3)
    assert quantize(value, "float16").scale.shape == (5, 1)
    given = quantize([value, value.detach()])
    assert not given.values.requires_grad
    assert not given.scale.requires_grad
    assert given.origin is not None
    assert given.origin.untyped_storage().nbytes() == 4  # whatever it stands for
    assert quantize(value.detach()).origin is None
    with torch.no_grad():
        assert quantize(value).origin is None


@every_storage
def test_error_bounds(storage: str, by_group: bool) -> None:
    """Half a unit of 11 or of 4 bits for all values down to 2^-28, 2^-13 of the largest."""
    value = torch.randn(200, 384) * torch.exp2(torch.randint(-40, 1, (200, 384)).float())
    given = quantize(value, storage, by_group=by_group).dequantize(torch.float64)
    largest = value.abs().unflatten(-1, (-1, GROUP if by_group else 384)).amax(-1, keepdim=True)
    largest = largest.expand(-1, -1, GROUP if by_group else 384).flatten(-2).double()
    relative, below = (2.0**-11, 2.0**-28) if storage == "float16" else (2.0**-4, 2.0**-13)
    error = (given - value.double()).abs()
    normal = value.abs() >= largest * below
    assert normal.any()
    assert (error <= value.abs() * relative)[normal].all()
    absolute = 2.0**-39 if storage == "float16" else 2.0**-17
    assert (error <= largest * absolute)[~normal].all()


# ------------------------------------------------------------- attend and read over stored values


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, NAN, dtype=dtype)


def parts(sources: list[QuantizedSource]) -> tuple[list[Tensor], list[Tensor]]:
    return [s.values for s in sources], [s.scale for s in sources]


def stored(
    count: int, lead: tuple[int, ...], dim: int, storage: str, by_group: bool, strided: bool
) -> list[QuantizedSource]:
    """Sources of several magnitudes; strided: rows with room between them."""
    given = []
    for _ in range(count):
        value = torch.randn(*lead, dim) * 2.0 ** torch.randint(-6, 7, (1,)).item()
        source = quantize(value, storage, by_group=by_group)
        if strided:
            room = torch.zeros(*lead, dim + 24, dtype=source.values.dtype)
            room[..., 8 : 8 + dim].copy_(source.values)
            source = QuantizedSource(room[..., 8 : 8 + dim], source.scale)
        given.append(source)
    return given


def assert_all_close(
    ours: dict[str, Tensor],
    exact: dict[str, Tensor],
    plain: dict[str, Tensor],
    cotangents: list[Tensor],
    query: Tensor,
    inv_rms: Tensor,
    normed: int = 1,
) -> None:
    """err(ours) <= 2 err(float32, rounded) + a few ulp; gradients as in test_ops.compare.

    ``normed``: D, where a norm follows. The gradient of its input is orthogonal to that input, so
    that dot products of D terms cancel in the gradients of logits: the rounding of the inverse RMS
    that the forward stores is enough to move them by sqrt(D) roundings of a term.
    """
    given = [t for t in (*exact.values(), *cotangents) if t.numel()]
    magnitude = max((t.abs().max().item() for t in given), default=0.0)
    slopes = inv_rms[inv_rms.isfinite()] * query.abs().max()
    magnitude *= max([1.0, *slopes.flatten().tolist()])
    for name, value in ours.items():
        count = cotangents[0].numel() if name in ("du", "dg") else 1
        terms = count * (1 if name == "x" else normed)
        assert_close_enough(
            name, value, exact[name], plain[name].to(value.dtype), magnitude=magnitude * terms**0.5
        )


@every_storage
@hypothesis.settings(max_examples=25)
@hypothesis.given(
    seed=st.integers(0, 2**20),
    tokens=st.sampled_from([1, 5, 17, 67, 0]),
    dim=st.sampled_from([1, 8, 100, 128, 136, 264, 520]),
    num_sources=st.sampled_from([1, 2, 3, 5, 9]),
    num_queries=st.sampled_from([1, 2, 3, 9]),
    dtype=st.sampled_from(DTYPES),
    grad_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    accumulate=st.booleans(),
    strided=st.booleans(),
)
def test_attend(
    storage, by_group, seed, tokens, dim, num_sources, num_queries, dtype, grad_dtype, accumulate,
    strided,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    N, S, T, D = num_sources, num_queries, tokens, dim
    sources = stored(N, (T,), D, storage, by_group, strided)
    values, scales = parts(sources)
    key_dim = D if D < 100 else D - 4
    queries = torch.randn(S, key_dim) / key_dim**0.5
    out, lse = poisoned(S, T, D, dtype=dtype), poisoned(S, T)
    logits, inv_rms = poisoned(T, S, N), poisoned(T, N)
    OPS.attend_into(values, queries, 0.9, EPS, out, lse, logits, inv_rms, scales)
    dout, dlse, gate = torch.randn(S, T, D).to(dtype), torch.randn(S, T), torch.rand(S, T)
    before = [torch.randn(T, D).to(grad_dtype) for _ in sources]
    dsources = [b.clone() if accumulate else torch.full_like(b, NAN) for b in before]
    dqueries = torch.full_like(queries, NAN)
    OPS.attend_backward_into(
        *(dout, dlse, gate, values, queries, lse, logits, inv_rms, 0.9, dsources, accumulate),
        *(dqueries, False, scales),
    )

    def reference(wide: torch.dtype) -> dict[str, Tensor]:
        """By autograd through the formulas; the gate multiplies a query's dout."""
        leaves = [s.dequantize(wide).requires_grad_() for s in sources]
        u = queries.to(wide).requires_grad_()
        mix, total = eager.attend(leaves, u, 0.9, EPS)
        given = [gate[..., None] * dout, dlse.to(wide)]
        grads = torch.autograd.grad([mix, total], [u, *leaves], given)
        held = [
            b.to(wide) if accumulate else torch.zeros_like(g)
            for b, g in zip(before, grads[1:], strict=True)
        ]
        named = {f"dv {n}": g + h for n, (g, h) in enumerate(zip(grads[1:], held, strict=True))}
        return {"out": mix.detach(), "lse": total.detach(), "du": grads[0]} | named

    exact, plain = reference(torch.float64), reference(torch.float32)
    ours = {"out": out, "lse": lse, "du": dqueries}
    ours |= {f"dv {n}": dv for n, dv in enumerate(dsources)}
    assert_all_close(ours, exact, plain, [dout, dlse, *before], queries, inv_rms)

    # In float32 the numbers are exact: other kernels, the same bits.
    again, statistics = poisoned(S, T, D, dtype=dtype), [lse.clone(), logits.clone()]
    wide_values = [s.dequantize() for s in sources]
    OPS.attend_into(wide_values, queries, 0.9, EPS, again, *statistics, inv_rms.clone(), [])
    assert torch.equal(again, out)
    assert torch.equal(statistics[0], lse)


@every_storage
@hypothesis.settings(max_examples=40)
@hypothesis.given(
    seed=st.integers(0, 2**20),
    tokens=st.sampled_from([1, 5, 17, 67, 0]),
    dim=st.sampled_from([1, 8, 100, 128, 136, 264, 520]),
    num_sources=st.sampled_from([1, 2, 3, 5, 9]),
    phase1=st.booleans(),
    addends=st.sampled_from([0, 1, 2]),
    norm=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    strided=st.booleans(),
)
def test_read(
    storage, by_group, seed, tokens, dim, num_sources, phase1, addends, norm, dtype, strided
) -> None:
    torch.manual_seed(seed)
    N, T, D = num_sources, tokens, dim
    sources = stored(N, (T,), D, storage, by_group, strided)
    values, scales = parts(sources)

    def value() -> Tensor:
        return torch.randn(T, D).to(dtype)

    o, lse = (value(), torch.randn(T)) if phase1 else (None, None)
    partial = value() if addends else None
    update = value() if addends == 2 else None
    total = None if partial is None else partial if update is None else partial + update
    query, weight = torch.randn(D) / D**0.5, torch.randn(D).to(dtype) if norm else None
    terms = int(phase1) + N + int(addends > 0)
    x, logits, inv_rms = poisoned(T, D, dtype=dtype), poisoned(T, terms), poisoned(T, terms)
    mix_inv_rms = poisoned(T) if norm else None
    partial_out = poisoned(T, D, dtype=dtype) if addends == 2 else None
    OPS.read_into(
        *(o, lse, values, partial, update, query, weight, 1.1, EPS, norm, EPS, x, partial_out),
        *(logits, inv_rms, mix_inv_rms, scales),
    )
    if partial_out is not None:
        assert total is not None
        assert torch.equal(partial_out, total)

    dx, dtotal = value(), value() if addends else None
    dsources = [poisoned(T, D) for _ in sources]
    dpartial = None if total is None else poisoned(T, D, dtype=dtype)
    dquery, dweight = poisoned(D), None if weight is None else torch.full_like(weight, NAN)
    dh, gate, dlse = (
        (poisoned(T, D, dtype=dtype), poisoned(T), poisoned(T)) if phase1 else [None] * 3
    )
    OPS.read_backward_into(
        *(dx, dtotal, o, values, total, query, weight, logits, inv_rms, mix_inv_rms, 1.1, norm),
        *(dh, gate, dlse, dsources, False, dpartial, dquery, False, dweight, scales),
    )

    def reference(wide: torch.dtype) -> dict[str, Tensor]:
        leaves = {f"dv {n}": s.dequantize(wide) for n, s in enumerate(sources)}
        given = {"o": o, "dlse": lse, "dpartial": total, "du": query, "dg": weight}
        leaves |= {name: t.to(wide) for name, t in given.items() if t is not None}
        leaves = {name: t.requires_grad_() for name, t in leaves.items()}
        found, _, _ = eager.read(
            leaves["du"],
            phase1=(leaves["o"], leaves["dlse"]) if phase1 else None,
            sources=[leaves[f"dv {n}"] for n in range(N)],
            partial=leaves.get("dpartial"),
            scale=1.1,
            eps=EPS,
            norm=norm,
            norm_weight=leaves.get("dg"),
            norm_eps=EPS,
        )
        grads = torch.autograd.grad(found, list(leaves.values()), dx.to(wide), allow_unused=True)
        named = {
            name: torch.zeros_like(leaf) if grad is None else grad
            for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
        }
        if dtotal is not None:
            named["dpartial"] = named["dpartial"] + dtotal
        return named | {"x": found.detach()}

    exact, plain = reference(torch.float64), reference(torch.float32)
    ours = {"x": x, "du": dquery, "dg": dweight, "dlse": dlse, "dpartial": dpartial}
    ours |= {f"dv {n}": dv for n, dv in enumerate(dsources)}
    if dh is not None and gate is not None:
        ours["o"] = dh.float() * gate[:, None]
        plain["o"] = plain["o"].to(dtype)  # dh is rounded
        ours["o"] = ours["o"].to(dtype)
    held = {name: got for name, got in ours.items() if got is not None}
    cotangents = [t for t in (dx, dtotal) if t is not None]
    if mix_inv_rms is not None and weight is not None:
        # The norm's backward is a difference of numbers of this size; with D = 1 it is zero.
        cotangents.append((dx * weight).float() * mix_inv_rms[:, None])
    assert_all_close(held, exact, plain, cotangents, query, inv_rms, D if norm else 1)


@every_mode
@pytest.mark.parametrize("layout", ["list", "packed"])
def test_inference_operators(storage: str, layout: str) -> None:
    """Without gradients, into given memory: the numbers of the operators of training."""
    T, D, N, S = 13, 200, 3, 4
    sources = stored(N, (T,), D, storage, storage == "float8", False)
    given: QuantizedSource | list[QuantizedSource] = sources
    if layout == "packed":
        given = QuantizedSource(*(torch.stack(kind) for kind in parts(sources)))
    queries = torch.randn(S, D) / D**0.5
    out, lse = poisoned(S, T, D, dtype=torch.bfloat16), poisoned(S, T)
    attend_out(given, queries, out=out, lse=lse)
    expected, expected_lse = poisoned(S, T, D, dtype=torch.bfloat16), poisoned(S, T)
    values, scales = parts(sources)
    OPS.attend_into(
        *(values, queries, 1.0, EPS, expected, expected_lse, poisoned(T, S, N), poisoned(T, N)),
        scales,
    )
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    partial = torch.randn(T, D).bfloat16()
    x, expected = poisoned(T, D, dtype=torch.bfloat16), poisoned(T, D, dtype=torch.bfloat16)
    read_out(queries[0], x=x, sources=given, partial=partial)
    OPS.read_into(
        *(None, None, values, partial, None, queries[0], None, 1.0, EPS, False, EPS, expected),
        *(None, poisoned(T, N + 1), poisoned(T, N + 1), None, scales),
    )
    assert torch.equal(x, expected)


# --------------------------------------------------------------------- the functional API


def leaves(count: int, lead: tuple[int, ...], dim: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(*lead, dim).to(dtype).requires_grad_() for _ in range(count)]


def assert_gradients_of(
    outputs: list[Tensor], expected: list[Tensor], ours: list[Tensor], theirs: list[Tensor]
) -> None:
    """Gradients of random cotangents, of two ways to compute the same in float32."""
    given = [torch.randn_like(output) for output in outputs]
    for one, other in zip(outputs, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(outputs, ours, given)
    wanted = torch.autograd.grad(expected, theirs, given)
    for a, b, leaf in zip(found, wanted, ours, strict=True):
        assert a.dtype == leaf.dtype
        largest = b.abs().max().item()
        eps = torch.finfo(leaf.dtype).eps
        torch.testing.assert_close(
            a.float(), b.float(), rtol=2 * eps, atol=(1e-5 + eps / 4) * largest
        )


@every_storage
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [((7,), 200), ((2, 3), 136), ((1,), 1), ((5,), 100)])
def test_attend_has_gradients(storage, by_group, dtype, shape) -> None:
    """Straight through: those of attend over the values that are stored, in place of the terms."""
    (lead, dim), N, S = shape, 3, 4
    terms = leaves(N, lead, dim, dtype)
    queries, weight = torch.randn(S, dim) / dim**0.5, torch.randn(dim)
    stored = [quantize(term, storage, by_group=by_group) for term in terms]
    values = [source.dequantize().detach().requires_grad_() for source in stored]
    results = []
    for sources in (stored, values):
        u, g = queries.clone().requires_grad_(), weight.clone().requires_grad_()
        found = attend(sources, u, g, scale=0.9, return_probs=True)
        assert found.out.dtype == torch.float32
        results.append((found, [u, g]))
    (ours, own), (theirs, other) = results
    assert torch.equal(ours.out, theirs.out)
    assert torch.equal(ours.lse, theirs.lse)
    assert torch.equal(ours.probs, theirs.probs)
    assert_gradients_of(
        [ours.out, ours.lse], [theirs.out, theirs.lse], [*terms, *own], [*values, *other]
    )
    # One gradient alone, and of queries alone.
    plain = [quantize(term.detach(), storage, by_group=by_group) for term in terms]
    u = queries.clone().requires_grad_()
    attend(plain, u).lse.sum().backward()
    assert u.grad is not None
    assert u.grad.isfinite().all()
    packed = QuantizedSource(*(torch.stack([s[i] for s in plain]) for i in range(2)))
    assert torch.equal(attend(packed, u).out, attend(plain, u).out)


@every_storage
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("phase1", [False, True])
@pytest.mark.parametrize("addends", [0, 1, 2, 3])
def test_read_has_gradients(storage, by_group, norm, phase1, addends) -> None:
    """addends: none, the sum, the sum and an update, an update alone."""
    T, D, N = 9, 136, 3
    terms = leaves(N, (T,), D, torch.float32)
    stored = [quantize(term, storage, by_group=by_group) for term in terms]
    values = [source.dequantize().detach().requires_grad_() for source in stored]
    drawn = {
        "query": torch.randn(D) / D**0.5,
        "key_weight": 1 + 0.1 * torch.randn(D),
        "norm_weight": torch.randn(D) if norm else None,
        "o": torch.randn(T, D) if phase1 else None,
        "lse": torch.randn(T) if phase1 else None,
        "partial": torch.randn(T, D) if addends in (1, 2) else None,
        "update": torch.randn(T, D) if addends in (2, 3) else None,
    }
    results = []
    for sources in (stored, values):
        given = {n: t.clone().requires_grad_() for n, t in drawn.items() if t is not None}
        options = dict(given)
        if phase1:
            options["phase1"] = (options.pop("o"), options.pop("lse"))
        found = read(sources=sources, return_probs=True, **options)
        outputs = [found.x] if addends < 2 else [found.x, found.partial]
        results.append((outputs, list(given.values()), found.probs))
    (ours, own, probs), (theirs, other, expected) = results
    torch.testing.assert_close(probs, expected)
    assert_gradients_of(ours, theirs, [*terms, *own], [*values, *other])


@every_mode
def test_every_term_gets_the_gradient_of_the_sum(storage: str) -> None:
    """In its own dtype; what several readers give is summed in float32 first."""
    terms = [torch.randn(3, 130).to(dtype).requires_grad_() for dtype in DTYPES]
    fixed = torch.randn(3, 130)
    source = quantize([*terms, fixed], storage)
    queries = torch.randn(2, 2, 130)
    given = torch.randn(2, 3, 130)
    out = attend([source, source], queries[0]).out * given
    total = out.sum() + (read(queries[1, 0], sources=[source, source]).x * given[1]).sum()
    total = total + (source.dequantize() * given[0]).sum()
    found = torch.autograd.grad(total, terms)
    value = source.dequantize().detach().requires_grad_()
    out = attend([value, value], queries[0]).out * given
    total = out.sum() + (read(queries[1, 0], sources=[value, value]).x * given[1]).sum()
    (expected,) = torch.autograd.grad(total + (value * given[0]).sum(), value)
    for term, gradient in zip(terms, found, strict=True):
        assert gradient.dtype == term.dtype
        eps = torch.finfo(term.dtype).eps
        torch.testing.assert_close(gradient.float(), expected, rtol=eps, atol=1e-5)


def test_no_second_derivative() -> None:
    value = torch.randn(3, 130, requires_grad=True)
    out = attend([quantize(value)] * 2, torch.randn(2, 130, requires_grad=True)).out
    with pytest.raises(RuntimeError, match="second derivative"):  # noqa: PT012
        (g,) = torch.autograd.grad(out.square().sum(), value, create_graph=True)
        g.sum().backward()


# ------------------------------------------------------------------------------- whole networks


class Through(torch.autograd.Function):
    """One value whose gradient goes to another one, unchanged."""

    @staticmethod
    def forward(ctx, value: Tensor, like: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


def with_stored_blocks(
    network: Network, x: Tensor, held: list[QuantizedSource], plan: Plan
) -> Tensor:
    """The network by its formulas, its completed blocks dequantised copies, in the dtype of x.

    The copies are those that the stream made: a sum that lies on the border between two numbers
    would else be rounded to either one, by chance. The first block reads the embedding as it came,
    unless it reads it through a phase 1, and a sum that the read of a boundary completes is a term
    of that read before it is stored.
    """
    module, sites = network.attn_res, plan.sites
    queries = module.queries if module.key_weight is None else module.queries * module.key_weight
    blocks: list[Tensor] = []

    def add(value: Tensor) -> None:
        kept = held[len(blocks)].dequantize(torch.float64).to(x.dtype)
        blocks.append(Through.apply(kept, value))

    def mixture(site: int, norm: Tensor, partial: Tensor | None) -> Tensor:
        sources = [x] if len(blocks) == 1 and sites[site].slot < 0 else blocks
        return eager.read(
            queries[site], sources=sources, partial=partial, norm=True, norm_weight=norm
        )[0]

    add(x)
    partial = None
    for site, (norm, layer) in enumerate(zip(network.norms, network.layers, strict=False)):
        if site % module.block_size == 0 and partial is not None:
            before, partial = partial, None
            if sites[site].promotes:
                h = mixture(site, norm, before)
                add(before)
            else:
                add(before)
                h = mixture(site, norm, None)
        else:
            h = mixture(site, norm, partial)
        output = layer(h)
        partial = output if partial is None else partial + output
    if len(held) > len(blocks):
        assert partial is not None
        add(partial)
        partial = None
    assert len(held) == len(blocks)
    return mixture(len(network.layers), network.norms[-1], partial)


def run_and_keep(network: Network, x: Tensor, trace: Trace | None = None):
    """The network's output and what its stream stored."""
    stream = network.attn_res.start(x)
    held = stream._tape.stored  # finish lets go of it
    for norm, layer in zip(network.norms, network.layers, strict=False):
        h = stream.read(norm)
        y = layer(h)
        stream.write(y)
        if trace is not None:
            trace.outputs.append(y.detach())
    return stream.finish(network.norms[-1]), held


LAYOUTS = {
    "full": (9, 1, {}),
    "blocks of 3": (9, 3, {}),
    "short last block": (11, 4, {}),
    "one shot": (9, 3, {"forms": "one_shot"}),
    "mixed forms": (9, 3, {"forms": ["one_shot", "two_phase", "one_shot"]}),
    "groups": (12, 2, {"forms": "two_phase", "group_blocks": 2}),
    "phase 1 of the embedding": (6, 3, {"forms": ["two_phase", "two_phase"]}),
    "one block": (5, 5, {}),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


@every_layout
@every_mode
def test_what_a_stream_stores(storage: str, layout: tuple[int, int, dict]) -> None:
    """A block is quantised from its last running sum plus its last output, summed in float32."""
    num_sublayers, block_size, options = layout
    for dtype in DTYPES:
        network, x, _ = make(
            num_sublayers, block_size, "cpu", dtype, block_storage=storage, **options
        )
        trace = Trace()
        _, held = run_and_keep(network, x, trace)
        site_of = {s.index: s for s in network.attn_res.plan(dtype=dtype).sites}
        expected = [quantize(x, storage)]
        for first in range(0, num_sublayers, block_size):
            outputs = trace.outputs[first : first + block_size]
            partial = None
            for output in outputs[:-1]:
                partial = output if partial is None else partial + output
            terms = [outputs[-1]] if partial is None else [partial, outputs[-1]]
            reader = site_of.get(first + len(outputs))
            if len(terms) == 2 and reader is not None and reader.promotes:
                terms = [terms[0] + terms[1]]  # a sum that its site reads, in the stream's dtype
            expected.append(quantize(terms, storage))
        assert len(held) in (len(expected), len(expected) - 1)
        for ours, wanted in zip(held, expected, strict=False):
            assert torch.equal(ours.values.float(), wanted.values.float())
            assert torch.equal(ours.scale, wanted.scale)


@every_layout
@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("one_thread")
def test_network(storage: str, layout: tuple[int, int, dict], dtype: torch.dtype) -> None:
    """Output and every gradient against the formulas over dequantised copies.

    Of several networks together, for an error is one draw of a noise that runs through all
    sublayers after it. On one thread: PyTorch's products round by their threads, and float8 then
    falls elsewhere.
    """
    num_sublayers, block_size, options = layout

    def draw() -> tuple[dict[str, Tensor], ...]:
        """Of one network: from the stream, from the functional form, exact, by the formulas."""
        network, x, cotangent = make(
            num_sublayers, block_size, "cpu", dtype, dim=144, block_storage=storage, **options
        )
        plan = network.attn_res.plan(dtype=dtype)
        y, held = run_and_keep(network, x)
        kept = list(held)
        ours = gradients(y, tensors_of(network, x), cotangent)
        ours["y"] = y.detach()

        def reference(wide: torch.dtype) -> dict[str, Tensor]:
            copy = Network(num_sublayers, block_size, dim=144).to(wide)
            copy.load_state_dict(network.state_dict())
            leaf = x.detach().to(wide).requires_grad_()
            found = with_stored_blocks(copy, leaf, kept, plan)
            grads = gradients(found, tensors_of(copy, leaf), cotangent.to(wide), allow_unused=True)
            return {
                n: g if g is not None else torch.zeros_like(t)
                for (n, g), t in zip(grads.items(), tensors_of(copy, leaf).values(), strict=True)
            } | {"y": found.detach()}

        exact, by_formulas = reference(torch.float64), reference(dtype)
        y = network(x, functional=True)
        assert torch.equal(y, ours["y"])
        found = gradients(y, tensors_of(network, x), cotangent, allow_unused=True)
        found = {n: torch.zeros_like(exact[n]) if g is None else g for n, g in found.items()}
        plain = Network(num_sublayers, block_size, dim=144).to(dtype)
        plain.load_state_dict(network.state_dict())
        if num_sublayers > block_size:
            assert not torch.equal(plain(x), y)
        return ours, found | {"y": y.detach()}, exact, by_formulas

    ours, functional, exact, by_formulas = map(
        joined, zip(*(draw() for _ in range(12)), strict=True)
    )
    assert_gradients(ours, exact, by_formulas)
    assert_gradients(functional, exact, by_formulas)


def joined(draws: tuple[dict[str, Tensor], ...]) -> dict[str, Tensor]:
    """What several networks have of a name, end to end."""
    return {name: torch.cat([draw[name].flatten() for draw in draws]) for name in draws[0]}


@every_layout
@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_however_it_is_run(
    storage: str, layout: tuple[int, int, dict], dtype: torch.dtype
) -> None:
    """Checkpointed, with phase 1 kept, and once more."""
    num_sublayers, block_size, options = layout
    network, x, cotangent = make(
        num_sublayers, block_size, "cpu", dtype, dropout=0.1, block_storage=storage, **options
    )

    def run(**given) -> dict[str, Tensor]:
        torch.manual_seed(5)
        y = network(x, **given)
        return gradients(y, tensors_of(network, x), cotangent, allow_unused=True) | {"y": y}

    def known(found: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value for name, value in found.items() if value is not None}

    functional = known(run(functional=True))
    assert_equal(known(run(functional=True, checkpoint=True)), functional)
    expected = known(run())
    assert torch.equal(functional["y"], expected["y"])
    assert_equal(known(run()), expected)
    assert_equal(known(run(checkpoint=True)), expected)
    for keep in ("all", "last"):
        network.attn_res.keep_phase1 = keep
        assert_equal(known(run()), expected)
        assert_equal(known(run(checkpoint=True)), expected)


@every_mode
def test_inference_is_the_forward_of_training(storage: str) -> None:
    network, x, _ = make(12, 4, "cpu", torch.bfloat16, block_storage=storage, forms="two_phase")
    network.attn_res._inference_plan = network.attn_res._training_plans[torch.bfloat16]
    y = network(x)
    with torch.no_grad():
        assert torch.equal(network(x), y)


@every_mode
def test_stochastic_rounding_beside_it(storage: str) -> None:
    """The last sum of a block is rounded to bfloat16, then stored."""
    network, x, cotangent = make(
        9, 3, "cpu", torch.bfloat16, block_storage=storage, stochastic_rounding=3
    )
    runs = []
    for given in ({}, {"checkpoint": True}, {"functional": True}):
        assert network.attn_res.rounding_seed is not None
        network.attn_res.rounding_seed[1] = 4
        y = network(x, **given)
        runs.append(gradients(y, tensors_of(network, x), cotangent) | {"y": y})
    assert_equal(runs[0], runs[1])
    assert torch.equal(runs[0]["y"], runs[2]["y"])


# -------------------------------------------------------------------------------- memory, plans


def saved_bytes(storage: str | None, dtype: torch.dtype, checkpoint: bool) -> int:
    network = Network(24, 6, dim=256, block_storage=storage).to(dtype)
    x = torch.randn(2, 64, 256).to(dtype).requires_grad_()
    with large_saved(x.numel()) as saved:
        y = network(x, checkpoint=checkpoint)
    assert y.requires_grad
    return sum(saved.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_stored_blocks_take_less_memory(dtype: torch.dtype, checkpoint: bool) -> None:
    """Of 24 sublayers in blocks of 6, three block sums are kept in the storage mode.

    The fourth is the running sum that the output's site reads; the embedding is kept twice, as it
    came for the first block, which reads it alone, and stored for the others.
    """
    values = 2 * 64 * 256
    plain = saved_bytes(None, dtype, checkpoint)
    for storage, size in (("float16", 2), ("float8", 1)):
        ours = saved_bytes(storage, dtype, checkpoint)
        assert plain - ours == values * (3 * (dtype.itemsize - size) - size), storage


@every_mode
@pytest.mark.parametrize("training", [True, False])
def test_plan_counts_the_bytes_of_stored_blocks(storage: str, training: bool) -> None:
    """Phase 1 reads the stored numbers, in the backward twice more; a block is written so."""
    e, size = 2, 2 if storage == "float16" else 1
    plain = BlockAttnRes(12, 8, 4, forms="two_phase").plan()
    assert [(g.num_sources, g.two_phase) for g in plain.groups] == [(1, 0), (2, 1), (3, 1)]
    costs = BlockAttnRes(12, 8, 4, block_storage=storage).plan(training=training).costs
    plain = dataclasses.replace(plain, costs=dataclasses.replace(costs, source_bytes=None))
    ours = dataclasses.replace(plain, costs=costs)
    reads = (3 if training else 1) * (2 + 3) * (size - e)
    # The embedding is read and written; the last addition of a block writes it as it is stored.
    writes = (e + size) + 2 * (size - e)
    assert ours.bytes == plain.bytes + reads + writes
    assert f"{e}-byte values" in str(ours)
    assert f"{size}-byte blocks" in str(ours)
    assert "blocks of 4;" in str(plain)
    assert "byte blocks" not in str(plain)


# ------------------------------------------------------------------------------------- overflow


def test_an_unscaled_float16_sum_overflows_where_a_scaled_block_does_not() -> None:
    outputs = torch.full((3, 8), 40000.0)

    def run(dtype: torch.dtype, storage: str | None) -> Tensor:
        stream = BlockAttnRes(4, 8, 2, block_storage=storage).start(torch.randn(3, 8).to(dtype))
        for _ in range(4):
            stream.sublayer(lambda x: outputs.to(dtype) + 0 * x)
        return stream.finish()

    with check_finite():
        for storage in MODES:
            assert run(torch.float32, storage).isfinite().all()
            assert run(torch.bfloat16, storage).isfinite().all()
        with pytest.raises(FloatingPointError, match=r"float16.*overflowed here: .* 65504"):
            run(torch.float16, None)
        # Blocks are stored with scales; the running sum at the output has none.
        for storage in MODES:
            with pytest.raises(
                FloatingPointError, match=r"read of site 4: the partial sum \(float16"
            ):
                run(torch.float16, storage)


@every_mode
def test_a_block_that_is_not_finite_is_reported(storage: str) -> None:
    module = BlockAttnRes(4, 8, 2, block_storage=storage)
    stream = module.start(torch.randn(3, 8))
    bad = torch.randn(3, 8)
    bad[1, 2] = NAN
    stream.sublayer(lambda x: x)
    stream.sublayer(lambda x: bad)
    with check_finite(), pytest.raises(FloatingPointError, match="end of block 1: the block's sum"):
        stream.read()
    module = BlockAttnRes(4, 8, 2, block_storage=storage, forms=["two_phase"] * 2)
    with check_finite(), pytest.raises(FloatingPointError, match=r"the scales of sources\[0\]"):
        module.start(bad).read()


# --------------------------------------------------------------------------------------- errors

V = torch.zeros(3, 200)
Q = quantize(V)
H = quantize(V, "float16")
MADE = {"x": torch.empty(3, 200), "out": torch.empty(2, 3, 200), "lse": torch.empty(2, 3)}


def attend_quantized(source: object) -> None:
    attend_out(source, torch.zeros(2, 200), out=MADE["out"], lse=MADE["lse"])


def attend_into(values: list[Tensor], scales: list[Tensor]) -> None:
    statistics = (torch.empty(3, 2, len(values)), torch.empty(3, len(values)))
    OPS.attend_into(
        values, torch.zeros(2, 200), 1.0, EPS, MADE["out"], MADE["lse"], *statistics, scales
    )


def start(value: Tensor, **options) -> object:
    module = BlockAttnRes(4, 200, 2, block_storage="float8")
    return module.start(value, **options)


ERRORS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "unknown mode": (
        lambda: quantize(V, "int8"),
        ValueError,
        "quantize: storage is 'int8', expected one of ('float16', 'float8')",
    ),
    "unknown mode of a module": (
        lambda: BlockAttnRes(4, 8, 2, block_storage="bfloat16"),
        ValueError,
        "BlockAttnRes: block_storage is 'bfloat16', expected one of ('float16', 'float8')",
    ),
    "no terms": (lambda: quantize([]), ValueError, "quantize: terms has 0 items, expected 1 to 4"),
    "many terms": (lambda: quantize([V] * 5), ValueError, "terms has 5 items, expected 1 to 4"),
    "shape of a term": (
        lambda: quantize([V, V[:2]]),
        ValueError,
        "terms[1] has shape [2, 200], expected [3, 200] like terms[0]",
    ),
    "float64": (lambda: quantize(V.double()), TypeError, "terms[0] is torch.float64, expected"),
    "no tensor": (lambda: quantize([1.0]), TypeError, "terms[0] is a float, expected a torch"),
    "float64 stream": (
        lambda: start(V.double()),
        TypeError,
        "start: embedding is torch.float64, expected torch.float32, torch.bfloat16 or",
    ),
    "float64 functional stream": (
        lambda: start(V.double(), functional=True),
        TypeError,
        "start: embedding is torch.float64, expected torch.float32, torch.bfloat16 or",
    ),
    "shape of a scale": (
        lambda: attend_quantized([QuantizedSource(Q.values, Q.scale[:2])]),
        ValueError,
        "sources[0].scale has shape [2, 2], expected [3, 1] or [3, 2]",
    ),
    "columns of a scale": (
        lambda: attend_quantized([QuantizedSource(Q.values, Q.scale.repeat(1, 2))]),
        ValueError,
        "sources[0].scale has shape [3, 4], expected [3, 1] or [3, 2]",
    ),
    "dtype of a scale": (
        lambda: attend_quantized([QuantizedSource(Q.values, Q.scale.float())]),
        TypeError,
        "sources[0].scale is torch.float32, expected torch.uint8, the bits of float8_e8m0fnu",
    ),
    "dtype of the numbers": (
        lambda: attend_quantized([QuantizedSource(V.bfloat16(), Q.scale)]),
        TypeError,
        "sources[0].values is torch.bfloat16, expected torch.float16 or torch.float8_e4m3fn",
    ),
    "two modes": (
        lambda: attend_quantized([Q, H]),
        TypeError,
        "sources[1] is torch.float16 but sources[0] is torch.float8_e4m3fn",
    ),
    "with and without": (
        lambda: attend_quantized([Q, V]),
        TypeError,
        "sources[1] is a Tensor but sources[0] is a QuantizedSource, expected one storage mode",
    ),
    "numbers without scales": (
        lambda: attend_into([Q.values], []),
        RuntimeError,
        "sources[0] is float8_e4m3 but source_scales is empty, expected 1 items of shape [3, 1] or "
        "[3, 2]",
    ),
    "number of scales": (
        lambda: attend_into([Q.values] * 2, [Q.scale]),
        RuntimeError,
        "source_scales has 1 items, expected 2, one for each source, or none",
    ),
    "scales of two kinds": (
        lambda: attend_into([Q.values] * 2, [Q.scale, Q.scale[:, :1].contiguous()]),
        RuntimeError,
        "source_scales[1] has shape [3, 1], expected that of source_scales[0], [3, 2]",
    ),
    "packed without sources": (
        lambda: attend(QuantizedSource(Q.values[0], Q.scale[0]), torch.zeros(2, 200)),
        ValueError,
        "attend: sources.values has shape [200], expected packed [N, ..., D], or a list of",
    ),
    "shape of a quantised source": (
        lambda: attend([Q, quantize(V[:2])], torch.zeros(2, 200)),
        ValueError,
        "attend: sources[1] has shape [2, 200], expected [3, 200] like sources[0]",
    ),
    "two modes with gradients": (
        lambda: read(torch.zeros(200), sources=[Q, H]),
        TypeError,
        "read: sources[1] is torch.float16 but sources[0] is torch.float8_e4m3fn",
    ),
    "quantised beside values": (
        lambda: read(torch.zeros(200), sources=[V, H]),
        TypeError,
        "read: sources[1] is a QuantizedSource but sources[0] is a Tensor, expected one storage",
    ),
    "a scale of another shape, with gradients": (
        lambda: attend([QuantizedSource(Q.values, Q.scale[:2])], torch.zeros(2, 200)),
        ValueError,
        "attend: sources[0].scale has shape [2, 2], expected [3, 1] or [3, 2]",
    ),
    "a rounded mixture": (
        lambda: read(torch.zeros(200), sources=[Q], norm=True, round_mix=True),
        ValueError,
        "read: round_mix was given with quantised sources, expected none: flash_attn_res.inference",
    ),
    "the mixture": (
        lambda: read(torch.zeros(200), sources=[Q], return_mix=True),
        ValueError,
        "read: return_mix was given with quantised sources",
    ),
    "updates": (
        lambda: read(torch.zeros(200), sources=[Q], update=[V, V]),
        ValueError,
        "read: two updates was given with quantised sources",
    ),
    "a gradient where there is none": (
        lambda: attend_quantized([quantize(V.clone().requires_grad_())]),
        RuntimeError,
        "attend_out: an input requires a gradient, which this operation does not have",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    call, kind, message = ERRORS[case]
    with pytest.raises(kind, match=re.escape(message)):
        call()
