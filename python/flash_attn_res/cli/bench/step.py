"""Whole networks: what Attention Residuals cost in a training step, beside a plain residual.

A network is L sublayers SwiGLU (RMSNorm, D -> 2D gated -> D) in bfloat16 (float32 on a CPU), in
eager PyTorch, forward alone and forward with backward to the input, all weights and all queries;
and the same with checkpointed sublayers. Contenders share the layers and differ in what stands
between them:

  plain            x + layer(norm(x))
  flash_attn_res   this package: BlockAttnRes; (storage gradients): with grad_dtype=None
  torch.compile    two-phase: phase 1 once a block and the merge, both compiled
  seed             two-phase with the operators of the first Triton package
  fla              one-shot reads with the output norm of flash-linear-attention
  liger            one-shot reads of liger-kernel

Each contender is held to the formulas in float32 before it is timed. Times are medians over
rounds in which plain and this package's forms take turns, or plain and one other package, so that
one that compiles for minutes keeps nobody waiting; ratios are medians of the rounds' ratios to
plain, so that drift of the machine hits both. Bytes are those that the planner counts for a step of
the stream, the same for every contender; percent of copy is their share of what a copy moves in the
time of the whole step. Peak memory is that of one step, weights and input included.

`--scaling` measures series instead: over L with eight blocks, and over T. On a CPU the networks of
the same names are as small as lets a run end in minutes.

Kernels of other packages are compiled for every number of sources, one after the other, which takes
minutes. `--warm` does so beforehand in several processes at a time, one for each number; the timed
process finds them in the caches of Triton and Inductor, and still does what tuning a package does.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.nn.functional import rms_norm, silu
from torch.utils.checkpoint import checkpoint as checkpoint_function

from flash_attn_res import BlockAttnRes
from flash_attn_res.cli.accuracy import peers
from flash_attn_res.cli.accuracy.peers import UnsupportedError
from flash_attn_res.cli.bench import harness
from flash_attn_res.cli.bench.harness import (
    COMPILED,
    OURS,
    STORAGE_GRADIENTS,
    Request,
    Row,
    describe,
)
from flash_attn_res.cli.device import device_name

EPS = 1e-6
LIMIT = 3e-2
"""Largest relative L2 error of an output: bfloat16 rounds at every sublayer."""

CHECKED_TOKENS = 256
"""On which a contender's output is held to the formulas."""


