"""The PyTorch operators on the GPU: gradients against the double-precision reference, and all that
a caller of PyTorch relies on (streams, graphs, determinism, compilation, errors)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import eager
from flash_attn_res import attend, read

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "strided", "misaligned", "packed"]


def rows(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    """A random tensor [..., T, D] on the GPU."""
    *lead, dim = shape
    gap, offset = {"contiguous": (0, 0), "strided": (8, 0), "misaligned": (3, 1)}.get(
        layout, (0, 0)
    )
    flat = torch.randn(*lead, dim + gap + offset, device="cuda").to(dtype)
    return flat[..., offset : offset + dim]


def make_sources(
    count: int, tokens: int, dim: int, dtype: torch.dtype, layout: str
) -> list[Tensor]:
    if layout == "packed":  # a token-major bank
        return list(rows((tokens, count, dim), dtype, layout).unbind(1))
    return [rows((tokens, dim), dtype, layout) for _ in range(count)]


def leaves_of(tensors: list[Tensor], **kwargs: object) -> list[Tensor]:
    return [t.detach().to(**kwargs).requires_grad_() for t in tensors]


SUMMED = {"queries", "query", "key weight", "norm weight"}
"""Leaves whose gradients are sums over tokens, most of them of sums over the width."""


def compare(
    names: list[str],
    inputs: list[Tensor],
    ours,
    plain,
    ulps: float = 4.0,
    magnitudes: tuple[float, ...] = (),
) -> None:
    """Outputs and gradients of `ours` against itself in float64 on the CPU; `plain` is eager.

    `magnitudes` are those of the terms that each output sums; those of gradients are the largest
    cotangent or gradient, times |u| / rms(v) where a logit's gradient goes on to a value, times a
    random walk over tokens and width where it is a sum over both: the rule of tests/python.
    """
    own = [t.detach().requires_grad_() for t in inputs]
    exact = leaves_of(inputs, device="cpu", dtype=torch.float64)
    same = leaves_of(inputs)
    results = [ours(own), ours(exact), plain(same)]
    cotangents = [torch.randn(o.shape).to(o.dtype) for o in results[0]]
    grads = []
    for leaves, outputs in zip((own, exact, same), results, strict=True):
        grads.append(
            torch.autograd.grad(
                outputs,
                leaves,
                [c.to(o.device, o.dtype) for c, o in zip(cotangents, outputs, strict=True)],
                allow_unused=True,
            )
        )
    for i, (a, b, c) in enumerate(zip(*results, strict=True)):
        eager.assert_close_enough(
            f"output {i}",
            a.detach().cpu(),
            b.detach(),
            c.detach().cpu().double(),
            ulps,
            magnitudes[i] if i < len(magnitudes) else 0.0,
        )
    width = inputs[0].shape[-1]
    tokens = inputs[0].numel() // width
    known = [t for t in (*grads[1], *cotangents) if t is not None and t.numel()]
    largest = max((t.abs().max().item() for t in known), default=0.0)
    slope = largest_key_slope(dict(zip(names, exact, strict=True)))
    for name, a, b, c in zip(names, *grads, strict=True):
        if a is None:
            continue
        c = b if c is None else c.detach().cpu().double()
        walk = (tokens * width) ** 0.5 if name in SUMMED else 1.0
        eager.assert_close_enough(
            f"gradient of {name}", a.cpu(), b, c, 4.0, largest * max(1.0, slope) * walk
        )


def largest_key_slope(leaves: dict[str, Tensor]) -> float:
    """Largest |u| / rms(v): what a logit's gradient is multiplied by on its way to a value."""
    values = [t.detach() for n, t in leaves.items() if n not in SUMMED and t.dim() > 1]
    queries = [t.detach() for n, t in leaves.items() if n in ("query", "queries")]
    smallest = min((t.square().mean(-1).min().item() for t in values if t.numel()), default=1.0)
    largest = max((t.abs().max().item() for t in queries), default=0.0)
    return largest * (smallest + 1e-6) ** -0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_sources", [1, 2, 4, 9])
