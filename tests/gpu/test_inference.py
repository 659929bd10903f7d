"""Inference on the GPU: results in given memory, quantised results, snapshots, and whole models in
CUDA graphs."""

from __future__ import annotations

import functools
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import eager
from flash_attn_res import QuantizedSource, attend, inference, read
from flash_attn_res.compat import flashinfer, vllm
from flash_attn_res.inference import BlockBank, Quantized, Runner, SiteWeights

FP8 = torch.float8_e4m3fn
BF16 = torch.bfloat16
ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def normal(*shape: int, dtype: torch.dtype = torch.float32, factor: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * factor).to(dtype)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize("layout", ["tnd", "ntd"])
@pytest.mark.parametrize("D", [96, 100, 2304, 7168])
@pytest.mark.parametrize("T", [1, 7, 300])
def test_results_are_those_of_the_functional_api(
    T: int, D: int, layout: str, dtype: torch.dtype
) -> None:
    N, S = 4, 3
    bank = BlockBank(N + 1, T, D, layout=layout, dtype=dtype, device="cuda")
    bank.data.normal_()
    sources = bank.sources(N)
    queries = normal(S, D, factor=D**-0.5)
    out, lse = poisoned(S, T, D, dtype=dtype), poisoned(S, T)
    need = inference.attend_workspace_bytes(sources, queries, out=out, lse=lse)
    workspace = torch.full((need,), 0xFF, dtype=torch.uint8, device="cuda")
    inference.attend_out(sources, queries, out=out, lse=lse, workspace=workspace)
    want = attend(list(sources), queries)
    assert torch.equal(out, want.out)
    assert torch.equal(lse, want.lse)

    partial, update = normal(T, D, dtype=dtype), normal(T, D, dtype=dtype)
    weight = normal(D, dtype=dtype)
    wanted = read(
        queries[0],
        sources=list(sources),
        partial=partial,
        update=update,
        norm_weight=weight,
        return_mix=True,
    )
    x, mix = poisoned(T, D, dtype=dtype), poisoned(T, D, dtype=dtype)
    before = bank.data.clone()
    inference.read_out(
        queries[0],
        x=x,
        sources=sources,
        partial=partial,
        update=update,
        norm_weight=weight,
        partial_out=partial,
        snapshot=bank.row(N),
        mix=mix,
    )
    assert wanted.partial is not None
    assert wanted.mix is not None
    assert torch.equal(x, wanted.x)
    assert torch.equal(partial, wanted.partial)
    assert torch.equal(bank.row(N), wanted.partial)
    assert torch.equal(mix, wanted.mix)
    assert torch.equal(bank.sources(N), before.movedim(1, 0)[:N] if layout == "tnd" else before[:N])


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("D", [1, 100, 128, 300, 7168])
def test_quantised_x(D: int, groups: bool, power_of_two: bool) -> None:
    """The bits of the float32 x, scaled and converted by PyTorch."""
    T, N = 33, 3
    query, weight = normal(D, factor=D**-0.5), normal(D)
    sources = [normal(T, D) for _ in range(N)]
    for source in sources:
        source[4] = 0
    exact = torch.empty(T, D, device="cuda")
    inference.read_out(query, x=exact, sources=sources, norm_weight=weight)
    x = torch.full((T, D), 0x7F, dtype=torch.uint8, device="cuda").view(FP8)
    scale = poisoned(T, inference.scale_columns(D, groups))
    inference.read_out(
        query,
        x=x,
        x_scale=scale,
        sources=sources,
        norm_weight=weight,
        power_of_two_scale=power_of_two,
    )
    width = 128 if groups else D
    for g in range(scale.shape[1]):
        part = exact[:, g * width : (g + 1) * width].cpu()
        wanted = (part.abs().amax(1) / 448).clamp_min(2.0**-126)
        if power_of_two:
            mantissa, exponent = torch.frexp(wanted)
            wanted = torch.ldexp(torch.tensor(1.0), exponent - (mantissa == 0.5).int())
        assert torch.equal(scale[:, g].cpu(), wanted)
        stored = (part * (1 / wanted)[:, None]).clamp(-448, 448).to(FP8)
        got = x[:, g * width : (g + 1) * width].cpu()
        assert torch.equal(got.view(torch.uint8), stored.view(torch.uint8))


