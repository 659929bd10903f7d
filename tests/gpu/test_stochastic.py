"""Stochastic rounding on the GPU: the bits of the CPU, and what a captured graph sees."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flash_attn_res import BlockAttnRes, stochastic_add

OP_INTO = torch.ops.flash_attn_res.stochastic_add_into


def seed_of(seed: int, step: int, device: str = "cuda") -> Tensor:
    return torch.tensor([seed, step], dtype=torch.int64, device=device)


@pytest.mark.parametrize("tokens", [1, 3, 127, 4096])
@pytest.mark.parametrize("dim", [1, 7, 8, 100, 257, 2304])
@pytest.mark.parametrize("offset", [0, 1])
def test_same_bits_as_the_cpu(tokens: int, dim: int, offset: int) -> None:
    dtypes = [torch.bfloat16, torch.float32, torch.float16, torch.bfloat16]
    wide = [torch.randn(tokens, dim + offset).to(dtype) for dtype in dtypes]
    for count in range(1, 5):
        terms = [term[:, offset:] for term in wide[:count]]
        on_gpu = [term.cuda()[:, offset:] for term in wide[:count]]
        seed = int(torch.randint(2**62, ()).item())
        expected = stochastic_add(terms, seed_of(seed, count, "cpu"), site=77)
        assert stochastic_add(on_gpu, seed_of(seed, count), site=77).cpu().equal(expected)


def test_special_values() -> None:
    values = torch.tensor(
        [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-39, -1e-45, 3.4e38] * 8
    ).reshape(2, 32)
    ours = stochastic_add([values.cuda()], seed_of(1, 0)).cpu().view(torch.int16)
    theirs = stochastic_add([values], seed_of(1, 0, "cpu")).view(torch.int16)
    number = ~values.isnan()  # which bits a NaN has is the machine's affair
    assert torch.equal(ours[number], theirs[number])
    assert ours.view(torch.bfloat16)[~number].isnan().all()


def test_over_the_memory_of_a_term() -> None:
    total = torch.randn(300, 2048, device="cuda").bfloat16()
    update = torch.randn(300, 2048, device="cuda")
    expected = stochastic_add([total, update], seed_of(4, 1), site=2)
    OP_INTO([total, update], seed_of(4, 1), 2, total)
    assert total.equal(expected)


def test_a_captured_graph_reads_the_step() -> None:
    value = torch.randn(64, 512, device="cuda")
    seed = seed_of(8, 0)
    out = torch.empty(64, 512, dtype=torch.bfloat16, device="cuda")
    OP_INTO([value], seed, 5, out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        OP_INTO([value], seed, 5, out)
        seed[1] += 1
    for step in range(3):
        out.fill_(float("nan"))
        graph.replay()
        assert out.cpu().equal(stochastic_add([value.cpu()], seed_of(8, step, "cpu"), site=5))


def test_seed_on_another_device() -> None:
    with pytest.raises(ValueError, match="seed is on cpu but terms"):
        stochastic_add([torch.zeros(2, 8, device="cuda")], seed_of(1, 0, "cpu"))


@pytest.mark.parametrize("grad_dtype", [torch.float32, None])
def test_stream_is_reproducible(grad_dtype: torch.dtype | None) -> None:
    attn_res = BlockAttnRes(12, 256, 4, grad_dtype=grad_dtype, stochastic_rounding=3, device="cuda")
    torch.nn.init.normal_(attn_res.queries, std=0.1)
    assert attn_res.rounding_seed is not None
    weights = [(torch.randn(256, 256, device="cuda") / 16).bfloat16() for _ in range(12)]
    given = torch.randn(500, 256, device="cuda").bfloat16()

    def step(number: int) -> tuple[Tensor, Tensor]:
        assert attn_res.rounding_seed is not None
        attn_res.rounding_seed[1] = number
        embedding = given.clone().requires_grad_()
        stream = attn_res.start(embedding)
        for weight in weights:
            stream.write(torch.tanh(stream.read() @ weight))
        y = stream.finish()
        y.float().square().sum().backward()
        assert embedding.grad is not None
        assert embedding.grad.isfinite().all()
        return y.detach(), embedding.grad

    y, gradient = step(1)
    again, same = step(1)
    assert again.equal(y)
    assert same.equal(gradient)
    assert not step(2)[0].equal(y)
