r"""Other packages' Attention Residuals behind one shape of call: errors and benchmarks use it.

This file needs PyTorch alone, so that benchmarks may load it where this package is not built.

A :class:`Case` has an operation (:data:`OPS`), its inputs and the cotangents of its outputs. A peer
turns an operation into a differentiable function of the case's leaves; where its dialect cannot say
the operation it raises :class:`UnsupportedError` with the reason. Nothing is timed before
:func:`check` has held outputs and gradients against the formulas of docs/math.md on all tokens.

The packages are installed with this one, or where PyTorch must stay as it is in a folder for
PYTHONPATH; the seed always in a folder of its own:

    pip install '.[peers]'    (in a checkout)
    pip install --target SITE --no-deps flash-linear-attention fla-core liger-kernel \
        fast-attnres einops
    pip install --target SEED --no-deps flash-attn-res==0.1.12

The last is the first Triton package, which has this one's names: it is loaded from SEED under
the name ``seed_attn_res`` and SEED is never on sys.path. Dialects:

  seed          phase 1 and merge; no key weight, no scale, D a power of two. Its backward
                accumulates into bfloat16 gradients, as its own network does.
  fla           one-shot reads, with or without the output norm.
  liger         one-shot reads of a stacked bank, at most 32 sources (more are left out silently).
  fast_attnres  one-shot reads; phase 1 of up to 16 queries without lse. Queries in bfloat16.
  torch.compile every operation, in two forms.
  eager         every operation, in two forms: all of it in the storage dtype, and with float32
                inside of an operation.

A key weight that a package does not take is folded into the query before it is called.

Where a peer returns fresh gradients and the operation accumulates, the addition is part of it.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import pathlib
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

OPS = ["oneshot", "oneshot_norm", "merge", "advance", "phase1"]
EPS = 1e-6
SEED_NAME = "seed_attn_res"


class UnsupportedError(Exception):
    """The package has no such operation, or not at this shape."""


@dataclasses.dataclass
class Case:
    """Inputs of one operation. Every peer reads the same memory."""

    op: str
    N: int
    S: int
    T: int
    D: int
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    inputs: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # drawn if not given
    cotangents: list[Tensor] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.inputs:
            self.draw()

    def draw(self) -> None:
        """Normal inputs and cotangents."""

        def rows(*lead: int) -> Tensor:
            return torch.empty(
                *lead, self.T, self.D, device=self.device, dtype=self.dtype
            ).normal_()

        count = self.S if self.op == "phase1" else 1
        # Values that bfloat16 has: a peer that stores its queries so loses nothing by it.
        queries = (torch.randn(count, self.D, device=self.device) / self.D**0.5).bfloat16().float()
        self.inputs = {"queries": queries}  # (S,D)
        if self.op in ("oneshot", "oneshot_norm", "phase1"):
            self.inputs["sources"] = rows(self.N)  # (N,T,D)
        else:
            self.inputs["o"] = rows()  # (T,D) phase 1's result
            self.inputs["lse"] = torch.randn(self.T, device=self.device)  # (T)
            self.inputs["partial"] = rows()  # (T,D)
        if self.op == "advance":
            self.inputs["update"] = rows()  # (T,D)
        if self.op in ("oneshot_norm", "advance"):
            self.inputs["weight"] = torch.rand(self.D, device=self.device) + 0.5  # (D)
        self.cotangents = [rows(self.S)] if self.op == "phase1" else [rows()]
        if self.op == "phase1":
            self.cotangents.append(torch.randn(self.S, self.T, device=self.device))
        if self.op == "advance":
            self.cotangents.append(rows())


# ------------------------------------------------------------------------------ the formulas


def rsqrt_mean_square(v: Tensor) -> Tensor:
    """1 / rms of the rows."""
    return torch.rsqrt(v.square().mean(-1) + EPS)


def folded(x: dict[str, Tensor]) -> Tensor:
    """Queries [S, D] times key weights, where there are any."""
    return x["queries"] * x["key_weight"] if "key_weight" in x else x["queries"]


def formula(op: str, x: dict[str, Tensor]) -> list[Tensor]:
    """The operation in the dtype of its inputs, as in docs/math.md: what everything is held to."""
    q = folded(x)  # (S,D)
    if "sources" in x:
        v = x["sources"]  # (N,T,D)
        logits = torch.einsum("ntd,sd->nst", v, q) * rsqrt_mean_square(v)[:, None]  # (N,S,T)
        out = torch.einsum("nst,ntd->std", logits.softmax(0), v)  # (S,T,D)
        if op == "phase1":
            return [out, logits.logsumexp(0)]
        return [normalised(out[0], x)]
    b = x["partial"] + x["update"] if "update" in x else x["partial"]
    gate = torch.sigmoid((b @ q[0]) * rsqrt_mean_square(b) - x["lse"])[:, None]  # (T,1)
    h = normalised(x["o"] + gate * (b - x["o"]), x)  # (T,D)
    return [h, b] if op == "advance" else [h]


def normalised(h: Tensor, x: dict[str, Tensor]) -> Tensor:
    """The output norm, where the operation has one."""
    return h * rsqrt_mean_square(h)[..., None] * x["weight"] if "weight" in x else h


def check(case: Case, outputs: Sequence[Tensor], grads: dict[str, Tensor]) -> dict[str, float]:
    """Relative L2 error of each tensor against :func:`formula`, over all tokens in chunks.

    `outputs` may lack trailing ones (a peer without lse); the reference gradients then have no
    cotangent for them either.
    """
    precise = torch.float64 if case.device == "cpu" else torch.float32
    chunk = max(1, 2**25 // (case.D * (case.N + case.S)))
    shared = [name for name in grads if name in ("queries", "weight")]
    sums = {name: torch.zeros_like(case.inputs[name], dtype=precise) for name in shared}
    squares: dict[str, list[float]] = {}

    def compare(name: str, ours: Tensor, exact: Tensor) -> None:
        error, size = squares.setdefault(name, [0.0, 0.0])
        difference = (ours.to(precise) - exact).double()
        squares[name] = [
            error + difference.square().sum().item(),
            size + exact.double().square().sum().item(),
        ]

    for begin in range(0, case.T, chunk):
        piece = slice(begin, begin + chunk)

        def cut(name: str, value: Tensor, piece: slice = piece) -> Tensor:
            if name in ("queries", "weight"):
                return value
            return value[piece] if name == "lse" or value.dim() == 2 else value[:, piece]

        leaves = {
            name: cut(name, value).detach().to(precise).requires_grad_()
            for name, value in case.inputs.items()
        }
        exact = formula(case.op, leaves)[: len(outputs)]
        along = [1 if case.op == "phase1" else 0] * len(outputs)
        for i, (a, b, axis) in enumerate(zip(outputs, exact, along, strict=True)):
            compare(f"output {i}", a.detach()[(slice(None),) * axis + (piece,)], b.detach())
        cotangents = [
            c[(slice(None),) * axis + (piece,)].to(precise)
            for c, axis in zip(case.cotangents, along, strict=False)
        ]
        reference = torch.autograd.grad(exact, [leaves[name] for name in grads], cotangents)
        for (name, ours), exact_grad in zip(grads.items(), reference, strict=True):
            if name in sums:
                sums[name] += exact_grad
            else:
                compare(f"d {name}", cut(name, ours), exact_grad)
    for name, total in sums.items():
        compare(f"d {name}", grads[name], total)
    return {name: (e / max(s, 1e-60)) ** 0.5 for name, (e, s) in squares.items()}


LIMIT = 1.5e-2
"""Largest relative L2 error of a peer: bfloat16 has 2e-3 by rounding, gradients a few of them."""


# ------------------------------------------------------------------------------------ packages

Function = Callable[[dict[str, Tensor]], list[Tensor]]


def load_seed(folder: pathlib.Path) -> types.ModuleType:
    """The package at `folder`/flash_attn_res as the module :data:`SEED_NAME`."""
    if SEED_NAME in sys.modules:
        return sys.modules[SEED_NAME]
    package = folder / "flash_attn_res"
    if not (package / "ops" / "phase_1.py").is_file():
        raise UnsupportedError(f"the seed package is not installed in {folder}")
    spec = importlib.util.spec_from_file_location(
        SEED_NAME, package / "__init__.py", submodule_search_locations=[str(package)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[SEED_NAME] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[SEED_NAME]
        raise
    return module


def need_cuda(case: Case) -> None:
    """What runs Triton kernels refuses a case on the CPU."""
    if torch.device(case.device).type == "cpu":
        raise UnsupportedError("has Triton kernels, which run on CUDA devices alone")


def seed(case: Case) -> Function:
    """The first Triton package, loaded from the folder that SEED_ATTN_RES names."""
    need_cuda(case)
    if case.op not in ("phase1", "merge"):
        raise UnsupportedError("has phase 1 and merge only")
    if case.D & (case.D - 1):
        raise UnsupportedError(f"takes D that is a power of two, not {case.D}")
    if case.N * case.T * case.D >= 2**31 or case.S * case.T * case.D >= 2**31:
        raise UnsupportedError("offsets are 32 bits wide")
    folder = os.environ.get("SEED_ATTN_RES")
    if not folder:
        raise UnsupportedError("SEED_ATTN_RES does not name the folder it is installed in")
    package = load_seed(pathlib.Path(folder))
    if case.op == "phase1":
        phase1 = package.phase_1_batched_attention_triton_op

        def run(x: dict[str, Tensor]) -> list[Tensor]:
            out, lse = phase1(x["sources"][:, None], folded(x), EPS)
            return [out[:, 0], lse[:, 0]]

        return run
    merge = package.phase_2_online_softmax_merge_triton_op

    def run_merge(x: dict[str, Tensor]) -> list[Tensor]:
        one = (x["partial"][None], folded(x)[0], x["o"][None], x["lse"][None], EPS)
        return [merge(*one)[0]]

    return run_merge


def seed_accumulating(case: Case) -> Callable[[], dict[str, Tensor]]:
    """The seed's phase-1 backward as its own network calls it: added to bfloat16 gradients."""
    seed(case)
    ops = importlib.import_module(f"{SEED_NAME}.ops.phase_1")
    sources, queries = case.inputs["sources"][:, None], case.inputs["queries"]
    _, lse, inv_rms, logits = ops._phase_1_batched_attention_forward_with_aux_triton_op(
        sources, queries, EPS
    )
    dout, dlse = (c[:, None] for c in case.cotangents)
    dsources = torch.zeros_like(sources)
    partial = torch.empty(dout.shape, device=dout.device)
    dqueries = torch.zeros_like(queries)

    def run() -> dict[str, Tensor]:
        dqueries.zero_()  # the kernel adds to it
        ops._batched_attention_backward_accumulate(
            sources,
            queries,
            lse,
            dout,
            dlse,
            dsources,
            dqueries,
            partial,
            EPS,
            True,
            inv_rms,
            logits,
        )
        return {"sources": dsources[:, 0], "queries": dqueries}

    return run