def test_quantised_nan_and_inf_are_not_hidden() -> None:
    source = torch.ones(3, 256, device="cuda")
    source[1, 5], source[2, 200] = float("nan"), float("inf")
    x, scale = torch.empty(3, 256, dtype=FP8, device="cuda"), torch.empty(3, 2, device="cuda")
    inference.read_out(x=x, x_scale=scale, sources=[source])
    value = x.float() * scale.repeat_interleave(128, 1)
    bad = torch.zeros(3, 256, dtype=torch.bool, device="cuda")
    bad[1, :128] = bad[2, 128:] = True
    assert torch.equal(value.isnan(), bad)


class Toy:
    def __init__(self, L: int, D: int) -> None:
        self.weights = SiteWeights(
            normal(L + 1, D, factor=D**-0.5),
            torch.rand(L + 1, D, device="cuda") + 0.5,
            normal(L + 1, D, dtype=BF16),
        )
        self.matrices = normal(L, D, D, dtype=BF16, factor=D**-0.5)
        self.outputs = torch.empty(0)

    def run(self, runner: Runner, embedding: Tensor) -> Tensor:
        step = runner.start(embedding)
        for index in range(runner.num_sublayers):
            x = step.read()
            assert isinstance(x, Tensor)
            step.write(torch.tanh(x @ self.matrices[index]))
        return step.finish()


def captured(toy: Toy, runner: Runner, embedding: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A step of a whole model in a graph, after one on another stream, and its result."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        toy.run(runner, embedding)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = toy.run(runner, embedding)
    return graph, y


def reads_on_both(
    toy: Toy, embedding: Tensor, given: dict[str, object]
) -> Iterator[tuple[Tensor, Tensor]]:
    """What a runner of either device reads, and its result, where both write the same outputs."""
    outputs = normal(len(toy.matrices), *embedding.shape, dtype=BF16)
    results = []
    for device in ("cuda", "cpu"):
        step = Runner(toy.weights.to(device), **given).start(embedding.to(device))
        inputs = []
        for output in outputs:
            x = step.read()
            assert isinstance(x, Tensor)
            inputs.append(x.clone().cpu())
            step.write(output.to(device))
        results.append([*inputs, step.finish().clone().cpu()])
    return zip(*results, strict=True)


@pytest.mark.parametrize("T", [1, 5, 200])
@pytest.mark.parametrize("mode", ["one_shot", "two_phase", "auto"])
@pytest.mark.parametrize("side_stream", [False, True])
def test_runner_in_a_graph(T: int, mode: str, side_stream: bool) -> None:
    L, D, S = 24, 256, 6
    toy = Toy(L, D)
    runner = Runner(toy.weights, block_size=S, max_tokens=T, mode=mode, side_stream=side_stream)
    plain = Runner(toy.weights, block_size=S, max_tokens=T, mode=mode)
    embedding = normal(T, D, dtype=BF16)
    graph, y = captured(toy, runner, embedding)
    for _ in range(3):
        embedding.normal_()
        runner.bank.data.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, toy.run(plain, embedding))
        assert y.isfinite().all()


