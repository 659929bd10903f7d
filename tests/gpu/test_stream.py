"""The stream on the GPU: the tests of every device, CUDA streams, devices and graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flash_attn_res import BlockAttnRes
from stream_networks import Network, assert_equal, assert_gradients, gradients, make, tensors_of
from stream_suite import *  # noqa: F403
from stream_suite import check_compiled_layers, check_compiled_network, exact_and_plain


@pytest.fixture
def device() -> str:
    return "cuda:0"


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.mark.parametrize(
    ("num_sublayers", "block_size", "dim"),
    [(24, 8, 2048), (18, 6, 2304), (6, 6, 7168), (12, 1, 2048)],
)
@pytest.mark.large
@pytest.mark.parametrize("options", [{}, {"grad_dtype": None}, {"sum_dtype": torch.float32}])
def test_widths_that_matter(num_sublayers, block_size, dim, options) -> None:
    network, x, cotangent = make(
        *(num_sublayers, block_size, "cuda:0", torch.bfloat16, (2, 75)),
        dim=dim,
        queries=dim**-0.5,
        **options,
    )
    tensors = tensors_of(network, x)
    ours = gradients(network(x), tensors, cotangent)
    assert_gradients(ours, *exact_and_plain(network, x, cotangent))
    assert_equal(gradients(network(x, checkpoint=True), tensors, cotangent), ours)
    assert_equal(gradients(network(x), tensors, cotangent), ours)


STORAGE = {
    "stored": {"block_storage": "float8"},
    "stored, one-shot": {"block_storage": "float16", "forms": "one_shot"},
    "float32 sums": {"sum_dtype": torch.float32},
    "both": {"block_storage": "float8", "sum_dtype": torch.float32},
}
every_storage = pytest.mark.parametrize("options", STORAGE.values(), ids=STORAGE.keys())


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("block_size", [1, 3])
@pytest.mark.parametrize("options", [{}, {"sum_dtype": torch.float32}], ids=["plain", "wide sums"])
def test_a_captured_step(options: dict, block_size: int, checkpointed: bool) -> None:
    """Forward, backward and accumulation in one CUDA graph, replayed on other inputs."""
    network, x, cotangent = make(8, block_size, "cuda:0", torch.bfloat16, **options)
    tensors = tensors_of(network, x)

    def step() -> list[Tensor]:
        stream = network.attn_res.start(x)
        for norm, layer in zip(network.norms, network.layers, strict=False):
            stream.sublayer(layer, norm, checkpoint=checkpointed, preserve_rng_state=False)
        y = stream.finish(network.norms[-1])
        return [y.detach(), *torch.autograd.grad(y, list(tensors.values()), cotangent)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
            cotangent.copy_(torch.randn_like(cotangent))
        graph.replay()
        for ours, expected in zip(captured, step(), strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("block_size", [1, 3])
def test_compiled_layers(block_size: int, checkpointed: bool, dtype: torch.dtype) -> None:
    network, x, cotangent = make(8, block_size, "cuda:0", dtype)
    check_compiled_layers(network, x, cotangent, checkpointed)


@pytest.mark.parametrize("block_size", [1, 3, 4])
def test_a_compiled_network(block_size: int, dtype: torch.dtype) -> None:
    """The last block is of two sublayers with blocks of three, of the full size with four."""
    network, x, cotangent = make(8, block_size, "cuda:0", dtype)
    check_compiled_network(network, x, cotangent)


@every_storage
def test_a_compiled_network_with_storage(options: dict) -> None:
    """Against eager mode over the same operators, which has the bits of the lean stream.

    Inductor's layers round in other places, and a stored value then falls to another number.
    """
    torch._dynamo.reset()
    network, x, cotangent = make(8, 3, "cuda:0", torch.bfloat16, dim=264, **options)
    tensors = tensors_of(network, x)
    eager = network(x, functional=True)
    assert torch.equal(eager, network(x))
    expected = gradients(eager, tensors, cotangent)
    y = torch.compile(network, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(y, eager)
    found = gradients(y, tensors, cotangent)
    largest = max(g.float().norm() for g in expected.values())
    for name, other in expected.items():
        error = (found[name].float() - other.float()).norm()
        assert error <= 1e-2 * other.float().norm() + 1e-3 * largest, name
    torch._dynamo.reset()
    y = torch.compile(network, fullgraph=True)(x)
    assert (y - eager).norm() <= 0.2 * eager.norm()
    found = gradients(y, tensors, cotangent)
    assert all(gradient.isfinite().all() for gradient in found.values())


@every_storage
def test_an_exported_network_with_storage(options: dict) -> None:
    network, x, _ = make(8, 3, "cuda:0", torch.bfloat16, dim=264, **options)
    x = x.detach()
    program = torch.export.export(network, (x,))
    for given in (x, torch.randn_like(x)):
        y, expected = program.module()(given), network(given, functional=True)
        assert (y - expected).norm() <= 0.1 * expected.norm()


@pytest.mark.parametrize("block_size", [1, 3])
def test_an_exported_network(block_size: int, dtype: torch.dtype) -> None:
    network, x, _ = make(8, block_size, "cuda:0", dtype)
    x = x.detach()
    program = torch.export.export(network, (x,))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "flash_attn_res.read.default" in called
    for given in (x, torch.randn_like(x)):
        y, expected = program.module()(given), network(given, functional=True)
        assert (y - expected).norm() <= 32 * torch.finfo(dtype).eps * expected.norm()


def test_no_synchronisation() -> None:
    network, x, cotangent = make(8, 3, "cuda:0", torch.bfloat16)
    tensors = tensors_of(network, x)
    gradients(network(x), tensors, cotangent)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(network(x), tensors, cotangent)
        network(x, checkpoint=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_on_another_stream() -> None:
    network, x, cotangent = make(8, 3, "cuda:0", torch.float32)
    tensors = tensors_of(network, x)
    expected = gradients(network(x), tensors, cotangent)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # whatever ran on another stream would come too early
        ours = gradients(network(x), tensors, cotangent)
    side.synchronize()
    assert_equal(ours, expected)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("block_size", [1, 3])
def test_sublayers_on_two_streams(block_size: int, checkpointed: bool) -> None:
    """Forward switches streams, as it pleases; the backward runs each node on its own."""
    network, x, cotangent = make(12, block_size, "cuda:0", torch.float32)
    tensors = tensors_of(network, x)
    expected = gradients(network(x), tensors, cotangent)
    streams = [torch.cuda.Stream() for _ in range(2)]
    main = torch.cuda.current_stream()
    for repeat in range(3):
        stream = network.attn_res.start(x)
        before = main
        for i, (norm, layer) in enumerate(zip(network.norms, network.layers, strict=False)):
            current = streams[(i + repeat) % 2]
            current.wait_stream(before)
            with torch.cuda.stream(current):
                torch.cuda._sleep(2_000_000)
                stream.sublayer(layer, norm, checkpoint=checkpointed)
            before = current
        main.wait_stream(before)
        y = stream.finish(network.norms[-1])
        assert_equal(gradients(y, tensors, cotangent), expected)
    torch.cuda.synchronize()


def test_a_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    network, x, cotangent = make(8, 3, "cuda:0", torch.float32)
    expected = gradients(network(x), tensors_of(network, x), cotangent)
    network = network.to("cuda:1")
    x, cotangent = x.detach().to("cuda:1").requires_grad_(), cotangent.to("cuda:1")
    with torch.cuda.device(0):
        ours = gradients(network(x), tensors_of(network, x), cotangent)
    assert_equal({name: g.to("cuda:0") for name, g in ours.items()}, expected)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_peak_memory_is_that_of_plain(checkpointed: bool) -> None:
    torch.manual_seed(0)
    network = Network(24, 8, dim=1024).to("cuda", torch.bfloat16)
    x = torch.randn(1, 8192, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    peaks = {}
    for name in ("plain", "ours"):
        for _ in range(2):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            if name == "plain" and checkpointed:
                y = x
                for norm, layer in zip(network.norms, network.layers, strict=False):

                    def sublayer(h: Tensor, norm=norm, layer=layer) -> Tensor:
                        return layer(torch.nn.functional.rms_norm(h, norm.shape, norm, 1e-6))

                    y = y + torch.utils.checkpoint.checkpoint(sublayer, y, use_reentrant=False)
            else:
                y = network.plain(x) if name == "plain" else network(x, checkpoint=checkpointed)
            torch.autograd.grad(y, [x, *network.layers.parameters()], torch.ones_like(y))
            del y
        peaks[name] = torch.cuda.max_memory_allocated()
    assert peaks["ours"] <= (1.3 if checkpointed else 1.08) * peaks["plain"], peaks


def test_a_read_without_memory() -> None:
    """It says so in PyTorch's type, and may be tried again."""
    module = BlockAttnRes(2, 2048, block_size=2).cuda()
    embedding = torch.randn(65536, 2048, device="cuda", dtype=torch.bfloat16).requires_grad_()
    stream = module.start(embedding)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties("cuda").total_memory
    room = torch.cuda.memory_reserved() + embedding.nbytes // 4
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        with pytest.raises(torch.OutOfMemoryError, match="PyTorch could not allocate"):
            stream.read()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(stream.read(), embedding)
