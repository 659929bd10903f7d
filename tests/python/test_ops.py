"""The operators against the double-precision reference over random shapes, forward and backward."""

from __future__ import annotations

import dataclasses
import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import eager
from flash_attn_res import ReadResult, attend, read

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SUMMED = {"query", "queries", "key weight", "norm weight"}
WIDTHS = [1, 2, 7, 16, 31, 64, 65, 100, 128, 257]


def make(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    """A random tensor [..., D] in one of the layouts that users bring."""
    *lead, dim = shape
    if layout == "contiguous":
        tensor = torch.randn(shape)
    elif layout == "strided":  # rows with a gap between them
        tensor = torch.randn(*lead, dim + 5)[..., 3 : 3 + dim]
    elif layout == "transposed":  # the last dimension is not the dense one
        tensor = torch.randn(dim, *reversed(lead)).permute(*reversed(range(len(shape))))
    else:  # expanded over tokens
        tensor = torch.randn(*([1] * len(lead)), dim).expand(shape)
    # Converting keeps the strides of a dense tensor; a slice keeps its gap.
    return (
        tensor.to(dtype)
        if layout != "strided"
        else torch.empty(*lead, dim + 5, dtype=dtype).copy_(
            torch.nn.functional.pad(tensor, (3, 2))
        )[..., 3 : 3 + dim]
    )


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def exact(tensor: Tensor) -> Tensor:
    return tensor.detach().double().requires_grad_()


@dataclasses.dataclass
class Run:
    """One computation: its leaves, its outputs and, after ``backward``, the leaves' gradients."""

    leaves: dict[str, Tensor]
    outputs: dict[str, Tensor]

    def backward(self, cotangents: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs = {k: v for k, v in self.outputs.items() if v.requires_grad}
        grads = torch.autograd.grad(
            list(outputs.values()),
            list(self.leaves.values()),
            [cotangents[name].to(v.dtype) for name, v in outputs.items()],
            allow_unused=True,
        )
        return {
            name: torch.zeros_like(leaf) if grad is None else grad
            for (name, leaf), grad in zip(self.leaves.items(), grads, strict=True)
        }


def compare(ours: Run, reference: Run, plain: Run) -> None:
    for name, output in ours.outputs.items():
        eager.assert_close_enough(
            name,
            output.detach(),
            reference.outputs[name].detach(),
            plain.outputs[name].detach(),
            # The largest logit plus the log of a sum of up to 9 terms: they may cancel.
            magnitude=math.log(9) if name == "lse" else 0.0,
        )
    cotangents = {name: torch.randn(out.shape).to(out.dtype) for name, out in ours.outputs.items()}
    grads = ours.backward(cotangents)
    reference_grads = reference.backward(cotangents)
    plain_grads = plain.backward(cotangents)
    terms = [t for t in (*reference_grads.values(), *cotangents.values()) if t.numel()]
    magnitude = max((t.abs().max().item() for t in terms), default=0.0)
    magnitude *= max(1.0, largest_key_slope(ours.leaves))
    some_output = next(iter(ours.outputs.values()))
    width = some_output.shape[-1]
    tokens = some_output.numel() / some_output.shape[-1]
    for name, grad in grads.items():
        assert grad.dtype == ours.leaves[name].dtype
        eager.assert_close_enough(
            f"gradient of {name}",
            grad,
            reference_grads[name],
            plain_grads[name],
            # Gradients of parameters are sums over tokens of sums over the width, and their errors
            # add like a random walk.
            magnitude=magnitude * ((tokens * width) ** 0.5 if name in SUMMED else 1),
        )


def largest_key_slope(leaves: dict[str, Tensor]) -> float:
    """Largest |u| / rms(v): what a logit's gradient is multiplied by on its way to a value.

    For narrow keys the two terms of that gradient, scale r u and l r^2 k / R, cancel (for one
    coordinate entirely), so that their size and not the result's says what float32 can resolve.
    """
    values = [t for name, t in leaves.items() if name not in SUMMED and t.dim() > 1 and t.numel()]
    queries = [t for name, t in leaves.items() if name in ("query", "queries")]
    smallest = min((t.double().square().mean(-1).min().item() for t in values), default=1.0)
    largest = max((t.abs().max().item() for t in queries), default=0.0)
    return largest * (smallest + 1e-6) ** -0.5


layouts = st.sampled_from(["contiguous", "strided", "transposed", "expanded"])
leads = st.sampled_from([(1,), (5,), (17,), (2, 3), (3, 1, 4), (67,), (129,)])


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    seed=st.integers(0, 2**20),
    dtype=st.sampled_from(DTYPES),
    lead=leads,
    dim=st.sampled_from(WIDTHS),
    num_sources=st.sampled_from([1, 2, 3, 5, 8, 9]),
    num_queries=st.sampled_from([1, 2, 3, 8, 9]),
    layout=layouts,
    packed=st.booleans(),
    sliced=st.booleans(),
    scale=st.sampled_from([1.0, 0.25, -2.0]),
    eps=st.sampled_from([1e-6, 1e-2]),
)
def test_attend(
    seed: int,
    dtype: torch.dtype,
    lead: tuple[int, ...],
    dim: int,
    num_sources: int,
    num_queries: int,
    layout: str,
    packed: bool,
    sliced: bool,
    scale: float,
    eps: float,
) -> None:
    torch.manual_seed(seed)
    width = (dim + 1) // 2 if sliced else dim
    queries = torch.randn(num_queries, width) / width**0.5
    weight = 1 + 0.1 * torch.randn(num_queries, width)
    if packed:
        bank = make((num_sources, *lead, dim), dtype, layout)
        values = {"bank": bank}
    else:
        values = {f"source {n}": make((*lead, dim), dtype, layout) for n in range(num_sources)}

    def ours() -> Run:
        leaves = {name: leaf(v) for name, v in values.items()}
        leaves |= {"queries": leaf(queries), "key weight": leaf(weight)}
        given = leaves["bank"] if packed else [leaves[name] for name in values]
        result = attend(given, leaves["queries"], leaves["key weight"], scale=scale, eps=eps)
        return Run(leaves, {"out": result.out, "lse": result.lse})

    def reference() -> Run:
        leaves = {name: exact(v) for name, v in values.items()}
        leaves |= {"queries": exact(queries), "key weight": exact(weight)}
        given = leaves["bank"] if packed else [leaves[name] for name in values]
        result = attend(given, leaves["queries"], leaves["key weight"], scale=scale, eps=eps)
        return Run(leaves, {"out": result.out, "lse": result.lse})

    def plain() -> Run:
        leaves = {name: leaf(v) for name, v in values.items()}
        leaves |= {"queries": leaf(queries), "key weight": leaf(weight)}
        given = list(leaves["bank"]) if packed else [leaves[name] for name in values]
        folded = leaves["queries"] * leaves["key weight"]
        out, lse = eager.attend(given, folded, scale, eps)
        return Run(leaves, {"out": out, "lse": lse.float()})

    compare(ours(), reference(), plain())


@hypothesis.settings(max_examples=120)
@hypothesis.given(
    seed=st.integers(0, 2**20),
    dtype=st.sampled_from(DTYPES),
    sum_dtype=st.sampled_from([None, torch.float32]),
    lead=leads,
    dim=st.sampled_from(WIDTHS),
    phase1=st.booleans(),
    num_sources=st.sampled_from([0, 1, 2, 4, 9]),
    partial=st.booleans(),
    num_updates=st.sampled_from([0, 1, 2]),
    norm=st.sampled_from(["none", "plain", "weight", "low-precision weight"]),
    return_mix=st.booleans(),
    layout=layouts,
    sliced=st.booleans(),
    scale=st.sampled_from([1.0, 0.25]),
)
def test_read(
    seed: int,
    dtype: torch.dtype,
    sum_dtype: torch.dtype | None,
    lead: tuple[int, ...],
    dim: int,
    phase1: bool,
    num_sources: int,
    partial: bool,
    num_updates: int,
    norm: str,
    return_mix: bool,
    layout: str,
    sliced: bool,
    scale: float,
) -> None:
    hypothesis.assume(phase1 or num_sources or partial or num_updates)
    torch.manual_seed(seed)
    width = (dim + 1) // 2 if sliced else dim
    values: dict[str, Tensor] = {"query": torch.randn(width) / width**0.5}
    if phase1:
        values |= {"phase1 out": make((*lead, dim), dtype, layout), "phase1 lse": torch.randn(lead)}
    values |= {f"source {n}": make((*lead, dim), dtype, layout) for n in range(num_sources)}
    if partial:
        values["partial"] = make((*lead, dim), sum_dtype or dtype, layout)
    values |= {f"update {i}": make((*lead, dim), dtype, layout) for i in range(num_updates)}
    if norm in ("weight", "low-precision weight"):
        values["norm weight"] = 1 + 0.1 * torch.randn(dim)
        if norm == "low-precision weight":
            values["norm weight"] = values["norm weight"].to(dtype)

    def arguments(leaves: dict[str, Tensor]) -> dict:
        return {
            "phase1": (leaves["phase1 out"], leaves["phase1 lse"]) if phase1 else None,
            "sources": [leaves[f"source {n}"] for n in range(num_sources)],
            "partial": leaves.get("partial"),
            "scale": scale,
            "eps": 1e-4,
            "norm": norm != "none",
            "norm_weight": leaves.get("norm weight"),
            "norm_eps": 1e-3,
        }

    def outputs_of(result, total: Tensor | None) -> dict[str, Tensor]:
        outputs = {"x": result.x}
        if num_updates:
            outputs["partial"] = total
        if return_mix:
            outputs["mix"] = result.mix
        return outputs

    def ours() -> Run:
        leaves = {name: leaf(v) for name, v in values.items()}
        updates = [leaves[f"update {i}"] for i in range(num_updates)]
        result = read(leaves["query"], update=updates, return_mix=return_mix, **arguments(leaves))
        return Run(leaves, outputs_of(result, result.partial))

    def reference(total: Tensor | None) -> Run:
        """The reference starts from the rounded sum, as the definition of read says."""
        leaves = {name: exact(v) for name, v in values.items()}
        if total is not None:
            total = exact(total)
            addends = [name for name in leaves if name == "partial" or name.startswith("update")]
            leaves |= dict.fromkeys(addends, total)
            leaves.setdefault("partial", total)
        result = read(leaves["query"], return_mix=return_mix, **arguments(leaves))
        leaves = {name: leaves[name] for name in values}
        return Run(leaves, outputs_of(result, total))

    def plain() -> Run:
        leaves = {name: leaf(v) for name, v in values.items()}
        updates = [leaves[f"update {i}"] for i in range(num_updates)]
        x, total, mix = eager.read(leaves["query"], updates=updates, **arguments(leaves))
        return Run(leaves, outputs_of(ReadResult(x, total, mix, None), total))

    run, plain_run = ours(), plain()
    total = run.outputs.get("partial")
    if total is not None:
        addends = [v for name, v in values.items() if name == "partial" or name[:6] == "update"]
        exact_total = torch.stack([v.double() for v in addends]).sum(0)
        eager.assert_close_enough(
            "partial", total.detach(), exact_total, plain_run.outputs["partial"].detach(), ulps=0.5
        )
    compare(run, reference(None if total is None else total.detach()), plain_run)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_tokens(dtype: torch.dtype) -> None:
    sources = [torch.randn(0, 8, dtype=dtype, requires_grad=True) for _ in range(3)]
    queries = torch.randn(2, 8, requires_grad=True)
    result = attend(sources, queries, return_probs=True)
    assert result.out.shape == (2, 0, 8)
    assert result.lse.shape == (2, 0)
    assert result.probs.shape == (0, 2, 3)
    weight = torch.ones(8, requires_grad=True)
    site = read(queries[0], sources=sources, partial=sources[0], norm_weight=weight)
    assert site.x.shape == (0, 8)
    (result.out.sum() + site.x.sum()).backward()
    assert torch.equal(queries.grad, torch.zeros_like(queries))
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert sources[0].grad.shape == (0, 8)


def test_probabilities_sum_to_one_and_reproduce_the_mixture() -> None:
    sources = [torch.randn(4, 3, 16) for _ in range(5)]
    queries = torch.randn(2, 16)
    result = attend(sources, queries, return_probs=True)
    assert result.probs.shape == (4, 3, 2, 5)
    torch.testing.assert_close(result.probs.sum(-1), torch.ones(4, 3, 2))
    mixture = torch.einsum("btsn,nbtd->sbtd", result.probs, torch.stack(sources))
    torch.testing.assert_close(result.out, mixture)
    partial = torch.randn(4, 3, 16)
    site = read(
        queries[1], phase1=(result.out[1], result.lse[1]), partial=partial, return_probs=True
    )
    direct = read(queries[1], sources=sources, partial=partial, return_probs=True)
    torch.testing.assert_close(site.x, direct.x)
    torch.testing.assert_close(site.probs[..., 1], direct.probs[..., -1])


def test_packed_and_listed_sources_agree_bit_for_bit() -> None:
    bank = torch.randn(6, 5, 3, 24, dtype=torch.bfloat16)  # (T,B,N,D), token-major
    queries = torch.randn(4, 24)
    packed = attend(bank.movedim(-2, 0), queries)
    listed = attend([bank[:, :, n] for n in range(3)], queries)
    assert torch.equal(packed.out, listed.out)
    assert torch.equal(packed.lse, listed.lse)


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_mix_rounds_what_the_norm_sees(dtype: torch.dtype) -> None:
    sources = [torch.randn(9, 33, dtype=dtype) for _ in range(3)]
    query = torch.randn(33)
    result = read(query, sources=sources, norm=True, round_mix=True, return_mix=True)
    mix = result.mix.double()
    expected = mix * torch.rsqrt(mix.square().mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(
        result.x.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6
    )


def test_nan_and_inf_come_out_as_ieee_says() -> None:
    sources = [torch.ones(4, 8), torch.ones(4, 8)]
    sources[0][1, 2] = float("nan")
    sources[1][2, 3] = float("inf")
    out = attend(sources, torch.ones(1, 8)).out[0]
    assert out[1].isnan().all()
    assert not out[2].isfinite().all()
    assert out[[0, 3]].isfinite().all()
    x = read(torch.ones(8), sources=sources, norm=True).x
    assert x[1].isnan().all()
    assert x[[0, 3]].isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_reach_the_gradients(bad: float) -> None:
    """Of their own token, and of the parameters, which sum over the tokens."""
    sources = [torch.randn(4, 8) for _ in range(2)]
    sources[0][1, 2] = bad
    sources = [leaf(v) for v in sources]
    queries, weight = leaf(torch.ones(2, 8)), leaf(torch.ones(8))
    out = attend(sources, queries).out
    x = read(queries[0], sources=sources, norm_weight=weight).x
    for total, parameters in ((out.sum(), [queries]), (x.sum(), [queries, weight])):
        *values, _ = grads = torch.autograd.grad(total, [*sources, *parameters], retain_graph=True)
        for grad in values[:2]:
            assert not grad[1].isfinite().any()
            assert grad[[0, 2, 3]].isfinite().all()
        for grad in grads[2:]:
            assert grad.isnan().any()


def test_one_term_takes_no_query_and_has_probability_one() -> None:
    value = torch.randn(5, 12, dtype=torch.bfloat16)
    assert torch.equal(read(sources=[value]).x, value)
    query = torch.randn(12, requires_grad=True)
    (read(query, sources=[value]).x * torch.randn(5, 12)).sum().backward()
    assert torch.equal(query.grad, torch.zeros(12))


def test_gradients_reach_any_subset_of_the_inputs() -> None:
    def run(trainable: set[str]) -> dict[str, Tensor | None]:
        torch.manual_seed(3)
        inputs = {name: torch.randn(6, 10) for name in ("a", "b", "partial", "update")}
        inputs |= {name: torch.randn(10) for name in ("query", "weight")}
        for name in trainable:
            inputs[name].requires_grad_()
        x = read(
            inputs["query"],
            sources=[inputs["a"], inputs["b"]],
            partial=inputs["partial"],
            update=inputs["update"],
            norm_weight=inputs["weight"],
        ).x
        if trainable:
            (x * torch.randn(6, 10)).sum().backward()
        else:
            assert not x.requires_grad
        return {name: tensor.grad for name, tensor in inputs.items()}

    everything = run({"a", "b", "partial", "update", "query", "weight"})
    for subset in [{"a"}, {"query"}, {"weight", "b"}, {"update"}, {"partial", "query"}, set()]:
        grads = run(subset)
        for name, grad in grads.items():
            if name in subset:
                assert torch.equal(grad, everything[name]), (subset, name)
            else:
                assert grad is None


@pytest.mark.parametrize("subset", [{"a"}, {"queries"}, {"weight"}, {"b", "weight"}, set()])
def test_phase1_gradients_reach_any_subset_of_the_inputs(subset: set[str]) -> None:
    values = {name: torch.randn(6, 10) for name in ("a", "b")}
    values |= {name: torch.randn(3, 10) for name in ("queries", "weight")}
    cotangents = torch.randn(3, 6, 10), torch.randn(3, 6)

    def run(trainable: set[str]) -> dict[str, Tensor | None]:
        inputs = {k: v.detach().clone().requires_grad_(k in trainable) for k, v in values.items()}
        sources = [inputs["a"], inputs["b"]]
        result = attend(sources, inputs["queries"], inputs["weight"])
        if trainable:
            torch.autograd.backward([result.out, result.lse], cotangents)
        else:
            assert not result.out.requires_grad
            assert not result.lse.requires_grad
        return {name: tensor.grad for name, tensor in inputs.items()}

    everything = run(set(values))
    for name, grad in run(subset).items():
        if name in subset:
            assert torch.equal(grad, everything[name]), name
        else:
            assert grad is None


def test_same_bits_whatever_the_number_of_threads() -> None:
    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        torch.manual_seed(5)
        sources = [torch.randn(301, 96, requires_grad=True) for _ in range(4)]
        queries = torch.randn(3, 96, requires_grad=True)
        weight = torch.ones(96, requires_grad=True)
        out, lse, _ = attend(sources, queries)
        x = read(queries[0], sources=sources, norm_weight=weight).x
        (out.sum() + lse.sum() + (x * torch.randn(301, 96)).sum()).backward()
        return [out, lse, x, queries.grad, weight.grad, *(s.grad for s in sources)]

    held = torch.get_num_threads()
    try:
        for one, many in zip(run(1), run(4), strict=True):
            assert torch.equal(one, many)
    finally:
        torch.set_num_threads(held)


def test_a_token_does_not_depend_on_the_others() -> None:
    sources = [torch.randn(257, 100, dtype=torch.bfloat16) for _ in range(5)]
    queries = torch.randn(8, 100)
    whole = attend(sources, queries)
    for size in (1, 7, 128):
        part = attend([s[:size] for s in sources], queries)
        assert torch.equal(part.out, whole.out[:, :size])
        assert torch.equal(part.lse, whole.lse[:, :size])


def test_inputs_are_left_as_they_were() -> None:
    tensors = [torch.randn(7, 12) for _ in range(4)]
    held = [t.clone() for t in tensors]
    a, b, partial, update = tensors
    read(torch.randn(12), sources=[a, b], partial=partial, update=update, norm=True)
    for now, before in zip(tensors, held, strict=True):
        assert torch.equal(now, before)


def test_inference_mode() -> None:
    def run() -> list[Tensor]:
        first = attend(sources, queries)
        phase1 = (first.out[0], first.lse[0])
        site = read(queries[1], phase1=phase1, partial=partial, update=partial, norm=True)
        return [first.out, first.lse, site.x, site.partial]

    sources, queries = [torch.randn(3, 8) for _ in range(2)], torch.randn(2, 8)
    partial = torch.randn(3, 8, requires_grad=True)
    expected = run()
    with torch.inference_mode():
        results = run()
    for result, other in zip(results, expected, strict=True):
        assert result.is_inference()
        assert torch.equal(result, other)


def test_autocast_takes_mixed_dtypes() -> None:
    partial = torch.randn(5, 16, requires_grad=True)
    linear = torch.nn.Linear(16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        update = linear(partial)
        assert update.dtype == torch.bfloat16
        result = read(torch.zeros(16), sources=[partial], partial=partial, update=update, norm=True)
    assert result.x.dtype == result.partial.dtype == torch.float32
    torch.testing.assert_close(result.partial, partial + update)
    result.x.sum().backward()
    assert partial.grad is not None
    assert linear.weight.grad.dtype == torch.float32
