"""Quantised sources on CUDA: what quantize makes, and attend and read over it.

A quantised source stands for values that float64 holds exactly: the double-precision reference on
those values is the oracle. Rows that are aligned to 16 bytes go to the Hopper kernels where there
are any, the same numbers in misaligned rows to the general ones.
"""

from __future__ import annotations

import functools
import itertools
import random

import pytest
import seen
import torch
from torch import Tensor

from flash_attn_res import BlockAttnRes, QuantizedSource, attend, quantize, read

OPS = torch.ops.flash_attn_res
EPS = 1e-6
STORAGE = [("float8", True), ("float8", False), ("float16", False), ("float16", True)]

# N, S, T, D: tiles of sources and queries on both sides of their edges, one to eight CTAs a token,
# slices that begin inside a group of 128 columns, widths that only the general kernels take.
SHAPES = [
    (4, 8, 133, 2048),
    (8, 24, 97, 7168),
    (10, 6, 101, 2304),
    (8, 1, 65, 2048),
    (8, 4, 200, 2048),
    (2, 3, 64, 1024),
    (3, 9, 77, 272),
    (7, 16, 50, 4096),
    (9, 17, 41, 5120),
    (16, 24, 33, 1024),
    (5, 4, 1, 8192),
    (4, 12, 300, 80),
    (3, 5, 40, 100),
    (1, 2, 9, 1),
    # Few queries over few sources: teams with several tokens, warps that have columns to spare.
    (8, 1, 1300, 2304),
    (7, 2, 700, 896),
    (3, 3, 301, 2064),
    (6, 1, 555, 7168),
    (8, 2, 290, 8192),
    (5, 4, 290, 5120),
    (4, 1, 4100, 512),
    (8, 4, 131, 48),
    # One query, of float16 a read: few tokens and many, rows that are copied ahead and others.
    (1, 1, 401, 2048),
    (9, 1, 7, 1000),
    (10, 1, 450, 1280),
    (10, 1, 400, 7168),
]


def misaligned(tensor: Tensor) -> Tensor:
    """The same numbers, each row one element past an aligned address."""
    *lead, dim = tensor.shape
    room = torch.empty(*lead, dim + 16, dtype=tensor.dtype, device=tensor.device)
    view = room[..., 1 : 1 + dim]
    view.copy_(tensor)
    return view