def test_runner_step_allocates_nothing() -> None:
    L, D, T = 24, 256, 16
    toy = Toy(L, D)
    for mode in ("one_shot", "two_phase"):
        runner = Runner(toy.weights, block_size=6, max_tokens=T, mode=mode)
        embedding, output = normal(T, D, dtype=BF16), normal(T, D, dtype=BF16)

        def step(runner: Runner = runner, e: Tensor = embedding, o: Tensor = output) -> None:
            step = runner.start(e)
            for _ in range(L):
                step.read()
                step.write(o)
            step.finish()

        step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        step()
        torch.cuda.synchronize()
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.parametrize("fp8", [None, "group"])
@pytest.mark.parametrize("mode", ["one_shot", "two_phase"])
def test_another_number_of_tokens_takes_no_memory(mode: str, fp8: str | None) -> None:
    L, D, most = 8, 256, 600
    toy = Toy(L, D)
    runner = Runner(toy.weights, block_size=2, max_tokens=most, mode=mode, fp8=fp8)
    embedding, output = normal(most, D, dtype=BF16), normal(most, D, dtype=BF16)

    def step(tokens: int) -> None:
        step = runner.start(embedding[:tokens])
        for _ in range(L):
            step.read()
            step.write(output[:tokens])
        step.finish()

    step(most)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for tokens in range(1, most, 5):  # more than a runner keeps views for
        step(tokens)
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.parametrize("storage", [None, "float8"])
@pytest.mark.parametrize("mode", ["one_shot", "two_phase"])
@pytest.mark.parametrize("side_stream", [False, True])
def test_first_step_of_a_size_in_a_graph(side_stream: bool, mode: str, storage: str | None) -> None:
    """Several graphs of one runner, each captured at the first step of its size. They hold when the
    views of their sizes are no longer kept."""
    L, D, sizes = 12, 512, (5, 64, 300)
    toy = Toy(L, D)
    given = {"block_size": 4, "max_tokens": 300, "mode": mode, "storage": storage}
    runner = Runner(toy.weights, **given, side_stream=side_stream)
    plain = Runner(toy.weights, **given)
    embedding, outputs = normal(300, D, dtype=BF16), normal(L, 300, D, dtype=BF16)

    def step(runner: Runner, tokens: int) -> Tensor:
        step = runner.start(embedding[:tokens])
        for index in range(L):
            step.read()
            step.write(outputs[index, :tokens])
        return step.finish()

    graphs = {}
    for tokens in sizes:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = step(runner, tokens)
        graphs[tokens] = (graph, y)
    for tokens in range(100, 200):
        step(runner, tokens)
    embedding.normal_()
    for tokens in (*sizes, *sizes):
        graph, y = graphs[tokens]
        runner.bank.data.view(torch.uint8).fill_(0xFF)  # NaN in bfloat16 and in float8
        graph.replay()
        assert y.isfinite().all()
        assert torch.equal(y, step(plain, tokens))


# Phase 1, a merge with everything and a one-shot read, and their backward passes.
FIRST_CALL = """
import sys

import torch

from flash_attn_res import attend, read

T, D = int(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(5)


def leaf(*shape, factor=1.0, dtype=torch.bfloat16):
    return (torch.randn(*shape, device="cuda") * factor).to(dtype).requires_grad_()


sources = [leaf(T, D) for _ in range(4)]
partial, update, weight = leaf(T, D), leaf(T, D), leaf(D)
queries = leaf(8, D, factor=D**-0.5, dtype=torch.float32)
leaves = [*sources, partial, update, weight, queries]
cotangents = [leaf(8, T, D).detach(), leaf(T, D).detach(), leaf(T, D).detach()]
# What is PyTorch's own, its allocator and the thread of its backward passes, is ready.
(partial * update).sum().backward()


def step():
    phase1 = attend(sources, queries)
    site = (phase1.out[0], phase1.lse[0])
    merged = read(
        queries[0], phase1=site, partial=partial, update=update, norm_weight=weight
    ).x
    mixed = read(queries[1], sources=sources, norm_weight=weight).x
    results = [phase1.out, merged, mixed]
    return [*results, *torch.autograd.grad(results, leaves, cotangents)]


torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured = step()
graph.replay()
for result, again in zip(captured, step(), strict=True):
    assert result.isfinite().all()
    assert torch.equal(result, again)
print("captured")
"""