@pytest.mark.parametrize("num_queries", [1, 4, 8, 12, 24])
@pytest.mark.parametrize("dim", [96, 1024, 2304])
def test_attend(
    dtype: torch.dtype, layout: str, num_sources: int, num_queries: int, dim: int
) -> None:
    tokens = 5
    sources = make_sources(num_sources, tokens, dim, dtype, layout)
    queries = torch.randn(num_queries, dim, device="cuda") / dim**0.5
    weight = torch.rand(num_queries, dim, device="cuda") + 0.5

    def ours(leaves: list[Tensor]) -> list[Tensor]:
        *v, u, g = leaves
        result = attend(v, u, g, eps=1e-5)
        return [result.out, result.lse]

    def plain(leaves: list[Tensor]) -> list[Tensor]:
        *v, u, g = leaves
        out, lse = eager.attend(v, u * g, eps=1e-5)
        return [out, lse.float()]

    names = [f"source {n}" for n in range(num_sources)] + ["queries", "key weight"]
    # lse sums terms that add to ||g u||, of which the tensor cores take 16 bits (2^-17).
    terms = (queries * weight).norm(dim=-1).max().item()
    terms *= 2.0**6 if dtype == torch.bfloat16 else 1.0
    compare(names, [*sources, queries, weight], ours, plain, magnitudes=(0.0, terms))


CASES = ["one_shot", "merge", "advance", "kimi_k3", "first"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS[:3])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dim", [1, 2, 96, 1024, 2304, 4096, 7168, 9216])
@pytest.mark.parametrize("wide_sum", [False, True])
def test_read(
    dtype: torch.dtype, layout: str, case: str, norm: bool, dim: int, wide_sum: bool
) -> None:
    """wide_sum: the running sum is float32 beside values of 16 bits."""
    if norm and dim == 1:
        pytest.skip("one column normalised is its sign: its gradient is what cancellation leaves")
    if wide_sum and (dtype == torch.float32 or case == "one_shot"):
        pytest.skip("there is no sum of another dtype")
    tokens = 3
    count = {"one_shot": 5, "kimi_k3": 8}.get(case, 0)
    tensors = {f"source {n}": rows((tokens, dim), dtype, layout) for n in range(count)}
    if case in ("merge", "advance"):
        tensors["phase1"] = rows((tokens, dim), dtype, layout)
        tensors["lse"] = torch.randn(tokens, device="cuda")
    if case != "one_shot":
        sum_dtype = torch.float32 if wide_sum else dtype
        tensors["partial"] = rows((tokens, dim), sum_dtype, layout)
    if case in ("advance", "kimi_k3", "first"):
        tensors["update"] = rows((tokens, dim), dtype, layout)
    for name in {"partial", "update"} & tensors.keys() if "update" in tensors else ():
        # Multiples of 1/16: their sum is exact in every dtype, so that the reference, which rounds
        # it to float64, has the same. test_native.py looks at the rounding.
        tensors[name] = tensors[name].mul_(16).round_().clamp_(-64, 64).div_(16)
    tensors["query"] = torch.randn(dim, device="cuda") / dim**0.5
    if norm:
        tensors["norm weight"] = torch.rand(dim, device="cuda").to(dtype) + 0.5
    names = list(tensors)

    def arguments(leaves: list[Tensor]) -> dict[str, object]:
        named = dict(zip(names, leaves, strict=True))
        return {
            "query": named["query"],
            "phase1": (named["phase1"], named["lse"]) if "phase1" in named else None,
            "sources": [named[f"source {n}"] for n in range(count)],
            "partial": named.get("partial"),
            "norm_weight": named.get("norm weight"),
        }, [named["update"]] if "update" in named else []

    def ours(leaves: list[Tensor]) -> list[Tensor]:
        given, updates = arguments(leaves)
        result = read(**given, update=updates, norm=norm)
        return [result.x, *([result.partial] if updates else [])]

    def plain(leaves: list[Tensor]) -> list[Tensor]:
        given, updates = arguments(leaves)
        given["query"] = given.pop("query")
        x, partial, _ = eager.read(given.pop("query"), **given, updates=updates, norm=norm)
        return [x, *([partial] if updates else [])]

    compare(names, list(tensors.values()), ours, plain)


