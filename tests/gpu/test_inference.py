"""Inference on the GPU: results in given memory, quantised results, snapshots, and whole models in
CUDA graphs."""

from __future__ import annotations

import os
import pathlib
import subprocess
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import eager
from flash_attn_res import attend, inference, read
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


@pytest.mark.parametrize("T", [1, 5, 200])
@pytest.mark.parametrize("mode", ["one_shot", "two_phase", "auto"])
@pytest.mark.parametrize("side_stream", [False, True])
def test_runner_in_a_graph(T: int, mode: str, side_stream: bool) -> None:
    L, D, S = 24, 256, 6
    toy = Toy(L, D)
    runner = Runner(toy.weights, block_size=S, max_tokens=T, mode=mode, side_stream=side_stream)
    plain = Runner(toy.weights, block_size=S, max_tokens=T, mode=mode)
    embedding = normal(T, D, dtype=BF16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        toy.run(runner, embedding)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = toy.run(runner, embedding)
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


@pytest.mark.parametrize("mode", ["one_shot", "two_phase"])
def test_runner_is_that_of_the_cpu(mode: str) -> None:
    L, D, T = 24, 512, 9
    toy = Toy(L, D)
    outputs = normal(L, T, D, dtype=BF16)
    embedding = normal(T, D, dtype=BF16)
    results = []
    for device in ("cuda", "cpu"):
        runner = Runner(toy.weights.to(device), block_size=6, max_tokens=T, mode=mode)
        step = runner.start(embedding.to(device))
        inputs = []
        for index in range(L):
            x = step.read()
            assert isinstance(x, Tensor)
            inputs.append(x.clone().cpu())
            step.write(outputs[index].to(device))
        results.append([*inputs, step.finish().clone().cpu()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2.0**-7, atol=2.0**-7)


@pytest.mark.parametrize("storage", ["float16", "float8"])
@pytest.mark.parametrize("mode", ["one_shot", "two_phase"])
@pytest.mark.parametrize(("T", "D"), [(1, 256), (5, 2304), (300, 2048)])
def test_runner_with_a_stored_bank_in_a_graph(T: int, D: int, mode: str, storage: str) -> None:
    """A replay has the bits of a plain run, and its first reads are those of the CPU."""
    L, S = 12, 4
    toy = Toy(L, D)
    given = {"block_size": S, "max_tokens": T, "mode": mode, "storage": storage}
    runner, plain = Runner(toy.weights, **given), Runner(toy.weights, **given)
    embedding = normal(T, D, dtype=BF16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        toy.run(runner, embedding)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = toy.run(runner, embedding)
    for _ in range(3):
        embedding.normal_()
        runner.bank.data.view(torch.uint8).fill_(0x7F)  # NaN in float8 and in float16
        graph.replay()
        assert torch.equal(y, toy.run(plain, embedding))
        assert y.isfinite().all()

    outputs = normal(L, T, D, dtype=BF16)
    results = []
    for device in ("cuda", "cpu"):
        step = Runner(toy.weights.to(device), **given).start(embedding.to(device))
        inputs = []
        for index in range(L):
            x = step.read()
            assert isinstance(x, Tensor)
            inputs.append(x.clone().cpu())
            step.write(outputs[index].to(device))
        results.append([*inputs, step.finish().clone().cpu()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2.0**-7, atol=2.0**-7)


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


@pytest.mark.parametrize("T", [7, 128, 2048])
def test_tokens_do_not_depend_on_their_batch(T: int) -> None:
    N, D = 8, 7168
    bank, query = normal(T, N, D, dtype=BF16), normal(D, factor=D**-0.5)
    prefix, delta = normal(T, D, dtype=BF16), normal(T, D, dtype=BF16)
    weight = normal(D, dtype=BF16)
    together, alone = poisoned(T, D, dtype=BF16), poisoned(T, D, dtype=BF16)
    totals = [torch.empty_like(prefix) for _ in range(2)]

    def site(rows: slice, x: Tensor, total: Tensor) -> None:
        inference.read_out(
            query,
            x=x[rows],
            sources=bank[rows].movedim(1, 0),
            partial=prefix[rows],
            update=delta[rows],
            partial_out=total[rows],
            norm_weight=weight,
        )

    site(slice(0, T), together, totals[0])
    for t in range(0, T, max(1, T // 16)):
        site(slice(t, t + 1), alone, totals[1])
        assert torch.equal(alone[t], together[t])


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
