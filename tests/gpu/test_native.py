"""Every argument of the C API on the GPU, against the double-precision reference.

Cases are drawn at random, by seed: shapes around the chunk of eight columns and the warp's 256,
dtypes of every argument on its own, gaps between rows, addresses that are aligned to nothing but
the element, absent results, accumulation, aliasing. The reference runs on the same numbers in
float64; an eager computation in the same dtype says how large an error may be.
"""

from __future__ import annotations

import dataclasses
import random

import native
import pytest
import torch
from torch import Tensor

import eager

pytestmark = pytest.mark.skipif(
    native.library_path() is None,
    reason="no shared library: build with BUILD_SHARED_LIBS=ON or set FLASH_ATTN_RES_LIBRARY",
)

STORAGE = [torch.bfloat16, torch.float16, torch.float32]
GUARD = 777.0  # fills the gaps between rows of results


@dataclasses.dataclass
class Layout:
    """How the tensors of a case lie in memory."""

    gap: int = 0  # elements between rows
    offset: int = 0  # elements before the first row

    def place(self, values: Tensor) -> Tensor:
        """`values` [T, D] on the GPU, laid out so."""
        rows, cols = values.shape
        stride = cols + self.gap
        flat = torch.full((self.offset + rows * stride,), GUARD, dtype=values.dtype, device="cuda")
        view = flat[self.offset :].view(rows, stride)[:, :cols]
        view.copy_(values)
        return view

    def poisoned(self, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
        return self.place(torch.full((rows, cols), float("nan"), dtype=dtype))

    def check_gaps(self, view: Tensor) -> None:
        if self.gap and view.shape[0]:
            rows, cols = view.shape
            wide = view.as_strided(
                (rows, self.gap), (view.stride(0), 1), view.storage_offset() + cols
            )
            assert (wide == torch.tensor(GUARD).to(view.dtype).item()).all(), "a gap was written"


ALIGNED = Layout()
ALIGNED_LAYOUTS = [ALIGNED, Layout(gap=8), Layout(gap=16, offset=8)]
LAYOUTS = [*ALIGNED_LAYOUTS, Layout(gap=3), Layout(gap=8, offset=1)]


class Results:
    """Poisoned results on the GPU beside zeroed ones for the reference."""

    def __init__(self) -> None:
        self.gpu: dict[str, object] = {}
        self.exact: dict[str, object] = {}
        self.layouts: dict[str, Layout] = {}

    def add(
        self,
        name: str,
        rows: int,
        cols: int,
        dtype: torch.dtype,
        layout: Layout = ALIGNED,
        count: int | None = None,
        initial: list[Tensor] | None = None,
    ) -> None:
        n = 1 if count is None else count
        if initial is not None:
            ours = [layout.place(value) for value in initial]
            exact = [value.double() for value in initial]
        else:
            ours = [layout.poisoned(rows, cols, dtype) for _ in range(n)]
            exact = [torch.full((rows, cols), float("nan"), dtype=torch.float64) for _ in range(n)]
        self.layouts[name] = layout
        self.gpu[name] = ours[0] if count is None else ours
        self.exact[name] = exact[0] if count is None else exact

    def check(
        self,
        plain: dict[str, object],
        loose: dict[str, float] | None = None,
        magnitudes: dict[str, float] | None = None,
    ) -> None:
        """Against the reference, by the rule of tests/python; `loose` are ulps of the largest value
        (default 4), `magnitudes` those of the terms whose float32 sum a result is."""
        for name, result in self.gpu.items():
            ours = result if isinstance(result, list) else [result]
            exact = self.exact[name]
            exact = exact if isinstance(exact, list) else [exact]
            eager_result = plain.get(name)
            eagers = eager_result if isinstance(eager_result, list) else [eager_result] * len(ours)
            for i, (a, b, c) in enumerate(zip(ours, exact, eagers, strict=True)):
                self.layouts[name].check_gaps(a)
                c = b if c is None else c.detach().double().cpu().reshape(b.shape)
                ulps = (loose or {}).get(name, 4.0)
                magnitude = (magnitudes or {}).get(name, 0.0)
                eager.assert_close_enough(f"{name}[{i}]", a.cpu(), b, c, ulps, magnitude)


def randn(rng: random.Random, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    return torch.randn(*shape, generator=generator).to(dtype)


def doubled(value: object) -> object:
    if isinstance(value, Tensor):
        return value.double().cpu()
    return [item.double().cpu() for item in value] if isinstance(value, list) else value


def logit_magnitude(queries: Tensor, scale: float, storage: torch.dtype) -> float:
    """Of the float32 terms of a logit: a key has rms 1, so that the terms add to scale * ||u||.

    Where sources are bfloat16 the tensor cores take u as two bfloat16 numbers, 16 bits of it: its
    own rounding is 2^-17 of a term, 2^6 times that of a float32.
    """
    norm = scale * queries.double().norm(dim=-1).max().item()
    return norm * (2.0**6 if storage == torch.bfloat16 else 1.0)


def gradient_magnitude(queries: Tensor, values: list[Tensor], scale: float) -> float:
    """Of the terms of a source's gradient: scale r u and l r^2 k / R cancel for narrow keys, so
    that their size and not the result's says what float32 can resolve."""
    keys = torch.stack([eager.key_of(v.double(), queries.shape[-1]) for v in values])
    smallest = keys.square().mean(-1).min().item() if keys.numel() else 1.0
    slope = scale * queries.abs().max().item() * (smallest + 1e-6) ** -0.5
    return 4.0 * max(1.0, slope * values[0].shape[-1] ** 0.5)


def eager_statistics(
    values: list[Tensor], queries: Tensor, scale: float, eps: float
) -> dict[str, Tensor]:
    """logits, inv_rms and probs [T, ...] in float32 by the plain formulas, on the GPU."""
    v = torch.stack(values).cuda().float()  # (N,T,D)
    key = eager.key_of(v, queries.shape[-1])  # (N,T,R)
    inv_rms = torch.rsqrt(key.square().mean(-1) + eps)  # (N,T)
    logits = scale * torch.einsum("ntr,sr->tsn", key * inv_rms[..., None], queries.cuda())
    return {
        "logits": logits.flatten(1),
        "inv_rms": inv_rms.T,
        "probs": logits.softmax(-1).flatten(1),
    }


def pick_dim(rng: random.Random) -> int:
    return rng.choice([1, 2, 7, 8, 9, 16, 31, 64, 100, 248, 256, 264, 333, 512, 1032, 2048, 2304])


# --------------------------------------------------------------------------------------- attend


def attend_case(rng: random.Random, tokens: int | None = None) -> dict[str, object]:
    dim = pick_dim(rng)
    small = dim <= 333
    return {
        "T": rng.choice([1, 2, 5, 33] if small else [1, 3, 6]) if tokens is None else tokens,
        "N": rng.choice([1, 2, 3, 4, 5, 8, 9, 17] if small else [1, 3, 4, 6]),
        "S": rng.choice([1, 2, 3, 7, 8, 9, 16, 24, 33, 65] if small else [1, 4, 8, 9, 24]),
        "D": dim,
        "R": dim if rng.random() < 0.6 else rng.randint(1, dim),
        "storage": rng.choice(STORAGE),
        "layout": rng.choice(LAYOUTS),
        "scale": rng.choice([1.0, 0.7, 3.0]),
        "eps": rng.choice([1e-6, 1e-3]),
    }


@pytest.mark.parametrize("seed", range(120))
def test_attend(seed: int) -> None:
    rng = random.Random(seed)
    case = attend_case(rng)
    T, N, S, D, R = (case[k] for k in "TNSDR")
    layout, storage = case["layout"], case["storage"]
    values = [randn(rng, T, D, dtype=storage) for _ in range(N)]
    queries = randn(rng, S, R) / R**0.5
    inputs = {"scale": case["scale"], "eps": case["eps"]}

    out_dtype = storage if rng.random() < 0.6 else rng.choice(STORAGE)
    forward = Results()
    forward.add("out", T, D, out_dtype, rng.choice(LAYOUTS), count=S)
    forward.add("lse", S, T, torch.float32, rng.choice([ALIGNED, Layout(gap=3)]))
    statistics = {"logits": (T, S * N), "inv_rms": (T, N), "probs": (T, S * N)}
    wanted = {name for name in statistics if rng.random() < 0.7}
    for name in sorted(wanted):
        forward.add(name, *statistics[name], torch.float32, rng.choice([ALIGNED, Layout(gap=5)]))
    sources = [layout.place(value) for value in values]
    native.call("attend", sources=sources, queries=queries.cuda(), **inputs, **forward.gpu)
    native.call(
        "attend", sources=doubled(values), queries=queries.double(), **inputs, **forward.exact
    )
    out, lse = eager.attend([v.cuda() for v in values], queries.cuda(), **inputs)
    # Statistics are float32 whatever the storage, and so are the eager ones beside them.
    plain = eager_statistics(values, queries, **inputs)
    plain["lse"] = plain["logits"].view(T, S, N).logsumexp(-1).T
    terms = logit_magnitude(queries, case["scale"], storage)
    forward.check(
        {"out": list(out.to(out_dtype)), **plain},
        magnitudes=dict.fromkeys(("logits", "probs", "lse"), terms),
    )

    # Backward, from the reference's statistics rounded to float32: errors of the forward stay out.
    exact = Results()
    exact.add("out", T, D, torch.float32, count=S)
    for name, shape in {"lse": (S, T), "logits": (T, S * N), "inv_rms": (T, N)}.items():
        exact.add(name, *shape, torch.float32)
    native.call(
        "attend", sources=doubled(values), queries=queries.double(), **inputs, **exact.exact
    )
    saved = {name: exact.exact[name].float() for name in ("lse", "logits", "inv_rms")}
    dout_dtype = storage if rng.random() < 0.7 else rng.choice(STORAGE)
    dout = [randn(rng, T, D, dtype=dout_dtype) for _ in range(S)] if rng.random() < 0.9 else []
    gate = torch.rand(S, T) if rng.random() < 0.5 else None
    dlse = randn(rng, S, T) if rng.random() < 0.5 else None
    backward = Results()
    accumulate = rng.random() < 0.5
    dsource_dtype = storage if rng.random() < 0.6 else rng.choice(STORAGE)
    if rng.random() < 0.9:
        held = [randn(rng, T, D, dtype=dsource_dtype) for _ in range(N)] if accumulate else None
        backward.add("dsources", T, D, dsource_dtype, rng.choice(LAYOUTS), count=N, initial=held)
    if rng.random() < 0.9:
        add_queries = rng.random() < 0.5
        held = [randn(rng, S, R)] if add_queries else None
        backward.add(
            "dqueries", S, R, torch.float32, rng.choice([ALIGNED, Layout(gap=3)]), initial=held
        )
    else:
        add_queries = False
    held_sources = [v.clone() for v in backward.gpu.get("dsources", [])]
    held_queries = backward.gpu["dqueries"].clone() if "dqueries" in backward.gpu else None
    flags = {"accumulate_dsources": int(accumulate), "accumulate_dqueries": int(add_queries)}
    options = {"gate": gate, "dlse": dlse}
    native.call(
        "attend_backward",
        sources=sources,
        queries=queries.cuda(),
        scale=case["scale"],
        dout=[rng.choice(LAYOUTS).place(g) for g in dout],
        **flags,
        **backward.gpu,
        **{k: v.cuda() for k, v in saved.items()},
        **{k: v.cuda() for k, v in options.items() if v is not None},
    )
    native.call(
        "attend_backward",
        sources=doubled(values),
        queries=queries.double(),
        scale=case["scale"],
        dout=doubled(dout),
        **flags,
        **backward.exact,
        **{k: v.double() for k, v in saved.items()},
        **{k: v.double() for k, v in options.items() if v is not None},
    )

    leaves = [v.cuda().requires_grad_() for v in values]
    u = queries.cuda().requires_grad_()
    out, lse = eager.attend(leaves, u, **inputs)
    cotangent = torch.zeros_like(out)
    if dout:
        scaled = torch.stack([g.cuda().to(storage) for g in dout])
        cotangent = scaled if gate is None else scaled * gate.cuda().unsqueeze(-1).to(storage)
    dlse_cotangent = torch.zeros_like(lse) if dlse is None else dlse.cuda().to(lse.dtype)
    *dv, du = torch.autograd.grad([out, lse], [*leaves, u], [cotangent, dlse_cotangent])
    if accumulate:
        dv = [(a.to(g.dtype) + g) for a, g in zip(held_sources, dv, strict=False)]
    if add_queries:
        du = du + held_queries
    backward.check(
        {"dsources": [g.to(dsource_dtype) for g in dv], "dqueries": du},
        # A logit's gradient is a sum over D of terms of size 1, a query's a sum of those over T:
        # errors add like a random walk. A source gets a logit's gradient times |u| / rms(v).
        magnitudes={
            "dqueries": case["scale"] * max(T * D, 1) ** 0.5,
            "dsources": gradient_magnitude(queries, values, case["scale"]),
        },
    )


# ----------------------------------------------------------------------------------------- read


@pytest.mark.parametrize("seed", range(200))
def test_read(seed: int) -> None:
    rng = random.Random(10_000 + seed)
    D = rng.choice([4096, 8192, 8200]) if rng.random() < 0.05 else pick_dim(rng)
    N = rng.choice([0, 0, 1, 2, 4, 5, 9, 30, 70] if D <= 333 else [0, 1, 4, 9])
    T = rng.choice([1, 2, 5, 33] if D <= 333 else [1, 3, 6])
    check_read(rng, T, N, D, uniform=rng.random() < 0.6, aligned=seed % 2 == 1)


# The kernel that keeps rows in registers comes for 2, 4, 6, 8, 10, 12, 18 and 32 terms, and for 2,
# 4, 8 and 12 of mixed dtypes; it splits wide tokens over 2, 4 or 8 blocks. N sources and up to two
# terms more reach both sides of every one of these. With up to four terms, more than 128 tokens
# have kernels of their own.
@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("N", [0, 1, 3, 5, 7, 9, 11, 12, 16, 17, 18, 31, 32])
@pytest.mark.parametrize("D", [8, 256, 264, 520, 1032, 2048, 2304, 4104, 7168, 8192, 8200, 16392])
def test_read_in_registers(N: int, D: int, uniform: bool) -> None:
    rng = random.Random(f"{N} {D} {uniform}")
    tokens = [1, 130] if N <= 4 and D <= 2304 else [1, 2, 5]
    check_read(rng, rng.choice(tokens), N, D, uniform=uniform, aligned=True)


def check_read(rng: random.Random, T: int, N: int, D: int, *, uniform: bool, aligned: bool) -> None:
    """One random call over N sources. `uniform`: all values have one dtype. `aligned`: rows of
    whole chunks begin on 16 bytes."""
    R = D if rng.random() < 0.6 else rng.randint(1, D)
    storage = rng.choice(STORAGE)

    def dtype() -> torch.dtype:
        return storage if uniform else rng.choice(STORAGE)

    def layout() -> Layout:
        return rng.choice(ALIGNED_LAYOUTS if aligned else LAYOUTS)

    has_phase1 = rng.random() < 0.5
    has_partial = rng.random() < 0.6
    E = rng.choice([0, 1, 2])
    if not has_phase1 and N == 0 and not has_partial and E == 0:
        N = 2
    inputs: dict[str, object] = {}
    if has_phase1:
        inputs["phase1_out"] = randn(rng, T, D, dtype=dtype())
        inputs["phase1_lse"] = randn(rng, 1, T)
    if N:
        source_dtype = dtype()
        inputs["sources"] = [randn(rng, T, D, dtype=source_dtype) for _ in range(N)]
    if has_partial:
        inputs["partial"] = randn(rng, T, D, dtype=dtype())
    if E:
        inputs["updates"] = [randn(rng, T, D, dtype=dtype()) for _ in range(E)]
    summed = has_partial or E > 0
    K = int(has_phase1) + N + int(summed)
    if K > 1 or rng.random() < 0.7:
        inputs["query"] = randn(rng, 1, R) / R**0.5
    else:
        R = D
    # One column normalised is its sign: every gradient is the rest of a cancellation.
    norm = rng.random() < 0.5 and D > 1
    scalars: dict[str, object] = {
        "scale": rng.choice([1.0, 0.6]),
        "eps": 1e-6,
        "norm": int(norm),
        "norm_eps": rng.choice([1e-6, 1e-3]),
    }
    if norm and rng.random() < 0.7:
        inputs["norm_weight"] = randn(rng, 1, D, dtype=rng.choice(STORAGE))
    round_mix = norm and rng.random() < 0.4
    scalars["mix_rounding"] = int(round_mix)

    x_dtype = dtype()
    results = Results()
    results.add("x", T, D, x_dtype, layout())
    partial_dtype = dtype()
    alias = None
    if E or (has_partial and rng.random() < 0.4):
        # In place of the partial sum or of an update: same dtype, same memory.
        alias = rng.choice([None, "partial" if has_partial else None, "updates" if E else None])
        if alias == "partial":
            partial_dtype = inputs["partial"].dtype
        elif alias == "updates":
            partial_dtype = inputs["updates"][0].dtype
        results.add("partial_out", T, D, partial_dtype, layout())
    if rng.random() < 0.4:
        results.add("mix", T, D, dtype(), layout())
    for name, shape in {"logits": (T, K), "inv_rms": (T, K), "probs": (T, K)}.items():
        if rng.random() < 0.7:
            results.add(name, *shape, torch.float32, rng.choice([ALIGNED, Layout(gap=5)]))
    if norm and rng.random() < 0.7:
        results.add("mix_inv_rms", 1, T, torch.float32)

    placed = {
        name: [layout().place(v) for v in value]
        if isinstance(value, list)
        else (layout().place(value) if value.shape == (T, D) else value.cuda())
        for name, value in inputs.items()
    }
    if alias == "partial":
        results.gpu["partial_out"] = placed["partial"]
    elif alias == "updates":
        results.gpu["partial_out"] = placed["updates"][0]
    results.layouts.pop("partial_out", None)
    results.layouts["partial_out"] = ALIGNED
    native.call("read", **placed, **scalars, **results.gpu)
    reference = {name: doubled(value) for name, value in inputs.items()}
    if "partial_out" in results.gpu:
        # The reference rounds where its output does: give it the storage dtype, then widen.
        rounded = torch.empty(T, D, dtype=partial_dtype)
        total = torch.zeros(T, D, dtype=torch.float64)
        for term in [reference.get("partial"), *reference.get("updates", [])]:
            total = total if term is None else total + term
        rounded.copy_(total.float())
        results.exact["partial_out"] = rounded.double()
        reference.pop("updates", None)
        # Go on from the sum as written, itself held to `rounded` below: float32 and float64 sums
        # now and then round a value to different neighbours, which no later result can answer for.
        reference["partial"] = results.gpu["partial_out"].cpu().double()
    exact_results = {k: v for k, v in results.exact.items() if k != "partial_out"}
    if round_mix:
        exact_results.setdefault("mix", torch.empty(T, D, dtype=torch.float64))
    native.call("read", **reference, **{**scalars, "mix_rounding": 0}, **exact_results)

    plain_terms = {
        "phase1": (inputs["phase1_out"].cuda(), inputs["phase1_lse"][0].cuda())
        if has_phase1
        else None,
        "sources": [s.cuda() for s in inputs.get("sources", [])],
        "partial": inputs["partial"].cuda() if has_partial else None,
        "updates": [u.cuda() for u in inputs.get("updates", [])],
    }
    query = inputs["query"][0].cuda() if "query" in inputs else None
    weight = inputs["norm_weight"][0].cuda() if "norm_weight" in inputs else None
    x, _, h = eager.read(
        query,
        **plain_terms,
        scale=scalars["scale"],
        eps=scalars["eps"],
        norm=norm,
        norm_weight=weight,
        norm_eps=scalars["norm_eps"],
    )
    terms = (
        logit_magnitude(inputs["query"], scalars["scale"], torch.float32)
        if query is not None
        else 1.0
    )
    statistics_plain: dict[str, object] = {}
    if query is not None:
        total = reference.get("partial")
        if "partial_out" not in results.gpu and summed:  # ours adds in float32 and rounds nothing
            parts = [*([inputs["partial"]] if has_partial else []), *inputs.get("updates", [])]
            total = sum(part.float() for part in parts)
        values = [*([inputs["phase1_out"]] if has_phase1 else []), *inputs.get("sources", [])]
        values = [v.float() for v in [*values, *([total] if summed else [])]]
        plain_of = eager_statistics(values, inputs["query"], scalars["scale"], scalars["eps"])
        if has_phase1:  # its logit is given
            plain_of["logits"][:, 0] = inputs["phase1_lse"][0].cuda()
            plain_of["inv_rms"] = plain_of["inv_rms"].clone()
            if "inv_rms" in results.exact:
                plain_of["inv_rms"][:, 0] = results.exact["inv_rms"][:, 0].cuda()
            plain_of["probs"] = plain_of["logits"].softmax(-1)
        statistics_plain.update(plain_of)
    results.check(
        {"x": x.to(x_dtype), "mix": h, **statistics_plain},
        # A mixture rounded before the norm is one rounding worse than the exact one.
        {
            "mix_inv_rms": 4.0 + 2**16 * round_mix,
            "x": 12.0 if round_mix else 4.0,
        },
        magnitudes=dict.fromkeys(("logits", "probs"), terms),
    )

    # ------------------------------------------------------------------------------- backward
    terms = dict(reference)
    terms.pop("phase1_lse", None)
    terms.pop("updates", None)
    statistics = {name: torch.empty(T, K, dtype=torch.float64) for name in ("logits", "inv_rms")}
    extra = {"mix_inv_rms": torch.empty(1, T, dtype=torch.float64)} if norm else {}
    native.call(
        "read",
        **reference,
        **{**scalars, "mix_rounding": 0},
        **statistics,
        **extra,
        x=torch.empty(T, D, dtype=torch.float64),
    )
    saved = {name: value.float() for name, value in {**statistics, **extra}.items()}
    if norm:
        saved["norm_weight"] = inputs.get("norm_weight")
        saved = {k: v for k, v in saved.items() if v is not None}
    gradients: dict[str, Tensor] = {}
    if rng.random() < 0.9:
        gradients["dx"] = randn(rng, T, D, dtype=x_dtype)
    if rng.random() < 0.4:
        gradients["dmix"] = randn(rng, T, D, dtype=dtype())
    if summed and rng.random() < 0.6:
        gradients["dpartial_out"] = randn(rng, T, D, dtype=dtype())
    backward = Results()
    flags = {"accumulate_dsources": 0, "accumulate_dquery": 0, "accumulate_dnorm_weight": 0}
    held: dict[str, object] = {}
    if has_phase1:
        if rng.random() < 0.6:
            backward.add("dphase1_out", T, D, dtype(), layout())
        if rng.random() < 0.6:
            backward.add("dphase1_lse", 1, T, torch.float32)
        if rng.random() < 0.6:
            backward.add("gate", 1, T, torch.float32)
    if rng.random() < 0.5:
        backward.add("dh", T, D, dtype(), layout())
    if N and rng.random() < 0.9:
        flags["accumulate_dsources"] = int(rng.random() < 0.5)
        kind = dtype()
        if flags["accumulate_dsources"]:
            held["dsources"] = [randn(rng, T, D, dtype=kind) for _ in range(N)]
        backward.add("dsources", T, D, kind, layout(), count=N, initial=held.get("dsources"))
    alias_dpartial = False
    if summed and rng.random() < 0.9:
        alias_dpartial = "dpartial_out" in gradients and rng.random() < 0.5
        kind = gradients["dpartial_out"].dtype if alias_dpartial else dtype()
        backward.add("dpartial", T, D, kind, layout())
    if "query" in inputs and rng.random() < 0.9:
        flags["accumulate_dquery"] = int(rng.random() < 0.5)
        if flags["accumulate_dquery"]:
            held["dquery"] = [randn(rng, 1, R)]
        backward.add("dquery", 1, R, torch.float32, initial=held.get("dquery"))
    if norm and rng.random() < 0.9:
        flags["accumulate_dnorm_weight"] = int(rng.random() < 0.5)
        kind = rng.choice(STORAGE)
        if flags["accumulate_dnorm_weight"]:
            held["dnorm_weight"] = [randn(rng, 1, D, dtype=kind)]
        backward.add("dnorm_weight", 1, D, kind, initial=held.get("dnorm_weight"))

    gpu_terms = dict(placed)
    for name in ("phase1_lse", "updates", "norm_weight"):
        gpu_terms.pop(name, None)
    if summed:
        total_dtype = partial_dtype if "partial_out" in results.gpu else inputs["partial"].dtype
        gpu_terms["partial"] = layout().place(reference["partial"].to(total_dtype))
    gpu_gradients = {name: layout().place(value) for name, value in gradients.items()}
    if alias_dpartial:
        backward.gpu["dpartial"] = gpu_gradients["dpartial_out"]
        backward.layouts["dpartial"] = ALIGNED
    common = {"scale": scalars["scale"], "norm": int(norm), **flags}
    native.call(
        "read_backward",
        **gpu_terms,
        **gpu_gradients,
        **common,
        mix_rounding=int(round_mix),
        **{k: v.cuda() for k, v in saved.items()},
        **backward.gpu,
    )
    exact_terms = {k: v for k, v in terms.items() if k != "norm_weight"}
    native.call(
        "read_backward",
        **exact_terms,
        **{k: v.double() for k, v in gradients.items()},
        **common,
        **{k: v.double() for k, v in saved.items()},
        **backward.exact,
    )

    plain = eager_read_gradients(inputs, reference, gradients, scalars, norm, has_phase1, summed)
    for name, values in held.items():
        own = plain.get(name)
        if own is not None:
            plain[name] = (
                [a.cuda() + b for a, b in zip(values, own, strict=True)]
                if name == "dsources"
                else values[0].cuda() + own.reshape(values[0].shape)
            )
    if "dpartial" in backward.gpu and "dpartial_out" in gradients and "dpartial" in plain:
        plain["dpartial"] = plain["dpartial"] + gradients["dpartial_out"].cuda()
    loose: dict[str, float] = {}
    # A logit's gradient is the difference of two sums over D, a query's a sum of those over T; the
    # gradient of a norm's weight is a sum over T. With a norm both carry 1 / rms of the mixture.
    cotangent = max((g.abs().max().item() for g in gradients.values()), default=0.0)
    if norm and T:
        cotangent *= max(1.0, extra["mix_inv_rms"].max().item())
    values = [v for k in ("sources",) for v in reference.get(k, [])]
    values += [reference[k] for k in ("phase1_out", "partial") if k in reference]
    slope = 1.0
    if query is not None:
        slope = gradient_magnitude(inputs["query"], values, scalars["scale"])
    magnitudes = {
        "dquery": cotangent * scalars["scale"] * max(T * D, 1) ** 0.5,
        "dphase1_lse": cotangent * D**0.5,
        "gate": 1.0,
        "dnorm_weight": cotangent * max(T, 1) ** 0.5,
        **dict.fromkeys(("dsources", "dpartial", "dphase1_out", "dh"), cotangent * slope),
    }
    if round_mix:
        # The gradient of the rounding itself is taken as one; the eager formula has none.
        for name in backward.gpu:
            value = backward.gpu[name]
            kind = (value[0] if isinstance(value, list) else value).dtype
            mix_ulp = torch.finfo(x_dtype).eps / torch.finfo(kind).eps
            loose[name] = 8.0 * max(1.0, mix_ulp)
    backward.check(plain, loose, magnitudes)


def eager_read_gradients(
    inputs: dict[str, object],
    reference: dict[str, object],
    gradients: dict[str, Tensor],
    scalars: dict[str, object],
    norm: bool,
    has_phase1: bool,
    summed: bool,
) -> dict[str, object]:
    """Gradients of the eager formula in the dtype of the first term."""
    leaves: dict[str, object] = {}
    phase1 = None
    if has_phase1:
        leaves["dphase1_out"] = inputs["phase1_out"].cuda().requires_grad_()
        leaves["dphase1_lse"] = inputs["phase1_lse"][0].cuda().requires_grad_()
        phase1 = (leaves["dphase1_out"], leaves["dphase1_lse"])
    sources = [s.cuda().requires_grad_() for s in inputs.get("sources", [])]
    first = (
        inputs["phase1_out"].dtype
        if has_phase1
        else (sources[0].dtype if sources else reference["partial"].dtype)
    )
    if summed:
        dtype = inputs["partial"].dtype if "partial" in inputs else inputs["updates"][0].dtype
        leaves["dpartial"] = reference["partial"].to(dtype).cuda().requires_grad_()
        first = dtype if not has_phase1 and not sources else first
    if "query" in inputs:
        leaves["dquery"] = inputs["query"][0].cuda().requires_grad_()
    if "norm_weight" in inputs:
        leaves["dnorm_weight"] = inputs["norm_weight"][0].cuda().requires_grad_()
    x, _, h = eager.read(
        leaves.get("dquery"),
        phase1=phase1,
        sources=sources,
        partial=leaves.get("dpartial"),
        scale=scalars["scale"],
        eps=scalars["eps"],
        norm=norm,
        norm_weight=leaves.get("dnorm_weight"),
        norm_eps=scalars["norm_eps"],
    )
    outputs, cotangents = [], []
    for output, name in ((x, "dx"), (h, "dmix")):
        if name in gradients:
            outputs.append(output)
            cotangents.append(gradients[name].cuda().to(output.dtype))
    names = list(leaves)
    flat = [*leaves.values(), *sources]
    if not outputs or not any(o.requires_grad for o in outputs):
        return {}
    grads = torch.autograd.grad(outputs, flat, cotangents, allow_unused=True)
    found = {n: g for n, g in zip(names, grads, strict=False) if g is not None}
    if sources and all(g is not None for g in grads[len(names) :]):
        found["dsources"] = list(grads[len(names) :])
    return found
