"""The forms of the forward of `read` on the same numbers: many tokens at once, and few.

With many tokens the next one's rows are copied ahead where the call is a usual one, a thread has
two, three or four chunks of every row where that is faster, with few one, and very few are spread
over more threads. A token has the same bits whichever form serves it, so slices of the call must
give exactly what the whole call gives.
"""

from __future__ import annotations

import dataclasses
import itertools

import native
import pytest
import seen
import torch
from torch import Tensor

pytestmark = pytest.mark.skipif(
    native.library_path() is None,
    reason="no shared library: build with BUILD_SHARED_LIBS=ON or set FLASH_ATTN_RES_LIBRARY",
)

# Tokens of slices, in turn: thinly split up to 32, one chunk a thread up to 128, else as many have
# them.
FEW = (1, 30, 100, 200)


@dataclasses.dataclass(frozen=True)
class Site:
    D: int
    sources: int = 0
    site: bool = False  # a phase-1 result and a partial sum
    updates: int = 0
    norm: bool = False
    round_mix: bool = False
    mix: bool = False
    key_dim: int | None = None
    storage: torch.dtype = torch.bfloat16
    T: int = 2201
    gap: int = 0  # elements between rows
    weight: torch.dtype = torch.float32

    @property
    def ahead(self) -> bool:
        """Whether the next token's rows are copied ahead."""
        terms = self.sources + 2 * int(self.site)
        multiprocessors = torch.cuda.get_device_properties("cuda").multi_processor_count
        least = 1 if terms > 2 else 16 if self.updates else 3
        return (
            not (self.mix or self.round_mix or self.key_dim)
            and self.updates <= int(self.norm)
            and terms <= 10
            and least * multiprocessors <= self.T
            and any(self.D % width == 0 for width in (512, 768))
        )


SITES = [
    # Blocks of one and two to a multiprocessor, and widths that leave lanes idle.
    *(
        Site(D=D, sources=N, norm=norm)
        for D in (7680, 7688, 8192, 9728, 9736)
        for N in (3, 4)
        for norm in (False, True)
    ),
    Site(D=8192, sources=2, site=True, norm=True, mix=True),
    Site(D=8192, sources=4, norm=True, key_dim=6401, round_mix=True),
    Site(D=8192, sources=3, storage=torch.float16, gap=8),
    Site(D=8192, sources=4, norm=True, T=528),
    *(
        Site(D=D, sources=N, norm=norm)
        for D in (6144, 6152, 7168, 7176, 7680, 7688)
        for N in (5, 7, 8)
        for norm in (False, True)
    ),
    Site(D=7168, sources=6, norm=True, round_mix=True, mix=True),
    Site(D=7168, sources=7, norm=True, key_dim=512),
    Site(D=7168, sources=7, key_dim=6401),
    Site(D=7168, sources=4, site=True, updates=1, norm=True),
    Site(D=7168, sources=6, site=True, updates=2, norm=True),
    Site(D=7168, sources=7, norm=True, storage=torch.float16),
    Site(D=7168, sources=7, norm=True, gap=8),
    Site(D=7168, sources=8, norm=True, T=528),
    Site(D=7168, sources=8, norm=True, T=529),
    Site(D=7168, sources=9, norm=True),
    # A thread with one, two, three and four chunks; one, three and more warps a token.
    *(
        Site(D=D, sources=N, norm=norm)
        for D in (1024, 1536)
        for N in (2, 4)
        for norm in (False, True)
    ),
    *(Site(D=D, site=True, updates=u) for D in (1000, 2304, 3072) for u in (0, 1)),
    *(Site(D=D, sources=1, site=True, updates=u) for D in (1536, 2304, 4096) for u in (0, 1)),
    *(Site(D=D, site=True, updates=2, norm=True) for D in (1024, 2304, 3584, 5000)),
    Site(D=2304, site=True, updates=1, norm=True, key_dim=500, round_mix=True, mix=True),
    Site(D=4096, site=True, norm=True, key_dim=4000, storage=torch.float16, gap=8),
    Site(D=3072, sources=6, norm=True, gap=8),
    *(Site(D=D, sources=10, norm=True) for D in (1024, 2304, 4096)),
    *(Site(D=D, sources=4, norm=True) for D in (2048, 5120, 8192)),
    *(Site(D=D, site=True, T=4001) for D in (2304, 7168)),
    *(Site(D=D, site=True, updates=1, norm=True, T=4001) for D in (2048, 2304, 7168)),
    Site(D=2304, sources=16),
    # Rows copied ahead: every form, with the fewest and the most terms, several bands of blocks,
    # a last band with a token for some of its blocks alone.
    *(
        Site(D=D, sources=N, norm=norm, T=T)
        for D, T in ((512, 9001), (768, 4001), (1024, 7001))
        for N in (1, 2, 3, 5, 8, 9)
        for norm in (False, True)
    ),
    *(Site(D=2304, sources=N, norm=norm) for N in (1, 6, 7, 9, 10) for norm in (False, True)),
    *(Site(D=D, sources=N, norm=True) for D in (3584, 5120, 8192) for N in (1, 6, 9, 10)),
    *(Site(D=D, site=True, updates=1, norm=True, T=2112) for D in (768, 1024, 1536, 5120, 8192)),
    *(
        Site(D=D, sources=N, site=True, updates=1, norm=True)
        for D in (1024, 1536, 2304, 4096, 7168, 8192)
        for N in (1, 2, 3, 5, 7, 8)
    ),
    # A token or two for each multiprocessor.
    *(
        Site(D=D, sources=N, norm=norm, T=T)
        for D, T in ((1024, 200), (7168, 150), (7168, 300))
        for N in (3, 4, 6, 9)
        for norm in (False, True)
    ),
    *(
        Site(D=D, sources=6, site=True, updates=1, norm=True, T=T)
        for D, T in ((7168, 150), (2304, 500))
    ),
    Site(D=2048, sources=8, storage=torch.float16, norm=True, weight=torch.float16, gap=8),
    Site(D=2048, site=True, updates=1, norm=True, storage=torch.float16, T=8001),
    Site(D=2048, site=True, norm=True, weight=torch.bfloat16, T=20001),
]


