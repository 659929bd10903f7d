"""Both ways through `read_backward` on the same numbers: the Hopper kernel and the general ones.

As in test_hopper.py, misaligned rows send a call to the general kernels. Results may take the place
of what they are computed from (`dh` of `phase1_out`, `dpartial` of `dpartial_out`), which the
training stream relies on: runs that do so must give the same bits as runs that do not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import native
import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.skipif(
    native.library_path() is None,
    reason="no shared library: build with BUILD_SHARED_LIBS=ON or set FLASH_ATTN_RES_LIBRARY",
)


@dataclasses.dataclass(frozen=True)
class Site:
    """One site: its terms, its shape, and what is asked of it."""

    T: int
    D: int
    sources: int = 0
    phase1: bool = False
    partial: bool = False
    norm: bool = False
    key_dim: int | None = None  # R
    dmix: bool = False
    accumulate: bool = False
    gradient: torch.dtype = torch.bfloat16  # of dsources
    dpartial_out: torch.dtype | None = None  # of this gradient and the next, where not of storage
    dpartial: torch.dtype | None = None
    storage: torch.dtype = torch.bfloat16

    @property
    def terms(self) -> int:
        return int(self.phase1) + self.sources + int(self.partial)


ADVANCE = {"phase1": True, "partial": True, "norm": True}
SITES = [
    # one, two, four and eight CTAs a token; one chunk of columns a lane, or two (2048, 4096, 5120,
    # 7168); lanes that lack theirs, up to a whole warp (7176)
    *(
        Site(T=301, D=D, **ADVANCE)
        for D in (8, 256, 264, 512, 520, 896, 1800, 2048, 2304, 2560, 2568, 4096, 5120, 7168, 7176)
    ),
    *(Site(T=301, D=D, **ADVANCE) for D in (8192, 16384)),
    Site(T=301, D=1800, dmix=True, **ADVANCE),
    # two chunks a lane: dmix, slices of the keys, a CTA that lacks columns of its last chunk
    *(Site(T=301, D=D, dmix=True, **ADVANCE) for D in (2048, 7168)),
    Site(T=301, D=2048, phase1=True, partial=True, dmix=True, key_dim=1280),
    *(Site(T=301, D=D, key_dim=D - 1000, **ADVANCE) for D in (4096, 7160)),
    Site(T=301, D=7160, dmix=True, **ADVANCE),
    Site(T=301, D=7176, dmix=True, phase1=True, partial=True),
    Site(T=200, D=1800, sources=5, norm=True, dmix=True, key_dim=1280),
    Site(T=1, D=7168, **ADVANCE),
    Site(T=2000, D=7168, **ADVANCE),
    Site(T=3000, D=2048, phase1=True, partial=True),
    Site(T=2500, D=2304, phase1=True, partial=True, dmix=True),
    Site(T=300, D=2048, phase1=True, norm=True),
    Site(T=300, D=7168, phase1=True, norm=True, dmix=True),
    # the first block of a network and a Kimi K3 site, into buffers of either dtype
    Site(T=700, D=2048, sources=1, partial=True, norm=True, accumulate=True),
    Site(
        T=300, D=7168, sources=1, partial=True, norm=True, accumulate=True, gradient=torch.float32
    ),
    Site(
        T=300, D=7168, sources=8, partial=True, norm=True, accumulate=True, gradient=torch.float32
    ),
    Site(T=200, D=2304, sources=10, norm=True, gradient=torch.float32),
    Site(T=200, D=2048, sources=5, accumulate=True),
    Site(T=200, D=4096, sources=16, norm=True),
    # Rows so many that one CTA has a multiprocessor to itself, with two groups of warps: an odd and
    # an even number of tokens a group, lanes without columns, all that a kernel can be asked for.
    Site(T=700, D=2304, sources=10),
    Site(T=3001, D=2304, sources=10, norm=True),
    Site(T=1501, D=2048, sources=16, norm=True, dmix=True),
    Site(T=600, D=1800, sources=12, norm=True, key_dim=1280),
    Site(T=513, D=2560, sources=9, partial=True, norm=True, accumulate=True),
    Site(T=1057, D=1024, sources=31, partial=True, norm=True),
    Site(
        T=900,
        D=2048,
        phase1=True,
        sources=8,
        partial=True,
        norm=True,
        storage=torch.float16,
        gradient=torch.float32,
        accumulate=True,
        dpartial_out=torch.float32,
        dpartial=torch.float32,
    ),
    Site(T=5000, D=72, **ADVANCE),  # tokens so short that they are counted several at a time
    Site(T=100, D=1024, sources=31),
    Site(T=100, D=1024, sources=31, partial=True, norm=True),
    Site(T=100, D=1024, sources=33, norm=True),  # more terms than lanes: general in both runs
    # the sites that Full AttnRes and groups of several blocks have: float32 gradients of sources
    # become dpartial_out, and dpartial has the storage of the values
    Site(T=3000, D=2048, phase1=True, partial=True, dpartial_out=torch.float32),
    *(Site(T=301, D=D, dpartial_out=torch.float32, **ADVANCE) for D in (264, 2304, 7168)),
    Site(T=301, D=2304, dpartial_out=torch.float32, dpartial=torch.float32, **ADVANCE),
    Site(T=301, D=2048, dpartial=torch.float32, **ADVANCE),
    Site(
        T=301,
        D=7168,
        phase1=True,
        sources=3,
        partial=True,
        norm=True,
        accumulate=True,
        gradient=torch.float32,
        dpartial_out=torch.float32,
    ),
    Site(
        T=301,
        D=2048,
        sources=5,
        partial=True,
        accumulate=True,
        dpartial_out=torch.float32,
        dmix=True,
    ),
    Site(
        T=201,
        D=2304,
        sources=2,
        partial=True,
        norm=True,
        storage=torch.float16,
        gradient=torch.float32,
        accumulate=True,
        dpartial_out=torch.float32,
        dpartial=torch.float32,
    ),
    # sliced keys and float16
    Site(T=250, D=2048, key_dim=512, sources=4, norm=True),
    Site(T=250, D=2048, key_dim=776, **ADVANCE),
    Site(T=250, D=2304, sources=3, norm=True, storage=torch.float16, gradient=torch.float16),
]


def misaligned(tensor: Tensor) -> Tensor:
    """The same values, each row one element past an aligned address."""
    rows, cols = tensor.shape
    view = tensor.new_empty(rows, cols + 8)[:, 1 : 1 + cols]
    view.copy_(tensor)
    return view


def run(
    site: Site,
    tensors: dict,
    results: dict,
    place: Callable[[Tensor], Tensor] = lambda value: value,
    in_place: bool = False,
) -> dict:
    """read_backward on `tensors`, `place` laying out values and results.

    in_place: dh and dpartial take the place of phase1_out and dpartial_out.
    """

    def lay_out(value: object) -> object:
        if isinstance(value, list):
            return [place(item) for item in value]
        wide = isinstance(value, Tensor) and value.shape == (site.T, site.D)
        return place(value) if wide else value

    given = {name: lay_out(value) for name, value in tensors.items()}
    out = {name: lay_out(value) for name, value in results.items()}
    if in_place and site.phase1:
        out["dh"] = given["phase1_out"]
    if in_place and site.partial and given["dpartial_out"].dtype == out["dpartial"].dtype:
        out["dpartial"] = given["dpartial_out"]
    native.call(
        "read_backward",
        **given,
        **out,
        scale=0.8,
        norm=int(site.norm),
        accumulate_dsources=int(site.accumulate),
    )
    return out


def clone(tensors: dict) -> dict:
    return {
        name: [item.clone() for item in value] if isinstance(value, list) else value.clone()
        for name, value in tensors.items()
    }


def doubled(tensors: dict) -> dict:
    return {
        name: [item.cpu().double() for item in value]
        if isinstance(value, list)
        else value.cpu().double()
        for name, value in tensors.items()
    }


def make_call(site: Site) -> tuple[dict, dict]:
    """The inputs of a site and its results, which hold NaN or what is added to."""
    T, D = site.T, site.D

    def row(dtype: torch.dtype = site.storage) -> Tensor:
        return torch.randn(T, D, device="cuda").to(dtype)

    def floats(*shape: int) -> Tensor:
        return torch.full(shape, float("nan"), device="cuda")

    R = site.key_dim or D
    values: dict = {}
    if site.phase1:
        values["phase1_out"] = row()
    if site.sources:
        values["sources"] = [row() for _ in range(site.sources)]
    if site.partial:
        values["partial"] = row()
    if site.terms > int(site.phase1):
        values["query"] = torch.randn(1, R, device="cuda") / R**0.5
    if site.norm:
        values["norm_weight"] = torch.rand(1, D, device="cuda") + 0.5

    # Statistics of an exact forward, so that only the backward is judged.
    statistics = {name: floats(T, site.terms).cpu().double() for name in ("logits", "inv_rms")}
    if site.norm:
        statistics["mix_inv_rms"] = floats(1, T).cpu().double()
    lse = {"phase1_lse": torch.randn(1, T).double()} if site.phase1 else {}
    native.call(
        "read",
        **doubled(values),
        **lse,
        **statistics,
        x=torch.empty(T, D).double(),
        scale=0.8,
        norm=int(site.norm),
    )

    values |= {name: value.float().cuda() for name, value in statistics.items()}
    values["dx"] = row()
    if site.dmix:
        values["dmix"] = row()
    results: dict = {}
    if site.phase1:
        results |= {"dh": floats(T, D).to(site.storage)}
        results |= {name: floats(1, T) for name in ("gate", "dphase1_lse")}
    if site.sources:
        results["dsources"] = [row(site.gradient) for _ in range(site.sources)]
    if site.partial:
        values["dpartial_out"] = row(site.dpartial_out or site.storage)
        results["dpartial"] = floats(T, D).to(site.dpartial or site.storage)
    if "query" in values:
        results["dquery"] = floats(1, R)
    if site.norm:
        results["dnorm_weight"] = floats(1, D)
    return values, results


@pytest.mark.parametrize("site", SITES, ids=lambda s: f"K{s.terms}-T{s.T}-D{s.D}-norm{int(s.norm)}")
def test_read_backward_both_paths(site: Site) -> None:
    values, results = make_call(site)
    exact = run(site, doubled(values), doubled(results))
    fast = run(site, clone(values), clone(results))
    general = run(site, clone(values), clone(results), misaligned)
    again = {
        "fast": run(site, clone(values), clone(results), in_place=True),
        "general": run(site, clone(values), clone(results), misaligned, in_place=True),
    }

    def listed(value: object) -> list[Tensor]:
        return value if isinstance(value, list) else [value]

    for name in results:
        for i, reference in enumerate(listed(exact[name])):
            dtype = listed(results[name])[i].dtype
            scale = reference.norm().clamp_min(1e-30)
            # The reference's result rounded to storage: what a perfect kernel would be off by.
            rounding = ((reference.to(dtype).double() - reference).norm() / scale).item()
            if reference.norm() < 1e-9:
                continue  # one term alone: its logit has no gradient
            for path, result in (("fast", fast), ("general", general)):
                value = listed(result[name])[i].cpu()
                assert torch.isfinite(value).all(), (name, i, path)
                error = ((value.double() - reference).norm() / scale).item()
                assert error <= 1.1 * rounding + 1e-5, (name, i, path, error, rounding)
                repeated = listed(again[path][name])[i].cpu()
                assert torch.equal(value, repeated), f"{name}[{i}], {path}: differs in place"


@pytest.mark.parametrize("gradient", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [{"D": 2304}, {"D": 7168}, {"D": 2048, "sources": 2}])
def test_float32_gradients_keep_to_the_hopper_kernel(shape: dict, gradient: torch.dtype) -> None:
    """By name: to fall back would show in the time alone."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("not a Hopper GPU")
    site = Site(T=64, **shape, **ADVANCE, accumulate=True, gradient=gradient, dpartial_out=gradient)
    values, results = make_call(site)
    run(site, values, results)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(site, values, results)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if "read_backward" in event.name]
    assert len(kernels) == 1
    assert "hopper::read_backward_kernel" in kernels[0]