@pytest.mark.parametrize(("T", "D"), [(16, 7168), (600, 2048), (33, 100)])
def test_the_first_call_of_a_process_is_captured(T: int, D: int) -> None:
    """Nothing is set up by a first call outside of the graph."""
    command = [sys.executable, "-c", FIRST_CALL, str(T), str(D)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "captured"


def test_fp8_and_round_mix_are_refused_at_once() -> None:
    toy = Toy(4, 64)
    given = {"block_size": 2, "max_tokens": 3, "fp8": "token", "round_mix": True}
    with pytest.raises(ValueError, match=r"round_mix was given with fp8 and torch\.bfloat16"):
        Runner(toy.weights, **given)
    single = normal(3, 64)
    step = Runner(toy.weights, **given, dtype=torch.float32).start(single)
    assert isinstance(step.read(), Quantized)
    x, scale = torch.empty(3, 64, dtype=FP8, device="cuda"), torch.empty(3, 1, device="cuda")
    source = single.to(BF16)
    with pytest.raises(ValueError, match=r"^read: mix_rounding kStorage with x in float8"):
        inference.read_out(x=x, x_scale=scale, sources=[source], norm=True, round_mix=True)


@pytest.mark.parametrize("mode", ["one_shot", "two_phase"])
def test_runner_is_that_of_the_cpu(mode: str) -> None:
    L, D, T = 24, 512, 9
    toy = Toy(L, D)
    given = {"block_size": 6, "max_tokens": T, "mode": mode}
    for ours, theirs in reads_on_both(toy, normal(T, D, dtype=BF16), given):
        torch.testing.assert_close(ours, theirs, rtol=2.0**-7, atol=2.0**-7)


@pytest.mark.parametrize("storage", ["float16", "float8"])
@pytest.mark.parametrize("mode", ["one_shot", "two_phase"])
@pytest.mark.parametrize(("T", "D"), [(1, 256), (5, 2304), (300, 2048)])
def test_runner_with_a_stored_bank_in_a_graph(T: int, D: int, mode: str, storage: str) -> None:
    """A replay has the bits of a plain run, and the same reads are those of the CPU."""
    L, S = 12, 4
    toy = Toy(L, D)
    given = {"block_size": S, "max_tokens": T, "mode": mode, "storage": storage}
    runner, plain = Runner(toy.weights, **given), Runner(toy.weights, **given)
    embedding = normal(T, D, dtype=BF16)
    graph, y = captured(toy, runner, embedding)
    for _ in range(3):
        embedding.normal_()
        runner.bank.data.view(torch.uint8).fill_(0x7F)  # NaN in float8 and in float16
        graph.replay()
        assert torch.equal(y, toy.run(plain, embedding))
        assert y.isfinite().all()

    for ours, theirs in reads_on_both(toy, embedding, given):
        # A phase-1 result may be rounded to the other neighbour, 2^-8 of it: of a token, not of
        # each of its numbers, which may be small differences.
        error = (ours.double() - theirs.double()).norm(dim=-1)
        assert (error <= 2.0**-8 * theirs.double().norm(dim=-1)).all()


@pytest.mark.parametrize("fp8", ["token", "group"])
def test_runner_quantises_in_a_graph(fp8: str) -> None:
    L, D, T = 6, 384, 5
    toy = Toy(L, D)
    outputs = normal(L, T, D, dtype=BF16)
    embedding = normal(T, D, dtype=BF16)
    runner = Runner(toy.weights, block_size=2, max_tokens=T, fp8=fp8)
    plain = Runner(toy.weights, block_size=2, max_tokens=T)

    def run(runner: Runner) -> tuple[list[Tensor], Tensor]:
        step = runner.start(embedding)
        inputs = []
        for index in range(L):
            x = step.read()
            if isinstance(x, Quantized):
                width = D // x.scale.shape[1]
                inputs.append(x.x.float() * x.scale.repeat_interleave(width, 1))
            else:
                inputs.append(x.float())
            step.write(outputs[index])
        return inputs, step.finish().clone()

    run(runner)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(runner)
    embedding.normal_()
    graph.replay()
    want = run(plain)
    assert torch.equal(got[1], want[1])
    for ours, exact in zip(got[0], want[0], strict=True):
        assert ((ours - exact).norm() <= 0.04 * exact.norm()).item()


MANY = 8192
D_K3 = 7168
Run = Callable[[slice, dict[str, Tensor]], None]
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]  # of the results; -1 stands for T