def fla(case: Case, gluon: bool) -> Function:
    """flash-linear-attention, on either of its backends."""
    need_cuda(case)
    if case.op not in ("oneshot", "oneshot_norm"):
        raise UnsupportedError("has one-shot reads only")
    os.environ["FLA_ATTNRES_GLUON"] = "1" if gluon else "0"
    try:
        from fla.ops.attnres import fused_attnres

        if gluon:  # where it cannot be had, the package takes Triton without a word
            from fla.ops.attnres.backends import AttnResGluonBackend  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(f"not installed, or it does not import: {error}") from error
    ones = torch.ones(case.D, device=case.device)

    def run(x: dict[str, Tensor]) -> list[Tensor]:
        # The backend is looked up in every call.
        os.environ["FLA_ATTNRES_GLUON"] = "1" if gluon else "0"
        return [
            fused_attnres(
                x["queries"][0],
                x["sources"],
                x["key_weight"][0] if "key_weight" in x else ones,
                output_rms_weight=x.get("weight"),
                rms_eps=EPS,
            )
        ]

    return run


def liger(case: Case) -> Function:
    """Liger-Kernel."""
    need_cuda(case)
    if case.op != "oneshot":
        raise UnsupportedError("has one-shot reads without output norm only")
    if case.N > 32:
        raise UnsupportedError("leaves out sources beyond the 32nd")
    try:
        from liger_kernel.ops.attn_res import LigerAttnResFunction
    except ImportError as error:
        raise UnsupportedError(f"not installed, or it does not import: {error}") from error
    ones = torch.ones(case.D, device=case.device)

    def run(x: dict[str, Tensor]) -> list[Tensor]:
        v = x["sources"][:, None]  # (N,1,T,D)
        weight = x["key_weight"][0] if "key_weight" in x else ones
        return [LigerAttnResFunction.apply(v, x["queries"][0], weight, EPS)[0]]

    return run


