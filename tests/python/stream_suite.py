"""Tests of the stream that are the same on every device.

``tests/python/test_stream.py`` collects them for the CPU and ``tests/gpu/test_stream.py`` for CUDA;
each provides the fixtures ``device`` and ``dtype``.
"""

from __future__ import annotations

import copy
import functools
import gc
import importlib
import time
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import eager
from flash_attn_res import BlockAttnRes, read
from flash_attn_res.tape import TapeStream, operators
from stream_networks import (
    DIM,
    Network,
    Trace,
    assert_equal,
    assert_gradients,
    gradients,
    large_saved,
    make,
    tensors_of,
)

L = 24
# sublayers, block size, Kimi K3's layout: blocks of decoder layers, two sublayers each
LAYOUTS = {
    "full": (24, 1, False),
    "blocks of 2": (24, 2, False),
    "blocks of 6": (24, 6, False),
    "blocks of 8": (24, 8, False),
    "one block": (24, 24, False),
    "short last block": (24, 7, False),
    "block of a single sublayer at the end": (22, 3, False),
    "Kimi K3": (24, 8, True),
    "one sublayer": (1, 1, False),
}
FORMS = ["auto", "two_phase", "one_shot"]
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


def build(layout: tuple[int, int, bool], device: str, dtype: torch.dtype, **options):
    num_sublayers, block_size, k3 = layout
    return make(num_sublayers, block_size, device, dtype, k3=k3, **options)


def exact_and_plain(
    network: Network, x: Tensor, cotangent: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Gradients by the formulas: in float64, and in the network's own dtype."""
    wide = copy.deepcopy(network).double()
    wide_x = x.detach().double().requires_grad_(x.requires_grad)
    for a, b in zip(wide.parameters(), network.parameters(), strict=True):
        a.requires_grad_(b.requires_grad)
    y = wide.eager(wide_x)
    exact = gradients(y, tensors_of(wide, wide_x), cotangent.double())
    if x.dtype == torch.float64:
        return exact, None
    return exact, gradients(network.eager(x), tensors_of(network, x), cotangent)


def check(network: Network, x: Tensor, cotangent: Tensor, **options) -> dict[str, Tensor]:
    ours = gradients(network(x, **options), tensors_of(network, x), cotangent)
    assert_gradients(ours, *exact_and_plain(network, x, cotangent))
    return ours


def check_compiled_layers(
    network: Network, x: Tensor, cotangent: Tensor, checkpointed: bool, **options
) -> None:
    """Layers compiled one by one, under the lean stream."""
    torch._dynamo.reset()
    stream = network.attn_res.start(x)
    assert isinstance(stream, TapeStream)
    for layer, norm in zip(network.layers, network.norms, strict=False):
        compiled = torch.compile(layer, fullgraph=True, **options)
        stream.sublayer(compiled, norm, checkpoint=checkpointed)
    ours = gradients(stream.finish(network.norms[-1]), tensors_of(network, x), cotangent)
    assert_gradients(ours, *exact_and_plain(network, x, cotangent))


def check_compiled_network(network: Network, x: Tensor, cotangent: Tensor, **options) -> None:
    """A network compiled as a whole, whose stream is the functional one, beside eager mode."""
    torch._dynamo.reset()
    y = torch.compile(network, fullgraph=True, **options)(x)
    expected = network(x, functional=True)
    assert y.dtype == expected.dtype
    assert (y - expected).norm() <= 32 * torch.finfo(x.dtype).eps * expected.norm()
    ours = gradients(y, tensors_of(network, x), cotangent)
    assert_gradients(ours, *exact_and_plain(network, x, cotangent))


# ------------------------------------------------------------------------------------ gradients


@every_layout
def test_gradients_equal_the_eager_network(layout, device, dtype) -> None:
    network, x, cotangent = build(layout, device, dtype)
    assert isinstance(network.attn_res.start(x), TapeStream)
    check(network, x, cotangent)


@pytest.mark.parametrize("forms", FORMS)
@pytest.mark.parametrize("group_blocks", [None, 1, 3])
@pytest.mark.parametrize("block_size", [1, 4])
def test_every_schedule_computes_the_same(forms, group_blocks, block_size, device, dtype) -> None:
    network, x, cotangent = make(
        14, block_size, device, dtype, forms=forms, group_blocks=group_blocks
    )
    check(network, x, cotangent)


def test_phase_1_over_the_embedding_alone(device, dtype) -> None:
    network, x, cotangent = make(6, 3, device, dtype, forms=["two_phase", "one_shot"])
    assert network.attn_res.plan().groups[0].two_phase
    check(network, x, cotangent)


@pytest.mark.parametrize("options", [{"grad_dtype": None}, {"key_weight": False}, {"query_dim": 8}])
def test_options(options, device, dtype) -> None:
    network, x, cotangent = make(10, 3, device, dtype, **options)
    if "query_dim" not in options:  # the eager network reads sliced keys as well
        assert network.attn_res.query_dim == DIM
    check(network, x, cotangent)


@every_layout
def test_functional_and_lean_agree(layout, device, dtype) -> None:
    network, x, cotangent = build(layout, device, dtype)
    lean, functional = network(x), network(x, functional=True)
    assert torch.equal(lean, functional)
    exact, plain = exact_and_plain(network, x, cotangent)
    assert_gradients(gradients(functional, tensors_of(network, x), cotangent), exact, plain)


@every_layout
def test_checkpointed_bits(layout, device, dtype) -> None:
    network, x, cotangent = build(layout, device, dtype)
    tensors = tensors_of(network, x)
    expected = gradients(network(x), tensors, cotangent)
    assert_equal(gradients(network(x, checkpoint=True), tensors, cotangent), expected)


def test_checkpointed_functional_stream(device, dtype) -> None:
    network, x, cotangent = make(9, 3, device, dtype)
    tensors = tensors_of(network, x)
    expected = gradients(network(x, functional=True), tensors, cotangent)
    y = network(x, functional=True, checkpoint=True)
    assert_equal(gradients(y, tensors, cotangent), expected)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("keep", ["last", "all"])
@pytest.mark.parametrize("block_size", [1, 3])
def test_kept_and_recomputed_bits(keep, block_size, checkpointed, device, dtype) -> None:
    network, x, cotangent = make(14, block_size, device, dtype, group_blocks=1)
    tensors = tensors_of(network, x)
    expected = gradients(network(x), tensors, cotangent)
    network.attn_res.keep_phase1 = keep
    y = network(x, checkpoint=checkpointed)
    assert_equal(gradients(y, tensors, cotangent, retain_graph=True), expected)
    assert_equal(gradients(y, tensors, cotangent), expected)


def test_repeats_bit_for_bit(device, dtype) -> None:
    network, x, cotangent = make(14, 4, device, dtype)
    tensors = tensors_of(network, x)
    first = gradients(network(x), tensors, cotangent)
    assert_equal(gradients(network(x), tensors, cotangent), first)


# ------------------------------------------------------------------------- float32 running sums

narrow_dtype = pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)


