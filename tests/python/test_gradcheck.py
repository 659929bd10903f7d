"""gradcheck in float64: the operators' autograd formulas through the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from flash_attn_res import attend, read


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(("num_sources", "key_dim"), [(1, 6), (3, 6), (3, 2)])
def test_attend(num_sources: int, key_dim: int) -> None:
    def function(queries: Tensor, weight: Tensor, *sources: Tensor) -> tuple[Tensor, Tensor]:
        return attend(list(sources), queries, weight, scale=0.8, eps=1e-3)[:2]

    sources = [random(2, 2, 6) for _ in range(num_sources)]
    assert gradcheck(function, (random(3, key_dim), random(3, key_dim), *sources))


def test_attend_on_a_packed_bank() -> None:
    assert gradcheck(lambda q, v: attend(v, q)[:2], (random(2, 5), random(3, 4, 5)))


CASES = {
    "one-shot": {"sources": 3},
    "one-shot with norm": {"sources": 3, "norm": True},
    "merge": {"phase1": True, "partial": True},
    "advance": {"phase1": True, "partial": True, "updates": 1, "norm": True},
    "two addends": {"phase1": True, "partial": True, "updates": 2, "norm": True},
    "Kimi K3 site": {"sources": 2, "partial": True, "updates": 1, "norm": True},
    "first output of a block": {"sources": 2, "updates": 1, "norm": True},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_read(case: dict) -> None:
    tensors = {"query": random(6), "key_weight": random(6)}
    tensors |= {f"source{n}": random(3, 6) for n in range(case.get("sources", 0))}
    if case.get("phase1"):
        tensors |= {"out": random(3, 6), "lse": random(3)}
    if case.get("partial"):
        tensors["partial"] = random(3, 6)
    tensors |= {f"update{i}": random(3, 6) for i in range(case.get("updates", 0))}
    if case.get("norm"):
        tensors["norm_weight"] = random(6)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(tensors, values, strict=True))
        result = read(
            named["query"],
            named["key_weight"],
            phase1=(named["out"], named["lse"]) if "out" in named else None,
            sources=[v for name, v in named.items() if name.startswith("source")],
            partial=named.get("partial"),
            update=[v for name, v in named.items() if name.startswith("update")],
            norm_weight=named.get("norm_weight"),
            eps=1e-3,
            norm_eps=1e-2,
            return_mix=True,
        )
        outputs = [result.x, result.mix]
        return (*outputs, result.partial) if case.get("updates") else tuple(outputs)

    assert gradcheck(function, tuple(tensors.values()))


def test_second_derivatives_are_refused_clearly() -> None:
    queries = random(2, 4)
    out = attend([random(3, 4), random(3, 4)], queries).out
    (grad,) = torch.autograd.grad(out.square().sum(), queries, create_graph=True)
    with pytest.raises(RuntimeError, match="attend_backward has no second derivative"):
        grad.sum().backward()