@dataclasses.dataclass(frozen=True)
class Shape:
    layers: int
    block_size: int
    tokens: int
    dim: int

    @property
    def num_blocks(self) -> int:
        """Completed sources at the network's end, without the input."""
        return -(-self.layers // self.block_size)


SHAPES = {
    "narrow": Shape(32, 8, 16384, 2048),
    "kimi-k3": Shape(24, 24, 4096, 7168),
    "kimi-linear": Shape(54, 6, 8192, 2304),
    "full": Shape(32, 1, 8192, 2048),
}
ON_CPU = {
    "narrow": Shape(16, 4, 512, 256),
    "kimi-k3": Shape(12, 12, 256, 512),
    "kimi-linear": Shape(18, 3, 512, 192),
    "full": Shape(16, 1, 512, 256),
}
SMALL = {
    "narrow": Shape(8, 4, 256, 128),
    "kimi-k3": Shape(6, 6, 128, 192),
    "kimi-linear": Shape(9, 3, 192, 96),
    "full": Shape(8, 1, 128, 128),
}

# Eight blocks over L, so that what is read grows as the network does.
SCALING = {
    "L": [Shape(layers, layers // 8, 4096, 2048) for layers in (16, 32, 64, 128)],
    "T": [Shape(32, 4, tokens, 2048) for tokens in (1024, 2048, 4096, 8192, 16384, 32768)],
}
SCALING_ON_CPU = {
    "L": [Shape(layers, layers // 8, 256, 256) for layers in (16, 32, 64)],
    "T": [Shape(16, 2, tokens, 256) for tokens in (128, 256, 512, 1024, 2048)],
}
SMALL_SCALING = {
    "L": [Shape(layers, layers // 8, 128, 64) for layers in (8, 16, 32)],
    "T": [Shape(8, 1, tokens, 64) for tokens in (64, 128, 256)],
}
SCALING_LEFT_OUT = (STORAGE_GRADIENTS, COMPILED)
"""The former is near ours; the latter compiles anew for every length."""


class Sublayer(nn.Module):
    """RMSNorm weight, D -> 2D gated -> D."""

    norm: nn.Parameter
    up: nn.Linear
    down: nn.Linear

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(dim))
        self.up = nn.Linear(dim, 2 * dim, bias=False)
        self.down = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The layer without its norm."""
        a, b = self.up(x).chunk(2, -1)
        out: Tensor = self.down(silu(b) * a)
        return out

    def normed(self, h: Tensor) -> Tensor:
        return self.forward(rms_norm(h, self.norm.shape, self.norm, EPS))


class Network(nn.Module):
    """What all contenders share."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        with torch.device(device):
            self.layers = nn.ModuleList(Sublayer(shape.dim) for _ in range(shape.layers))
            self.to(dtype)
            # No key weights: the seed's dialect has none.
            self.queries = nn.Parameter(torch.randn(shape.layers + 1, shape.dim).to(dtype) * 0.02)
        self.shape = shape

    def sublayers(self) -> list[Sublayer]:
        """The layers, as what they are."""
        return [layer for layer in self.layers if isinstance(layer, Sublayer)]

    def blocks(self) -> list[list[int]]:
        sites = range(self.shape.layers)
        return [list(sites[i : i + self.shape.block_size]) for i in sites[:: self.shape.block_size]]


Forward = Callable[[Tensor, bool], Tensor]
"""From the input [1, T, D] and whether to checkpoint, to the output."""


def maybe_checkpoint(checkpointed: bool, function: Callable[..., Tensor], *given: object) -> Tensor:
    if checkpointed and torch.is_grad_enabled():
        return checkpoint_function(function, *given, use_reentrant=False, preserve_rng_state=False)
    return function(*given)


# -------------------------------------------------------------------------------- contenders


def plain(network: Network) -> Forward:
    def run(x: Tensor, checkpointed: bool) -> Tensor:
        for layer in network.sublayers():
            x = x + maybe_checkpoint(checkpointed, layer.normed, x)
        return x

    return run


def ours(network: Network, grad_dtype: torch.dtype | None = torch.float32) -> Forward:
    shape = network.shape
    with torch.device("meta"):
        attn_res = BlockAttnRes(
            shape.layers,
            shape.dim,
            shape.block_size,
            key_weight=False,
            eps=EPS,
            grad_dtype=grad_dtype,
        )
    attn_res.queries = network.queries

    def run(x: Tensor, checkpointed: bool) -> Tensor:
        stream = attn_res.start(x)
        for layer in network.sublayers():
            stream.sublayer(
                layer, layer.norm, EPS, checkpoint=checkpointed, preserve_rng_state=False
            )
        return stream.finish()

    return run


Phase1 = Callable[[list[Tensor], Tensor], tuple[Sequence[Tensor], Sequence[Tensor]]]
Merge = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
OneShot = Callable[[list[Tensor], Tensor, "Tensor | None"], Tensor]


@dataclasses.dataclass(frozen=True)
class Operators:
    """What a package offers: without a phase 1 and a merge, every site reads all sources."""

    one_shot: OneShot
    phase1: Phase1 | None = None
    merge: Merge | None = None


def over(make: Callable[[Network], Operators], network: Network) -> Forward:
    """The network over the operators of a package."""
    operators = make(network)
    if operators.phase1 is None or operators.merge is None:
        return one_shot_network(network, operators.one_shot)
    return two_phase(network, operators.phase1, operators.merge, operators.one_shot)


def two_phase(network: Network, phase1: Phase1, merge: Merge, one_shot: OneShot) -> Forward:
    """Algorithm 1 of the paper over the operators of a package, merges outside of checkpoints."""
    layers = network.sublayers()

    def run(x: Tensor, checkpointed: bool) -> Tensor:
        queries = network.queries.float()
        sources = [x]
        for block in network.blocks():
            outs, lses = phase1(sources, queries[block[0] : block[-1] + 1])
            partial: Tensor | None = None
            for i, site in enumerate(block):
                layer = layers[site]

                def read_and_apply(
                    o: Tensor,
                    lse: Tensor,
                    b: Tensor | None,
                    layer: Sublayer = layer,
                    query: Tensor = queries[site],
                ) -> Tensor:
                    return layer.normed(o if b is None else merge(o, lse, b, query))

                y = maybe_checkpoint(checkpointed, read_and_apply, outs[i], lses[i], partial)
                partial = y if partial is None else partial + y
            assert partial is not None
            sources.append(partial)
        return one_shot(sources, queries[-1], None)

    return run


def one_shot_network(network: Network, one_shot: OneShot) -> Forward:
    """Every site reads all sources; with its norm, where the package has one."""
    layers = network.sublayers()

    def run(x: Tensor, checkpointed: bool) -> Tensor:
        queries = network.queries.float()
        sources = [x]
        for block in network.blocks():
            partial: Tensor | None = None
            for site in block:
                layer = layers[site]

                def read_and_apply(
                    *given: Tensor, layer: Sublayer = layer, query: Tensor = queries[site]
                ) -> Tensor:
                    return layer(one_shot(list(given), query, layer.norm))

                given = sources if partial is None else [*sources, partial]
                y = maybe_checkpoint(checkpointed, read_and_apply, *given)
                partial = y if partial is None else partial + y
            assert partial is not None
            sources.append(partial)
        return one_shot(sources, queries[-1], None)

    return run


def rsqrt_mean_square(v: Tensor) -> Tensor:
    return torch.rsqrt(v.square().mean(-1) + EPS)


def formula_phase1(
    sources: list[Tensor], queries: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    v = [source.float() for source in sources]
    inverse = [rsqrt_mean_square(source) for source in v]
    outs, lses = [], []
    for query in queries.unbind(0):
        logits = torch.stack([(s @ query) * r for s, r in zip(v, inverse, strict=True)])
        p = logits.softmax(0)
        out = sum(p[n][..., None] * source for n, source in enumerate(v))
        assert isinstance(out, Tensor)
        outs.append(out.to(sources[0].dtype))
        lses.append(logits.logsumexp(0))
    return tuple(outs), tuple(lses)


def formula_merge(o: Tensor, lse: Tensor, partial: Tensor, query: Tensor) -> Tensor:
    b, mix = partial.float(), o.float()
    gate = torch.sigmoid((b @ query) * rsqrt_mean_square(b) - lse)[..., None]
    return (mix + gate * (b - mix)).to(o.dtype)


def formula_one_shot(sources: list[Tensor], query: Tensor, weight: Tensor | None) -> Tensor:
    h = formula_phase1(sources, query[None])[0][0]
    return h if weight is None else rms_norm(h, weight.shape, weight, EPS)


def compiled(network: Network) -> Operators:
    torch._dynamo.reset()  # or the networks before count towards its limit of compilations
    functorch_config.donated_buffer = False
    phase1 = torch.compile(formula_phase1, dynamic=False, fullgraph=True)
    merge = torch.compile(formula_merge, dynamic=False, fullgraph=True)
    one_shot = torch.compile(formula_one_shot, dynamic=False, fullgraph=True)
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    return Operators(one_shot, phase1, merge)


def seed(network: Network) -> Operators:
    if network.shape.dim & (network.shape.dim - 1):
        raise UnsupportedError(f"takes D that is a power of two, not {network.shape.dim}")
    folder = os.environ.get("SEED_ATTN_RES")
    if not folder:
        raise UnsupportedError("SEED_ATTN_RES does not name the folder it is installed in")
    package = peers.load_seed(pathlib.Path(folder))

    def phase1(sources: list[Tensor], queries: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        out, lse = package.phase_1_batched_attention_triton_op(torch.stack(sources), queries, EPS)
        return list(out.unbind(0)), list(lse.unbind(0))

    def merge(o: Tensor, lse: Tensor, partial: Tensor, query: Tensor) -> Tensor:
        return package.phase_2_online_softmax_merge_triton_op(partial, query, o, lse, EPS)[0]

    def one_shot(sources: list[Tensor], query: Tensor, weight: Tensor | None) -> Tensor:
        return phase1(sources, query[None])[0][0]

    return Operators(one_shot, phase1, merge)


def fla(network: Network, gluon: bool) -> Operators:
    os.environ["FLA_ATTNRES_GLUON"] = "1" if gluon else "0"
    try:
        from fla.ops.attnres import fused_attnres

        if gluon:  # where it cannot be had, the package takes Triton without a word
            from fla.ops.attnres.backends import AttnResGluonBackend  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(f"not installed, or it does not import: {error}") from error
    ones = torch.ones(network.shape.dim, device=network.queries.device)

    def one_shot(sources: list[Tensor], query: Tensor, weight: Tensor | None) -> Tensor:
        # The backend is looked up in every call.
        os.environ["FLA_ATTNRES_GLUON"] = "1" if gluon else "0"
        return fused_attnres(query, sources, ones, output_rms_weight=weight, rms_eps=EPS)

    return Operators(one_shot)


def liger(network: Network) -> Operators:
    if network.shape.num_blocks + 1 > 32:
        raise UnsupportedError("leaves out sources beyond the 32nd")
    try:
        from liger_kernel.ops.attn_res import LigerAttnResFunction
    except ImportError as error:
        raise UnsupportedError(f"not installed, or it does not import: {error}") from error
    ones = torch.ones(network.shape.dim, device=network.queries.device)

    def one_shot(sources: list[Tensor], query: Tensor, weight: Tensor | None) -> Tensor:
        h = LigerAttnResFunction.apply(torch.stack(sources), query, ones, EPS)[0]
        h = h.view_as(sources[0])  # it drops an axis of one
        return h if weight is None else rms_norm(h, weight.shape, weight, EPS)

    return Operators(one_shot)


OPERATORS: dict[str, Callable[[Network], Operators]] = {
    COMPILED: compiled,
    "seed": seed,
    "fla (Triton)": functools.partial(fla, gluon=False),
    "fla (Gluon)": functools.partial(fla, gluon=True),
    "liger": liger,
}
PACKAGES: dict[str, Callable[[Network], Forward]] = {
    "plain": plain,
    OURS: ours,
    STORAGE_GRADIENTS: functools.partial(ours, grad_dtype=None),
    **{name: functools.partial(over, make) for name, make in OPERATORS.items()},
}


# ------------------------------------------------------------------------------- measurement


SLOW_SECONDS = 10
"""Of preparation, after which a run says what it has waited for."""


class Clock:
    """Times a call on the device, in milliseconds, and the host's share of it."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.host_ms = 0.0

    def __call__(self, run: Callable[[], object], repeats: int) -> float:
        times, host = [], []
        for _ in range(repeats):
            begin = time.perf_counter()
            if self.cuda:
                events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                events[0].record()
                run()
                host.append((time.perf_counter() - begin) * 1e3)
                events[1].record()
                events[1].synchronize()
                times.append(events[0].elapsed_time(events[1]))
            else:
                run()
                host.append((time.perf_counter() - begin) * 1e3)
                times.append(host[-1])
        self.host_ms = statistics.median(host)
        return statistics.median(times)


@dataclasses.dataclass
class Contender:
    package: str
    forward: Callable[[], object]
    step: Callable[[], object]
    fwd: list[float] = dataclasses.field(default_factory=list)
    both: list[float] = dataclasses.field(default_factory=list)
    host: list[float] = dataclasses.field(default_factory=list)
    peak: int | None = None


def held_to_the_formulas(network: Network, run: Forward, package: str) -> None:
    """Raises where a contender computes something else, on a few tokens."""
    tokens = min(CHECKED_TOKENS, network.shape.tokens)
    x = torch.randn(1, tokens, network.shape.dim, device=network.queries.device)
    x = x.to(network.queries.dtype)
    if package == "plain":
        return
    with torch.no_grad():
        wide = copy.deepcopy(network).float()
        expected = one_shot_network(wide, formula_one_shot)(x.float(), False)
    del wide
    for checkpointed in (False, True):
        got = run(x.detach().requires_grad_(), checkpointed).detach()
        error = ((got.float() - expected).norm() / expected.norm()).item()
        if not error <= LIMIT:
            raise UnsupportedError(f"relative error {error:.2e} of the output, above {LIMIT:.0e}")


def prepare(
    network: Network, package: str, x: Tensor, cotangent: Tensor, checkpointed: bool
) -> Contender | str:
    """A contender that has run, with the peak of its step; or why there is none."""
    try:
        run = PACKAGES[package](network)
        held_to_the_formulas(network, run, package)
        weights = [x, *network.layers.parameters()]
        weights += [] if package == "plain" else [network.queries]

        def forward() -> None:
            with torch.inference_mode():
                run(x, checkpointed)

        def step() -> None:
            torch.autograd.grad(run(x, checkpointed), weights, cotangent)

        contender = Contender(package, forward, step)
        for _ in range(2):
            forward()
            step()
        if x.is_cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            step()
            torch.cuda.synchronize()
            contender.peak = torch.cuda.max_memory_allocated()
    except Exception as error:  # whatever another package raises is its result
        return describe(error)
    return contender


def compile_beforehand(shapes: Sequence[Shape], packages: Sequence[str], jobs: int) -> None:
    """Compiles every package for every number of sources; failures show up when it is timed."""
    calls = [
        [package, *map(str, dataclasses.astuple(shape)), str(count)]
        for shape in shapes
        for package in packages
        if package in OPERATORS
        for count in range(1, shape.num_blocks + 2)
    ]
    harness.in_processes(__name__, calls, jobs)


def compile_one(package: str, shape: Shape, count: int, device: str, dtype: torch.dtype) -> None:
    """Runs what a network of this shape does with ``count`` sources, as `prepare` will."""
    network = Network(dataclasses.replace(shape, layers=1), device, dtype)
    layer, last = network.sublayers()[0], count > shape.num_blocks
    operators = OPERATORS[package](network)

    def forward(tokens: int) -> Tensor:
        sources = [
            torch.randn(1, tokens, shape.dim, device=device).to(dtype).requires_grad_()
            for _ in range(count)
        ]
        queries = torch.randn(shape.block_size, shape.dim, device=device).requires_grad_()
        if operators.phase1 is None or operators.merge is None:
            results = [operators.one_shot(sources, queries[0], layer.norm)]
            results += [operators.one_shot(sources, queries[0], None)] if last else []
        elif last:
            results = [operators.one_shot(sources, queries[0], None)]
        else:
            outs, lses = operators.phase1(sources, queries)
            results = [operators.merge(outs[0], lses[0], sources[-1], queries[0])]
        return torch.stack([result.float().sum() for result in results]).sum()

    # In the order of `prepare`: packages tune a kernel in its first call, whatever the number of
    # tokens, and the check on a few has no backward.
    forward(min(CHECKED_TOKENS, shape.tokens))
    with torch.inference_mode():
        forward(shape.tokens)
    forward(shape.tokens).backward()


def residual_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """What the planner counts for one step of the stream."""
    with torch.device("meta"):
        attn_res = BlockAttnRes(shape.layers, shape.dim, shape.block_size)
    return attn_res.plan(dtype=dtype).bytes * shape.tokens * shape.dim


def measure(
    network: Network,
    packages: list[str],
    checkpointed: bool,
    rounds: int,
    copy_rate: float,
    series: str = "",
) -> list[Row]:
    """The packages in turn on one network: rows in their order, then what failed."""
    shape = network.shape
    device, dtype = network.queries.device, network.queries.dtype
    x = torch.randn(1, shape.tokens, shape.dim, device=device).to(dtype).requires_grad_()
    cotangent = torch.randn(1, shape.tokens, shape.dim, device=device).to(dtype)
    clock = Clock(device.type)
    where = {
        **dataclasses.asdict(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "checkpointed": checkpointed,
        **({"series": series} if series else {}),
    }
    contenders: list[Contender] = []
    failures: list[Row] = []
    for package in packages:
        begin = time.perf_counter()
        prepared = prepare(network, package, x, cotangent, checkpointed)
        if (seconds := time.perf_counter() - begin) > SLOW_SECONDS:
            print(f"{package}: {seconds:.0f} s until compiled and checked", flush=True)
        if isinstance(prepared, Contender):
            contenders.append(prepared)
            continue
        harness.failed(failures, package, where, prepared)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if failures and all(contender.package == "plain" for contender in contenders):
        return failures  # nothing is left to set beside it
    for index in range(rounds if contenders else 0):
        shift = index % len(contenders)
        for contender in contenders[shift:] + contenders[:shift]:
            clock(contender.forward, 1)
            contender.fwd.append(clock(contender.forward, 5))
            clock(contender.step, 1)
            contender.both.append(clock(contender.step, 3))
            contender.host.append(clock.host_ms)
    base = next((c for c in contenders if c.package == "plain"), None)
    counted = residual_bytes(shape, dtype)
    rows = []
    for contender in contenders:
        row: Row = {
            "package": contender.package,
            **where,
            **harness.spread("fwd_ms", contender.fwd, 3),
            **harness.spread("step_ms", contender.both, 3),
            "host_ms": round(statistics.median(contender.host), 3),
            "peak_gib": None if contender.peak is None else round(contender.peak / 2**30, 3),
        }
        if contender.package != "plain":
            step_seconds = statistics.median(contender.both) * 1e-3
            row["bytes"] = counted
            row["percent_of_copy"] = round(100 * counted / step_seconds / copy_rate, 1)
        if base is not None:
            for name, own, plain_times in (
                ("fwd", contender.fwd, base.fwd),
                ("step", contender.both, base.both),
            ):
                ratios = [a / b for a, b in zip(own, plain_times, strict=True)]
                row[f"{name}_over_plain"] = round(statistics.median(ratios), 4)
                row[f"{name}_over_plain_range"] = [round(min(ratios), 4), round(max(ratios), 4)]
            if contender.peak is not None and base.peak is not None:
                row["peak_over_plain"] = round(contender.peak / base.peak, 4)
        rows.append(row)
        peak = ""
        if row["peak_gib"] is not None:
            peak = f"peak {row['peak_gib']:6.2f} GiB ({row.get('peak_over_plain', 0):.3f}x)  "
        print(
            f"{contender.package:36} {'ck' if checkpointed else '':3}"
            f"fwd {row['fwd_ms']:8.2f} ms ({row.get('fwd_over_plain', 0):.3f}x)  "
            f"step {row['step_ms']:8.2f} ms ({row.get('step_over_plain', 0):.3f}x)  "
            f"{peak}"
            f"host {row['host_ms']:7.2f} ms  {row.get('percent_of_copy', 0):4.1f} % of copy",
            flush=True,
        )
    return rows + failures


def groups_of(packages: Sequence[str]) -> list[list[str]]:
    """What is measured in the same rounds: our own, then every other package with plain."""
    own = [name for name in packages if name not in OPERATORS]
    base = [name for name in own if name == "plain"]
    others = [[*base, name] for name in packages if name in OPERATORS]
    return [own, *others] if own else others


def profile(network: Network, packages: list[str], checkpointed: bool, device: str) -> None:
    """Prints where the device's time of a step goes, by kernel."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    shape = network.shape
    x = torch.randn(1, shape.tokens, shape.dim, device=device).to(network.queries.dtype)
    x.requires_grad_()
    for package in packages:
        run = PACKAGES[package](network)
        weights = [x, *network.layers.parameters()]
        for _ in range(2):
            torch.autograd.grad(run(x, checkpointed).sum(), weights)
        activity = ProfilerActivity.CUDA if device.startswith("cuda") else ProfilerActivity.CPU
        with profiler(activities=[activity]) as profiled:
            torch.autograd.grad(run(x, checkpointed).sum(), weights)
        print(f"--- {package}{' checkpointed' if checkpointed else ''}")
        key = "self_cuda_time_total" if device.startswith("cuda") else "self_cpu_time_total"
        print(profiled.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=70))


def run(request: Request) -> list[Row]:
    """Measures and writes after each group of packages."""
    options = request.options
    if request.quick:
        known, scaling = SMALL, SMALL_SCALING
    elif request.cuda:
        known, scaling = SHAPES, SCALING
    else:
        known, scaling = ON_CPU, SCALING_ON_CPU
    rounds = options.rounds or (2 if request.quick else 6)
    dtype = torch.bfloat16 if request.cuda else torch.float32
    timer = harness.Timer(request.device)
    copy_rate = harness.measure_copy(timer, harness.copy_runner(request.device), 5)
    del timer
    print(f"{device_name(request.device)}, copy {copy_rate / 1e12:.3f} TB/s")
    packages = request.packages
    checkpoints = {"no": [False], "yes": [True], "both": [False, True]}[
        options.checkpointed or "both"
    ]
    if options.scaling:
        packages = [name for name in packages if name not in SCALING_LEFT_OUT]
        checkpoints = [False]
        networks = [(f"over {axis}", shape, axis) for axis in scaling for shape in scaling[axis]]
    else:
        networks = [(name, known[name], "") for name in request.shapes or known]
    if options.warm and request.cuda:
        compile_beforehand([shape for _, shape, _ in networks], packages, options.warm)
    rows: list[Row] = []
    for name, shape, axis in networks:
        print(f"{name}: {shape}", flush=True)
        torch.manual_seed(0)
        network = Network(shape, str(request.device), dtype)
        for checkpointed in checkpoints:
            if options.profile:
                profile(network, packages, checkpointed, str(request.device))
                continue
            for index, group in enumerate(groups_of(packages)):
                measured = measure(network, group, checkpointed, rounds, copy_rate, axis)
                rows += [row for row in measured if index == 0 or row["package"] != "plain"]
                request.store.write(rows, copy_rate)
        del network
        if request.cuda:
            torch.cuda.empty_cache()
    return rows


if __name__ == "__main__":
    given, *numbers = sys.argv[1:]
    *sizes, sources = map(int, numbers)
    compile_one(given, Shape(*sizes), sources, "cuda", torch.bfloat16)
    torch.cuda.synchronize()