def rows_of(tensor: Tensor, rows: slice) -> Tensor:
    """The rows of some tokens: the first axis that has them all."""
    return tensor[rows] if tensor.shape[0] == MANY else tensor[:, rows]


def values(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=BF16, device="cuda")


def one_shot() -> tuple[Shapes, Run]:
    bank, query = values(MANY, 9, D_K3), normal(D_K3, factor=D_K3**-0.5)

    def run(rows: slice, out: dict[str, Tensor]) -> None:
        inference.read_out(query, sources=bank[rows].movedim(1, 0), **out)

    return {"x": ((-1, D_K3), BF16)}, run


def advance() -> tuple[Shapes, Run]:
    o, partial, update = (values(MANY, D_K3) for _ in range(3))
    lse, query = normal(MANY), normal(D_K3, factor=D_K3**-0.5)
    weight = values(D_K3)

    def run(rows: slice, out: dict[str, Tensor]) -> None:
        inference.read_out(
            query,
            phase1=(o[rows], lse[rows]),
            partial=partial[rows],
            update=update[rows],
            norm_weight=weight,
            **out,
        )

    return {"x": ((-1, D_K3), BF16), "partial_out": ((-1, D_K3), BF16)}, run


def kimi_k3_site(fp8: str | None = None, power_of_two: bool = False) -> tuple[Shapes, Run]:
    bank, query = values(MANY, 8, D_K3), normal(D_K3, factor=D_K3**-0.5)
    prefix, delta, weight = values(MANY, D_K3), values(MANY, D_K3), values(D_K3)

    def run(rows: slice, out: dict[str, Tensor]) -> None:
        inference.read_out(
            query,
            sources=bank[rows].movedim(1, 0),
            partial=prefix[rows],
            update=delta[rows],
            norm_weight=weight,
            power_of_two_scale=power_of_two,
            **out,
        )

    results: Shapes = {
        "x": ((-1, D_K3), BF16 if fp8 is None else FP8),
        "partial_out": ((-1, D_K3), BF16),
        "snapshot": ((-1, D_K3), BF16),
        "mix": ((-1, D_K3), BF16),
    }
    if fp8 is not None:
        columns = inference.scale_columns(D_K3, fp8 == "group")
        results["x_scale"] = ((-1, columns), torch.float32)
    return results, run


def phase_1(S: int = 24) -> tuple[Shapes, Run]:
    bank, queries = values(8, MANY, D_K3), normal(S, D_K3, factor=D_K3**-0.5)

    def run(rows: slice, out: dict[str, Tensor]) -> None:
        inference.attend_out(bank[:, rows], queries, **out)

    return {"out": ((S, -1, D_K3), BF16), "lse": ((S, -1), torch.float32)}, run


def stored_bank(layout: str, storage: str = "float8") -> BlockBank:
    bank = BlockBank(8, MANY, D_K3, layout=layout, device="cuda", storage=storage)
    for row in range(8):
        bank.write(row, values(MANY, D_K3))
    return bank


def stored_site() -> tuple[Shapes, Run]:
    stored = stored_bank("tnd").stored(8)
    query, prefix = normal(D_K3, factor=D_K3**-0.5), values(MANY, D_K3)

    def run(rows: slice, out: dict[str, Tensor]) -> None:
        sources = QuantizedSource(stored.values[:, rows], stored.scale[:, rows])
        inference.read_out(query, sources=sources, partial=prefix[rows], norm=True, **out)

    return {"x": ((-1, D_K3), BF16)}, run


def stored_phase_1(S: int = 24, layout: str = "ntd", storage: str = "float8") -> tuple[Shapes, Run]:
    stored = stored_bank(layout, storage).stored(8)
    queries = normal(S, D_K3, factor=D_K3**-0.5)

    def run(rows: slice, out: dict[str, Tensor]) -> None:
        sources = QuantizedSource(stored.values[:, rows], stored.scale[:, rows])
        inference.attend_out(sources, queries, **out)

    return {"out": ((S, -1, D_K3), BF16), "lse": ((S, -1), torch.float32)}, run


