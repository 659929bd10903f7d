"""The stream on the CPU: the tests of every device, and those of the machinery around it."""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import shutil
import traceback
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from distributed_checks import connect, leave, spawn
from stream_networks import Network, assert_equal, assert_gradients, gradients, make, tensors_of
from stream_suite import *  # noqa: F403
from stream_suite import check_compiled_layers


@pytest.fixture
def device() -> str:
    return "cpu"


@pytest.fixture(params=[torch.float64, torch.float32, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_layers(backend: str, checkpointed: bool, dtype: torch.dtype) -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if backend == "inductor" and (dtype != torch.float32 or compiler is None):
        pytest.skip("Inductor compiles C++: one dtype, where there is a compiler")
    network, x, cotangent = make(6, 3, "cpu", dtype)
    check_compiled_layers(network, x, cotangent, checkpointed, backend=backend)


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


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_sharded_sublayer_that_failed_may_be_tried_again(checkpointed: bool) -> None:
    import torch.distributed as dist

    from flash_attn_res.distributed import TokenShards

    def fail(h: Tensor) -> Tensor:
        raise ArithmeticError

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        network, x, cotangent = make(6, 2, "cpu", torch.float32)
        tensors = tensors_of(network, x)
        expected = gradients(network(x), tensors, cotangent)
        stream = TokenShards(dim=1).start(network.attn_res, x)
        for layer, norm in zip(network.layers, network.norms, strict=False):
            with pytest.raises(ArithmeticError):
                stream.sublayer(fail, norm, checkpoint=checkpointed)
            stream.sublayer(layer, norm, checkpoint=checkpointed)
        assert_equal(gradients(stream.finish(network.norms[-1]), tensors, cotangent), expected)
    finally:
        dist.destroy_process_group()


PARALLEL = ("ddp", "fsdp", "fsdp, apart", "fsdp, bfloat16", "fsdp, bfloat16, apart")


def wrap_parallel(kind: str, network: Network, world: int) -> torch.nn.Module:
    """``apart``: the queries are sharded on their own, and so keep their dtype."""
    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(network)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    mesh = init_device_mesh("cpu", (world,))
    policy = MixedPrecisionPolicy()
    if "bfloat16" in kind:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in network.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    if "apart" in kind:
        fully_shard(network.attn_res, mesh=mesh)
        register_fsdp_forward_method(network.attn_res, "start")
    return fully_shard(network, mesh=mesh, mp_policy=policy)


@contextlib.contextmanager
def synchronised(model: torch.nn.Module, wanted: bool) -> Iterator[None]:
    """Whether a backward exchanges gradients, or leaves them where they are for a later one."""
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        with contextlib.nullcontext() if wanted else model.no_sync():
            yield
    else:
        model.set_requires_gradient_sync(wanted)
        yield


def run_parallel(rank: int, world: int, port: int, device: str, folder: str, kind: str) -> None:
    """One process of data-parallel steps of two micro-batches; rank 0 stores the gradients."""
    import torch.distributed as dist

    try:
        connect(rank, world, port, device)
        parallel_steps(rank, world, folder, kind)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        leave(1)
    leave(0)


def parallel_steps(rank: int, world: int, folder: str, kind: str) -> None:
    torch.manual_seed(5)
    network = Network(6, 2)
    x = torch.randn(world, 2, 5, network.attn_res.dim)[rank]
    model = wrap_parallel(kind, network, world)
    dtypes = set()
    fold = network.attn_res._fold

    def look(op: str, name: str, value: Tensor) -> Tensor:
        dtypes.add((network.attn_res.queries.dtype, value.dtype))
        return fold(op, name, value)

    network.attn_res._fold = look
    for checkpointed, every in itertools.product((False, True), repeat=2):
        model.zero_grad()
        for index, part in enumerate(x.split(1)):
            with synchronised(model, every or index == 1):
                (model(part, checkpoint=checkpointed).square().mean() / 2).backward()
        grads = {}
        for name, parameter in network.named_parameters():
            gradient = parameter.grad
            grads[name] = gradient if kind == "ddp" else gradient.full_tensor()
        if rank == 0:
            torch.save((grads, dtypes), f"{folder}/{checkpointed}, {every}.pt")
        if kind == "fsdp":  # between its forwards the module holds shards
            with pytest.raises(TypeError, match="queries is a sharded DTensor"):
                network.attn_res.start(x)


@pytest.mark.parametrize("kind", PARALLEL)
def test_data_parallel(kind: str, tmp_path) -> None:
    """Gradients of one process on all data, exchanged after each micro-batch or after the last."""
    world = 2
    assert spawn(run_parallel, world, "cpu", tmp_path, kind) == [0] * world
    torch.manual_seed(5)
    network = Network(6, 2)
    x = torch.randn(world, 2, 5, network.attn_res.dim).flatten(0, 1)

    def alone(dtype: torch.dtype) -> dict[str, Tensor]:
        module = copy.deepcopy(network).to(dtype)
        loss = module(x.to(dtype)).square().mean()
        return gradients(loss, dict(module.named_parameters()), None)

    expected = alone(torch.float32)
    for checkpointed, every in itertools.product((False, True), repeat=2):
        ours, dtypes = torch.load(tmp_path / f"{checkpointed}, {every}.pt")
        if "bfloat16" in kind:
            queries = torch.float32 if "apart" in kind else torch.bfloat16
            assert dtypes == {(queries, torch.bfloat16)}
            assert all(gradient.dtype == torch.float32 for gradient in ours.values())
            assert_gradients(ours, alone(torch.float64), alone(torch.bfloat16))
            continue
        for name, gradient in expected.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-6)
