"""Results in given memory, the block bank, site weights from files, and the runner of a model."""

from __future__ import annotations

import json
import pathlib
import re
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import eager
from flash_attn_res import BlockAttnRes, attend, inference, quantize, read
from flash_attn_res.inference import BlockBank, Quantized, Runner, SiteWeights
from flash_attn_res.inference.operators import in_words
from flash_attn_res.inference.runner import KEPT_SCHEDULES

FP8 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan")).to(dtype)


class Operators(TorchDispatchMode):
    """Writes down every operator that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


# ----------------------------------------------------------------------------- attend_out, read_out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["tnd", "ntd"])
def test_results_are_those_of_the_functional_api(dtype: torch.dtype, layout: str) -> None:
    T, N, D, S = 7, 4, 96, 3
    bank = BlockBank(N + 1, T, D, layout=layout, dtype=dtype)
    bank.data.normal_()
    sources = bank.sources(N)
    queries = torch.randn(S, D) / D**0.5
    out, lse = poisoned(T, S, D, dtype=dtype).movedim(1, 0), poisoned(T, S).t().contiguous()
    need = inference.attend_workspace_bytes(sources, queries, out=out, lse=lse)
    workspace = torch.empty(need, dtype=torch.uint8)
    inference.attend_out(sources, queries, out=out, lse=lse, workspace=workspace)
    want = attend(list(sources), queries)
    assert torch.equal(out, want.out)
    assert torch.equal(lse, want.lse)

    partial, update = torch.randn(T, D).to(dtype), torch.randn(T, D).to(dtype)
    weight = torch.randn(D).to(dtype)
    wanted = read(
        queries[0],
        sources=list(sources),
        partial=partial,
        update=update,
        norm_weight=weight,
        return_mix=True,
        return_probs=True,
    )
    x, mix = poisoned(T, D, dtype=dtype), poisoned(T, D, dtype=dtype)
    probs, held = poisoned(T, N + 1), partial.clone()
    arguments: dict[str, Any] = {
        "x": x,
        "sources": sources,
        "partial": held,
        "update": update,
        "norm_weight": weight,
        "partial_out": held,  # in place
        "snapshot": bank.row(N),
        "mix": mix,
        "probs": probs,
    }
    need = inference.read_workspace_bytes(queries[0], **arguments)
    workspace = torch.empty(need, dtype=torch.uint8)
    inference.read_out(queries[0], **arguments, workspace=workspace)
    assert torch.equal(x, wanted.x)
    assert wanted.partial is not None
    assert wanted.mix is not None
    assert torch.equal(held, wanted.partial)
    assert torch.equal(bank.row(N), wanted.partial)
    assert torch.equal(mix, wanted.mix)
    torch.testing.assert_close(probs, wanted.probs)


def test_nothing_runs_but_the_operator() -> None:
    """With a workspace there is no allocation, and no other operator either."""
    T, N, D = 4, 3, 32
    bank = torch.randn(T, N, D)
    x, query = torch.empty(T, D), torch.randn(D)
    partial, update = torch.randn(T, D), torch.randn(T, D)
    items = [bank[:, n] for n in range(N)]
    workspace = torch.empty(1 << 20, dtype=torch.uint8)
    with Operators() as ran:
        inference.read_out(
            query,
            x=x,
            sources=items,
            partial=partial,
            update=update,
            partial_out=partial,
            norm=True,
            workspace=workspace,
        )
    # Views and conversions that change nothing are no work.
    assert ran.names[-1] == "flash_attn_res::read_out"
    assert not [name for name in ran.names if "empty" in name or "copy" in name or "mul" in name]


def test_compiles_in_full() -> None:
    torch.compiler.reset()
    T, N, D = 4, 3, 32
    sources, query = torch.randn(N, T, D), torch.randn(D)

    def site(sources: Tensor, query: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        x, total = torch.empty(T, D), torch.empty(T, D)
        inference.read_out(query, x=x, sources=sources, update=update, partial_out=total)
        return x * 2, total

    update = torch.randn(T, D)
    want = site(sources, query, update)
    got = torch.compile(site, fullgraph=True, backend="aot_eager")(sources, query, update)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("T", [1, 5])
def test_the_schedule_in_the_documentation(T: int) -> None:
    """The block of docs/inference.md has the bits of the functional API, tokens fewer than most."""
    page = pathlib.Path(__file__).resolve().parents[2] / "docs" / "inference.md"
    found = re.findall(r"<!-- test: own_schedule -->\n```python\n(.*?)```", page.read_text(), re.S)
    (example,) = found
    S, D, n = 4, 72, 2
    w, g, norms = (v(S, D, dtype=torch.bfloat16) for _ in range(3))
    given = {"S": S, "D": D, "w": w / D**0.5, "g": g, "norms": norms, "device": "cpu"}
    namespace: dict[str, Any] = {**given, "max_tokens": 5, "num_rows": 4}
    exec(compile(example, "inference.md", "exec"), namespace)
    bank, prefix, u = namespace["bank"], namespace["prefix"], namespace["u"]
    bank.fill_(float("nan"))  # rows behind those that are read may hold anything
    rows = [v(T, D, dtype=torch.bfloat16) for _ in range(n)]
    for index, row in enumerate(rows):
        bank[:T, index] = row
    prefix[:T] = first = v(T, D, dtype=torch.bfloat16)
    delta = given_delta = v(T, D, dtype=torch.bfloat16)
    sublayers: list[Callable[[Tensor], Tensor]] = [torch.sin, torch.cos, torch.tanh, torch.sin]
    with Operators() as ran:
        got = namespace["run_block"](T, n, given_delta, sublayers)
    assert not [name for name in ran.names if "empty" in name or "copy" in name or "mul" in name]

    site = read(u[0], sources=rows, partial=first, update=delta, norm_weight=norms[0], eps=1e-5)
    assert site.partial is not None
    rows.append(site.partial)
    phase1 = attend(rows, u[1:], eps=1e-5)
    total = None
    for s, sublayer in enumerate(sublayers):
        if s > 0:
            site = read(
                u[s],
                phase1=(phase1.out[s - 1], phase1.lse[s - 1]),
                partial=total,
                update=delta,
                norm_weight=norms[s],
                eps=1e-5,
            )
            total = site.partial
        delta = sublayer(site.x)
    assert torch.equal(bank[:T, n], rows[n])
    assert total is not None
    assert torch.equal(prefix[:T], total)
    assert torch.equal(got, delta)


# --------------------------------------------------------------------------------------------- fp8


def reference_quantisation(
    values: np.ndarray, groups: bool, power_of_two: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Codes as torch.float8_e4m3fn stores them, as floats, and scales, of float32 [T, D]."""
    T, D = values.shape
    width = 128 if groups else D
    scales = np.empty((T, -(-D // width)), np.float32)
    stored = np.empty((T, D), np.float32)
    for g in range(scales.shape[1]):
        part = values[:, g * width : (g + 1) * width]
        amax = np.abs(part).max(axis=1)
        scale = np.maximum(amax / np.float32(448), np.float32(2.0**-126)).astype(np.float32)
        if power_of_two:
            mantissa, exponent = np.frexp(scale)
            scale = np.ldexp(np.float32(1), np.where(mantissa == 0.5, exponent - 1, exponent))
        scales[:, g] = scale
        scaled = part * (np.float32(1) / scale)[:, None].astype(np.float32)
        clamped = torch.from_numpy(np.clip(scaled, -448, 448))
        stored[:, g * width : (g + 1) * width] = clamped.to(FP8).float().numpy()
    return stored, scales


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("D", [1, 100, 128, 300, 2304])
def test_quantised_x_is_the_float32_x_quantised(D: int, groups: bool, power_of_two: bool) -> None:
    T, N = 9, 3
    query, weight = torch.randn(D) / D**0.5, torch.randn(D)
    sources = [torch.randn(T, D) * 10.0 ** torch.randint(-3, 4, (T, 1)) for _ in range(N)]
    sources = [source.index_fill(0, torch.tensor([4]), 0.0) for source in sources]  # a zero row
    exact = torch.empty(T, D)
    inference.read_out(query, x=exact, sources=sources, norm_weight=weight)
    x = torch.full((T, D), 0x7F, dtype=torch.uint8).view(FP8)
    scale = poisoned(T, inference.scale_columns(D, groups))
    mix = poisoned(T, D)
    inference.read_out(
        query,
        x=x,
        x_scale=scale,
        sources=sources,
        norm_weight=weight,
        power_of_two_scale=power_of_two,
        mix=mix,
    )
    stored, scales = reference_quantisation(exact.numpy(), groups, power_of_two)
    np.testing.assert_array_equal(scale.numpy(), scales)
    np.testing.assert_array_equal(x.float().numpy(), stored)
    assert torch.equal(mix, read(query, sources=sources).x)
    assert (x.float()[4] == 0).all()
    if power_of_two:  # UE8M0: the exponent bits of the float32 say all
        assert (scale.view(torch.int32) & 0x7FFFFF == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantised_x_from_half_precision(dtype: torch.dtype) -> None:
    T, D = 6, 300
    sources = [torch.randn(T, D).to(dtype) for _ in range(3)]
    query = torch.randn(D) / D**0.5
    exact = torch.empty(T, D)
    inference.read_out(query, x=exact, sources=sources, norm=True)
    x, scale = torch.empty(T, D, dtype=FP8), torch.empty(T, 3)
    inference.read_out(query, x=x, x_scale=scale, sources=sources, norm=True)
    stored, scales = reference_quantisation(exact.numpy(), True, False)
    np.testing.assert_allclose(scale.numpy(), scales, rtol=1e-6)
    value = x.float() * scale.repeat_interleave(128, 1)[:, :D]
    # Half a unit in the last place of a value, or of the smallest normal one.
    bound = torch.maximum(exact.abs(), scale.repeat_interleave(128, 1)[:, :D] * 2.0**-6) / 16
    assert ((value - exact).abs() <= bound * 1.001).all()
    assert (x.float().numpy() == stored).mean() > 0.99


def test_quantised_nan_and_inf_are_not_hidden() -> None:
    source = torch.ones(3, 256)
    source[1, 5], source[2, 200] = float("nan"), float("inf")
    x, scale = torch.empty(3, 256, dtype=FP8), torch.empty(3, 2)
    inference.read_out(x=x, x_scale=scale, sources=[source])
    value = x.float() * scale.repeat_interleave(128, 1)
    bad = torch.zeros(3, 256, dtype=torch.bool)
    bad[1, :128] = bad[2, 128:] = True
    assert torch.equal(value.isnan(), bad)
    assert (value[~bad] == 1).all()


# ------------------------------------------------------------------------------------------ runner


class Toy:
    """A model of L sublayers tanh(x W), its site weights, and its forward in double precision."""

    def __init__(self, L: int, D: int, dtype: torch.dtype = torch.float32) -> None:
        self.queries = torch.randn(L + 1, D) / D**0.5
        self.keys = torch.rand(L + 1, D) + 0.5
        self.norms = (torch.rand(L + 1, D) + 0.5).to(dtype)
        self.matrices = torch.randn(L, D, D) / D**0.5
        self.weights = SiteWeights(self.queries, self.keys, self.norms)

    def sublayer(self, index: int, x: Tensor) -> Tensor:
        return torch.tanh(x.to(torch.float64) @ self.matrices[index].double()).to(x.dtype)

    def run(self, runner: Runner, embedding: Tensor) -> tuple[list[Tensor], Tensor]:
        step = runner.start(embedding)
        inputs = []
        for index in range(runner.num_sublayers):
            x = step.read()
            assert isinstance(x, Tensor)
            inputs.append(x.clone())
            step.write(self.sublayer(index, x))
        return inputs, step.finish().clone()


def kimi_k3(
    toy: Toy,
    embedding: Tensor,
    layers_per_block: int,
    eps: float,
    stored: list[Tensor] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Kimi K3 layer by layer as its engines run it: snapshots, prefix, reset at a boundary.

    ``stored`` are the snapshots as a bank holds them, in place of the ones computed here.
    """
    num_layers = len(toy.matrices) // 2
    snapshots: list[Tensor] = []
    prefix: Tensor = embedding
    inputs = []

    def mix(site: int, values: list[Tensor]) -> Tensor:
        v = torch.stack(values)
        if len(values) == 1:
            h = v[0]  # softmax over one is one
        else:
            k = eager.rms_norm(v, eps) * toy.keys[site].to(v.dtype)
            p = (k @ toy.queries[site].to(v.dtype)).softmax(0)
            h = (p[..., None] * v).sum(0)
        return eager.rms_norm(h, eps) * toy.norms[site].to(v.dtype)

    for layer in range(num_layers):
        assert len(snapshots) == -(-layer // layers_per_block)
        inputs.append(mix(2 * layer, [*snapshots, prefix]))
        attention = toy.sublayer(2 * layer, inputs[-1])
        if layer % layers_per_block == 0:
            snapshots.append(prefix if stored is None else stored[len(snapshots)])
            prefix = attention
        else:
            prefix = prefix + attention
        assert len(snapshots) == layer // layers_per_block + 1
        inputs.append(mix(2 * layer + 1, [*snapshots, prefix]))
        prefix = prefix + toy.sublayer(2 * layer + 1, inputs[-1])
    return inputs, mix(2 * num_layers, [*snapshots, prefix])


@pytest.mark.parametrize("layout", ["tnd", "ntd"])
@pytest.mark.parametrize("mode", ["one_shot", "two_phase", "auto"])
@pytest.mark.parametrize("layers", [6, 8, 10])  # the last block full or short
def test_runner_is_kimi_k3(layers: int, mode: str, layout: str) -> None:
    T, D, eps = 5, 24, 1e-5
    toy = Toy(2 * layers, D)
    embedding = torch.randn(T, D)
    runner = Runner(
        toy.weights, block_size=4, max_tokens=8, dtype=torch.float32, mode=mode, layout=layout
    )
    assert runner.bank.num_rows == -(-layers // 2)
    runner.bank.data.fill_(float("nan"))
    want_inputs, want = kimi_k3(toy, embedding.double(), layers_per_block=2, eps=eps)
    plain_inputs, plain = kimi_k3(toy, embedding, layers_per_block=2, eps=eps)
    for _ in range(2):  # the second step finds the first one's values in the buffers
        inputs, y = toy.run(runner, embedding)
        pairs = zip([*inputs, y], [*want_inputs, want], [*plain_inputs, plain], strict=True)
        for index, (ours, exact, in_eager) in enumerate(pairs):
            # Differences of a float32 ulp pass through the sublayers, each about as large again.
            eager.assert_close_enough(f"site {index}", ours, exact, in_eager, ulps=8)
    # Site 0 has one source: its mixture is the embedding itself.
    assert torch.equal(runner.bank.row(0, T), embedding)


@pytest.mark.parametrize("storage", ["float16", "float8"])
@pytest.mark.parametrize("layout", ["tnd", "ntd"])
@pytest.mark.parametrize("mode", ["one_shot", "two_phase", "auto"])
def test_runner_with_a_stored_bank(mode: str, layout: str, storage: str) -> None:
    """Exactly over what the bank holds, and within the storage's error of a plain bank."""
    T, D, eps = 5, 136, 1e-5
    toy = Toy(20, D)
    embedding = torch.randn(T, D)
    runner = Runner(
        toy.weights,
        block_size=4,
        max_tokens=8,
        dtype=torch.float32,
        mode=mode,
        layout=layout,
        storage=storage,
    )
    bank = runner.bank
    size = 1 if storage == "float8" else 2
    assert bank.data.nbytes == bank.num_rows * 8 * D * size
    assert bank.scale is not None
    assert bank.scale.nbytes == bank.num_rows * 8 * (2 if storage == "float8" else 1)
    for _ in range(2):
        bank.data.view(torch.uint8).fill_(0x7F)  # NaN in float8, huge in float16
        bank.scale.fill_(0xFF)
        inputs, y = toy.run(runner, embedding)
        held = [bank.stored_row(row, T).dequantize(torch.float64) for row in range(bank.num_rows)]
        single = [value.float() for value in held]
        want_inputs, want = kimi_k3(toy, embedding.double(), 2, eps, held)
        plain_inputs, plain = kimi_k3(toy, embedding, 2, eps, single)
        pairs = zip([*inputs, y], [*want_inputs, want], [*plain_inputs, plain], strict=True)
        for index, (ours, exact, in_eager) in enumerate(pairs):
            eager.assert_close_enough(f"site {index}", ours, exact, in_eager, ulps=8)
    first = quantize(embedding, storage)
    assert torch.equal(bank.stored_row(0, T).values.float(), first.values.float())
    assert torch.equal(bank.stored_row(0, T).scale, first.scale)
    plain_runner = Runner(toy.weights, block_size=4, max_tokens=8, dtype=torch.float32, mode=mode)
    unstored = toy.run(plain_runner, embedding)[1]
    rows = [plain_runner.bank.row(row, T).double() for row in range(bank.num_rows)]
    bound = 2.0**-4 if storage == "float8" else 2.0**-11
    for n, (row, value) in enumerate(zip(rows, held, strict=True)):
        # Row 0 is rounded once, the others follow sites that read rounded rows.
        assert (row - value).norm() <= (1 if n == 0 else 4) * bound * row.norm(), n
    assert (y - unstored).norm() <= 4 * bound * unstored.norm()
    assert not torch.equal(y, unstored)


@pytest.mark.parametrize("storage", ["float16", "float8"])
def test_a_stored_bank_is_the_stream_that_stores(storage: str) -> None:
    """In one-shot form both read the sum of a boundary as it is, and store it then."""
    L, D, T = 12, 136, 3
    toy = Toy(L, D)
    module = BlockAttnRes(L, D, 4, eps=1e-5, block_storage=storage, forms="one_shot")
    module.queries.copy_(toy.queries)
    assert module.key_weight is not None
    module.key_weight.copy_(toy.keys)
    embedding = torch.randn(T, D)
    stream = module.start(embedding)
    for index in range(L):
        stream.write(toy.sublayer(index, stream.read(toy.norms[index])))
    want = stream.finish(toy.norms[L])
    weights = SiteWeights.from_module(module, toy.norms)
    runner = Runner(
        weights, block_size=4, max_tokens=T, dtype=torch.float32, mode="one_shot", storage=storage
    )
    y = toy.run(runner, embedding)[1]
    # But for the embedding, which the first block of a stream reads as it came.
    bound = 2.0**-4 if storage == "float8" else 2.0**-11
    assert (y - want).norm() <= 2 * bound * want.norm()


@pytest.mark.parametrize("storage", [None, "float8"])
@pytest.mark.parametrize("mode", ["one_shot", "two_phase"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_running_sum(dtype: torch.dtype, mode: str, storage: str | None) -> None:
    """Site by site with the functional API; the row of a boundary is the sum, rounded once."""
    L, S, D, T = 11, 4, 72, 3
    toy = Toy(L, D, dtype)
    embedding = torch.randn(T, D).to(dtype)
    runner = Runner(
        toy.weights,
        block_size=S,
        max_tokens=T,
        dtype=dtype,
        mode=mode,
        storage=storage,
        sum_dtype=torch.float32,
    )
    step, rows = runner.start(embedding), []
    total, output, phase1 = embedding, None, None
    u = toy.weights.queries
    for site in range(L + 1):
        x = (step.read() if site < L else step.finish()).clone()
        if output is not None:
            total = output.float() if total is None else total + output
        if site % S == 0 and site < L and storage is None:
            total = total.to(dtype).float()  # rows of one dtype would go to another kernel
        given = {"sources": rows, "partial": total, "norm_weight": toy.norms[site], "eps": 1e-5}
        if mode == "two_phase" and rows:
            slot = (site - 1) % S
            given |= {"sources": (), "phase1": (phase1.out[slot], phase1.lse[slot])}
        want = read(u[site] if rows else None, **given, dtype=dtype).x
        assert torch.equal(x, want), site
        if site < L and site % S == 0:
            if storage is None:
                rows.append(total.to(dtype))
                assert torch.equal(runner.bank.row(site // S, T), rows[-1])
            else:
                rows.append(quantize(total, storage))
                stored = runner.bank.stored_row(site // S, T)
                assert torch.equal(stored.values.float(), rows[-1].values.float())
                assert torch.equal(stored.scale, rows[-1].scale)
            if mode == "two_phase":
                phase1 = attend(rows, u[site + 1 : site + S + 1], eps=1e-5, dtype=dtype)
            total = None
        if site < L:
            output = toy.sublayer(site, x)
            step.write(output)


def test_errors_of_the_sum_dtype() -> None:
    with pytest.raises(ValueError, match=r"sum_dtype is torch.bfloat16, expected torch.float32"):
        Runner(Toy(4, 8).weights, block_size=2, max_tokens=1, sum_dtype=torch.bfloat16)


def test_a_step_with_a_stored_bank_allocates_nothing() -> None:
    toy = Toy(8, 32, torch.bfloat16)
    runner = Runner(toy.weights, block_size=2, max_tokens=4, mode="two_phase", storage="float8")
    embedding, output = (torch.randn(3, 32).bfloat16() for _ in range(2))
    toy.run(runner, embedding)
    with Operators() as ran:
        step = runner.start(embedding)
        for _ in range(8):
            step.read()
            step.write(output)
        step.finish()
    names = [name.removeprefix("flash_attn_res::") for name in ran.names]
    assert set(names) == {"read_out", "attend_out", "quantize_into"}
    assert [names.count(name) for name in ("read_out", "attend_out", "quantize_into")] == [9, 4, 4]


def test_bank_with_storage() -> None:
    bank = BlockBank(3, 4, 200, storage="float8")
    assert (bank.data.dtype, bank.data.shape) == (torch.float8_e4m3fn, (4, 3, 200))
    value = torch.randn(2, 200).bfloat16()
    bank.write(1, value)
    expected = quantize(value, "float8")
    assert torch.equal(bank.stored_row(1, 2).values.float(), expected.values.float())
    assert torch.equal(bank.stored_row(1, 2).scale, expected.scale)
    packed = bank.stored(2, 2)
    assert (packed.values.shape, packed.scale.shape) == ((2, 2, 200), (2, 2, 2))
    assert torch.equal(packed.dequantize()[1], expected.dequantize())
    with pytest.raises(ValueError, match="row 1 is in use"):
        bank.write(1, value)
    bank.reset()
    bank.write(1, value)


@pytest.mark.parametrize("block_size", [1, 3, 7, 12, 20])
@pytest.mark.parametrize("mode", ["one_shot", "two_phase"])
def test_runner_is_the_stream(block_size: int, mode: str) -> None:
    L, D, T = 12, 16, 3
    toy = Toy(L, D)
    module = BlockAttnRes(L, D, block_size, eps=1e-5)
    module.queries.copy_(toy.queries)
    assert module.key_weight is not None
    module.key_weight.copy_(toy.keys)
    embedding = torch.randn(T, D)
    stream = module.start(embedding)
    for index in range(L):
        stream.write(toy.sublayer(index, stream.read(toy.norms[index])))
    want = stream.finish(toy.norms[L])
    weights = SiteWeights.from_module(module, toy.norms)
    runner = Runner(weights, block_size=block_size, max_tokens=T, dtype=torch.float32, mode=mode)
    torch.testing.assert_close(toy.run(runner, embedding)[1], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["one_shot", "two_phase"])
def test_step_allocates_nothing(mode: str) -> None:
    toy = Toy(8, 32, torch.bfloat16)
    runner = Runner(toy.weights, block_size=2, max_tokens=4, mode=mode)
    embedding, output = (torch.randn(3, 32).bfloat16() for _ in range(2))
    toy.run(runner, embedding)
    with Operators() as ran:
        step = runner.start(embedding)
        for _ in range(8):
            step.read()
            step.write(output)
        step.finish()
    names = {name.removeprefix("flash_attn_res::") for name in ran.names}
    views = {"aten::slice.Tensor", "aten::select.int"}
    assert names - views == {"read_out"} | ({"attend_out"} if mode == "two_phase" else set())
    # Nine sites, and phase 1 once a block.
    assert ran.names.count("flash_attn_res::read_out") == 9
    assert ran.names.count("flash_attn_res::attend_out") == (4 if mode == "two_phase" else 0)


@pytest.mark.parametrize("fp8", [None, "group"])
@pytest.mark.parametrize("mode", ["one_shot", "two_phase"])
def test_another_number_of_tokens_takes_no_memory(mode: str, fp8: str | None) -> None:
    L, D, most = 4, 32, KEPT_SCHEDULES + 20
    toy = Toy(L, D, torch.bfloat16)
    runner = Runner(toy.weights, block_size=2, max_tokens=most, mode=mode, fp8=fp8)
    embedding, output = (torch.randn(most, D).bfloat16() for _ in range(2))
    with Operators() as ran:
        for T in [*range(most + 1), 0, 1, most]:  # 0: a rank of a batch may have none
            step = runner.start(embedding[:T])
            for _ in range(L):
                step.read()
                step.write(output[:T])
            assert step.finish().shape == (T, D)
            assert len(runner._schedules) <= KEPT_SCHEDULES
    names = {name.removeprefix("flash_attn_res::") for name in ran.names}
    views = {"aten::alias", "aten::select.int", "aten::slice.Tensor", "aten::unbind.int"}
    assert names <= views | {"read_out", "attend_out"}
    # What came up last is kept.
    assert [*runner._schedules][-3:] == [0, 1, most]


def test_fewer_tokens_need_no_larger_workspace() -> None:
    """That of the most tokens serves all others."""
    N, S, D, most = 3, 4, 48, 400
    sources = torch.empty(N, most, D)
    lse, out = torch.empty(S, most), torch.empty(S, most, D)
    queries = torch.zeros(S, D)
    for dtype in (torch.bfloat16, FP8):
        x = torch.empty(most, D, dtype=dtype)
        scale = torch.empty(most, 1) if dtype == FP8 else None
        reads, attends = [], []
        for T in range(1, most + 1):
            cut = None if scale is None else scale[:T]
            reads.append(
                inference.read_workspace_bytes(
                    queries[0],
                    x=x[:T],
                    x_scale=cut,
                    sources=sources[:, :T],
                    partial=out[0, :T],
                    norm=True,
                )
            )
            attends.append(
                inference.attend_workspace_bytes(
                    sources[:, :T], queries, out=out[:, :T], lse=lse[:, :T]
                )
            )
        assert reads == sorted(reads)
        assert attends == sorted(attends)


def test_step_compiles_in_full() -> None:
    torch.compiler.reset()
    L, D = 4, 16
    toy = Toy(L, D)
    runner = Runner(toy.weights, block_size=2, max_tokens=4, dtype=torch.float32, mode="two_phase")

    def model(embedding: Tensor) -> Tensor:
        step = runner.start(embedding)
        for _ in range(L):
            x = step.read()
            assert isinstance(x, Tensor)
            step.write(torch.tanh(x))
        return step.finish() * 2

    embedding = torch.randn(3, D)
    want = model(embedding)
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(embedding)
    assert torch.equal(got, want)


@pytest.mark.parametrize("mode", ["one_shot", "two_phase"])
def test_tokens_do_not_depend_on_their_batch(mode: str) -> None:
    toy = Toy(8, 64, torch.bfloat16)
    embedding = torch.randn(9, 64).bfloat16()
    runner = Runner(toy.weights, block_size=2, max_tokens=9, mode=mode)
    outputs = torch.randn(8, 9, 64).bfloat16()

    def run(rows: slice) -> list[Tensor]:
        step = runner.start(embedding[rows])
        results = []
        for index in range(8):
            x = step.read()
            assert isinstance(x, Tensor)
            results.append(x.clone())
            step.write(outputs[index, rows])
        return [*results, step.finish().clone()]

    together = run(slice(0, 9))
    for t in (0, 4, 8):
        for one, all_of_them in zip(run(slice(t, t + 1)), together, strict=True):
            assert torch.equal(one[0], all_of_them[t])


@pytest.mark.parametrize("fp8", ["token", "group"])
def test_runner_quantises(fp8: str) -> None:
    L, D, T = 4, 200, 3
    toy = Toy(L, D, torch.bfloat16)
    embedding = torch.randn(T, D).bfloat16()
    outputs = torch.randn(L, T, D).bfloat16()
    plain = Runner(toy.weights, block_size=2, max_tokens=T)
    runner = Runner(toy.weights, block_size=2, max_tokens=T, fp8=fp8, power_of_two_scale=True)
    steps = plain.start(embedding), runner.start(embedding)
    for index in range(L):
        mix = poisoned(T, D, dtype=torch.bfloat16)
        want, got = steps[0].read(), steps[1].read(mix=mix)
        assert isinstance(want, Tensor)
        assert isinstance(got, Quantized)
        assert got.x.dtype == FP8
        assert got.scale.shape == (T, 1 if fp8 == "token" else 2)
        width = D if fp8 == "token" else 128
        value = got.x.float() * got.scale.repeat_interleave(width, 1)[:, :D]
        torch.testing.assert_close(
            value, want.float(), rtol=0.07, atol=float(got.scale.max()) * 2.0**-9
        )
        assert mix.isfinite().all()
        for step in steps:
            step.write(outputs[index])
    assert torch.equal(steps[0].finish(), steps[1].finish())


def test_two_addends() -> None:
    """A routed and a shared expert's outputs, added in one call."""
    toy = Toy(2, 16)
    embedding, a, b = (torch.randn(2, 16) for _ in range(3))
    runner = Runner(toy.weights, block_size=4, max_tokens=2, dtype=torch.float32)
    results = []
    for outputs in ((a, b), (a + b,)):
        step = runner.start(embedding)
        step.read()
        step.write(*outputs)
        x = step.read()
        assert isinstance(x, Tensor)
        results.append(x.clone())
    torch.testing.assert_close(results[0], results[1])


# ----------------------------------------------------------------------------------------- weights


def kimi_names(layers: int, D: int) -> dict[str, Tensor]:
    tensors = {
        "model.embed_tokens.weight": torch.randn(3, D),
        "model.output_attn_res_proj.weight": torch.randn(1, D),
        "model.output_attn_res_norm.weight": torch.randn(D),
        "model.norm.weight": torch.randn(D),
        "lm_head.weight": torch.randn(3, D),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name in ("self_attention_res_proj", "mlp_res_proj"):
            tensors[f"{prefix}{name}.weight"] = torch.randn(1, D)
        for name in (
            *("self_attention_res_norm", "mlp_res_norm"),
            *("input_layernorm", "post_attention_layernorm"),
        ):
            tensors[f"{prefix}{name}.weight"] = torch.randn(D)
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


def test_weights_of_kimi_k3_names(tmp_path: pathlib.Path) -> None:
    layers, D = 11, 8  # more than ten: layers are numbers, not words in order
    tensors = kimi_names(layers, D)
    weights = SiteWeights.from_state_dict(tensors)
    assert weights.num_sublayers == 2 * layers
    assert weights.queries.dtype == torch.float32
    prefix = "model.layers.10."
    folded = (
        tensors[f"{prefix}mlp_res_proj.weight"][0].float()
        * tensors[f"{prefix}mlp_res_norm.weight"].float()
    )
    assert torch.equal(weights.queries[21], folded)
    assert torch.equal(weights.norm_weights[20], tensors[f"{prefix}input_layernorm.weight"])
    assert torch.equal(weights.norm_weights[22], tensors["model.norm.weight"])

    one, many = tmp_path / "model.safetensors", tmp_path / "shards"
    save_file(tensors, one)
    many.mkdir()
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:20]}, many / "a.safetensors")
    save_file({name: tensors[name] for name in names[20:]}, many / "b.safetensors")
    for path in (one, many):
        loaded = SiteWeights.from_safetensors(path)
        assert torch.equal(loaded.queries, weights.queries)
        assert torch.equal(loaded.norm_weights, weights.norm_weights)


def test_weights_know_the_module_they_are_of() -> None:
    module = BlockAttnRes(12, 16, 4, eps=3e-6)
    module.queries.normal_()
    weights = SiteWeights.from_module(module, torch.ones(13, 16))
    assert (weights.eps, weights.block_size) == (3e-6, 4)
    same = weights.to("cpu")
    assert (same.eps, same.block_size) == (3e-6, 4)
    runner = Runner(weights, max_tokens=3, dtype=torch.float32)
    assert (runner.eps, runner.norm_eps, runner.block_size) == (3e-6, 3e-6, 4)
    Runner(weights, max_tokens=3, block_size=4, eps=3e-6, norm_eps=1e-5)
    with pytest.raises(ValueError, match="eps is 1e-05 but the weights are of a model with eps"):
        Runner(weights, max_tokens=3, eps=1e-5)
    with pytest.raises(ValueError, match=r"block_size is 2 but the weights .* with block_size 4"):
        Runner(weights, max_tokens=3, block_size=2)
    unknown = SiteWeights(module.queries, None, torch.ones(13, 16))
    assert (unknown.eps, unknown.block_size) == (None, None)
    assert Runner(unknown, block_size=6, max_tokens=3, dtype=torch.float32).eps == 1e-5


def test_weights_behind_a_prefix() -> None:
    tensors = kimi_names(2, 8)
    inside = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    names = inference.KIMI_K3_NAMES.prefixed("language_model.")
    weights = SiteWeights.from_state_dict(inside, names=names)
    assert torch.equal(weights.queries, SiteWeights.from_state_dict(tensors).queries)


def test_missing_and_misshapen_weights_are_named() -> None:
    tensors = kimi_names(3, 8)
    del tensors["model.layers.1.mlp_res_proj.weight"], tensors["model.norm.weight"]
    with pytest.raises(KeyError) as missing:
        SiteWeights.from_state_dict(tensors)
    assert "lacks 2 parameters: model.layers.1.mlp_res_proj.weight, model.norm.weight" in str(
        missing.value
    )
    with pytest.raises(KeyError, match=r"no parameter named model\.layers\.0\.self_attention_res"):
        SiteWeights.from_state_dict({})
    tensors = kimi_names(3, 8)
    tensors["model.layers.2.mlp_res_norm.weight"] = torch.ones(9)
    with pytest.raises(ValueError, match=r"layers\.2\.mlp_res_norm\.weight has shape \[9\]"):
        SiteWeights.from_state_dict(tensors)


@pytest.mark.parametrize("number", ["3", "999999999", "9" * 5000, "007"])
def test_layers_without_a_gap(number: str) -> None:
    """Names are made for the layers that are there, not up to the largest number."""
    tensors = kimi_names(2, 8)
    tensors[f"model.layers.{number}.self_attention_res_proj.weight"] = torch.ones(1, 8)
    with pytest.raises(KeyError) as caught:
        SiteWeights.from_state_dict(tensors)
    assert (
        "state_dict has no parameter named model.layers.2.self_attention_res_proj.weight, but one "
        f"of layer {number[:20]}"
    ) in str(caught.value)
    with pytest.raises(KeyError, match="parameters, too few for 999999999 layers"):
        SiteWeights.from_state_dict(tensors, num_layers=999999999)
    weights = SiteWeights.from_state_dict(tensors, num_layers=2)
    assert weights.num_sublayers == 4


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, FP8])
def test_parameters_of_another_kind_are_refused(dtype: torch.dtype) -> None:
    for name in ("self_attention_res_proj", "mlp_res_norm", "input_layernorm"):
        tensors = kimi_names(2, 8)
        name = f"model.layers.1.{name}.weight"
        tensors[name] = tensors[name].to(dtype)
        with pytest.raises(TypeError) as caught:
            SiteWeights.from_state_dict(tensors)
        assert f"SiteWeights: {name} is {dtype}, expected float32, bfloat16" in str(caught.value)


def test_a_parameter_in_two_shards_is_refused(tmp_path: pathlib.Path) -> None:
    tensors = kimi_names(2, 8)
    twice = "model.layers.1.mlp_res_proj.weight"
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({twice: tensors[twice], "other": torch.ones(1)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"is in .* and in") as caught:
        SiteWeights.from_safetensors(tmp_path)
    for part in (twice, "a.safetensors", "b.safetensors"):
        assert part in str(caught.value)


def test_hostile_files_are_refused(tmp_path: pathlib.Path) -> None:
    good = tmp_path / "good.safetensors"
    save_file(kimi_names(2, 8), good)
    data = good.read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    first = next(iter(header))
    header[first]["data_offsets"] = [0, 1 << 40]
    text = json.dumps(header).encode()
    bad = {
        "empty": b"",
        "cut": data[: len(data) // 2],
        "cut in the header": data[:40],
        "long header": struct.pack("<Q", 1 << 62) + data[8:],
        "no json": struct.pack("<Q", 4) + b"{{{{",
        "offsets outside": struct.pack("<Q", len(text)) + text + data[8 + len(text) :],
    }
    for name, content in bad.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged, or no safetensors file") as caught:
            SiteWeights.from_safetensors(path)
        assert str(path) in str(caught.value)
    with pytest.raises(FileNotFoundError):
        SiteWeights.from_safetensors(tmp_path / "nothing.safetensors")


# ------------------------------------------------------------------------------------------ errors


def v(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def runner(**options: Any) -> Runner:
    given: dict[str, Any] = {"block_size": 2, "max_tokens": 4, "dtype": torch.float32}
    return Runner(Toy(4, 8).weights, **{**given, **options})


def claimed_twice() -> None:
    bank = BlockBank(2, 4, 8)
    bank.write(1, v(3, 8).bfloat16())
    bank.claim(1)


def started(count: int = 0) -> inference.Step:
    step = runner().start(v(3, 8))
    for _ in range(count):
        step.read()
        step.write(v(3, 8))
    return step


def read_twice() -> None:
    step = started()
    step.read()
    step.read()


def finish_for_write() -> None:
    step = started(3)
    step.read()
    step.finish()


def finished() -> inference.Step:
    step = started(4)
    step.finish()
    return step


Q = torch.zeros(8)
X = torch.empty(3, 8)
ERRORS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "x shape": (
        lambda: inference.read_out(Q, x=torch.empty(3, 9), sources=[v(3, 8)]),
        ValueError,
        "read_out: x has shape [3, 9], expected [3, 8]",
    ),
    "x strided": (
        lambda: inference.read_out(Q, x=torch.empty(8, 3).t(), sources=[v(3, 8)]),
        ValueError,
        "x has stride 3 in its last dimension, expected 1",
    ),
    "source strided": (
        lambda: inference.read_out(Q, x=X, sources=[v(8, 3).t()]),
        ValueError,
        "sources[0] has stride 3 in its last dimension, expected 1: a copy would",
    ),
    "no partial_out": (
        lambda: inference.read_out(Q, x=X, sources=[v(3, 8)], update=v(3, 8)),
        ValueError,
        "partial_out is missing, expected shape [3, 8]",
    ),
    "snapshot of nothing": (
        lambda: inference.read_out(Q, x=X, sources=[v(3, 8)], snapshot=torch.empty(3, 8)),
        ValueError,
        "snapshot was given without partial or update",
    ),
    "aliasing": (
        lambda: inference.read_out(Q, x=X, sources=[X]),
        ValueError,
        "read: x of shape [3, 8] overlaps the memory of sources[0] of shape [3, 8]",
    ),
    "attend aliasing": (
        lambda: inference.attend_out([X], Q[None], out=X[None], lse=torch.empty(1, 3)),
        ValueError,
        "attend: out[0] of shape [3, 8] overlaps the memory of sources[0] of shape [3, 8]",
    ),
    "fp8 without scale": (
        lambda: inference.read_out(Q, x=X.to(FP8), sources=[v(3, 8)]),
        ValueError,
        "x is torch.float8_e4m3fn but x_scale is missing, expected float32 of shape [3, 1]",
    ),
    "scale without fp8": (
        lambda: inference.read_out(Q, x=X, x_scale=torch.empty(3, 1), sources=[v(3, 8)]),
        ValueError,
        "x_scale was given but x is torch.float32, expected torch.float8_e4m3fn",
    ),
    "scale shape": (
        lambda: inference.read_out(
            torch.zeros(300),
            x=torch.empty(3, 300).to(FP8),
            x_scale=torch.empty(3, 2),
            sources=[v(3, 300)],
        ),
        ValueError,
        "x_scale has shape [3, 2], expected [3, 3]",
    ),
    "workspace dtype": (
        lambda: inference.read_out(Q, x=X, sources=[v(3, 8)], workspace=torch.empty(9)),
        TypeError,
        "workspace is torch.float32 of shape [9], expected contiguous bytes",
    ),
    "workspace size": (
        lambda: inference.read_out(
            Q, x=X, sources=[v(3, 8)] * 2, workspace=torch.empty(1, dtype=torch.uint8)
        ),
        ValueError,
        "read: workspace has 1 bytes, expected at least",
    ),
    "lse shape": (
        lambda: inference.attend_out(
            [v(3, 8)], Q[None], out=torch.empty(1, 3, 8), lse=torch.empty(2, 3)
        ),
        ValueError,
        "lse has shape [2, 3], expected [1, 3]",
    ),
    "bank index": (
        lambda: BlockBank(2, 4, 8).claim(2),
        ValueError,
        "row 2 is out of range, expected 0 to 1: the bank has 2 rows",
    ),
    "bank row in use": (claimed_twice, ValueError, "row 1 is in use: it was written in this step"),
    "bank tokens": (
        lambda: BlockBank(2, 4, 8).row(0, 5),
        ValueError,
        "5 tokens do not fit: the bank holds 4",
    ),
    "bank layout": (
        lambda: BlockBank(2, 4, 8, layout="nd"),
        ValueError,
        "layout is 'nd', expected one of tnd, ntd",
    ),
    "bank too small": (
        lambda: runner(bank=BlockBank(1, 4, 8, dtype=torch.float32)),
        ValueError,
        "bank has 1 rows, expected at least 2, one for each block of 2 of 4 sublayers",
    ),
    "bank too short": (
        lambda: runner(bank=BlockBank(2, 3, 8, dtype=torch.float32)),
        ValueError,
        "bank holds 3 tokens of width 8, expected at least 4 of width 8",
    ),
    "bank dtype": (
        lambda: runner(bank=BlockBank(2, 4, 8)),
        TypeError,
        "bank is torch.bfloat16, expected torch.float32",
    ),
    "mode": (lambda: runner(mode="fast"), ValueError, "mode is 'fast', expected one of auto"),
    "fp8": (lambda: runner(fp8="row"), ValueError, "fp8 is 'row', expected None, 'token'"),
    "scale rounding": (
        lambda: runner(power_of_two_scale=True),
        ValueError,
        "power_of_two_scale was given without fp8",
    ),
    "side stream": (
        lambda: runner(side_stream=True),
        ValueError,
        "side_stream needs CUDA, but the weights are on cpu",
    ),
    "too large a block": (
        lambda: Runner(Toy(140, 4).weights, block_size=130, max_tokens=1, mode="two_phase"),
        ValueError,
        "block_size is 130, expected at most 128",
    ),
    "embedding width": (
        lambda: runner().start(v(3, 9)),
        ValueError,
        "embedding has shape [3, 9], expected [T, 8]",
    ),
    "embedding tokens": (
        lambda: runner().start(v(5, 8)),
        ValueError,
        "embedding has shape [5, 8], expected at most 4 tokens",
    ),
    "embedding dtype": (
        lambda: runner().start(v(3, 8).bfloat16()),
        TypeError,
        "embedding is torch.bfloat16, expected torch.float32",
    ),
    "bank storage": (
        lambda: BlockBank(2, 4, 8, storage="int8"),
        ValueError,
        "BlockBank: storage is 'int8', expected one of ('float16', 'float8')",
    ),
    "values of a stored bank": (
        lambda: BlockBank(2, 4, 8, storage="float8").sources(2),
        ValueError,
        "BlockBank.sources: this bank stores float8 with scales, which stored() and stored_row()",
    ),
    "claim of a stored bank": (
        lambda: BlockBank(2, 4, 8, storage="float8").claim(0),
        ValueError,
        "BlockBank.claim: this bank stores float8 with scales",
    ),
    "stored rows of values": (
        lambda: BlockBank(2, 4, 8).stored(1),
        ValueError,
        "BlockBank.stored: this bank holds values of torch.bfloat16, expected one with storage",
    ),
    "runner storage": (
        lambda: runner(storage="fp8"),
        ValueError,
        "BlockBank: storage is 'fp8', expected one of ('float16', 'float8')",
    ),
    "two storages": (
        lambda: runner(storage="float16", bank=BlockBank(2, 4, 8, storage="float8")),
        ValueError,
        "Runner: storage is 'float16' but that of bank is 'float8'",
    ),
    "two reads": (read_twice, RuntimeError, "Step.read: site 0 of 4 has been read: expected write"),
    "finish for write": (
        finish_for_write,
        RuntimeError,
        "Step.finish: site 3 of 4 has been read: expected write()",
    ),
    "read behind the end": (
        lambda: finished().read(),
        RuntimeError,
        "Step.read: this step is finished: expected Runner.start()",
    ),
    "write behind the end": (
        lambda: finished().write(v(3, 8)),
        RuntimeError,
        "Step.write: this step is finished",
    ),
    "two ends": (lambda: finished().finish(), RuntimeError, "Step.finish: this step is finished"),
    "write first": (
        lambda: started().write(v(3, 8)),
        RuntimeError,
        "there is no sublayer to write for: expected read()",
    ),
    "early finish": (
        lambda: started(2).finish(),
        RuntimeError,
        "2 of 4 sublayers have run: expected read()",
    ),
    "late read": (
        lambda: started(4).read(),
        RuntimeError,
        "4 of 4 sublayers have run: expected finish()",
    ),
    "no block size": (
        lambda: runner(block_size=None),
        ValueError,
        "Runner: block_size is missing, expected a number of sublayers: the weights say none",
    ),
    "query dtype": (
        lambda: SiteWeights(torch.ones(3, 8, dtype=torch.int32), None, v(3, 8)),
        TypeError,
        "SiteWeights: queries is torch.int32, expected float32, bfloat16, float16",
    ),
    "key weight dtype": (
        lambda: SiteWeights(v(3, 8), torch.ones(3, 8, dtype=torch.bool), v(3, 8)),
        TypeError,
        "SiteWeights: key_weights is torch.bool, expected float32",
    ),
    "weights' eps": (
        lambda: SiteWeights(v(3, 8), None, v(3, 8), eps=0.0),
        ValueError,
        "SiteWeights: eps is 0.0, expected a number > 0",
    ),
    "weights": (
        lambda: SiteWeights(v(3, 8), None, v(4, 8)),
        ValueError,
        "norm_weights has shape [4, 8], expected 3 rows like queries [3, 8]",
    ),
    "key weights": (
        lambda: SiteWeights(v(3, 8), v(3, 7), v(3, 8)),
        ValueError,
        "key_weights has shape [3, 7], expected [3, 8] like queries",
    ),
}


@pytest.mark.parametrize(("call", "error", "words"), ERRORS.values(), ids=ERRORS.keys())
def test_bad_input(call: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)
    assert "convert.h" not in str(caught.value)


def test_only_arguments_become_value_errors() -> None:
    said = "check, ../../bindings/torch/convert.h:294, flash_attn_res: "
    for text, kind in (
        ("read: x of shape [3, 8] overlaps the memory of mix of shape [3, 8]", ValueError),
        ("read (K=3, T=1, D=8): a launch failed: out of memory", RuntimeError),
        ("attend: this build of flash_attn_res has no CUDA kernels; build it", RuntimeError),
        ("read: the GPU has compute capability 7.5, expected 8.0 or later", RuntimeError),
    ):
        error = in_words(RuntimeError(said + text))
        assert type(error) is kind
        assert str(error) == text
    other = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert in_words(other) is other


def test_write_of_another_shape_keeps_the_step() -> None:
    step = started()
    step.read()
    with pytest.raises(ValueError, match=r"output has shape \[2, 8\], expected \[3, 8\]"):
        step.write(v(2, 8))
    step.write(v(3, 8))
    step.read()


@pytest.mark.parametrize("storage", [None, "float8"])
@pytest.mark.parametrize("mode", ["one_shot", "two_phase"])
def test_a_read_that_fails_keeps_the_step(mode: str, storage: str | None) -> None:
    """Every site is read wrongly first; the results are those of a step without a mistake."""
    L, T, D = 6, 3, 8
    toy = Toy(L, D)
    given = {"block_size": 2, "max_tokens": T, "dtype": torch.float32, "mode": mode}
    runners = [Runner(toy.weights, **given, storage=storage) for _ in range(2)]
    embedding, outputs = v(T, D), v(L, T, D)
    steps = [runner.start(embedding) for runner in runners]
    for index in range(L + 1):
        last = index == L
        read_it = [step.finish if last else step.read for step in steps]
        with pytest.raises(ValueError, match=r"mix has shape \[2, 8\], expected \[3, 8\]"):
            read_it[0](mix=v(2, D))
        with pytest.raises(TypeError, match=r"mix is torch\.bfloat16"):
            read_it[0](mix=v(T, D, dtype=torch.bfloat16))
        aliased = outputs[index - 1] if index > 0 else embedding
        with pytest.raises(ValueError, match=r"mix of shape .* overlaps the memory of"):
            read_it[0](mix=aliased)
        ours, wanted = (read() for read in read_it)
        assert isinstance(ours, Tensor)
        assert isinstance(wanted, Tensor)
        assert torch.equal(ours, wanted)
        for step in steps:
            if not last:
                step.write(outputs[index])


def test_the_memory_of_x_is_not_taken() -> None:
    one = runner()
    step = one.start(v(3, 8))
    x = step.read()
    assert isinstance(x, Tensor)
    for given in (x, x.mul_(2), x.view(3, 8), x[:]):
        with pytest.raises(ValueError, match="output is memory that read\\(\\) or finish"):
            step.write(given)
    with pytest.raises(ValueError, match="addend is memory that read"):
        step.write(v(3, 8), x)
    step.write(x.clone())
    for _ in range(3):
        step.read()
        step.write(v(3, 8))
    with pytest.raises(ValueError, match="embedding is memory that read"):
        one.start(step.finish())


def test_a_step_that_was_given_up_is_over() -> None:
    one = runner(mode="two_phase")
    toy_embedding, outputs = v(3, 8), v(4, 3, 8)
    old = one.start(v(3, 8))
    old.read()
    step = one.start(toy_embedding)
    for call in (old.read, lambda: old.write(outputs[0]), old.finish):
        with pytest.raises(RuntimeError, match="this step is over: its runner has started another"):
            call()
    for output in outputs:
        step.read()
        step.write(output)
    y = step.finish().clone()
    again = one.start(toy_embedding)
    for output in outputs:
        again.read()
        again.write(output)
    assert torch.equal(again.finish(), y)


def test_a_step_that_failed_half_way_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    one = runner(mode="two_phase")

    def fails(call: object) -> None:
        raise RuntimeError("a launch failed")

    with monkeypatch.context() as patched:
        patched.setattr(one, "_run_phase1", fails)
        step = one.start(v(3, 8))
        with pytest.raises(RuntimeError, match="a launch failed"):
            step.read()
    for call in (step.read, lambda: step.write(v(3, 8))):
        with pytest.raises(RuntimeError, match="this step is over"):
            call()
    one.start(v(3, 8)).read()


def test_fp8_and_round_mix_go_together_on_the_cpu_alone() -> None:
    options = {"fp8": "token", "round_mix": True}
    assert runner(**options, dtype=torch.bfloat16).round_mix
    with FakeTensorMode():
        weights = SiteWeights(*(torch.empty(5, 8, device="cuda") for _ in range(3)))
    with pytest.raises(ValueError, match=r"round_mix was given with fp8 and torch\.bfloat16"):
        Runner(weights, block_size=2, max_tokens=4, **options)


def test_gradients_are_refused() -> None:
    with torch.enable_grad():
        source = v(3, 8).requires_grad_()
        with pytest.raises(RuntimeError, match=r"use flash_attn_res\.read"):
            inference.read_out(x=torch.empty(3, 8), sources=[source])
        with pytest.raises(RuntimeError, match="embedding requires a gradient"):
            runner().start(source)