@pytest.mark.parametrize("count", [1, 2, 3, 31, 32, 33, 60, 61, 62, 64, 65, 128, 200, 257, 512])
@pytest.mark.parametrize("dim", [40, 2048])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_many_sources(count: int, dim: int, dtype: torch.dtype) -> None:
    sources = make_sources(count, 2, dim, dtype, "packed")
    query = torch.randn(dim, device="cuda") / dim**0.5
    compare(
        [f"source {n}" for n in range(count)] + ["query"],
        [*sources, query],
        lambda v: [read(v[-1], sources=v[:-1]).x],
        lambda v: [eager.read(v[-1], sources=v[:-1])[0]],
    )
    out = attend(sources, query[None]).out[0]
    assert torch.allclose(out.float(), read(query, sources=sources).x.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dim", [264, 2048, 7168])
def test_aligned_and_unaligned_kernels_agree(dim: int) -> None:
    """The same numbers, once aligned to 16 bytes and once to nothing (streamed)."""

    def step(tensors: list[Tensor]) -> list[Tensor]:
        leaves = [t.requires_grad_() for t in tensors]
        query = torch.linspace(-1, 1, dim, device="cuda").requires_grad_()
        weight = torch.linspace(0.5, 2, dim, device="cuda").requires_grad_()
        x = read(query, sources=leaves[:3], partial=leaves[3], norm_weight=weight).x
        out = attend(leaves[:3], torch.stack([query, -query])).out
        cotangents = [x.detach(), out.detach()]
        return [x, out, *torch.autograd.grad([x, out], [*leaves, query, weight], cotangents)]

    aligned = [torch.randn(9, dim, device="cuda").to(torch.bfloat16) for _ in range(4)]
    shifted = []
    for tensor in aligned:
        wide = torch.empty(9, dim + 3, device="cuda", dtype=torch.bfloat16)
        wide[:, 1 : dim + 1] = tensor
        shifted.append(wide[:, 1 : dim + 1])
    for a, b in zip(step(aligned), step(shifted), strict=True):
        scale = a.abs().max().item()
        assert (a - b).abs().max().item() <= torch.finfo(torch.bfloat16).eps * scale


def test_single_source_is_returned_as_it_is() -> None:
    source = torch.randn(7, 264, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    queries = torch.randn(3, 264, device="cuda", requires_grad=True)
    result = attend([source], queries, return_probs=True)
    assert (result.out == source).all()
    assert (result.probs == 1).all()
    dv, du = torch.autograd.grad(result.out, [source, queries], torch.randn_like(result.out))
    assert (du == 0).all()
    assert torch.isfinite(dv).all()
    x = read(queries[0], sources=[source])
    assert (x.x == source).all()
    (du,) = torch.autograd.grad(x.x, queries, torch.randn_like(x.x))
    assert (du == 0).all()


@pytest.mark.parametrize("dim", [64, 100])
def test_no_tokens(dim: int) -> None:
    sources = [torch.empty(0, dim, device="cuda", requires_grad=True) for _ in range(3)]
    queries = torch.randn(4, dim, device="cuda", requires_grad=True)
    out = attend(sources, queries).out
    assert out.shape == (4, 0, dim)
    grads = torch.autograd.grad(out.sum(), [*sources, queries])
    assert (grads[-1] == 0).all()
    assert grads[0].shape == (0, dim)
    weight = torch.ones(dim, device="cuda", requires_grad=True)
    x = read(queries[0], sources=sources, norm_weight=weight).x
    assert x.shape == (0, dim)
    dquery, dweight = torch.autograd.grad(x.sum(), [queries, weight])
    assert (dquery == 0).all()
    assert (dweight == 0).all()


def test_nan_and_inf_stay_in_their_token() -> None:
    for bad in (float("nan"), float("inf")):
        sources = [torch.randn(4, 72, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        sources[1][2, 5] = bad
        out = attend(sources, torch.randn(2, 72, device="cuda")).out
        x = read(torch.randn(72, device="cuda"), sources=sources).x
        for result in (out[0], out[1], x):
            assert torch.isfinite(result[[0, 1, 3]]).all()
            assert torch.isnan(result[2]).all()
        # Outside the key slice a bad value reaches its own column alone.
        x = read(torch.randn(32, device="cuda"), sources=sources).x
        assert not torch.isfinite(x[2, 5])
        assert torch.isfinite(x[2, 6:]).all()


def training_step(tokens: int, dim: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Outputs and gradients of attend and read on fresh inputs."""
    generator = torch.Generator(device="cuda").manual_seed(seed)

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator).to(dtype).requires_grad_()

    sources = [random(tokens, dim) for _ in range(4)]
    queries = random(8, dim, dtype=torch.float32)
    partial, update, weight = random(tokens, dim), random(tokens, dim), random(dim)
    phase1 = attend(sources, queries)
    site = read(
        queries[1],
        phase1=(phase1.out[1], phase1.lse[1]),
        partial=partial,
        update=update,
        norm_weight=weight,
    )
    last = read(queries[2], sources=[*sources, site.partial], norm_weight=weight)
    outputs = [phase1.out, site.x, last.x]
    leaves = [*sources, queries, partial, update, weight]
    grads = torch.autograd.grad(outputs, leaves, [o.detach() * 0.1 for o in outputs])
    return [*[o.detach() for o in outputs], phase1.lse.detach(), *grads]


@pytest.mark.parametrize("dim", [2048, 7168, 100])
def test_same_bits_beside_other_work(dim: int) -> None:
    first = training_step(999, dim, torch.bfloat16)
    torch.cuda.synchronize()
    other = torch.cuda.Stream()
    noise = torch.randn(4096, 4096, device="cuda")
    for _ in range(3):
        with torch.cuda.stream(other):
            for _ in range(10):
                noise = (noise @ noise).clamp(-1, 1)
        again = training_step(999, dim, torch.bfloat16)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    torch.cuda.synchronize()


@pytest.mark.parametrize("dim", [96, 100, 2048, 7168])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_does_not_see_its_batch(dim: int, dtype: torch.dtype) -> None:
    sources = [torch.randn(777, dim, device="cuda").to(dtype) for _ in range(5)]
    queries = torch.randn(9, dim, device="cuda")
    weight = torch.rand(dim, device="cuda")
    whole = attend(sources, queries)
    whole_x = read(queries[0], sources=sources, norm_weight=weight).x
    for count in (1, 2, 7, 130, 776):
        some = [s[:count] for s in sources]
        part = attend(some, queries)
        assert torch.equal(part.out, whole.out[:, :count])
        assert torch.equal(part.lse, whole.lse[:, :count])
        assert torch.equal(read(queries[0], sources=some, norm_weight=weight).x, whole_x[:count])


@pytest.mark.parametrize("dim", [96, 100, 1024, 2304, 7168])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_reading_a_token_does_not_see_its_batch(case: str, dtype: torch.dtype, dim: int) -> None:
    tokens = 4097
    sources = make_sources(
        {"one_shot": 5, "kimi_k3": 8}.get(case, 0), tokens, dim, dtype, "contiguous"
    )
    terms = rows((3, tokens, dim), dtype, "contiguous")
    lse = torch.randn(tokens, device="cuda")
    query = torch.randn(dim, device="cuda") / dim**0.5
    weight = torch.rand(dim, device="cuda").to(dtype)

    def site(part: slice) -> list[Tensor]:
        result = read(
            query,
            phase1=(terms[0, part], lse[part]) if case in ("merge", "advance") else None,
            sources=[source[part] for source in sources],
            partial=terms[1, part] if case != "one_shot" else None,
            update=terms[2, part] if case in ("advance", "kimi_k3", "first") else None,
            norm=case != "merge",
            norm_weight=weight if case != "merge" else None,
        )
        return [result.x, *([result.partial] if result.partial is not None else [])]

    whole = site(slice(None))
    for begin, count in [(0, 1), (4096, 1), (1000, 7), (8, 128), (1, 4096)]:
        part = slice(begin, begin + count)
        for ours, expected in zip(site(part), whole, strict=True):
            assert torch.equal(ours, expected[part])


def test_caller_stream() -> None:
    expected = training_step(300, 512, torch.bfloat16)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # whatever ran on another stream would come too early
        ours = training_step(300, 512, torch.bfloat16)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(expected, ours, strict=True))


@pytest.mark.parametrize("dim", [2048, 7168, 100])
def test_cuda_graph(dim: int) -> None:
    sources = [torch.randn(64, dim, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    leaves = [s.requires_grad_() for s in sources]
    queries = torch.randn(8, dim, device="cuda", requires_grad=True)
    weight = torch.rand(dim, device="cuda", requires_grad=True)

    def step() -> list[Tensor]:
        phase1 = attend(leaves, queries)
        x = read(
            queries[0],
            phase1=(phase1.out[0], phase1.lse[0]),
            partial=leaves[0],
            update=leaves[1],
            norm_weight=weight,
        ).x
        x = x + read(queries[1], sources=leaves).x
        return [x, *torch.autograd.grad(x, [*leaves, queries, weight], x.detach())]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        with torch.no_grad():
            for source in sources:
                source.copy_(torch.randn_like(source))
        graph.replay()
        for a, b in zip(captured, step(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.large
def test_more_than_two_to_the_31_elements() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("needs 60 GiB of GPU memory")
    tokens, dim = 1_060_000, 2048  # 2.17e9 elements
    source = torch.empty(tokens, dim, device="cuda", dtype=torch.bfloat16)
    other = torch.empty_like(source)
    for begin in range(0, tokens, 100_000):
        source[begin : begin + 100_000].normal_()
        other[begin : begin + 100_000].normal_()
    queries = torch.randn(2, dim, device="cuda") / 16
    tail = slice(tokens - 5, tokens)
    result = attend([source, other], queries)
    few = attend([source[tail], other[tail]], queries)
    assert torch.equal(result.out[:, tail], few.out)
    assert torch.equal(result.lse[:, tail], few.lse)
    del result
    x = read(queries[0], sources=[source, other]).x
    assert torch.equal(x[tail], read(queries[0], sources=[source[tail], other[tail]]).x)
    del x
    saved = torch.ops.flash_attn_res.read(
        None,
        None,
        [source, other],
        None,
        [],
        queries[0],
        None,
        1.0,
        1e-6,
        False,
        1e-6,
        False,
        False,
        None,
    )
    dv = torch.ops.flash_attn_res.read_backward(
        saved[0],
        None,
        None,
        None,
        [source, other],
        None,
        queries[0],
        None,
        saved[3],
        saved[4],
        saved[5],
        1.0,
        False,
        False,
        False,
        True,
        False,
        False,
        False,
    )[2]
    few = torch.ops.flash_attn_res.read_backward(
        saved[0][tail],
        None,
        None,
        None,
        [source[tail], other[tail]],
        None,
        queries[0],
        None,
        saved[3][tail],
        saved[4][tail],
        saved[5],
        1.0,
        False,
        False,
        False,
        True,
        False,
        False,
        False,
    )[2]
    assert torch.equal(dv[1][tail], few[1])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool) -> None:
    def step(v: list[Tensor], u: Tensor, b: Tensor, g: Tensor) -> Tensor:
        phase1 = attend(v, u)
        return read(u[0], phase1=(phase1.out[0], phase1.lse[0]), partial=b, norm_weight=g).x * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for tokens in (16, 48):
        v = [
            torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for _ in range(3)
        ]
        u = torch.randn(4, 256, device="cuda", requires_grad=True)
        b = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        g = torch.rand(256, device="cuda", requires_grad=True)
        expected, got = step(v, u, b, g), compiled(v, u, b, g)
        assert torch.equal(expected, got)
        cotangent = torch.randn_like(got)
        for a, c in zip(
            torch.autograd.grad(expected, [*v, u, b, g], cotangent),
            torch.autograd.grad(got, [*v, u, b, g], cotangent),
            strict=True,
        ):
            assert torch.allclose(a, c)


def test_error_texts() -> None:
    v = torch.randn(4, 16, device="cuda")
    with pytest.raises(ValueError, match=r"sources\[1\].*\[4, 8\].*\[4, 16\]"):
        attend([v, v[:, :8]], torch.randn(1, 16, device="cuda"))
    with pytest.raises((ValueError, TypeError), match=r"device|cuda|cpu"):
        attend([v, v], torch.randn(1, 16))
    with pytest.raises(ValueError, match="eps"):
        attend([v], torch.randn(1, 16, device="cuda"), eps=0.0)
    with pytest.raises((RuntimeError, TypeError), match="float64"):
        attend([v.double()], torch.randn(1, 16, device="cuda", dtype=torch.float64))


BAD_INPUTS = {
    "no sources": lambda v, u: attend([], u),
    "other width": lambda v, u: attend([v, v[:, :8]], u),
    "other tokens": lambda v, u: attend([v, v[:3]], u),
    "wide key": lambda v, u: attend([v[:, :8]], u),
    "queries of three axes": lambda v, u: attend([v], u[None]),
    "eps": lambda v, u: attend([v], u, eps=-1.0),
    "key weight": lambda v, u: attend([v], u, u[:, :8]),
    "nothing to read": lambda v, u: read(u[0]),
    "read widths": lambda v, u: read(u[0], sources=[v], partial=v[:, :8]),
    "read query": lambda v, u: read(u, sources=[v, v]),
    "norm weight": lambda v, u: read(u[0], sources=[v, v], norm_weight=u[0, :8]),
    "norm eps": lambda v, u: read(u[0], sources=[v, v], norm=True, norm_eps=0.0),
    "phase1 lse": lambda v, u: read(u[0], phase1=(v, v[:, 0].reshape(2, 2)), partial=v),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_refused_with_the_words_of_the_cpu(case: str) -> None:
    texts = []
    for device in ("cpu", "cuda"):
        v = torch.zeros(4, 16, device=device)
        u = torch.zeros(2, 16, device=device)
        with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
            BAD_INPUTS[case](v, u)
        texts.append(f"{error.type.__name__}: {error.value}".replace("cuda:0", "cpu"))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("count", [31, 64, 129, 256])
@pytest.mark.parametrize("num_queries", [1, 33, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attend_beyond_one_tile(count: int, num_queries: int, dtype: torch.dtype) -> None:
    dim = 136
    sources = make_sources(count, 3, dim, dtype, "packed")
    queries = torch.randn(num_queries, dim, device="cuda") / dim**0.5

    def ours(leaves: list[Tensor]) -> list[Tensor]:
        result = attend(leaves[:-1], leaves[-1])
        return [result.out, result.lse]

    def plain(leaves: list[Tensor]) -> list[Tensor]:
        out, lse = eager.attend(leaves[:-1], leaves[-1])
        return [out, lse.float()]

    terms = queries.norm(dim=-1).max().item() * (2.0**6 if dtype == torch.bfloat16 else 1.0)
    names = [f"source {n}" for n in range(count)] + ["queries"]
    compare(names, [*sources, queries], ours, plain, magnitudes=(0.0, terms))


@pytest.mark.large
@pytest.mark.parametrize("dim", [2048, 2304])
def test_backward_beyond_two_to_the_31_elements(dim: int) -> None:
    if torch.cuda.get_device_properties(0).total_memory < 70 * 2**30:
        pytest.skip("needs 70 GiB of GPU memory")
    torch.cuda.empty_cache()
    tokens = 2**31 // dim + 1000
    flat = [torch.empty(tokens, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    for tensor in flat:
        for piece in tensor.split(100_000):
            piece.normal_()
    source, other, dout = flat
    queries = torch.randn(1, dim, device="cuda") / 16
    dlse = torch.randn(1, tokens, device="cuda")

    def gradients(rows: slice) -> list[Tensor]:
        leaves = [t[rows].detach().requires_grad_() for t in (source, other)]
        result = attend(leaves, queries)
        return torch.autograd.grad(
            [result.out, result.lse], leaves, [dout[None, rows], dlse[:, rows]]
        )

    whole = gradients(slice(None))
    tail = slice(tokens - 5, tokens)
    for a, b in zip(whole, gradients(tail), strict=True):
        # Which token shares a step with which may move a gradient's last bit, not more.
        assert (a[tail].float() - b.float()).abs().max() <= 2**-7 * b.float().abs().max()
        assert torch.isfinite(a[:: tokens // 1000]).all()


def test_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    v = [torch.randn(5, 64, device="cuda:1") for _ in range(3)]
    u = torch.randn(2, 64, device="cuda:1")
    with torch.cuda.device(0):
        out = attend(v, u).out
    assert out.device.index == 1
    assert torch.allclose(out.cpu(), attend([x.cpu() for x in v], u.cpu()).out, atol=1e-5)