def fast_attnres(case: Case) -> Function:
    """fast-attnres."""
    need_cuda(case)
    try:
        import attnres
    except ImportError as error:
        raise UnsupportedError(f"not installed, or it does not import: {error}") from error
    if case.op == "oneshot":
        return lambda x: [attnres.attnres(x["sources"], folded(x)[0].bfloat16(), eps=EPS)]
    if case.op != "phase1":
        raise UnsupportedError("has one-shot reads and phase 1 without lse only")
    if case.S > 16:
        raise UnsupportedError("takes at most 16 queries")
    return lambda x: [attnres.attnres_multi(x["sources"], folded(x).bfloat16(), eps=EPS)]


def loops(op: str, x: dict[str, Tensor]) -> list[Tensor]:
    """:func:`formula` on bfloat16 storage, in float32 sums over sources that a compiler fuses."""
    kind = next(iter(v for k, v in x.items() if k in ("sources", "o"))).dtype
    if "sources" not in x:
        wide = {name: value.float() for name, value in x.items()}
        if "update" in x:  # the sum is rounded to storage and used as rounded
            wide["partial"] = (wide["partial"] + wide.pop("update")).to(kind).float()
        outputs = formula("merge", wide)
        return [outputs[0].to(kind), *([wide["partial"].to(kind)] if op == "advance" else [])]
    v = [source.float() for source in x["sources"].unbind(0)]
    inverse = [rsqrt_mean_square(source) for source in v]
    outs, lses = [], []
    for q in folded(x).unbind(0):
        logits = torch.stack([(s * q).sum(-1) * r for s, r in zip(v, inverse, strict=True)])
        p = logits.softmax(0)
        outs.append(torch.stack([p[i][:, None] * source for i, source in enumerate(v)]).sum(0))
        lses.append(logits.logsumexp(0))
    if op == "phase1":
        return [torch.stack(outs).to(kind), torch.stack(lses)]
    return [normalised(outs[0], x).to(kind)]