BATCHES: dict[str, Callable[[], tuple[Shapes, Run]]] = {
    "one-shot": one_shot,
    "advance": advance,
    "Kimi K3 site": kimi_k3_site,
    "phase 1": phase_1,
    "phase 1 with one query": functools.partial(phase_1, 1),
    "float8 x": functools.partial(kimi_k3_site, "token"),
    "float8 x in groups": functools.partial(kimi_k3_site, "group", power_of_two=True),
    "float8 bank": stored_site,
    "phase 1 over a float8 bank": stored_phase_1,
    "phase 1 with one query over a float8 bank": functools.partial(stored_phase_1, 1),
    "phase 1 with two queries over a float8 bank": functools.partial(stored_phase_1, 2),
    "phase 1 with one query over a float16 bank": functools.partial(
        stored_phase_1, 1, "tnd", "float16"
    ),
}


@pytest.mark.parametrize("case", BATCHES)
def test_tokens_do_not_depend_on_their_batch(case: str) -> None:
    """The bits of a token are those that it has among 8192, alone, among 7 and among 128."""
    shapes, run = BATCHES[case]()

    def results(count: int) -> dict[str, Tensor]:
        found = {}
        for name, (shape, dtype) in shapes.items():
            sizes = [count if size == -1 else size for size in shape]
            found[name] = torch.empty(sizes, dtype=dtype, device="cuda")
            found[name].view(torch.uint8).fill_(0xFF)  # NaN in each of the dtypes
        return found

    together = results(MANY)
    run(slice(0, MANY), together)
    for name, result in together.items():
        assert result.to(BF16).isfinite().all(), name
    for size in (1, 7, 128):
        for first in (0, 2999, MANY - size):
            rows = slice(first, first + size)
            few = results(size)
            run(rows, few)
            for name, result in few.items():
                whole = rows_of(together[name], rows).contiguous()
                same = torch.equal(result.view(torch.uint8), whole.view(torch.uint8))
                assert same, f"{name} of tokens {first} to {first + size - 1}"


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize(("num_blocks", "write"), [(0, 0), (1, -1), (3, 3), (8, -1)])
def test_kimi_k3_site(num_blocks: int, write: int, with_norm: bool) -> None:
    T, NB, D = 5, 8, 7168
    prefix, blocks, delta = (normal(*s, dtype=BF16) for s in ((T, D), (T, NB, D), (T, D)))
    norm_weight, qk_weight = normal(D, dtype=BF16), normal(D, dtype=BF16, factor=D**-0.5)
    weight = normal(D, dtype=BF16) if with_norm else None
    want_prefix = prefix + delta
    want_blocks = blocks.clone()
    if write >= 0:
        want_blocks[:, write] = want_prefix
    terms = [*want_blocks.double().unbind(1)[:num_blocks], want_prefix.double()]
    query = norm_weight.double() * qk_weight.double()
    want, _, _ = eager.read(
        query,
        sources=terms,
        eps=1e-5,
        norm=with_norm,
        norm_weight=None if weight is None else weight.double(),
        norm_eps=1e-5,
    )
    site = (norm_weight, qk_weight, weight)
    out = poisoned(T, D, dtype=BF16)
    held = prefix.clone(), blocks.clone()
    got = vllm.attn_res(held[0], delta, held[1], *site, num_blocks, write, 1e-5, 1e-5)
    flashinfer.kimi_k3_attn_res(
        prefix, delta, blocks, *site, out, num_blocks=num_blocks, block_write_idx=write
    )
    for x, sums, bank in ((got, *held), (out, prefix, blocks)):
        assert torch.equal(sums, want_prefix)
        assert torch.equal(bank, want_blocks)
        assert ((x.double() - want).abs() <= want.abs() * 2.0**-8 * 1.05 + 1e-4).all()


