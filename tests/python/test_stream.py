"""The stream on the CPU: the tests of every device, and those of the machinery around it."""

from __future__ import annotations

import socket

import pytest
import torch
from torch import Tensor

from stream_networks import Network, assert_equal, gradients, make, tensors_of
from stream_suite import *  # noqa: F403


@pytest.fixture
def device() -> str:
    return "cpu"


@pytest.fixture(params=[torch.float64, torch.float32, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def test_compiled_layers(dtype: torch.dtype) -> None:
    network, x, cotangent = make(6, 3, "cpu", dtype)
    torch._dynamo.reset()
    compiled = [
        torch.compile(layer, fullgraph=True, backend="aot_eager") for layer in network.layers
    ]
    tensors = tensors_of(network, x)
    found = []
    for layers in (network.layers, compiled):
        stream = network.attn_res.start(x)
        for layer, norm in zip(layers, network.norms, strict=False):
            stream.write(layer(stream.read(norm)))
        found.append(gradients(stream.finish(network.norms[-1]), tensors, cotangent))
    largest = max(g.norm() for g in found[0].values())
    eps = torch.finfo(dtype).eps
    for name, gradient in found[0].items():
        assert (found[1][name] - gradient).norm() <= 100 * eps * (gradient.norm() + largest), name


def test_a_stream_from_outside_of_the_compiled_function() -> None:
    network, x, _ = make(2, 2, "cpu", torch.float32)
    torch._dynamo.reset()
    stream = network.attn_res.start(x)
    compiled = torch.compile(lambda: stream.read() * 2, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="started outside of the compiled function"):
        compiled()


def test_offloaded_saved_tensors() -> None:
    """What is saved goes through hooks, as for any network."""
    network, x, cotangent = make(8, 3, "cpu", torch.float32)
    tensors = tensors_of(network, x)
    expected = gradients(network(x), tensors, cotangent)
    with torch.autograd.graph.saved_tensors_hooks(Tensor.clone, lambda tensor: tensor):
        y = network(x)
    assert_equal(gradients(y, tensors, cotangent), expected)


def run_parallel(kind: str, rank: int, world: int, port: int, folder: str) -> None:
    """One process of a data-parallel step; rank 0 stores the gradients."""
    import torch.distributed as dist

    torch.manual_seed(5)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    try:
        network = Network(6, 2)
        x = torch.randn(world, 2, 5, network.attn_res.dim)[rank]
        if kind == "ddp":
            model = torch.nn.parallel.DistributedDataParallel(network)
        else:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (world,))
            for layer in network.layers:
                fully_shard(layer, mesh=mesh)
            model = fully_shard(network, mesh=mesh)
        for checkpointed in (False, True):
            model.zero_grad()
            for _ in range(2):  # gradients accumulate over micro-batches
                (model(x, checkpoint=checkpointed).square().mean() / 2).backward()
            grads = {}
            for name, parameter in network.named_parameters():
                gradient = parameter.grad
                grads[name] = gradient.full_tensor() if kind == "fsdp" else gradient
            if kind == "fsdp":  # between its forwards the module holds shards
                with pytest.raises(TypeError, match="queries is a sharded DTensor"):
                    network.attn_res.start(x)
            if rank == 0:
                torch.save(grads, f"{folder}/{checkpointed}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_data_parallel(kind: str, tmp_path) -> None:
    import torch.multiprocessing as mp

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = 2
    context = mp.get_context("spawn")
    workers = [
        context.Process(target=run_parallel, args=(kind, rank, world, port, str(tmp_path)))
        for rank in range(world)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(180)
        assert worker.exitcode == 0
    torch.manual_seed(5)
    network = Network(6, 2)
    x = torch.randn(world, 2, 5, network.attn_res.dim)
    expected = gradients(
        network(x.flatten(0, 1)).square().mean(), dict(network.named_parameters()), None
    )
    for checkpointed in (False, True):
        ours = torch.load(tmp_path / f"{checkpointed}.pt")
        for name, gradient in expected.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-6)