def products(op: str, x: dict[str, Tensor]) -> list[Tensor]:
    """:func:`formula` with matrix products in the storage dtype and float32 statistics."""
    if "sources" not in x:
        raise UnsupportedError("the form with matrix products is that of reads over sources")
    v = x["sources"]
    inverse = rsqrt_mean_square(v.float())  # (N,T)
    logits = torch.einsum("ntd,sd->nst", v, folded(x).to(v.dtype)).float() * inverse[:, None]
    out = torch.einsum("nst,ntd->std", logits.softmax(0).to(v.dtype), v)
    if op == "phase1":
        return [out, logits.logsumexp(0)]
    return [normalised(out[0].float(), x).to(v.dtype)]


Form = Callable[[str, dict[str, Tensor]], list[Tensor]]


def in_storage(op: str, x: dict[str, Tensor]) -> list[Tensor]:
    """:func:`formula` with everything, sums included, in the storage dtype: what one writes first.

    PyTorch's reductions keep float32 inside, and round what they give.
    """
    kind = next(iter(v for k, v in x.items() if k in ("sources", "o"))).dtype
    return formula(op, {name: value.to(kind) for name, value in x.items()})


def eager(case: Case, form: Form) -> Function:
    """A form of the formulas as it stands."""
    return lambda x: form(case.op, x)


def compiled(case: Case, form: Form) -> Function:
    """A form of the formulas through torch.compile."""
    if form is products and "sources" not in case.inputs:
        raise UnsupportedError("the form with matrix products is that of reads over sources")
    torch._functorch.config.donated_buffer = False  # the graph is kept for many backward passes
    return torch.compile(lambda x: form(case.op, x), dynamic=False, fullgraph=True)