@narrow_dtype
@every_layout
def test_float32_sums(layout, narrow, device) -> None:
    network, x, cotangent = build(layout, device, narrow, sum_dtype=torch.float32)
    tensors = tensors_of(network, x)
    ours = check(network, x, cotangent)
    assert_equal(gradients(network(x, checkpoint=True), tensors, cotangent), ours)
    y = network(x, functional=True)
    assert torch.equal(y, network(x))
    exact, plain = exact_and_plain(network, x, cotangent)
    functional = gradients(y, tensors, cotangent)
    assert_gradients(functional, exact, plain)
    y = network(x, functional=True, checkpoint=True)
    assert_equal(gradients(y, tensors, cotangent), functional)


@pytest.mark.parametrize("storage", [None, "float16", "float8"])
@pytest.mark.parametrize("grad_dtype", [torch.float32, None])
@pytest.mark.parametrize("forms", FORMS)
def test_float32_sums_in_every_schedule(forms, grad_dtype, storage, device) -> None:
    """Sums that a phase 1 closes, that a read makes a source of, alone and in groups of blocks."""
    options = {"forms": forms, "grad_dtype": grad_dtype, "block_storage": storage}
    for group_blocks in (None, 1, 3):
        network, x, cotangent = make(
            *(14, 4, device, torch.bfloat16),
            sum_dtype=torch.float32,
            group_blocks=group_blocks,
            **options,
        )
        tensors = tensors_of(network, x)
        ours = gradients(network(x), tensors, cotangent)
        if storage is None:
            assert_gradients(ours, *exact_and_plain(network, x, cotangent))
        assert_equal(gradients(network(x, checkpoint=True), tensors, cotangent), ours)
        for keep in ("last", "all"):
            network.attn_res.keep_phase1 = keep
            assert_equal(gradients(network(x), tensors, cotangent), ours)


@pytest.mark.parametrize(
    ("block_size", "dtype"), [(1, torch.bfloat16), (1, torch.float16), (4, torch.float32)]
)
def test_float32_sums_of_nothing_that_is_rounded(block_size, dtype, device) -> None:
    """Blocks of one sublayer add nothing up, and a float32 stream has such sums already."""
    network, x, cotangent = make(10, block_size, device, dtype)
    tensors = tensors_of(network, x)
    expected = gradients(network(x), tensors, cotangent)
    wide, _, _ = make(10, block_size, device, dtype, sum_dtype=torch.float32)
    wide.load_state_dict(network.state_dict())
    wide.attn_res._training_plans = network.attn_res._training_plans
    found = gradients(wide(x), tensors_of(wide, x), cotangent)
    assert_equal(found, expected)


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("forms", ["two_phase", "one_shot"])
def test_a_float32_sum_is_rounded_once(forms, functional, device) -> None:
    """Each site reads the sum in float32; the block is that sum, rounded."""
    module = BlockAttnRes(
        9, DIM, 3, forms=forms, sum_dtype=torch.float32, device=device, group_blocks=1
    )
    nn.init.normal_(module.queries, std=0.5)
    value = torch.randn(5, DIM, device=device).bfloat16().requires_grad_()
    stream = module.start(value, functional=functional)
    queries = (module.queries * module.key_weight).double()
    blocks, partial = [value], None
    for site in range(10):
        x = stream.read() if site < 9 else stream.finish()
        if site % 3 == 0 and partial is not None and forms == "two_phase":
            blocks, partial = [*blocks, partial.bfloat16()], None
        sources = [block.double() for block in blocks]
        h, _, _ = eager.read(
            queries[site], sources=sources, partial=None if partial is None else partial.double()
        )
        if site % 3 == 0 and partial is not None:
            blocks, partial = [*blocks, partial.bfloat16()], None
        assert x.dtype == torch.bfloat16
        # Phase 1's mixtures are rounded, too.
        torch.testing.assert_close(x.double(), h, rtol=2**-7, atol=2**-8)
        if site == 9:
            break
        output = (1.0 + 2.0**-6 * torch.randn(5, DIM, device=device)).bfloat16()
        stream.write(output)
        partial = output.float() if partial is None else partial + output
        held = stream._sources if functional else stream._tape.sources
        for ours, block in zip(held[1:], blocks[1:], strict=True):
            assert torch.equal(ours, block)


@pytest.mark.parametrize("block_size", [1, 4, 6, 24])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_saved_bytes_of_float32_sums(block_size, checkpointed, device) -> None:
    """Two more a value for each sum of two outputs or more that is not yet a block."""
    saved = []
    for sum_dtype in (None, torch.float32):
        network = Network(L, block_size, forms="two_phase", group_blocks=1, sum_dtype=sum_dtype)
        network.to(device, torch.bfloat16)
        x = torch.randn(2, 64, DIM, device=device).bfloat16().requires_grad_()
        with large_saved(x.numel()) as ours:
            y = network(x, checkpoint=checkpointed)
        assert y.requires_grad
        saved.append(ours)
    assert len(saved[0]) == len(saved[1])
    blocks = L // block_size
    # Of each block all sums but the first and the last; the output's site reads the last of all.
    sums = blocks * max(block_size - 2, 0) + int(block_size > 1)
    more = sum(saved[1].values()) - sum(saved[0].values())
    assert more == sums * 2 * x.numel()