def test_prepared_site_in_a_graph() -> None:
    T, D = 4, 7168
    prefix, blocks, delta = (normal(*s, dtype=BF16) for s in ((T, D), (T, 8, D), (T, D)))
    weights = [normal(D, dtype=BF16) for _ in range(3)]
    out = poisoned(T, D, dtype=BF16)
    site = flashinfer.prepare_kimi_k3_attn_res(
        prefix, delta, blocks, *weights, out, num_blocks=5, block_write_idx=6
    )
    first = prefix.clone()
    site.launch()
    want, total = out.clone(), prefix.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        site.launch()
    prefix.copy_(first)
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, want)
    assert torch.equal(prefix, total)
    assert torch.equal(blocks[:, 6], total)


@pytest.mark.parametrize("T", [1, 16, 128, 700])
@pytest.mark.parametrize("D", [2048, 7168])
def test_reads_that_overlap_wait_for_what_they_need(T: int, D: int) -> None:
    """A chain of reads, each of what the one before wrote, behind a copy and before another: reads
    are launched before the grid ahead of them has ended."""
    start, update = normal(T, D, dtype=BF16), normal(T, D, dtype=BF16)
    source, query = normal(1, T, D, dtype=BF16), normal(D, factor=D**-0.5)
    weight = normal(D)
    steps = 40

    def chain(total: Tensor, x: Tensor, kept: Tensor, synchronise: bool) -> None:
        total.copy_(start)
        for _ in range(steps):
            inference.read_out(
                query,
                x=x,
                sources=source,
                partial=total,
                update=update,
                partial_out=total,
                norm_weight=weight,
            )
            if synchronise:
                torch.cuda.synchronize()
            inference.read_out(query, x=update, sources=source, partial=x, norm_weight=weight)
            if synchronise:
                torch.cuda.synchronize()
        kept.copy_(x)

    first = update.clone()
    want = [poisoned(T, D, dtype=BF16) for _ in range(3)]
    chain(*want, synchronise=True)
    want.append(update.clone())
    update.copy_(first)
    got = [poisoned(T, D, dtype=BF16) for _ in range(3)]
    chain(*got, synchronise=False)
    for a, b in zip([*got, update], want, strict=True):
        assert torch.equal(a, b)

    graph = torch.cuda.CUDAGraph()
    got = [poisoned(T, D, dtype=BF16) for _ in range(3)]
    with torch.cuda.graph(graph):
        chain(*got, synchronise=False)
    for _ in range(3):
        update.copy_(first)
        graph.replay()
        for a, b in zip([*got, update], want, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("variant", ["plain", "block", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cpp_decoder(variant: str, dtype: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """examples/cpp/decoder on the GPU; FLASH_ATTN_RES_DECODER names the program, if not build/cuda.

    The preset "cuda" builds it with -DFLASH_ATTN_RES_EXAMPLES=ON.
    """
    built = ROOT / "build" / "cuda" / "examples" / "cpp" / "decoder" / "decoder"
    program = pathlib.Path(os.environ.get("FLASH_ATTN_RES_DECODER", built))
    if not program.exists():
        pytest.skip(f"{program} has not been built")
    from test_train import train_tiny

    folder = tmp_path_factory.mktemp(f"{variant}-{dtype}")
    options = ("--layers", "3", "--dtype", dtype, "--variants", variant)
    with torch.enable_grad():
        file = train_tiny(folder, "--steps", "30", *options) / f"{variant}.safetensors"
    texts = {}
    logits = {}
    for device in ("cpu", "cuda"):
        command = [program, file, "--device", device, "--prompt", "def f"]
        texts[device] = subprocess.run(
            [*command, "--length", "60"], capture_output=True, check=True
        ).stdout
        lines = subprocess.run([*command, "--logits"], capture_output=True, check=True).stdout
        logits[device] = torch.tensor(
            [[float(w) for w in line.split()] for line in lines.splitlines()]
        )
    error = (logits["cuda"] - logits["cpu"]).norm() / logits["cpu"].norm()
    assert error <= (1e-4 if dtype == "float32" else 0.03)
    if dtype == "float32":
        assert texts["cuda"] == texts["cpu"]
