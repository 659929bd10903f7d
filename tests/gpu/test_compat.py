"""Training drop-ins on the GPU: results and gradients are those of the CPU.

The tests of the CPU hold those against each package's formula. The sites of vLLM and FlashInfer are
in test_inference.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flash_attn_res.compat import fla, flashinfer, liger, seed, vllm

BF16 = torch.bfloat16
DTYPES = [torch.float32, torch.float16, BF16]


def leaf(*shape: int, dtype: torch.dtype = torch.float32, factor: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * factor).to(dtype).requires_grad_()


def relative(ours: Tensor, theirs: Tensor) -> float:
    assert ours.isfinite().all()
    difference = ours.detach().cpu().double() - theirs.detach().double()
    return (difference.norm() / theirs.detach().double().norm().clamp_min(1e-30)).item()


def check(
    call: Callable[..., Any], inputs: dict[str, Tensor | list[Tensor]], bound: float | None = None
) -> None:
    """Outputs and gradients of all leaves on both devices: alike, but for their last rounding."""
    results: list[dict[str, Tensor]] = []
    factors: list[Tensor] = []
    for device in ("cuda", "cpu"):

        def there(tensor: Tensor, device: str = device) -> Tensor:
            return tensor.detach().to(device).requires_grad_(tensor.requires_grad)

        given = {
            name: [there(item) for item in value] if isinstance(value, list) else there(value)
            for name, value in inputs.items()
        }
        out = call(**given)
        outputs = list(out) if isinstance(out, tuple) else [out]
        if not factors:
            factors = [torch.randn(output.shape) for output in outputs]
        loss = torch.stack(
            [
                (output.float() * factor.to(device)).sum()
                for output, factor in zip(outputs, factors, strict=True)
                if output.requires_grad
            ]
        ).sum()
        leaves = {
            f"d{name}[{index}]": item
            for name, value in given.items()
            for index, item in enumerate(value if isinstance(value, list) else [value])
            if item.requires_grad
        }
        grads = torch.autograd.grad(loss, list(leaves.values()))
        found = {f"output {index}": output for index, output in enumerate(outputs)}
        results.append(found | dict(zip(leaves, grads, strict=True)))
    for name, ours in results[0].items():
        theirs = results[1][name]
        assert ours.dtype == theirs.dtype
        assert ours.is_cuda
        # A value on the edge between two numbers may be rounded to either one.
        allowed = bound or (1e-4 if ours.dtype == torch.float32 else torch.finfo(ours.dtype).eps)
        assert relative(ours, theirs) <= allowed, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("L", "D"), [(3, 100), (9, 2304), (40, 264)])
def test_fla(L: int, D: int, normed: bool, dtype: torch.dtype) -> None:
    def call(
        query: Tensor, residuals: list[Tensor], weight: Tensor, output_weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        norm = output_weight if normed else None
        o, p = fla.fused_attnres(query, residuals, weight, norm, scale=0.5, return_weights=True)
        assert not p.requires_grad
        return o, p

    inputs: dict[str, Tensor | list[Tensor]] = {
        "query": leaf(D, 1, dtype=dtype, factor=D**-0.5),
        "residuals": [leaf(2, 65, D, dtype=dtype) for _ in range(L)],
        "weight": leaf(D, dtype=dtype),
        "output_weight": leaf(D, dtype=dtype) if normed else torch.ones(D),
    }
    check(call, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", ["function", "class", "list"])
@pytest.mark.parametrize(("N", "D"), [(4, 100), (8, 2048), (37, 264)])
def test_liger(N: int, D: int, call: str, dtype: torch.dtype) -> None:
    calls = {
        "function": liger.liger_attn_res,
        "class": lambda V, w_query, w_norm: liger.LigerAttnResFunction.apply(
            V, w_query, w_norm, 1e-6
        ),
        "list": lambda V, w_query, w_norm: liger.liger_attn_res(list(V), w_query, w_norm),
    }
    inputs: dict[str, Tensor | list[Tensor]] = {
        "V": leaf(N, 2, 33, D, dtype=dtype),
        "w_query": leaf(D, dtype=dtype, factor=D**-0.5),
        "w_norm": leaf(D, dtype=dtype),
    }
    check(calls[call], inputs)


def test_liger_module() -> None:
    D = 512
    module = liger.LigerAttnRes(D)
    V, factor = torch.randn(5, 2, 33, D), torch.randn(2, 33, D)
    results = []
    for device in ("cuda", "cpu"):
        at = liger.LigerAttnRes(D).to(device)
        at.load_state_dict(module.state_dict())
        out = at(V.to(device))
        (out * factor.to(device)).sum().backward()
        results.append([out, *(p.grad for p in at.parameters() if p.grad is not None)])
    assert len(results[0]) == 3
    for ours, theirs in zip(*results, strict=True):
        assert relative(ours, theirs) <= 1e-4


@pytest.mark.parametrize("shape", [(1, 1, 3, 8), (4, 8, 130, 2048), (10, 6, 65, 2304)])
def test_seed_operators(shape: tuple[int, int, int, int]) -> None:
    S, Q, T, D = shape
    eps = torch.finfo(torch.float32).eps

    def phase_1(blocks: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        return seed.phase_1_batched_attention_triton_op(blocks, queries, eps)

    def phase_2(total: Tensor, query: Tensor, out: Tensor, lse: Tensor) -> Tensor:
        return seed.phase_2_online_softmax_merge_triton_op(total, query, out, lse, eps)

    # Gradients of phase 1 pass the tensor cores with 11 bits.
    queries = leaf(Q, D, dtype=BF16, factor=D**-0.5)
    check(phase_1, {"blocks": leaf(S, 1, T, D, dtype=BF16), "queries": queries}, bound=2.0**-7)
    inputs: dict[str, Tensor | list[Tensor]] = {
        "total": leaf(1, T, D, dtype=BF16),
        "query": leaf(D, dtype=BF16, factor=D**-0.5),
        "out": leaf(1, T, D, dtype=BF16),
        "lse": leaf(1, T),
    }
    check(phase_2, inputs, bound=2.0**-7)


class Layer(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x.to(self.linear.weight.dtype)))


@pytest.mark.parametrize(("L", "size"), [(5, 2), (6, 8)])
def test_seed_autograd_class(L: int, size: int) -> None:
    D, eps = 256, 1e-6
    layers = nn.ModuleList(Layer(D) for _ in range(L))
    inputs, queries, factor = leaf(2, 65, D), leaf(L + 1, D, factor=D**-0.5), torch.randn(2, 65, D)
    torch.backends.cuda.matmul.allow_tf32 = False
    results = []
    for device in ("cuda", "cpu"):
        at = nn.ModuleList(Layer(D) for _ in range(L)).to(device)
        at.load_state_dict(layers.state_dict())
        params = list(at.parameters())
        x, q = (t.detach().to(device).requires_grad_() for t in (inputs, queries))
        out = seed.BlockAttentionResiduals.apply(x, q, list(at), size, eps, *params)
        grads = torch.autograd.grad((out * factor.to(device)).sum(), [x, q, *params])
        results.append([out, *grads])
    for ours, theirs in zip(*results, strict=True):
        # Phase 1 rounds to bfloat16, on either device to either neighbour.
        assert relative(ours, theirs) <= 0.03


@pytest.mark.parametrize("package", ["vllm", "flashinfer"])
def test_kimi_k3_site_compiles_in_full(package: str) -> None:
    torch.compiler.reset()
    T, NB, D = 5, 8, 7168
    weights = [torch.randn(D, device="cuda").to(BF16) for _ in range(3)]
    weights[1] /= D**0.5

    def run(prefix: Tensor, delta: Tensor, blocks: Tensor) -> Tensor:
        if package == "vllm":
            return vllm.attn_res(prefix, delta, blocks, *weights, 4, 5, 1e-5, 1e-5)
        out = torch.empty_like(prefix)
        options = {"num_blocks": 4, "block_write_idx": 5}
        return flashinfer.kimi_k3_attn_res(prefix, delta, blocks, *weights, out, **options)

    given = [torch.randn(*s, device="cuda").to(BF16) for s in ((T, D), (T, D), (T, NB, D))]
    ours = [tensor.clone() for tensor in given]
    with torch.no_grad():
        want = run(given[0], given[1], given[2])
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        got = compiled(ours[0], ours[1], ours[2])
    for result, wanted in zip((got, *ours), (want, *given), strict=True):
        assert torch.equal(result, wanted)