def test_float32_sums_under_autocast(device) -> None:
    """Layers that give float32 beside a bfloat16 stream, and the other way round."""
    for dtype in (torch.bfloat16, torch.float32):
        network, x, cotangent = make(8, 3, device, torch.float32, sum_dtype=torch.float32)
        x, cotangent = x.detach().to(dtype).requires_grad_(), cotangent.to(dtype)
        tensors = tensors_of(network, x)
        found = []
        for checkpointed in (False, True):
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                y = network(x, checkpoint=checkpointed)
                assert torch.equal(network(x, functional=True), y)
            assert y.dtype == dtype
            found.append(gradients(y, tensors, cotangent))
        assert_equal(*found)


@pytest.mark.parametrize("functional", [False, True])
def test_float32_sums_of_float32_outputs(functional, device) -> None:
    """A float32 output beside a bfloat16 stream is summed as it came, the first one as well."""
    module = BlockAttnRes(3, DIM, 3, sum_dtype=torch.float32, device=device, forms="one_shot")
    value = torch.randn(3, DIM, device=device).bfloat16().requires_grad_()
    outputs = [torch.randn(3, DIM, device=device) for _ in range(2)]
    stream = module.start(value, functional=functional)
    for i, output in enumerate(outputs):
        stream.read()
        stream.write(output)
        assert stream._partial is None or torch.equal(stream._partial, outputs[i - 1])
    stream.read()
    assert torch.equal(stream._partial, outputs[0] + outputs[1])


# --------------------------------------------------------------------------------------- memory


def plain_with_a_fused_norm(network: Network, x: Tensor) -> Tensor:
    """Pre-norm sublayers whose norm saves its input and nothing else that is large."""
    for norm, layer in zip(network.norms, network.layers, strict=False):
        x = x + layer(read(sources=[x], norm_weight=norm).x)
    return read(sources=[x], norm_weight=network.norms[-1]).x


@pytest.mark.parametrize("block_size", [1, 4, 6, 24])
def test_saved_bytes_are_those_of_plain_pre_norm(block_size, device) -> None:
    network = Network(L, block_size).to(device)
    x = torch.randn(2, 64, DIM, device=device, requires_grad=True)
    with large_saved(x.numel()) as plain:
        y_plain = plain_with_a_fused_norm(network, x)
    with large_saved(x.numel()) as ours:
        y = network(x)
    assert y.requires_grad
    assert y_plain.requires_grad
    assert len(ours) == len(plain)
    assert sum(ours.values()) == sum(plain.values())


def test_checkpointed_sublayers_keep_one_tensor_each(device) -> None:
    network = Network(L, 6).to(device)
    x = torch.randn(2, 64, DIM, device=device, requires_grad=True)
    with large_saved(x.numel()) as ours:
        y = network(x, checkpoint=True)
    assert y.requires_grad
    assert len(ours) == L + 1  # the embedding and each running sum


@pytest.mark.parametrize("checkpointed", [False, True])
def test_phase_1_results_are_not_kept(checkpointed, device) -> None:
    network = Network(12, 3, forms="two_phase", group_blocks=1).to(device)
    x = torch.randn(1, 7, DIM, device=device, requires_grad=True)

    def results() -> int:
        shapes = {(3, *x.shape), (4, *x.shape)}
        return sum(type(o) is Tensor and tuple(o.shape) in shapes for o in gc.get_objects())

    y = network(x, checkpoint=checkpointed)
    assert results() == 0
    network.attn_res.keep_phase1 = "all"
    kept = network(x, checkpoint=checkpointed)
    assert results() == 3
    (y + kept).sum().backward()
    assert results() == 0