PEERS: dict[str, Callable[[Case], Function]] = {
    "seed": seed,
    "fla (Triton)": lambda case: fla(case, gluon=False),
    "fla (Gluon)": lambda case: fla(case, gluon=True),
    "liger": liger,
    "fast_attnres": fast_attnres,
    "torch.compile (sums)": lambda case: compiled(case, loops),
    "torch.compile (products)": lambda case: compiled(case, products),
}

EAGER: dict[str, Callable[[Case], Function]] = {
    "eager": lambda case: eager(case, in_storage),
    "eager (float32 inside)": lambda case: eager(case, loops),
}
"""What a user writes without any package; benchmarks time its compiled forms instead."""

DISTRIBUTIONS = ["flash-linear-attention", "fla-core", "liger-kernel", "fast-attnres", "triton"]


NOT_INSTALLED = "not installed"


def versions() -> dict[str, str]:
    """Versions of what is installed, the seed's by its own folder."""
    from importlib import metadata

    installed = {d.metadata["Name"].replace("_", "-"): d.version for d in metadata.distributions()}
    found = {name: installed.get(name, NOT_INSTALLED) for name in DISTRIBUTIONS}
    folder = os.environ.get("SEED_ATTN_RES")
    infos = sorted(pathlib.Path(folder).glob("flash_attn_res-*.dist-info")) if folder else []
    found["seed"] = infos[-1].name.split("-")[1].removesuffix(".dist") if infos else NOT_INSTALLED
    return found


@dataclasses.dataclass
class Prepared:
    """One peer at one case, agreed with the formulas: what is timed."""

    forward: Callable[[], object]
    backward: Callable[[], object]
    errors: dict[str, float]
    note: str = ""


LISTS = {"fla (Triton)", "fla (Gluon)"}
"""Peers that take the sources as a list: each is a leaf, so that no gradients are stacked."""


def prepare(name: str, case: Case) -> Prepared:
    """Builds, runs and checks a peer; raises UnsupportedError where it cannot serve."""
    function = PEERS[name](case)
    inputs: dict = dict(case.inputs)
    if name in LISTS:
        inputs["sources"] = list(case.inputs["sources"].unbind(0))
    leaves: dict[str, Any] = {
        key: [v.detach().requires_grad_() for v in value]
        if isinstance(value, list)
        else value.detach().requires_grad_()
        for key, value in inputs.items()
    }
    flat = [v for value in leaves.values() for v in (value if isinstance(value, list) else [value])]
    outputs = function(leaves)
    cotangents = [c.to(o.dtype) for c, o in zip(case.cotangents, outputs, strict=False)]

    def flat_gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, flat, cotangents, retain_graph=True)

    def gradients() -> dict[str, Tensor]:
        found = iter(flat_gradients())
        return {
            key: torch.stack([next(found) for _ in value])
            if isinstance(value, list)
            else next(found)
            for key, value in leaves.items()
        }

    grads = gradients()
    errors = check(case, outputs, grads)
    notes = []
    if len(outputs) < len(case.cotangents):
        notes.append("without lse")
    del grads
    backward: Callable[[], object] = flat_gradients
    if case.op == "phase1" and name == "seed":
        run = seed_accumulating(case)
        accumulated = check(case, outputs, run())  # into zeros: the gradient itself
        errors.update(
            {f"{key} (accumulated)": e for key, e in accumulated.items() if key[0] == "d"}
        )
        backward = run
        outputs = [o.detach() for o in outputs]
    elif case.op == "phase1":
        held = torch.zeros_like(case.inputs["sources"])

        def accumulating() -> None:
            held.add_(gradients()["sources"])

        backward = accumulating
        notes.append("plus the addition to the held gradients")
    worst = max(errors, key=lambda key: errors[key])
    if not errors[worst] <= LIMIT:
        raise UnsupportedError(
            f"disagrees with the formulas: {worst} is off by {errors[worst]:.1e} (relative L2)"
        )

    def forward() -> None:
        with torch.no_grad():
            function(inputs)

    return Prepared(forward, backward, errors, ", ".join(notes))
