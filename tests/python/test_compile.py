"""opcheck, torch.compile(fullgraph=True) with static and dynamic token counts, torch.func."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck

from flash_attn_res import BlockAttnRes, attend, quantize, read, stochastic_add
from stream_networks import assert_equal, gradients, make, tensors_of

OPS = torch.ops.flash_attn_res


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_attend(dtype: torch.dtype) -> None:
    sources = [random(5, 8, dtype=dtype), random(2, 5, 8, dtype=dtype)]
    opcheck(OPS.attend, (sources, random(3, 8), 1.0, 1e-6, None))
    opcheck(OPS.attend, (sources, random(3, 4), 0.5, 1e-5, torch.float32))


def test_opcheck_read() -> None:
    def value() -> Tensor:
        return random(5, 8)

    # phase1_out, phase1_lse, sources, partial, updates, query, norm_weight, scale, eps,
    # norm, norm_eps, round_mix, return_mix, dtype
    advance = (value(), random(5), [], value(), [value()], random(8), random(8), 1.0, 1e-6)
    opcheck(OPS.read, (*advance, True, 1e-6, False, False, None))
    site = (None, None, [value(), random(2, 5, 8)], value(), [value()], random(8), None, 1.0, 1e-6)
    opcheck(OPS.read, (*site, True, 1e-6, True, True, torch.bfloat16))
    one_shot = (None, None, [value(), value()], None, [], random(8), None, 1.0, 1e-6)
    opcheck(OPS.read, (*one_shot, False, 1e-6, False, False, None))


@pytest.mark.parametrize("layout", ["expanded", "transposed", "strided", "empty"])
def test_opcheck_layouts(layout: str) -> None:
    value = {
        "expanded": torch.randn(1, 8).expand(5, 8),
        "transposed": torch.randn(8, 5).t(),
        "strided": torch.randn(5, 12)[:, 2:10],
        "empty": torch.randn(0, 8),
    }[layout].requires_grad_()
    opcheck(OPS.attend, ([value, value], random(3, 8), 1.0, 1e-6, None))
    site = (None, None, [value], value, [value], random(8), random(8), 1.0, 1e-6)
    opcheck(OPS.read, (*site, True, 1e-6, False, True, None))


def test_opcheck_backward_operators() -> None:
    sources = [torch.randn(5, 8), torch.randn(2, 5, 8)]
    queries = torch.randn(3, 8)
    out, lse, logits, inv_rms = OPS.attend(sources, queries, 1.0, 1e-6, None)
    opcheck(
        OPS.attend_backward,
        (out, lse, None, sources, queries, lse, logits, inv_rms, 1.0, True, True),
    )
    opcheck(
        OPS.attend_backward,
        (out, None, lse, sources, queries, lse, logits, inv_rms, 1.0, False, True),
    )
    query, weight = torch.randn(8), torch.randn(8)
    x, total, mix, logits, inv_rms, mix_inv_rms = OPS.read(
        *(None, None, sources, sources[0], [sources[0]], query, weight, 1.0, 1e-6),
        *(True, 1e-6, False, True, None),
    )
    opcheck(
        OPS.read_backward,
        (
            *(x, total, mix, None, sources, total, query, weight, logits, inv_rms, mix_inv_rms),
            *(1.0, True, False, True, True, True, True, True),
        ),
    )


@pytest.mark.parametrize("storage", [None, "float16"])  # opcheck itself compares no float8
def test_opcheck_operators_that_write_into_what_is_given(storage: str | None) -> None:
    sources = [torch.randn(2, 3, 8), torch.randn(2, 3, 8)]  # tokens in two dimensions
    scales: list[Tensor] = []
    if storage is not None:
        stored = [quantize(source, storage) for source in sources]
        opcheck(torch.ops.flash_attn_res.quantize_into, (sources, *quantize(sources, storage)[:2]))
        sources, scales = [s.values for s in stored], [s.scale for s in stored]
    queries = torch.randn(4, 8)
    out, lse = torch.empty(4, 2, 3, 8), torch.empty(4, 6)
    logits, inv_rms = torch.empty(6, 4, 2), torch.empty(6, 2)
    phase1 = (sources, queries, 1.0, 1e-6, out, lse, logits, inv_rms, scales)
    opcheck(OPS.attend_into, phase1)
    OPS.attend_into(*phase1)
    dsources = [torch.randn(2, 3, 8) for _ in sources]
    opcheck(
        OPS.attend_backward_into,
        (
            *(torch.randn_like(out), torch.randn_like(lse), torch.rand_like(lse), sources, queries),
            *(lse, logits, inv_rms, 1.0, dsources, True, torch.randn(4, 8), True, scales),
        ),
    )
    site = (out, lse, 1, sources, scales, torch.randn(2, 3, 8), torch.randn(2, 3, 8), queries, 2)
    knobs = (torch.randn(8), 1.0, 1e-6, 1e-6, torch.float32, torch.float32)
    for keep in (False, True):
        opcheck(OPS.read_site, (*site, *knobs, keep))
    x, total, statistics = OPS.read_site(*site, *knobs, True)
    opcheck(
        OPS.read_site_backward,
        (
            *(torch.randn(2, 3, 8), torch.randn(2, 3, 8), out, lse.clone(), lse.clone(), 1),
            *(sources, scales, total, queries, 2, knobs[0], statistics, 1.0, dsources, True, True),
            *(torch.randn(4, 8), True),
        ),
    )
    value, query, weight = torch.randn(2, 3, 8), torch.randn(8), torch.randn(8)
    x, total = torch.empty(2, 3, 8), torch.empty(2, 3, 8)
    saved = torch.empty(6, 4), torch.empty(6, 4), torch.empty(6)
    given = (out[0], lse[0], sources, value, torch.randn(2, 3, 8), query, weight)
    site = (*given, 1.0, 1e-6, True, 1e-6, x, total, *saved, scales)
    opcheck(OPS.read_into, site)
    OPS.read_into(*site)
    opcheck(
        OPS.read_backward_into,
        (
            *(torch.randn(2, 3, 8), torch.randn(2, 3, 8), out[0], sources, total, query, weight),
            *(*saved, 1.0, True, torch.empty(2, 3, 8), torch.empty(6), torch.empty(6)),
            *(dsources, True, torch.empty(2, 3, 8), torch.randn(8), True, torch.empty(8), scales),
        ),
    )


def test_opcheck_quantised_sources() -> None:
    terms = [random(6, 8), random(6, 8, dtype=torch.bfloat16)]
    opcheck(OPS.quantize, (terms, "float16", False))
    stored = [quantize(terms, "float16"), quantize(terms[0].detach(), "float16")]
    values, scales = [s.values for s in stored], [s.scale for s in stored]
    origins = [torch.randn(6, 8, requires_grad=True), torch.randn(6, 8)]
    queries = random(3, 8)
    given = (values, scales, origins, queries, 1.0, 1e-6, torch.float32)
    opcheck(OPS.attend_quantized, given)
    out, lse, logits, inv_rms = (t.detach() for t in OPS.attend_quantized(*given))
    for dout, dlse, needs in ((out, lse, (True, True)), (None, lse, (False, True))):
        saved = (values, scales, queries.detach(), lse, logits, inv_rms, 1.0)
        opcheck(OPS.attend_quantized_backward, (dout, dlse, *saved, *needs))
    options = (1.0, 1e-6, True, 1e-6, torch.bfloat16)
    site = (random(6, 8), random(6), values, scales, origins, random(6, 8), random(6, 8))
    opcheck(OPS.read_quantized, (*site, random(8), random(8), *options))
    bare = (None, None, values, scales, origins, None, None, random(8), None)
    opcheck(OPS.read_quantized, (*bare, 1.0, 1e-6, False, 1e-6, torch.float32))
    o, partial, query, weight = (random(6, 8), random(6, 8), random(8), random(8))
    x, _, *saved = OPS.read_quantized(
        *(o, random(6), values, scales, origins, partial, None, query, weight, *options)
    )
    tensors = (x, partial, o, values, scales, partial, query, weight, *saved)
    tensors = tuple(t.detach() if isinstance(t, Tensor) else t for t in tensors)
    opcheck(OPS.read_quantized_backward, (*tensors, 1.0, True, *(True,) * 5))


STREAMS = {
    "float16 blocks": {"block_storage": "float16"},
    "float8 blocks, one-shot": {"block_storage": "float8", "forms": "one_shot"},
    "float32 sums": {"sum_dtype": torch.float32},
    "both": {"block_storage": "float8", "sum_dtype": torch.float32},
}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("options", STREAMS.values(), ids=STREAMS.keys())
def test_compiled_storage_modes(options: dict, backend: str) -> None:
    """Forward and backward of the functional stream, on one graph."""
    torch._dynamo.reset()
    network = Network(3, **options).bfloat16()
    x = torch.randn(2, 5, 16).bfloat16().requires_grad_()
    given = torch.randn(2, 5, 16).bfloat16()
    wanted = [x, *network.parameters()]
    eager = network(x, functional=True)
    y = torch.compile(network, fullgraph=True, backend=backend)(x)
    torch.testing.assert_close(y, eager, rtol=5e-2, atol=5e-2)
    if backend == "aot_eager":
        assert torch.equal(y, eager)
        assert torch.equal(y, network(x))
    expected = torch.autograd.grad(eager, wanted, given)
    for ours, gradient in zip(torch.autograd.grad(y, wanted, given), expected, strict=True):
        if backend == "aot_eager":
            assert torch.equal(ours, gradient)
        assert (ours - gradient).float().norm() <= 0.1 * gradient.float().norm() + 1e-2


@pytest.mark.parametrize("options", STREAMS.values(), ids=STREAMS.keys())
def test_compiled_checkpoints_of_storage_modes(options: dict) -> None:
    torch._dynamo.reset()
    network, x, cotangent = make(6, 3, "cpu", torch.bfloat16, **options)
    tensors = tensors_of(network, x)
    compiled = torch.compile(
        lambda x: network(x, checkpoint=True), fullgraph=True, backend="aot_eager"
    )
    y, expected = compiled(x), network(x, functional=True)
    assert torch.equal(y, expected)
    assert_equal(gradients(y, tensors, cotangent), gradients(expected, tensors, cotangent))


@pytest.mark.parametrize("options", STREAMS.values(), ids=STREAMS.keys())
def test_exported_storage_modes(options: dict) -> None:
    network = Network(3, **options).eval().bfloat16()
    x = torch.randn(2, 5, 16).bfloat16()
    program = torch.export.export(network, (x,))
    assert torch.equal(program.module()(x), network(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_into_operators_equal_the_functional_ones(dtype: torch.dtype) -> None:
    """The same numbers, accumulation in the dtype given, dh over the memory of phase1_out."""
    floats = torch.float64 if dtype == torch.float64 else torch.float32
    v = [torch.randn(6, 8).to(dtype) for _ in range(5)]
    query, weight = torch.randn(8, dtype=floats), torch.randn(8).to(dtype)
    lse = torch.randn(6, dtype=floats)
    expected = OPS.read(
        v[0], lse, v[1:3], v[3], [v[4]], query, weight, 1.0, 1e-6, True, 1e-6, False, False, None
    )
    x, total = torch.full_like(v[0], torch.nan), torch.full_like(v[0], torch.nan)
    saved = [torch.full(s, torch.nan, dtype=floats) for s in ((6, 4), (6, 4), (6,))]
    OPS.read_into(
        *(v[0], lse, v[1:3], v[3], v[4], query, weight, 1.0, 1e-6, True, 1e-6, x, total, *saved),
        [],
    )
    for ours, other in zip((x, total, *saved), (*expected[:2], *expected[3:]), strict=True):
        assert torch.equal(ours, other)
    dx, later = torch.randn(6, 8).to(dtype), torch.randn(6, 8).to(dtype)
    dout, dlse, dv, dtotal, dquery, dweight = OPS.read_backward(
        *(dx, later, None, v[0], v[1:3], total, query, weight, *saved),
        *(1.0, True, False, True, True, True, True, True),
    )
    held = [torch.randn(6, 8, dtype=floats) for _ in range(2)]
    sums = [t.clone() for t in held]
    before = torch.randn(8, dtype=floats)
    du = before.clone()
    slot = v[0].clone()
    gate, dl = torch.empty(6, dtype=floats), torch.empty(6, dtype=floats)
    db, dg = torch.empty_like(dtotal), torch.empty_like(dweight)
    OPS.read_backward_into(
        *(dx, later, slot, v[1:3], total, query, weight, *saved, 1.0, True),
        *(slot, gate, dl, sums, True, db, du, True, dg, []),
    )
    tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}
    # Other kernels may serve other dtypes of the gradients of the sources.
    for ours, other in ((dl, dlse), (db, dtotal), (dg, dweight)):
        torch.testing.assert_close(ours, other, **tolerance)
    torch.testing.assert_close(gate[:, None] * slot.to(floats), dout.to(floats), **tolerance)
    torch.testing.assert_close(du, before + dquery)
    for total_, start, gradient in zip(sums, held, dv, strict=True):
        torch.testing.assert_close(total_, start + gradient.to(floats), **tolerance)


def site(sources: list[Tensor], partial: Tensor, query: Tensor, weight: Tensor) -> Tensor:
    out, lse, _ = attend(sources, query[None])
    return read(
        query, phase1=(out[0], lse[0]), partial=partial, update=partial * 2, norm_weight=weight
    ).x


def grads_of(function, inputs: list[Tensor]) -> list[Tensor]:
    sources, partial, query, weight = inputs[:2], inputs[2], inputs[3], inputs[4]
    out = function(sources, partial, query, weight)
    return [out, *torch.autograd.grad(out.square().sum(), inputs)]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_eager(dynamic: bool, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(site, fullgraph=True, dynamic=dynamic)
    for tokens in (6, 11, 40) if dynamic else (6,):
        inputs = [random(2, tokens, 16, dtype=dtype) for _ in range(3)] + [random(16), random(16)]
        for ours, eager in zip(grads_of(compiled, inputs), grads_of(site, inputs), strict=True):
            torch.testing.assert_close(
                ours,
                eager,
                rtol=2e-2 if dtype != torch.float32 else 1e-5,
                atol=2e-2 if dtype != torch.float32 else 1e-5,
            )


def test_dynamic_tokens_compile_once() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(
        lambda a, b, q: read(q, sources=[a, b]).x, fullgraph=True, dynamic=True, backend=counter
    )
    for tokens in (4, 9, 33):
        compiled(torch.randn(tokens, 8), torch.randn(tokens, 8), torch.randn(8))
    assert counter.frame_count == 1


class Network(nn.Module):
    def __init__(self, block_size: int, **options: Any) -> None:
        super().__init__()
        self.attn_res = BlockAttnRes(6, 16, block_size, **options)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))
        self.norms = nn.ParameterList(torch.ones(16) for _ in range(7))
        nn.init.normal_(self.attn_res.queries, std=0.3)

    def forward(self, x: Tensor, functional: bool | None = None) -> Tensor:
        stream = self.attn_res.start(x, functional=functional)
        for layer, norm in zip(self.layers, self.norms, strict=False):
            stream.write(torch.tanh(layer(stream.read(norm))))
        return stream.finish(self.norms[-1])


@pytest.mark.parametrize("block_size", [1, 3, 4])
def test_compiled_stream_equals_eager(block_size: int) -> None:
    torch._dynamo.reset()
    network = Network(block_size)
    x = torch.randn(2, 5, 16)
    compiled = torch.compile(network, fullgraph=True)
    torch.testing.assert_close(compiled(x), network(x))
    compiled(x).square().sum().backward()
    grads = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    network(x, functional=True).square().sum().backward()
    largest = max(p.grad.abs().max().item() for p in network.parameters())
    for ours, parameter in zip(grads, network.parameters(), strict=True):
        # Sums whose terms cancel: float32 noise is measured by the largest gradient of the network.
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=2e-6 * largest)


def test_errors_surface_while_tracing() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda a, b, q: read(q, sources=[a, b]).x, fullgraph=True)
    with pytest.raises(Exception, match=r"sources\[1\] has shape \[3, 7\]"):
        compiled(torch.randn(3, 8), torch.randn(3, 7), torch.randn(8))


def test_functional_call() -> None:
    network = Network(3)
    x = torch.randn(2, 5, 16)
    parameters = {name: p.detach() * 1.5 for name, p in network.named_parameters()}
    called = torch.func.functional_call(network, parameters, (x,))
    network.load_state_dict(parameters)
    assert torch.equal(called, network(x))


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "vmap": lambda f, x: torch.func.vmap(f)(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_transforms_are_refused(transform) -> None:
    """Not one of them could be right: jvp would go through with tangents of zero."""
    network, queries = Network(3), torch.randn(2, 16)
    calls = {
        "attend": lambda x: attend([x, x], queries).out.sum(),
        "read": lambda x: read(queries[0], sources=[x, x]).x.sum(),
        "stochastic_add": lambda x: stochastic_add([x, x], 1).sum(),
        "quantize": lambda x: quantize(x).dequantize().sum(),
        "start": lambda x: network(x, functional=True).sum(),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match=f"{name}: a transform of torch.func"):
            transform(call, torch.randn(5, 16))
    with pytest.raises(RuntimeError, match=r"start: a transform of torch.func"):
        transform(lambda x: network(x).sum(), torch.randn(5, 16))


def test_export() -> None:
    network = Network(3).eval()
    x = torch.randn(2, 5, 16)
    program = torch.export.export(network, (x,))
    torch.testing.assert_close(program.module()(x), network(x))