def relative(ours: Tensor, exact: Tensor) -> float:
    assert torch.isfinite(ours).all()
    return ((ours.cpu().double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize(("storage", "by_group"), STORAGE)
def test_quantize_gives_the_bits_of_the_cpu(storage: str, by_group: bool) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    for tokens, dim in itertools.product((1, 7, 300), (1, 8, 100, 128, 136, 2048, 7168)):
        terms = []
        for _ in range(random.randint(1, 4)):
            term = torch.randn(tokens, dim) * 10.0 ** random.uniform(-3, 3)
            term[0] = 0
            term = term.to(random.choice(dtypes))
            terms.append(misaligned(term) if random.random() < 0.3 else term)
        if dim > 200 and tokens > 1:
            terms[0][1, 5] = float("inf")
            terms[0][1, 150] = float("nan")
        on_cpu = quantize(terms, storage, by_group=by_group)
        on_gpu = quantize([term.cuda() for term in terms], storage, by_group=by_group)
        assert torch.equal(on_gpu.scale.cpu(), on_cpu.scale), (tokens, dim)
        finite = on_cpu.dequantize().isfinite()
        assert torch.equal(on_gpu.dequantize().isfinite().cpu(), finite)
        ours, theirs = on_gpu.values.cpu().float(), on_cpu.values.float()
        assert torch.equal(ours[finite], theirs[finite]), (tokens, dim)


def forward(
    sources: list[QuantizedSource], queries: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, dim = sources[0].values.shape
    num_queries, num_sources = queries.shape[0], len(sources)
    out = torch.full((num_queries, tokens, dim), float("nan"), dtype=dtype, device="cuda")
    lse = torch.full((num_queries, tokens), float("nan"), device="cuda")
    logits = torch.full((tokens, num_queries, num_sources), float("nan"), device="cuda")
    inv_rms = torch.full((tokens, num_sources), float("nan"), device="cuda")
    values, scales = [s.values for s in sources], [s.scale for s in sources]
    OPS.attend_into(values, queries, 0.9, EPS, out, lse, logits, inv_rms, scales)
    return out, lse, logits, inv_rms


def backward(
    sources: list[QuantizedSource],
    queries: Tensor,
    dout: Tensor,
    statistics: tuple[Tensor, Tensor, Tensor],
    dlse: Tensor,
    gate: Tensor,
    before: list[Tensor],
) -> tuple[list[Tensor], Tensor]:
    dsources = [b.clone() for b in before]
    dqueries = torch.full_like(queries, float("nan"))
    values, scales = [s.values for s in sources], [s.scale for s in sources]
    OPS.attend_backward_into(
        *(dout, dlse, gate, values, queries, *statistics, 0.9, dsources, True, dqueries, False),
        scales,
    )
    return dsources, dqueries


@pytest.mark.parametrize(("storage", "by_group"), STORAGE)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "N{}-S{}-T{}-D{}".format(*s))
def test_attend_over_quantised_sources(
    shape: tuple[int, int, int, int], storage: str, by_group: bool
) -> None:
    num_sources, num_queries, tokens, dim = shape
    raw = [torch.randn(tokens, dim, device="cuda") * 2.0**n for n in range(num_sources)]
    sources = [quantize(value, storage, by_group=by_group) for value in raw]
    shifted = [QuantizedSource(misaligned(s.values), s.scale) for s in sources]
    queries = torch.randn(num_queries, dim, device="cuda") / dim**0.5
    dtype = random.choice([torch.bfloat16, torch.bfloat16, torch.float32])
    dout = torch.randn(num_queries, tokens, dim, device="cuda").to(dtype)
    dlse = torch.randn(num_queries, tokens, device="cuda")
    gate = torch.rand(num_queries, tokens, device="cuda")
    grad_dtype = random.choice([torch.bfloat16, torch.float32])
    before = [torch.randn(tokens, dim, device="cuda").to(grad_dtype) for _ in sources]

    exact_sources = [s.dequantize(torch.float64).cpu() for s in sources]
    exact_queries = queries.cpu().double()
    out, lse, logits, inv_rms = OPS.attend(exact_sources, exact_queries, 0.9, EPS, None)
    dsources, dqueries = OPS.attend_backward(
        *(dout.cpu().double(), dlse.cpu().double(), gate.cpu().double(), exact_sources),
        *(exact_queries, lse, logits, inv_rms, 0.9, True, True),
    )
    exact = {"out": out, "lse": lse, "logits": logits, "inv_rms": inv_rms, "du": dqueries}
    exact |= {
        f"dv {n}": dv + b.cpu().double()
        for n, (dv, b) in enumerate(zip(dsources, before, strict=True))
    }
    first: dict[str, Tensor] = {}
    for path, given in (("aligned", sources), ("misaligned", shifted), ("again", sources)):
        out, *statistics = forward(given, queries, dtype)
        grads, dqueries = backward(
            given, queries, dout, (statistics[0], statistics[1], statistics[2]), dlse, gate, before
        )
        results = dict(zip(("out", "lse", "logits", "inv_rms"), (out, *statistics), strict=True))
        results |= {"du": dqueries} | {f"dv {n}": dv for n, dv in enumerate(grads)}
        if path == "again":
            for name, result in results.items():
                assert torch.equal(result, first[name]), f"{name} differs between two runs"
            continue
        if path == "aligned":
            first = results
        for name, reference in exact.items():
            rounding = relative(reference.to(results[name].dtype), reference)
            error = relative(results[name], reference)
            # u and w reach the tensor cores with 11 bits: float32 buffers hold no more of them.
            slack = 5e-4 if name.startswith("dv") else 1e-5
            assert error <= 1.1 * rounding + slack, (name, path, error, rounding)


def test_every_float8_number_and_scale() -> None:
    """All numbers with scales over a wide range: exact. A NaN makes its token NaN, and no other."""
    tokens, dim = 64, 2048
    codes = torch.arange(dim, device="cuda").remainder(256)
    codes[codes.remainder(128) == 127] = 0
    values = codes.to(torch.uint8).repeat(tokens, 1)
    exponents = torch.randint(70, 170, (tokens, dim // 128), device="cuda", dtype=torch.uint8)
    values[5, 77], values[6, 2001] = 0x7F, 0xFF
    exponents[9, 3] = 255
    source = QuantizedSource(values.view(torch.float8_e4m3fn), exponents)
    for given in (source, QuantizedSource(misaligned(source.values), exponents)):
        queries = torch.zeros(3, dim, device="cuda")
        out, lse, *_ = forward([given] * 4, queries, torch.bfloat16)
        exact = source.dequantize()  # four times the same with equal weights
        bad = torch.tensor([5, 6, 9], device="cuda")
        assert lse[:, bad].isnan().all()
        assert out[:, bad].isnan().all()
        good = torch.ones(tokens, dtype=torch.bool, device="cuda")
        good[bad] = False
        for s in range(3):
            assert torch.equal(out[s, good].float(), exact[good])


@pytest.mark.parametrize(("storage", "by_group"), STORAGE)
@pytest.mark.parametrize("dim", [264, 2048, 7168])
def test_read_over_quantised_sources(dim: int, storage: str, by_group: bool) -> None:
    tokens, num_sources = 45, random.randint(1, 9)
    sources = [
        quantize(torch.randn(tokens, dim, device="cuda"), storage, by_group=by_group)
        for _ in range(num_sources)
    ]
    exact_sources = [s.dequantize(torch.float64).cpu() for s in sources]
    value = {"device": "cuda", "dtype": torch.bfloat16}
    partial, update = torch.randn(tokens, dim, **value), torch.randn(tokens, dim, **value)
    query, weight = torch.randn(dim, device="cuda") / dim**0.5, torch.randn(dim, **value)
    dx, dsum = torch.randn(tokens, dim, **value), torch.randn(tokens, dim, **value)
    terms = num_sources + 1
    x, total = torch.full_like(partial, float("nan")), torch.full_like(partial, float("nan"))
    logits = torch.full((tokens, terms), float("nan"), device="cuda")
    inv_rms, mix_inv_rms = torch.full_like(logits, float("nan")), torch.empty(tokens, device="cuda")
    values, scales = [s.values for s in sources], [s.scale for s in sources]
    OPS.read_into(
        *(None, None, values, partial, update, query, weight, 1.0, EPS, True, EPS, x, total),
        *(logits, inv_rms, mix_inv_rms, scales),
    )
    dsources = [torch.full((tokens, dim), float("nan"), device="cuda") for _ in sources]
    dpartial, dquery = torch.empty_like(partial), torch.empty_like(query)
    dweight = torch.empty_like(weight)
    OPS.read_backward_into(
        *(dx, dsum, None, values, total, query, weight, logits, inv_rms, mix_inv_rms, 1.0, True),
        *(None, None, None, dsources, False, dpartial, dquery, False, dweight, scales),
    )

    exact_total = total.cpu().double()
    wide = [t.cpu().double() for t in (query, weight, dx, dsum)]
    exact = OPS.read(
        *(None, None, exact_sources, exact_total, [], wide[0], wide[1], 1.0, EPS, True, EPS),
        *(False, False, None),
    )
    grads = OPS.read_backward(
        *(wide[2], wide[3], None, None, exact_sources, exact_total, wide[0], wide[1]),
        *(exact[3], exact[4], exact[5], 1.0, True, False, False, True, True, True, True),
    )
    torch.testing.assert_close(total.float(), (partial.float() + update.float()).bfloat16().float())
    pairs = [("x", x, exact[0]), ("logits", logits, exact[3]), ("inv_rms", inv_rms, exact[4])]
    pairs += [(f"dv {n}", dv, grads[2][n]) for n, dv in enumerate(dsources)]
    pairs += [("dpartial", dpartial, grads[3]), ("du", dquery, grads[4]), ("dg", dweight, grads[5])]
    for name, ours, reference in pairs:
        rounding = relative(reference.to(ours.dtype), reference)
        assert relative(ours, reference) <= 1.1 * rounding + 1e-5, name


@pytest.mark.parametrize(("storage", "by_group"), STORAGE)
@pytest.mark.parametrize("dim", [100, 264, 2048])
def test_gradients_of_the_functional_api(dim: int, storage: str, by_group: bool) -> None:
    """Straight through to what was quantised, with a phase-1 result and a running sum beside it."""
    tokens, num_sources = 37, 4
    drawn = [torch.randn(tokens, dim) for _ in range(num_sources + 4)]
    queries, lse, weight = torch.randn(3, dim) / dim**0.5, torch.randn(tokens), torch.randn(dim)
    dout, dlse = torch.randn(3, tokens, dim), torch.randn(3, tokens)

    def run(device: str) -> list[Tensor]:
        leaves = [t.to(device).requires_grad_() for t in (*drawn, queries, lse, weight)]
        *terms, o, partial, update, _, u, total, g = leaves
        sources = [quantize(term, storage, by_group=by_group) for term in terms]
        phase1 = attend(sources, u, scale=0.9)
        site = read(
            u[0],
            sources=sources,
            phase1=(o, total),
            partial=partial,
            update=update,
            norm_weight=g,
        )
        results = [phase1.out, phase1.lse, site.x, site.partial]
        given = [dout, dlse, dout[0], dout[1]]
        wanted = [*terms, o, partial, update, u, total, g]
        given = [t.to(device) for t in given]
        return [*(r.detach() for r in results), *torch.autograd.grad(results, wanted, given)]

    for ours, theirs in zip(run("cuda"), run("cpu"), strict=True):
        assert relative(ours, theirs.double()) < 1e-3


@pytest.mark.parametrize("storage", ["float16", "float8"])
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("functional", [False, True])
def test_stream_with_block_storage(
    storage: str, checkpoint: bool, block_size: int, functional: bool
) -> None:
    """Networks in float32 with stored blocks compute on CUDA what they compute on the CPU.

    Several together: where a sum lies between two numbers, the devices may round it to either one,
    and with float8 a draw in which that runs through all blocks is off by more than others.
    """
    layers, dim = 11, 256
    torch.manual_seed(random.randrange(2**31))
    torch.backends.cuda.matmul.allow_tf32 = False

    def draw() -> tuple[list[Tensor], list[Tensor]]:
        """Output and gradients of one network on either device."""
        module = BlockAttnRes(layers, dim, block_size, block_storage=storage)
        torch.nn.init.normal_(module.queries, std=0.2)
        matrices = [torch.randn(dim, dim) / dim**0.5 for _ in range(layers)]
        embedding, gradient = torch.randn(3, 17, dim), torch.randn(3, 17, dim)

        def run(device: str) -> list[Tensor]:
            network = BlockAttnRes(layers, dim, block_size, block_storage=storage).to(device)
            network.load_state_dict(module.state_dict())
            inputs = embedding.to(device).requires_grad_()
            weight = torch.ones(dim, device=device, requires_grad=True)
            stream = network.start(inputs, functional=functional)
            for matrix in matrices:
                at = matrix.to(device)
                stream.sublayer(lambda x, at=at: torch.tanh(x @ at), weight, checkpoint=checkpoint)
            y = stream.finish(weight)
            y.backward(gradient.to(device))
            grads = [inputs.grad, weight.grad, *(p.grad for p in network.parameters())]
            return [y.detach(), *(grad for grad in grads if grad is not None)]

        return run("cuda"), run("cpu")

    ours, theirs = zip(*(draw() for _ in range(4)), strict=True)
    for own, other in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True):
        found = relative(torch.stack(own), torch.stack(other).double())
        assert found < (5e-2 if storage == "float8" else 5e-3)


@pytest.mark.parametrize(("storage", "by_group"), STORAGE)
@pytest.mark.parametrize(("norm", "updates"), [(False, 0), (True, 0), (True, 1)])
@pytest.mark.parametrize("D", [136, 512, 1000, 2304, 2048, 4096, 7168])
@pytest.mark.parametrize("N", [1, 2, 4, 6, 9])
def test_read_over_a_stored_bank_has_the_bits_of_its_values(
    N: int, D: int, norm: bool, updates: int, storage: str, by_group: bool
) -> None:
    """Powers of two change no bit of a sum: the read over the values in float32 has the same.

    e4m3 times a power of two is a bfloat16, too. From one token to many: split over a cluster, a
    token a block, rows copied ahead.
    """
    values_as = torch.bfloat16 if storage == "float8" else torch.float32

    def row(T: int) -> Tensor:
        return torch.randn(T, D, device="cuda").bfloat16()

    query = torch.randn(D, device="cuda") / D**0.5
    weight = torch.rand(D, device="cuda") + 0.5 if norm else None
    for T in (1, 45, 150, 2200 if updates else 900):
        bank = [quantize(row(T) * 2.0**n, storage, by_group=by_group) for n in range(N)]
        partial, update = row(T), row(T) if updates else None
        results = []
        for sources, scales in (
            ([s.values for s in bank], [s.scale for s in bank]),
            ([s.dequantize(values_as) for s in bank], []),
        ):
            x, new_partial = (torch.full_like(partial, float("nan")) for _ in range(2))
            logits, inv_rms = (torch.full((T, N + 1), float("nan"), device="cuda") for _ in "ab")
            mix_inv_rms = torch.full((T,), float("nan"), device="cuda") if norm else None
            given = (None, None, sources, partial, update, query, weight, 0.9, EPS, norm, EPS)
            out = (x, new_partial if updates else None, logits, inv_rms, mix_inv_rms)
            call = functools.partial(OPS.read_into, *given, *out, scales)
            if (kernels := seen.kernels_of(call)) is not None:
                names = " ".join(kernels)
                assert ("read_ahead_kernel" in names) != ("read_rows_kernel" in names), names
                assert ("StoredRead" in names) == bool(scales), names
            results.append([result for result in out if result is not None])
        for stored, plain in zip(*results, strict=True):
            assert torch.isfinite(stored).all()
            assert torch.equal(stored, plain), T


def spread(tensor: Tensor) -> Tensor:
    """The same numbers in rows that lie apart, still at aligned addresses."""
    tokens, dim = tensor.shape
    return torch.cat([tensor, tensor.new_zeros(tokens, 16)], dim=1)[:, :dim]


def uneven(tokens: int, dim: int) -> Tensor:
    """Values whose groups of 128 columns have different scales."""
    factors = torch.exp2(torch.randint(-9, 10, (tokens, -(-dim // 128)), device="cuda"))
    return torch.randn(tokens, dim, device="cuda") * factors.repeat_interleave(128, 1)[:, :dim]


@pytest.mark.parametrize("by_group", [False, True])
@pytest.mark.parametrize("D", [136, 1000, 1280, 2048, 2304, 7168])
@pytest.mark.parametrize("N", range(1, 11))
def test_attend_with_one_query_over_float16_sources_is_a_read(
    N: int, D: int, by_group: bool
) -> None:
    """Powers of two change no bit of a sum: it has those of the read over the values in float32.

    A token has them alone and among many, and wherever its rows lie.
    """
    query = torch.randn(1, D, device="cuda") / D**0.5

    def run(sources: list[QuantizedSource]) -> tuple[Tensor, ...]:
        return forward(sources, query, torch.bfloat16)

    def one_shot(sources: list[Tensor], scales: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.full(sources[0].shape, float("nan"), device="cuda").bfloat16()
        logits, inv_rms = (torch.full((len(x), N), float("nan"), device="cuda") for _ in "ab")
        given = (None, None, sources, None, None, query[0], None, 0.9, EPS, False, EPS)
        OPS.read_into(*given, x, None, logits, inv_rms, None, scales)
        return x, logits, inv_rms

    multiprocessors = torch.cuda.get_device_properties("cuda").multi_processor_count
    many = (1 if N > 2 else 3) * multiprocessors
    for T in (1, 7, 100, 900):
        bank = [quantize(uneven(T, D), "float16", by_group=by_group) for _ in range(N)]
        values, scales = [s.values for s in bank], [s.scale for s in bank]
        for call in (functools.partial(run, bank), functools.partial(one_shot, values, scales)):
            if (kernels := seen.kernels_of(call)) is not None:
                ahead = many <= T and any(D % width == 0 for width in (512, 768))
                name = "read_ahead_kernel" if ahead else "read_rows_kernel"
                assert len(kernels) == 1, kernels
                assert all(part in next(iter(kernels)) for part in (name, "AllStored")), kernels
        results = run(bank)
        out, lse, logits, inv_rms = results
        assert all(torch.isfinite(result).all() for result in results)
        plain = one_shot([s.dequantize(torch.float32) for s in bank], [])
        for found in ((out[0], logits[:, 0], inv_rms), one_shot(values, scales)):
            for ours, theirs in zip(found, plain, strict=True):
                assert torch.equal(ours, theirs), T
        exact = logits[:, 0].double().logsumexp(1)
        torch.testing.assert_close(lse[0].double(), exact, rtol=1e-6, atol=1e-6)

        apart = run([QuantizedSource(spread(s.values), spread(s.scale)) for s in bank])
        for ours, theirs in zip(apart, results, strict=True):
            assert torch.equal(ours, theirs), T
        for size in (1, 7, 128):
            rows = slice(T - size, T)
            if size < T:
                few = run([QuantizedSource(s.values[rows], s.scale[rows]) for s in bank])
                whole = (out[:, rows], lse[:, rows], logits[rows], inv_rms[rows])
                for ours, theirs in zip(few, whole, strict=True):
                    assert torch.equal(ours, theirs), (T, size)


@pytest.mark.parametrize("T", [5, 500])
@pytest.mark.parametrize(
    ("N", "R", "dtype", "aligned", "storage"),
    [
        (11, 2048, torch.bfloat16, True, "float16"),
        (4, 2000, torch.bfloat16, True, "float16"),
        (4, 2048, torch.float16, True, "float16"),
        (4, 2048, torch.float32, True, "float16"),
        (4, 2048, torch.bfloat16, False, "float16"),
        (4, 2048, torch.bfloat16, True, "float8"),
    ],
)
def test_one_query_that_is_no_read_over_a_stored_bank(
    N: int, R: int, dtype: torch.dtype, aligned: bool, storage: str, T: int
) -> None:
    D = 2048
    bank = [quantize(uneven(T, D), storage) for _ in range(N)]
    given = bank if aligned else [QuantizedSource(misaligned(s.values), s.scale) for s in bank]
    query = torch.randn(1, R, device="cuda") / R**0.5
    kernels = seen.kernels_of(lambda: forward(given, query, dtype))
    if kernels is not None:
        assert kernels
        assert not any("read_" in name for name in kernels), kernels