@pytest.mark.parametrize("site", SITES, ids=str)
def test_many_tokens_have_the_bits_of_few(site: Site) -> None:
    T, D = site.T, site.D
    K = site.sources + 2 * int(site.site)
    R = site.key_dim or D
    generator = torch.Generator("cuda").manual_seed(D * 100 + site.sources)

    def placed(values: Tensor) -> Tensor:
        view = torch.full((T, D + site.gap), 777.0, dtype=site.storage, device="cuda")[:, :D]
        view.copy_(values)
        return view

    def row() -> Tensor:
        return placed(torch.randn(T, D, device="cuda", generator=generator))

    rows: dict = {"sources": [row() for _ in range(site.sources)]} if site.sources else {}
    if site.site:
        rows |= {"phase1_out": row(), "partial": row()}
    if site.updates:
        rows["updates"] = [row() for _ in range(site.updates)]
    lse = torch.randn(1, T, device="cuda", generator=generator)
    query = torch.randn(1, R, device="cuda", generator=generator) / R**0.5
    weight = torch.rand(1, D, device="cuda", generator=generator) + 0.5
    weight = weight.to(site.weight)

    def results() -> dict[str, Tensor]:
        def poisoned(*shape: int) -> Tensor:
            return torch.full(shape, float("nan"), device="cuda")

        out = {"x": placed(poisoned(T, D))}
        if site.updates:
            out["partial_out"] = placed(poisoned(T, D))
        if site.mix:
            out["mix"] = placed(poisoned(T, D))
        out |= {name: poisoned(T, K) for name in ("logits", "inv_rms", "probs")}
        if site.norm:
            out["mix_inv_rms"] = poisoned(1, T)
        return out

    def read(first: int, last: int, out: dict[str, Tensor]) -> None:
        def cut(tensor: Tensor) -> Tensor:
            return tensor[first:last] if tensor.shape[0] == T else tensor[:, first:last]

        given = {
            name: [cut(v) for v in value] if isinstance(value, list) else cut(value)
            for name, value in rows.items()
        }
        if site.site:
            given["phase1_lse"] = cut(lse)
        if site.norm:
            given |= {"norm_weight": weight, "mix_rounding": int(site.round_mix)}
        native.call(
            "read",
            **given,
            query=query,
            scale=0.7,
            norm=int(site.norm),
            **{name: cut(value) for name, value in out.items()},
        )

    many, few, again = results(), results(), results()
    # By name: to fall back would show in the time alone.
    kernels = seen.kernels_of(lambda: read(0, T, many))
    if kernels is not None:
        assert any("read_ahead_kernel" in name for name in kernels) == site.ahead, kernels
    first = 0
    for size in itertools.cycle(FEW):
        if first >= T:
            break
        read(first, min(first + size, T), few)
        first += size
    read(0, T, again)
    for name, value in many.items():
        assert torch.isfinite(value).all(), name
        assert torch.equal(value, few[name]), name
        assert torch.equal(value, again[name]), f"{name} differs when run again"
    if not site.updates:
        return
    # In place of the partial sum.
    in_place = {**results(), "partial_out": rows["partial"]}
    read(0, T, in_place)
    for name, value in many.items():
        assert torch.equal(value, in_place[name]), f"{name} differs in place"


@pytest.mark.parametrize("T", [1, 40, 150, 2200])
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("N", "D", "R"),
    [
        (1, 2048, 2048),
        (2, 768, 700),
        (4, 2048, 2048),
        (8, 2304, 2304),
        (10, 7168, 7168),
        (9, 1000, 1000),
    ],
)
def test_attend_with_one_query_is_a_read(
    N: int, D: int, R: int, storage: torch.dtype, T: int
) -> None:
    sources = [torch.randn(T, D, device="cuda").to(storage) for _ in range(N)]
    query = torch.randn(1, R, device="cuda") / R**0.5

    def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(shape, float("nan"), dtype=dtype, device="cuda")

    def results() -> dict[str, Tensor]:
        statistics = {name: poisoned(T, N) for name in ("logits", "inv_rms", "probs")}
        return {"x": poisoned(T, D, dtype=storage), **statistics}

    given = {"sources": sources, "scale": 0.7, "eps": 1e-5}
    read, attend, lse = results(), results(), poisoned(1, T)
    native.call("read", **given, query=query, **read)
    out = [attend["x"]]
    statistics = {name: value for name, value in attend.items() if name != "x"}
    kernels = seen.kernels_of(
        lambda: native.call("attend", **given, queries=query, out=out, lse=lse, **statistics)
    )
    if kernels is not None:
        assert len(kernels) == 1, kernels
        assert any(name in next(iter(kernels)) for name in ("read_ahead", "read_rows")), kernels
    for name, value in read.items():
        assert torch.isfinite(value).all(), name
        assert torch.equal(value, attend[name]), name
    exact = read["logits"].double().logsumexp(1)
    torch.testing.assert_close(lse[0].double(), exact, rtol=1e-6, atol=1e-6)