@pytest.mark.parametrize("grad_dtype", [torch.float32, None])
@pytest.mark.parametrize("forms", ["auto", "one_shot"])
@pytest.mark.parametrize("block_size", [1, 4])
def test_gradient_buffers(block_size, forms, grad_dtype, device, monkeypatch) -> None:
    """At most one for each block at a time."""
    network, x, cotangent = make(
        16, block_size, device, torch.bfloat16, forms=forms, grad_dtype=grad_dtype
    )
    stream = network.attn_res.start(x)
    for norm, layer in zip(network.norms, network.layers, strict=False):
        stream.sublayer(layer, norm)
    y, tape = stream.finish(network.norms[-1]), stream._tape
    seen = []

    def look(real):
        def spy(*arguments):
            seen.append(sum(buffer.nbytes for buffer in tape.dsources.values()))
            return real(*arguments)

        return spy

    for name in ("read_backward", "attend_backward"):
        monkeypatch.setattr(operators, name, look(getattr(operators, name)))
    gradients(y, tensors_of(network, x), cotangent)
    most = (16 // block_size) * x.numel() * (2 if grad_dtype is None else 4)
    assert max(seen) == most if forms == "one_shot" else 0 < max(seen) <= most


def test_freed_without_a_garbage_collector(device) -> None:
    network, x, cotangent = make(8, 3, device, torch.float32)
    importlib.import_module("torch._dynamo")  # its first import keeps frames of whoever needs it
    gc.collect()
    gc.disable()
    try:
        for checkpointed in (False, True):
            for backward in (False, True):
                stream = network.attn_res.start(x)
                held = weakref.ref(stream._tape)
                for norm, layer in zip(network.norms, network.layers, strict=False):
                    stream.sublayer(layer, norm, checkpoint=checkpointed)
                y = stream.finish()
                if backward:
                    torch.autograd.grad(y, [x], cotangent)
                del stream, y
                # A thread of autograd may hold the last node a moment longer than the pass lasts.
                deadline = time.monotonic() + 5
                while held() is not None and time.monotonic() < deadline:
                    time.sleep(0.01)
                assert held() is None, (checkpointed, backward)
    finally:
        gc.enable()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_recorded_without_gradients(mode, device, dtype) -> None:
    network, x, _ = make(8, 3, device, dtype)
    with mode():
        y = network(x, checkpoint=True)
        assert torch.equal(y, network(x))
    assert y.grad_fn is None
    assert not y.requires_grad
    # Inference is planned on its own: equal up to the rounding of another schedule.
    eps = torch.finfo(dtype).eps
    assert (y - network(x)).norm() <= 16 * eps * y.norm()


# ------------------------------------------------------------------------------ partial passes


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("block_size", [1, 3])
@pytest.mark.parametrize("frozen", ["embedding", "queries", "both", "norms", "all but layers"])
def test_frozen(frozen, block_size, checkpointed, device, dtype) -> None:
    network, x, cotangent = make(8, block_size, device, dtype)
    if frozen in ("embedding", "both", "all but layers"):
        x.requires_grad_(False)
    if frozen in ("queries", "both", "all but layers"):
        network.attn_res.requires_grad_(False)
    if frozen in ("norms", "all but layers"):
        network.norms.requires_grad_(False)
    check(network, x, cotangent, checkpoint=checkpointed)


@pytest.mark.parametrize("first", [1, 3, 5, 8])
@pytest.mark.parametrize("block_size", [1, 3])
def test_frozen_lower_layers(first, block_size, device, dtype) -> None:
    network, x, cotangent = make(8, block_size, device, dtype)
    x.requires_grad_(False)
    network.attn_res.requires_grad_(False)
    network.norms.requires_grad_(False)
    network.layers[:first].requires_grad_(False)
    network.norms[-1].requires_grad_(True)
    check(network, x, cotangent)
    trace = Trace()
    network(x, trace=trace)
    # Nothing below needs a gradient, and nothing there gets one.
    assert not any(t.requires_grad for t in trace.inputs[: first + 1][:8])


def test_no_work_for_a_frozen_embedding(device, dtype, monkeypatch) -> None:
    network, x, cotangent = make(4, 4, device, dtype)
    calls = []

    def spy(*arguments):
        calls.append(arguments)
        return real(*arguments)

    real = operators.read_backward
    monkeypatch.setattr(operators, "read_backward", spy)
    gradients(network(x), tensors_of(network, x), cotangent)
    assert all(len(call[14]) == 1 and call[17] is not None for call in calls[:-1])
    calls.clear()
    x.requires_grad_(False)
    network.attn_res.requires_grad_(False)
    gradients(network(x), tensors_of(network, x), cotangent)
    assert calls
    assert all(call[14] == [] and call[17] is None for call in calls)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("block_size", [1, 3])
def test_passes_over_parts_of_the_graph(block_size, checkpointed, device, dtype) -> None:
    network, x, cotangent = make(8, block_size, device, dtype)
    tensors = tensors_of(network, x)
    expected = gradients(network(x), tensors, cotangent)
    y = network(x, checkpoint=checkpointed)
    last, middle, first = (next(iter(network.layers[i].parameters())) for i in (7, 4, 0))
    norms = [network.norms[i] for i in (0, 3, 6)]
    parts = [
        [last],
        [x],
        [middle],
        [first],
        norms,
        [network.attn_res.queries],
        [last, x],
        list(tensors.values()),
    ]
    names = {id(t): name for name, t in tensors.items()}
    for part in parts:
        found = torch.autograd.grad(y, part, cotangent, retain_graph=True)
        for t, g in zip(part, found, strict=True):
            assert torch.equal(g, expected[names[id(t)]]), names[id(t)]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_exception_in_a_backward(checkpointed, device, dtype) -> None:
    network, x, cotangent = make(8, 3, device, dtype)
    tensors = tensors_of(network, x)
    expected = gradients(network(x), tensors, cotangent)
    armed = [True]

    def fail(gradient: Tensor) -> None:
        if armed[0]:
            raise ArithmeticError("stop here")

    stream = network.attn_res.start(x)
    for i, (norm, layer) in enumerate(zip(network.norms, network.layers, strict=False)):

        def hooked(h: Tensor, layer=layer, i=i) -> Tensor:
            out = layer(h)
            if i == 4 and out.requires_grad:
                out.register_hook(fail)
            return out

        stream.sublayer(hooked, norm, checkpoint=checkpointed)
    y = stream.finish(network.norms[-1])
    for _ in range(2):
        with pytest.raises(ArithmeticError, match="stop here"):
            gradients(y, tensors, cotangent, retain_graph=True)
    armed[0] = False
    assert_equal(gradients(y, tensors, cotangent, retain_graph=True), expected)
    assert_equal(gradients(y, tensors, cotangent), expected)


@pytest.mark.parametrize("block_size", [1, 3])
def test_losses_in_mid_network(block_size, device, dtype) -> None:
    network, x, cotangent = make(8, block_size, device, dtype)
    wide = copy.deepcopy(network).double()
    wide_x = x.detach().double().requires_grad_()

    def losses(run, x: Tensor) -> tuple[Tensor, Tensor]:
        trace = Trace()
        y = run(x, trace=trace)
        middle = sum(
            (trace.inputs[i] * (i + 1) * cotangent.to(x.dtype)).sum()
            + trace.outputs[i].square().sum()
            for i in (2, 4, 5)
        )
        return middle, (y * cotangent.to(x.dtype)).sum()

    def passes(run, module: Network, x: Tensor) -> list[dict[str, Tensor]]:
        tensors = tensors_of(module, x)
        middle, end = losses(run, x)
        found = []
        for loss in (middle + end, middle, end, middle):
            grads = torch.autograd.grad(
                loss, list(tensors.values()), retain_graph=True, allow_unused=True
            )
            found.append(dict(zip(tensors, grads, strict=True)))
        return found

    ours = passes(network, network, x)
    exact = passes(wide.eager, wide, wide_x)
    plain = passes(network.eager, network, x)
    for a, b, c in zip(ours, exact, plain, strict=True):
        used = [name for name, value in b.items() if value is not None]
        for name in b.keys() - set(used):
            assert a[name] is None or not a[name].any(), name

        def some(values: dict[str, Tensor], used=used) -> dict[str, Tensor]:
            return {name: values[name] for name in used}

        assert_gradients(some(a), some(b), None if dtype == torch.float64 else some(c))


def test_hooks_see_the_gradients_and_keep_them(device, dtype) -> None:
    network, x, cotangent = make(8, 3, device, dtype)
    wide = copy.deepcopy(network).double()

    def captured(run, x: Tensor, cotangent: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        trace = Trace()
        y = run(x, trace=trace)
        seen, copies = {}, {}
        for kind, tensors in (("in", trace.inputs), ("out", trace.outputs)):
            for i, tensor in enumerate(tensors):

                def hook(gradient: Tensor, key=f"{kind} {i}") -> None:
                    seen[key], copies[key] = gradient, gradient.clone()

                tensor.register_hook(hook)
        y.backward(cotangent)
        return seen, copies

    seen, copies = captured(network, x, cotangent)
    assert_equal(seen, copies)  # nothing was written over what a hook was given
    exact, _ = captured(wide.eager, x.detach().double().requires_grad_(), cotangent.double())
    plain, _ = captured(network.eager, x.detach().requires_grad_(), cotangent)
    assert_gradients(copies, exact, None if dtype == torch.float64 else plain)


def test_a_hook_may_change_a_gradient(device) -> None:
    network, x, cotangent = make(8, 3, device, torch.float32)
    results = []
    for run in (network, network.eager):
        trace = Trace()
        y = run(x, trace=trace)
        trace.outputs[4].register_hook(lambda g: 3 * g)
        trace.inputs[2].register_hook(lambda g: -g)
        results.append(gradients(y, tensors_of(network, x), cotangent))
    assert_gradients(results[0], {n: g.double() for n, g in results[1].items()}, results[1], 1e3)


def test_two_passes_add_up(device, dtype) -> None:
    network, x, cotangent = make(8, 3, device, dtype)
    once = gradients(network(x), tensors_of(network, x), cotangent)
    y = network(x)
    y.backward(cotangent, retain_graph=True)
    y.backward(cotangent)
    for name, tensor in tensors_of(network, x).items():
        assert torch.equal(tensor.grad, once[name] + once[name]), name


@pytest.mark.parametrize("key_weight", [False, True])
def test_queries_that_change_before_the_backward(key_weight, device) -> None:
    """The gradient is that of the forward: FSDP may free the parameters, a step change them."""
    network, x, cotangent = make(6, 2, device, torch.float32, key_weight=key_weight)
    tensors = tensors_of(network, x)
    expected = gradients(network(x), tensors, cotangent)
    for functional in (False, True):
        y = network(x, functional=functional)
        with torch.no_grad():
            held = [parameter.clone() for parameter in network.attn_res.parameters()]
            for parameter in network.attn_res.parameters():
                parameter.fill_(torch.nan)
        found = gradients(y, tensors, cotangent)
        with torch.no_grad():
            for parameter, value in zip(network.attn_res.parameters(), held, strict=True):
                parameter.copy_(value)
        largest = max(gradient.abs().max() for gradient in expected.values())
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * largest)


def test_accumulation_over_micro_batches(device) -> None:
    network, _, _ = make(8, 3, device, torch.float64 if device == "cpu" else torch.float32)
    dtype = network.norms[0].dtype
    x = torch.randn(6, 5, DIM, device=device, dtype=dtype)
    parameters = dict(network.named_parameters())
    whole = gradients(network(x), parameters, torch.ones_like(x))
    outputs = [network(part) for part in x.split(2)]  # several forwards before the backwards
    for y in outputs:
        y.sum().backward()
    largest = max(g.abs().max() for g in whole.values())
    eps = torch.finfo(dtype).eps
    for name, parameter in parameters.items():
        torch.testing.assert_close(
            parameter.grad, whole[name], rtol=1e3 * eps, atol=1e2 * eps * largest
        )


# -------------------------------------------------------------------- checkpoints and precision


@pytest.mark.parametrize("reentrant", [False, True])
def test_torch_checkpoint_around_sublayers(reentrant, device, dtype) -> None:
    network, x, cotangent = make(8, 3, device, dtype)
    tensors = tensors_of(network, x)
    expected = gradients(network(x), tensors, cotangent)

    def wrap(layer: nn.Module, h: Tensor) -> Tensor:
        return checkpoint(layer, h, use_reentrant=reentrant)

    network(x, wrap=wrap).backward(cotangent)
    assert_equal({name: t.grad for name, t in tensors.items()}, expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inner", [False, True])
def test_torch_checkpoint_around_the_network(inner, reentrant, device, dtype) -> None:
    network, x, cotangent = make(8, 3, device, dtype)
    tensors = tensors_of(network, x)
    expected = gradients(network(x), tensors, cotangent)
    run = functools.partial(network, checkpoint=inner)
    checkpoint(run, x, use_reentrant=reentrant).backward(cotangent)
    assert_equal({name: t.grad for name, t in tensors.items()}, expected)


def test_random_numbers_under_checkpointing(device) -> None:
    network, x, cotangent = make(8, 3, device, torch.float32, dropout=0.3)
    tensors = tensors_of(network, x)
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(7)
        found.append(gradients(network(x, checkpoint=checkpointed), tensors, cotangent))
    assert_equal(*found)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_autocast(checkpointed, device) -> None:
    network, x, cotangent = make(8, 3, device, torch.float32, dropout=0.3)
    tensors = tensors_of(network, x)
    found = []
    for recompute in (False, checkpointed):
        torch.manual_seed(7)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            y = network(x, checkpoint=recompute)
        assert y.dtype == torch.float32
        found.append(gradients(y, tensors, cotangent))
    assert_equal(*found)
    torch.manual_seed(7)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        plain = gradients(network.eager(x), tensors, cotangent)
    largest = max(g.norm() for g in plain.values())
    for name, gradient in plain.items():
        assert (found[0][name] - gradient).norm() <= 0.05 * gradient.norm() + 1e-3 * largest, name


@pytest.mark.parametrize("functional", [False, True])
def test_layers_that_return_more_than_an_output(functional, device, dtype) -> None:
    """An auxiliary loss leaves through the closure; the recomputation of it is not wanted."""
    network, x, cotangent = make(8, 3, device, dtype)
    tensors = tensors_of(network, x)

    def run(checkpointed: bool) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
        losses: dict[int, Tensor] = {}
        stream = network.attn_res.start(x, functional=functional)
        for i, (norm, layer) in enumerate(zip(network.norms, network.layers, strict=False)):

            def output(h: Tensor, i=i, layer=layer) -> Tensor:
                y, loss = layer(h), h.square().mean() * (i + 1)
                losses.setdefault(i, loss)
                return y

            stream.sublayer(output, norm, checkpoint=checkpointed)
        y = stream.finish(network.norms[-1])
        kept = dict(losses)
        loss = sum(losses.values()) + (y * cotangent).sum()
        grads = gradients(loss, tensors, torch.ones_like(loss))
        assert all(losses[i] is loss for i, loss in kept.items())
        return kept, grads

    (losses, expected), (again, found) = run(False), run(True)
    assert_equal(
        {str(i): loss for i, loss in again.items()}, {str(i): loss for i, loss in losses.items()}
    )
    assert_equal(found, expected)


def test_outputs_of_another_dtype(device) -> None:
    """A float32 stream around bfloat16 layers, without autocast."""
    network, x, cotangent = make(8, 3, device, torch.float32)
    layers = copy.deepcopy(network.layers).to(torch.bfloat16)
    results = []
    for functional in (False, True):
        stream = network.attn_res.start(x, functional=functional)
        for norm, layer in zip(network.norms, layers, strict=False):
            stream.write(layer(stream.read(norm).to(torch.bfloat16)))
        y = stream.finish(network.norms[-1])
        assert y.dtype == torch.float32
        results.append((y, torch.autograd.grad(y, [x, *layers.parameters()], cotangent)))
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() <= 0.02 * b.norm()


def test_a_layer_that_does_not_lead_back_to_its_input(device, dtype) -> None:
    """Its recomputation may come after the backward of its site, which wrote over phase 1."""
    network, x, cotangent = make(8, 3, device, dtype)
    tensors = {n: t for n, t in tensors_of(network, x).items() if "norms.4" not in n}
    found = []
    for checkpointed in (False, True):
        stream = network.attn_res.start(x)
        for i, (norm, layer) in enumerate(zip(network.norms, network.layers, strict=False)):

            def cut(h: Tensor, layer=layer, i=i) -> Tensor:
                return layer(h.detach() if i == 4 else h)

            stream.sublayer(cut, norm, checkpoint=checkpointed)
        found.append(gradients(stream.finish(network.norms[-1]), tensors, cotangent))
    assert_equal(*found)


# -------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("shape", [(DIM,), (0, DIM), (3, DIM), (2, 1, 3, DIM)])
def test_leading_shapes(shape, device, dtype) -> None:
    module = BlockAttnRes(5, DIM, 2, device=device, dtype=dtype)
    nn.init.normal_(module.queries)
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    stream = module.start(x, return_probs=True)
    weight = torch.ones(DIM, device=device, dtype=dtype)
    for _ in range(5):
        stream.write(torch.tanh(stream.read(weight)))
    y = stream.finish()
    assert y.shape == shape
    assert [p.shape[:-1] for p in stream.probabilities] == [shape[:-1]] * 6
    y.sum().backward()
    assert x.grad.shape == shape


def test_any_strides(device, dtype) -> None:
    """Embedding, outputs and gradients as transposes leave them."""
    network, x, cotangent = make(6, 2, device, dtype)
    swapped = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    cotangent_swapped = cotangent.transpose(0, 1).contiguous().transpose(0, 1)

    def wrap(layer: nn.Module, h: Tensor) -> Tensor:
        return layer(h).transpose(0, 2).contiguous().transpose(0, 2)

    expected = gradients(network(x), tensors_of(network, x), cotangent)
    y = network(swapped, wrap=wrap)
    ours = gradients(y, tensors_of(network, swapped), cotangent_swapped)
    largest = max(g.abs().max() for g in expected.values())
    for name, gradient in expected.items():
        # The layers' own products may take another order for other strides.
        eps = torch.finfo(dtype).eps
        assert (ours[name] - gradient).norm() <= 100 * eps * gradient.norm() + eps * largest, name
    y = network(x)
    torch.autograd.grad(y.sum(), [x])  # a gradient of stride 0


def test_layers_that_work_in_place(device) -> None:
    network, x, cotangent = make(6, 2, device, torch.float32)

    def wrap(layer: nn.Module, h: Tensor) -> Tensor:
        return layer(h.mul_(0.5)).add_(1.0)

    def out_of_place(layer: nn.Module, h: Tensor) -> Tensor:
        return layer(h * 0.5) + 1.0

    found = [
        gradients(network(x, wrap=w), tensors_of(network, x), cotangent)
        for w in (wrap, out_of_place)
    ]
    assert_equal(*found)
    stream = network.attn_res.start(x)
    outputs = []
    for layer, norm in zip(network.layers, network.norms, strict=False):
        outputs.append(layer(stream.read(norm)))
        stream.write(outputs[-1])
    y = stream.finish()
    outputs[0].zero_()  # kept as the first running sum
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, [x], cotangent)


# ----------------------------------------------------------------------------- failed calls

SCHEDULES = {
    "sums that become sources as they are read": (7, 1, {"group_blocks": 3}),
    "blocks that close": (7, 2, {"forms": "two_phase", "group_blocks": 1}),
    "one-shot": (7, 3, {"forms": "one_shot"}),
    "as planned": (7, 3, {}),
    "stored": (7, 2, {"block_storage": "float16"}),
    "stored, one-shot": (7, 2, {"block_storage": "float8", "forms": "one_shot"}),
    "stochastic": (7, 2, {"stochastic_rounding": 3, "grad_dtype": None}),
    "float32 sums": (7, 3, {"sum_dtype": torch.float32}),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
every_stream = pytest.mark.parametrize("functional", [False, True], ids=["lean", "functional"])


def build_schedule(schedule, functional: bool, device: str):
    num_sublayers, block_size, options = schedule
    narrow = options.keys() & {"stochastic_rounding", "sum_dtype"}
    dtype = torch.bfloat16 if narrow else torch.float32
    return make(num_sublayers, block_size, device, dtype, **options)


def run_with(network: Network, x: Tensor, functional: bool, each) -> Tensor:
    """A forward whose sublayers are run by ``each(stream, index, layer, norm)``."""
    if network.attn_res.rounding_seed is not None:
        network.attn_res.rounding_seed[1] = 0
    stream = network.attn_res.start(x, functional=functional, return_probs=True)
    for i, (norm, layer) in enumerate(zip(network.norms, network.layers, strict=False)):
        each(stream, i, layer, norm)
    y = stream.finish(network.norms[-1])
    assert len(stream.probabilities) == len(network.layers) + 1
    return y


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@every_stream
@every_schedule
def test_a_sublayer_that_failed_may_be_tried_again(
    schedule, functional, checkpointed, device
) -> None:
    network, x, cotangent = build_schedule(schedule, functional, device)
    tensors = tensors_of(network, x)

    def sublayer(stream, i, layer, norm) -> None:
        stream.sublayer(layer, norm, checkpoint=checkpointed)

    y = run_with(network, x, functional, sublayer)
    expected = gradients(y, tensors, cotangent)

    def raises(h: Tensor) -> Tensor:
        raise ArithmeticError("this layer does not work")

    def interrupted(h: Tensor) -> Tensor:
        h.mul_(2)  # of no effect: the input is read again
        raise KeyboardInterrupt

    places = range(len(network.layers))
    for failing in [*([place] for place in places), list(places)]:

        def each(stream, i, layer, norm, failing=failing) -> None:
            if i in failing:
                for bad, error in (
                    (raises, ArithmeticError),
                    (lambda h: layer(h)[..., :-1], ValueError),
                    (interrupted, KeyboardInterrupt),
                ):
                    with pytest.raises(error):
                        stream.sublayer(bad, norm, checkpoint=checkpointed)
                with pytest.raises(RuntimeError, match=f"write: sublayer {i} of 7 has not been"):
                    stream.write(x)
            sublayer(stream, i, layer, norm)

        again = run_with(network, x, functional, each)
        assert torch.equal(again, y), failing
        assert_equal(gradients(again, tensors, cotangent), expected)


@every_stream
@every_schedule
def test_a_read_that_failed_may_be_tried_again(schedule, functional, device, monkeypatch) -> None:
    network, x, cotangent = build_schedule(schedule, functional, device)
    tensors = tensors_of(network, x)

    def sublayer(stream, i, layer, norm) -> None:
        stream.write(layer(stream.read(norm)))

    y = run_with(network, x, functional, sublayer)
    expected = gradients(y, tensors, cotangent)
    place = importlib.import_module("flash_attn_res.stream") if functional else operators
    real = place.read

    def fails(*arguments, **options):
        raise MemoryError

    def each(stream, i, layer, norm) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(place, "read", fails)
            for _ in range(2):
                with pytest.raises(MemoryError):
                    stream.read(norm)
        sublayer(stream, i, layer, norm)
        if i == len(network.layers) - 1:
            with monkeypatch.context() as patch:
                patch.setattr(place, "read", fails)
                with pytest.raises(MemoryError):
                    stream.finish(norm)
        assert place.read is real

    again = run_with(network, x, functional, each)
    assert torch.equal(again, y)
    assert_equal(gradients(again, tensors, cotangent), expected)


@pytest.mark.parametrize("place", range(6))
def test_a_loss_that_a_failed_call_made(place, device) -> None:
    """It counts, or is refused: its input may share memory with that of the call that went well."""
    network, x, cotangent = make(6, 3, device, torch.float32, forms="two_phase", group_blocks=1)
    tensors = tensors_of(network, x)

    def total(tries: int) -> Tensor:
        losses: list[Tensor] = []

        def each(stream, i, layer, norm) -> None:
            def with_loss(h: Tensor) -> Tensor:
                if i == place:
                    losses.append(h.square().sum() * (2 / tries))
                    if len(losses) < tries:
                        raise ArithmeticError
                return layer(h)

            for _ in range(tries - 1 if i == place else 0):
                with pytest.raises(ArithmeticError):
                    stream.sublayer(with_loss, norm)
            stream.sublayer(with_loss, norm)

        y = run_with(network, x, False, each)
        return sum(losses) + (y * cotangent).sum()

    one = torch.ones((), device=device)
    expected = gradients(total(1), tensors, one)
    loss = total(2)
    if place in (4, 5):  # later sites of a block with phase 1
        with pytest.raises(RuntimeError, match=f"site {place} was read twice, for a call of its"):
            gradients(loss, tensors, one)
        return
    found = gradients(loss, tensors, one)
    largest = max(g.abs().max() for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * largest)


# -------------------------------------------------------------------------------------- errors


class TestErrors:
    @pytest.fixture
    def stream(self, device):
        return BlockAttnRes(3, DIM, 2, device=device).start(
            torch.randn(2, DIM, device=device, requires_grad=True)
        )

    def value(self, stream, *shape: int, **options) -> Tensor:
        return torch.randn(*(shape or (2, DIM)), device=stream._like.device, **options)

    def test_order(self, stream) -> None:
        with pytest.raises(RuntimeError, match="write: sublayer 0 of 3 has not been read"):
            stream.write(self.value(stream))
        with pytest.raises(RuntimeError, match="finish: sublayer 0 of 3 is still to come"):
            stream.finish()
        x = stream.read()
        for call in (stream.read, stream.finish):
            with pytest.raises(RuntimeError, match="sublayer 0 of 3 has been read and not written"):
                call()
        with pytest.raises(RuntimeError, match="sublayer 0 of 3 has been read and not written"):
            stream.sublayer(nn.Identity(), checkpoint=True)
        stream.write(x)
        with pytest.raises(RuntimeError, match="write: sublayer 1 of 3 has not been read"):
            stream.write(x)
        stream.sublayer(nn.Identity())
        stream.sublayer(nn.Identity(), checkpoint=True)
        with pytest.raises(RuntimeError, match="all 3 sublayers are done; call finish"):
            stream.read()
        stream.finish()
        for call in (stream.read, stream.finish, lambda: stream.write(x)):
            with pytest.raises(RuntimeError, match="this stream is finished; start a new one"):
                call()

    def test_outputs(self, stream) -> None:
        stream.read()
        with pytest.raises(TypeError, match=r"output is a NoneType, expected a torch\.Tensor"):
            stream.write(None)
        with pytest.raises(ValueError, match=r"output has shape \[2, 31\], expected \[2, 32\]"):
            stream.write(self.value(stream, 2, 31))
        with pytest.raises(ValueError, match="output is on meta but the embedding is on"):
            stream.write(torch.empty(2, DIM, device="meta"))
        with pytest.raises(TypeError, match=r"output is torch.int64, expected float32"):
            stream.write(torch.zeros(2, DIM, dtype=torch.int64, device=stream._like.device))
        with pytest.raises(TypeError, match="float64 does not mix"):
            stream.write(self.value(stream, dtype=torch.float64))
        stream.write(self.value(stream))  # the stream is as good as before
        stream.read()
        with pytest.raises(
            TypeError, match=r"output is torch.bfloat16 but that of the sublayers before was"
        ):
            stream.write(self.value(stream, dtype=torch.bfloat16))

    def test_norm_weights(self, stream) -> None:
        with pytest.raises(ValueError, match=r"read: norm_weight has shape \[31\]"):
            stream.read(self.value(stream, 31))
        with pytest.raises(ValueError, match=r"read: norm_eps is -1, expected a number > 0"):
            stream.read(self.value(stream, DIM), -1)
        stream.read(self.value(stream, DIM))

    @pytest.mark.parametrize("functional", [False, True])
    @pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
    def test_another_streams_input(self, mode, functional, device) -> None:
        module = BlockAttnRes(3, DIM, 2, device=device)
        with mode():
            value = torch.randn(2, DIM, device=device)
            stream, other = (module.start(value, functional=functional) for _ in range(2))
            for _ in range(3):
                x, own = other.read(), stream.read()
                with pytest.raises(RuntimeError, match="output is what another stream's read gave"):
                    stream.write(x)
                stream.write(own)
                other.write(x)
            assert torch.equal(stream.finish(), other.finish())

    def test_an_output_that_is_refused_decides_no_dtype(self, stream, device) -> None:
        value = self.value(stream, dtype=torch.bfloat16)
        x = BlockAttnRes(3, DIM, 2, device=device).start(value).read()
        own = stream.read()
        with pytest.raises(RuntimeError, match="another stream's read"):
            stream.write(x)
        stream.write(own)

    @pytest.mark.parametrize("functional", [False, True])
    def test_a_network_as_a_layer(self, functional, device) -> None:
        """What the finish of an inner stream gives is an output like any other."""
        inner = BlockAttnRes(1, DIM, 1, device=device)

        def layer(x: Tensor) -> Tensor:
            stream = inner.start(x, functional=functional)
            stream.sublayer(torch.tanh)
            return stream.finish()

        x = torch.randn(2, DIM, device=device, requires_grad=True)
        stream = BlockAttnRes(2, DIM, 2, device=device).start(x, functional=functional)
        for checkpointed in (False, True):
            stream.sublayer(layer, checkpoint=checkpointed)
        stream.finish().sum().backward()
        assert x.grad.any()

    def test_after_its_backward(self, device) -> None:
        network, x, cotangent = make(8, 3, device, torch.float32)
        for retain in (True, False):
            stream = network.attn_res.start(x)
            for norm, layer in zip(network.norms[:5], network.layers[:5], strict=True):
                h = stream.read(norm)
                stream.write(layer(h))
            h.sum().backward(retain_graph=retain)
            if not retain:
                with pytest.raises(RuntimeError, match="a backward pass has freed the graph"):
                    stream.read()
                continue
            for norm, layer in zip(network.norms[5:8], network.layers[5:8], strict=True):
                stream.sublayer(layer, norm)
            y = stream.finish(network.norms[-1])
            expected = gradients(network(x), tensors_of(network, x), cotangent)
            assert_equal(gradients(y, tensors_of(network, x), cotangent), expected)
        with pytest.raises(RuntimeError, match="second time"):
            gradients(y, tensors_of(network, x), cotangent)

    @pytest.mark.parametrize("functional", [False, True])
    def test_double_backward(self, functional, device) -> None:
        network, x, _ = make(4, 2, device, torch.float32)
        y = network(x, functional=functional)
        with pytest.raises(RuntimeError, match="second derivative"):  # noqa: PT012
            (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            g.sum().backward()

    def test_one_pass_inside_another(self, device) -> None:
        network, x, cotangent = make(8, 3, device, torch.float32)
        trace = Trace()
        y = network(x, trace=trace)

        def nested(gradient: Tensor) -> None:
            if torch._C._current_graph_task_id() == outer[0]:
                with torch.enable_grad():
                    inner = trace.inputs[2].sum()
                torch.autograd.grad(inner, x, retain_graph=True)

        outer = []
        trace.outputs[-1].register_hook(lambda g: outer.append(torch._C._current_graph_task_id()))
        trace.inputs[4].register_hook(nested)
        with pytest.raises(RuntimeError, match="two backward passes run over one stream"):
            y.backward(cotangent)

    def test_a_functional_stream_whose_graph_is_gone(self, device) -> None:
        network, x, _ = make(4, 2, device, torch.float32)
        stream = network.attn_res.start(x, functional=True)
        for i, (norm, layer) in enumerate(zip(network.norms, network.layers, strict=False)):
            h = stream.read(norm)
            stream.write(layer(h))
            if i == 2:
                h.sum().backward()
        y = stream.finish()
        with pytest.raises(RuntimeError, match="Trying to backward through the graph a second"):
            y.sum().backward()

    def test_torch_checkpoint_around_a_read(self, device) -> None:
        network, x, cotangent = make(4, 2, device, torch.float32)
        stream = network.attn_res.start(x)
        for norm, layer in zip(network.norms, network.layers, strict=False):

            def run(norm=norm, layer=layer) -> Tensor:
                return layer(stream.read(norm))

            stream.write(checkpoint(run, use_reentrant=False))
        y = stream.finish()
        with pytest.raises(RuntimeError, match=r"use stream.sublayer\(..., checkpoint=True\)"):
            y.backward(cotangent)
