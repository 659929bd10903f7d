"""Each package's dialect, against an eager transcription of its formula, forward and backward."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eager
from flash_attn_res import compat
from flash_attn_res.compat import fla, flashinfer, liger, seed, vllm

BF16 = torch.bfloat16
# Gradients that are sums over tokens.
SUMMED = ("pseudo_quer", "query", "rms_weight", "output_rms_weight", "w_query", "w_norm")


def leaf(*shape: int, dtype: torch.dtype = torch.float32, factor: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * factor).to(dtype).requires_grad_()


def check(
    ours: Callable[..., Any],
    dialect: Callable[..., Any],
    inputs: dict[str, Any],
    names: tuple[str, ...],
) -> None:
    """Outputs and all gradients: ours, the dialect in double precision, and in the same dtype."""

    def convert(value: Any, double: bool) -> Any:
        if isinstance(value, list):
            return [convert(item, double) for item in value]
        if not isinstance(value, Tensor):
            return value
        copy = value.detach().clone()
        return (copy.double() if double else copy).requires_grad_(value.requires_grad)

    def leaves(values: dict[str, Any]) -> dict[str, Tensor]:
        flat: dict[str, Tensor] = {}
        for name, value in values.items():
            items = value if isinstance(value, list) else [value]
            for index, item in enumerate(items):
                if isinstance(item, Tensor) and item.requires_grad:
                    flat[f"d{name}[{index}]"] = item
        return flat

    results: list[dict[str, Tensor]] = []
    factors: dict[str, Tensor] = {}
    for function, double in ((ours, False), (dialect, True), (dialect, False)):
        values = {name: convert(value, double) for name, value in inputs.items()}
        out = function(**values)
        outputs = dict(zip(names, out if isinstance(out, tuple) else (out,), strict=True))
        for name, tensor in outputs.items():
            factors.setdefault(name, torch.randn(tensor.shape))
        loss = sum(
            (tensor.double() * factors[name]).sum()
            for name, tensor in outputs.items()
            if tensor.requires_grad
        )
        assert isinstance(loss, Tensor)
        loss.backward()
        grads = {}
        for name, tensor in leaves(values).items():
            assert tensor.grad is not None, name
            assert double or tensor.grad.dtype == tensor.dtype
            grads[name] = tensor.grad
        results.append({**{k: t.detach() for k, t in outputs.items()}, **grads})
    got, exact, plain = results
    # Their errors add like a random walk, as in test_ops.compare.
    given = (*exact.values(), *factors.values())
    magnitude = max(tensor.abs().max().item() for tensor in given)
    count = max(tensor.numel() for tensor in factors.values())
    for name in got:
        summed = name.removeprefix("d").startswith(SUMMED)
        eager.assert_close_enough(
            name,
            got[name],
            exact[name].double(),
            plain[name],
            magnitude=magnitude * count**0.5 if summed else 0.0,
        )


# -------------------------------------------------------------------------------------------- seed


def seed_phase_1(
    block_representations: Tensor, pseudo_queries: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    v = block_representations
    logits = torch.einsum("qd,sbtd->qbts", pseudo_queries, eager.rms_norm(v, eps))
    p = logits.softmax(-1)
    return torch.einsum("qbts,sbtd->qbtd", p, v), logits.logsumexp(-1)


def seed_phase_2(
    intrablock_partial_sum: Tensor,
    pseudo_query: Tensor,
    interblock_normalized_output: Tensor,
    interblock_lse: Tensor,
    eps: float,
) -> Tensor:
    logit = eager.rms_norm(intrablock_partial_sum, eps) @ pseudo_query
    q = torch.sigmoid(logit - interblock_lse)[..., None].to(interblock_normalized_output.dtype)
    return interblock_normalized_output + q * (
        intrablock_partial_sum - interblock_normalized_output
    )


@pytest.mark.parametrize("shape", [(1, 1, 1, 3, 8), (3, 4, 2, 5, 48), (8, 2, 1, 7, 96)])
def test_seed_operators(shape: tuple[int, int, int, int, int]) -> None:
    S, Q, B, T, D = shape
    eps = torch.finfo(torch.float32).eps
    inputs = {
        "block_representations": leaf(S, B, T, D, dtype=BF16),
        "pseudo_queries": leaf(Q, D, dtype=BF16, factor=D**-0.5),
        "eps": eps,
    }
    check(seed.phase_1_batched_attention_triton_op, seed_phase_1, inputs, ("out", "lse"))
    inputs = {
        "intrablock_partial_sum": leaf(B, T, D, dtype=BF16),
        "pseudo_query": leaf(D, dtype=BF16, factor=D**-0.5),
        "interblock_normalized_output": leaf(B, T, D, dtype=BF16),
        "interblock_lse": torch.randn(B, T).requires_grad_(),
        "eps": eps,
    }
    check(seed.phase_2_online_softmax_merge_triton_op, seed_phase_2, inputs, ("merged",))


def test_seed_dtypes() -> None:
    """Phase 1 gives bfloat16 whatever came in; phase 2 the dtype of phase 1's output."""
    out, lse = seed.phase_1_batched_attention_triton_op(
        torch.randn(2, 1, 3, 8), torch.randn(2, 8), 1e-6
    )
    assert (out.dtype, lse.dtype) == (BF16, torch.float32)
    assert (out.shape, lse.shape) == ((2, 1, 3, 8), (2, 1, 3))
    merged = seed.phase_2_online_softmax_merge_triton_op(
        torch.randn(1, 3, 8), torch.randn(8), out[0], lse[0], 1e-6
    )
    assert merged.dtype == BF16


class Doubled(nn.Module):
    """A layer that draws random numbers: they must be the same ones in the recomputation."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x.to(self.linear.weight.dtype))
        return nn.functional.dropout(y, 0.25, self.training)


def seed_stack(
    inputs: Tensor, queries: Tensor, layers: list[nn.Module], size: int, eps: float
) -> Tensor:
    blocks = [inputs]
    for first in range(0, len(layers), size):
        total = None
        for index in range(first, min(first + size, len(layers))):
            values = torch.stack([*blocks, *([] if total is None else [total])])
            logits = eager.rms_norm(values, eps) @ queries[index]
            h = (logits.softmax(0)[..., None] * values).sum(0)
            update = layers[index](h)
            total = update if total is None else total + update
        assert total is not None
        blocks.append(total)
    values = torch.stack(blocks)
    logits = eager.rms_norm(values, eps) @ queries[-1]
    return (logits.softmax(0)[..., None] * values).sum(0)


@pytest.mark.parametrize(("L", "size"), [(1, 1), (5, 2), (6, 3), (4, 8)])
def test_seed_autograd_class(L: int, size: int) -> None:
    B, T, D, eps = 2, 3, 16, 1e-6
    layers = [Doubled(D) for _ in range(L)]
    inputs, queries = leaf(B, T, D), leaf(L + 1, D, factor=D**-0.5)
    params = [p for layer in layers for p in layer.parameters()]
    factor = torch.randn(B, T, D)

    def gradients(
        run: Callable[[], Tensor], cast: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(5)
        out = run()
        return out.detach(), list(
            torch.autograd.grad((out * cast(factor)).sum(), [inputs, queries, *params])
        )

    # Phase 1 rounds to bfloat16 there and here: agreement is to bfloat16.
    out, grads = gradients(
        lambda: seed.BlockAttentionResiduals.apply(inputs, queries, layers, size, eps, *params),
        lambda t: t,
    )
    want, want_grads = gradients(
        lambda: seed_stack(inputs, queries, list(layers), size, eps), lambda t: t
    )
    assert out.dtype == inputs.dtype
    torch.testing.assert_close(out, want, rtol=0.03, atol=0.03)
    for got, wanted in zip(grads, want_grads, strict=True):
        assert (got - wanted).norm() <= 0.03 * wanted.norm() + 1e-3


# --------------------------------------------------------------------------------------------- fla


def fla_attnres(
    query: Tensor,
    residuals: list[Tensor],
    rms_weight: Tensor,
    output_rms_weight: Tensor | None = None,
    rms_eps: float = 1e-6,
    scale: float = 1.0,
    return_weights: bool = False,
) -> Any:
    v = torch.stack(residuals)
    k = eager.rms_norm(v, rms_eps) * rms_weight
    p = (scale * (k @ query.reshape(-1))).softmax(0)
    o = (p[..., None] * v).sum(0)
    if output_rms_weight is not None:
        o = eager.rms_norm(o, rms_eps) * output_rms_weight
    return (o, p.detach().float()) if return_weights else o


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("L", "D"), [(1, 8), (3, 48), (40, 33)])
def test_fla(L: int, D: int, normed: bool, dtype: torch.dtype) -> None:
    inputs = {
        "query": leaf(D, 1, dtype=dtype, factor=D**-0.5),
        "residuals": [leaf(2, 5, D, dtype=dtype) for _ in range(L)],
        "rms_weight": leaf(D, dtype=dtype),
        "output_rms_weight": leaf(D, dtype=dtype) if normed else None,
        "scale": 0.5,
        "return_weights": True,
    }
    if L == 1:
        # One source: no gradient flows through the softmax, theirs is a rounded zero.
        for name in ("query", "rms_weight"):
            inputs[name] = inputs[name].detach()
    check(fla.fused_attnres, fla_attnres, inputs, ("o", "p"))


def test_fla_errors() -> None:
    with pytest.raises(ValueError, match="at least one source"):
        fla.fused_attnres(torch.ones(4), [], torch.ones(4))
    with pytest.raises(ValueError, match="checkpoint_level must be 0 or 1, got 2"):
        fla.fused_attnres(torch.ones(4), [torch.ones(1, 4)], torch.ones(4), checkpoint_level=2)


def test_fla_returns_a_tensor_alone() -> None:
    o = fla.fused_attnres(torch.ones(4), [torch.randn(3, 4)] * 2, torch.ones(4))
    assert isinstance(o, Tensor)
    _, p = fla.fused_attnres(
        torch.ones(4), [leaf(2, 3, 4), leaf(2, 3, 4)], torch.ones(4), return_weights=True
    )
    assert p.shape == (2, 2, 3)
    assert not p.requires_grad


# ------------------------------------------------------------------------------------------- liger


def liger_formula(V: Any, w_query: Tensor, w_norm: Tensor, eps: float = 1e-6) -> Tensor:
    v = torch.stack(V) if isinstance(V, list) else V
    k = eager.rms_norm(v, eps) * w_norm
    alpha = torch.einsum("d,nbtd->nbt", w_query, k).softmax(0)
    return torch.einsum("nbt,nbtd->btd", alpha, v)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize(("N", "D"), [(2, 16), (8, 100), (37, 24)])
@pytest.mark.parametrize("stacked", [False, True])
def test_liger(N: int, D: int, stacked: bool, dtype: torch.dtype) -> None:
    shape = (2, 3, D)
    inputs = {
        "V": leaf(N, *shape, dtype=dtype)
        if stacked
        else [leaf(*shape, dtype=dtype) for _ in range(N)],
        "w_query": leaf(D, dtype=dtype, factor=D**-0.5),
        "w_norm": leaf(D, dtype=dtype),
    }
    check(liger.liger_attn_res, liger_formula, inputs, ("h",))


def test_liger_module_and_function() -> None:
    module = liger.LigerAttnRes(32, eps=1e-5)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "w_query": (32,),
        "w_norm": (32,),
    }
    assert (module.w_norm == 1).all()
    assert 0.005 < module.w_query.std().item() < 0.05
    V = torch.randn(4, 2, 3, 32)
    want = liger_formula(V, module.w_query, module.w_norm, 1e-5)
    torch.testing.assert_close(module(V), want)
    torch.testing.assert_close(module(list(V)), want)
    torch.testing.assert_close(
        liger.LigerAttnResFunction.apply(V, module.w_query, module.w_norm, 1e-5), want
    )


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_liger_function(dtype: torch.dtype) -> None:
    """`apply` is all that users of the class call; gradients are those of the function."""
    inputs = {
        "V": leaf(5, 2, 7, 33, dtype=dtype),
        "w_query": leaf(33, dtype=dtype, factor=33**-0.5),
        "w_norm": leaf(33, dtype=dtype),
    }

    def applied(V: Tensor, w_query: Tensor, w_norm: Tensor) -> Tensor:
        return liger.LigerAttnResFunction.apply(V, w_query, w_norm, 1e-6)

    check(applied, liger_formula, inputs, ("h",))


# --------------------------------------------------------------------------------- vllm, flashinfer


def kimi_site(
    prefix: Tensor,
    delta: Tensor | None,
    blocks: Tensor,
    norm_weight: Tensor,
    qk_weight: Tensor,
    output_norm_weight: Tensor | None,
    num_blocks: int,
    block_write_idx: int,
    eps: float,
    output_norm_eps: float,
) -> Tensor:
    if delta is not None:
        prefix += delta  # rounded to the dtype of prefix
    if block_write_idx >= 0:
        blocks[:, block_write_idx] = prefix
    values = torch.cat([blocks[:, :num_blocks], prefix[:, None]], dim=1).double()
    k = eager.rms_norm(values, eps) * norm_weight.double()
    p = (k @ qk_weight.double()).softmax(1)
    h = (p[..., None] * values).sum(1)
    if output_norm_weight is not None:
        h = eager.rms_norm(h, output_norm_eps) * output_norm_weight.double()
    return h


@pytest.mark.parametrize("package", ["vllm", "flashinfer", "flashinfer prepared"])
@pytest.mark.parametrize("with_delta", [False, True])
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize(("num_blocks", "write"), [(0, -1), (0, 0), (1, -1), (3, 3), (4, -1)])
def test_kimi_k3_site(
    num_blocks: int, write: int, with_norm: bool, with_delta: bool, package: str
) -> None:
    T, NB, D = 5, 4, 72
    prefix, blocks = torch.randn(T, D).to(BF16), torch.randn(T, NB, D).to(BF16)
    # Rows that are not read may hold anything.
    blocks[:, num_blocks:] = float("nan")
    norm_weight = torch.randn(D).to(BF16)
    qk_weight = (torch.randn(D) / D**0.5).to(BF16)
    delta = torch.randn(T, D).to(BF16) if with_delta else None
    output_norm = torch.randn(D).to(BF16) if with_norm else None
    want_prefix, want_blocks = prefix.clone(), blocks.clone()
    site = (norm_weight, qk_weight, output_norm)
    want = kimi_site(want_prefix, delta, want_blocks, *site, num_blocks, write, 1e-5, 2e-5)
    if package == "vllm":
        got = vllm.attn_res(prefix, delta, blocks, *site, num_blocks, write, 1e-5, 2e-5)
    else:
        out = torch.full((T, D), float("nan"), dtype=BF16)
        options = {"num_blocks": num_blocks, "block_write_idx": write, "output_norm_eps": 2e-5}
        if package == "flashinfer":
            got = flashinfer.kimi_k3_attn_res(prefix, delta, blocks, *site, out, **options)
        else:
            got = flashinfer.prepare_kimi_k3_attn_res(
                prefix, delta, blocks, *site, out, **options
            ).launch()
        assert got is out
    assert torch.equal(prefix, want_prefix)
    # Bit by bit, NaN included: one row was written and nothing else.
    assert torch.equal(blocks.view(torch.int16), want_blocks.view(torch.int16))
    assert got.dtype == BF16
    half_ulp = want.abs() * 2.0**-8
    assert ((got.double() - want).abs() <= half_ulp * 1.01 + 1e-5).all()


def test_weights_are_folded_once_and_again_when_they_change() -> None:
    norm_weight, qk_weight = torch.randn(8), torch.randn(8)
    first = vllm.fold_once(norm_weight, qk_weight)
    assert torch.equal(first, norm_weight * qk_weight)
    assert vllm.fold_once(norm_weight, qk_weight) is first
    qk_weight.mul_(2)
    assert torch.equal(vllm.fold_once(norm_weight, qk_weight), norm_weight * qk_weight)
    other = torch.randn(8)
    assert torch.equal(vllm.fold_once(norm_weight, other), norm_weight * other)
    with torch.inference_mode():
        frozen = torch.randn(8)
        assert torch.equal(vllm.fold_once(frozen, other), frozen * other)


def site(**changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "prefix": torch.randn(3, 8),
        "delta": None,
        "blocks": torch.randn(3, 4, 8),
        "norm_weight": torch.ones(8),
        "qk_weight": torch.ones(8),
        "output_norm_weight": None,
        "num_blocks": 2,
        "block_write_idx": -1,
        "eps": 1e-5,
        "output_norm_eps": 1e-5,
    }
    return vllm.attn_res(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_blocks": 5}, "num_blocks is 5, expected 0 to 4, the rows of blocks [3, 4, 8]"),
        ({"num_blocks": -1}, "num_blocks is -1, expected 0 to 4"),
        ({"block_write_idx": 4}, "block_write_idx is 4, expected below 4, the rows of blocks"),
        ({"block_write_idx": 1}, "row 1 is in use: this call reads rows 0 to 1"),
        ({"blocks": torch.randn(2, 4, 8)}, "blocks has shape [2, 4, 8], expected [3, NB, 8]"),
        ({"prefix": torch.randn(8)}, "prefix has shape [8], expected [T, D]"),
        ({"qk_weight": torch.ones(7)}, "qk_weight has shape [7], expected [8]"),
        ({"delta": torch.randn(2, 8)}, "update[0] has shape [2, 8], expected [3, 8]"),
        ({"eps": 0.0}, "eps is 0.0, expected a number > 0"),
    ],
)
def test_kimi_k3_errors_write_nothing(changes: dict[str, Any], words: str) -> None:
    prefix, blocks = torch.randn(3, 8), torch.randn(3, 4, 8)
    before = prefix.clone(), blocks.clone()
    with pytest.raises(ValueError, match=r"attn_res|read_out") as caught:
        site(**{"prefix": prefix, "blocks": blocks, **changes})
    assert words in str(caught.value)
    assert torch.equal(prefix, before[0])
    assert torch.equal(blocks, before[1])


def test_flashinfer_backend() -> None:
    with pytest.raises(ValueError, match="backend is 'other', expected one of cake"):
        flashinfer.kimi_k3_attn_res(
            *(torch.randn(3, 8), None, torch.randn(3, 4, 8), torch.ones(8), torch.ones(8), None),
            torch.empty(3, 8),
            num_blocks=1,
            backend="other",
        )


# ----------------------------------------------------------------------------------------- compile


@pytest.mark.parametrize("package", ["vllm", "flashinfer"])
@pytest.mark.parametrize(("num_blocks", "write"), [(0, 0), (2, -1), (3, 3)])
def test_kimi_k3_site_compiles_in_full(num_blocks: int, write: int, package: str) -> None:
    """With its effects on prefix and bank, and with weights that change behind the tracing."""
    torch.compiler.reset()
    T, NB, D = 3, 4, 24
    weights = [torch.randn(D) for _ in range(3)]

    def run(prefix: Tensor, delta: Tensor, blocks: Tensor, *weights: Tensor) -> Tensor:
        if package == "vllm":
            return 2 * vllm.attn_res(prefix, delta, blocks, *weights, num_blocks, write, 1e-5, 1e-5)
        out = torch.empty_like(prefix)
        options = {"num_blocks": num_blocks, "block_write_idx": write}
        return 2 * flashinfer.kimi_k3_attn_res(prefix, delta, blocks, *weights, out, **options)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        prefix, delta, blocks = torch.randn(T, D), torch.randn(T, D), torch.randn(T, NB, D)
        ours = prefix.clone(), delta.clone(), blocks.clone()
        with torch.no_grad():
            want = run(prefix, delta, blocks, *weights)
            got = compiled(*ours, *weights)
        for result, wanted in zip((got, *ours), (want, prefix, delta, blocks), strict=True):
            assert torch.equal(result, wanted)
        weights[1].mul_(3)


def test_training_operators_compile_in_full() -> None:
    D = 16
    layers = [nn.Linear(D, D, dtype=BF16) for _ in range(5)]
    queries, weight = leaf(6, D), leaf(D)
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "fla": lambda V: fla.fused_attnres(queries[0], list(V), weight, weight),
        "liger": lambda V: liger.liger_attn_res(V, queries[0], weight),
        "liger function": lambda V: liger.LigerAttnResFunction.apply(V, queries[0], weight, 1e-6),
        "seed": lambda V: seed.phase_1_batched_attention_triton_op(V, queries, 1e-6)[0],
        "seed class": lambda V: seed.BlockAttentionResiduals.apply(V[0], queries, layers, 2, 1e-6),
    }
    for name, call in calls.items():
        torch.compiler.reset()
        results = []
        for run in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
            V = torch.linspace(-1, 2, 3 * 2 * 4 * D).reshape(3, 2, 4, D).requires_grad_()
            out = run(V)
            grads = torch.autograd.grad(out.float().sin().sum(), [V, queries])
            results.append([out.detach(), *grads])
        for eagerly, compiled in zip(*results, strict=True):
            torch.testing.assert_close(compiled, eagerly, msg=lambda text, name=name: name + text)


# -------------------------------------------------------------------------------------- signatures

SIGNATURES = {
    seed.phase_1_batched_attention_triton_op: "block_representations pseudo_queries eps",
    seed.phase_2_online_softmax_merge_triton_op: (
        "intrablock_partial_sum pseudo_query interblock_normalized_output interblock_lse eps"
    ),
    seed.BlockAttentionResiduals.apply: (
        "inputs pseudo_queries layers BLOCK_SIZE eps *flat_layer_params"
    ),
    fla.fused_attnres: (
        "query residuals rms_weight output_rms_weight=None rms_eps=1e-06 scale=1.0 "
        "return_weights=False checkpoint_level=1"
    ),
    liger.liger_attn_res: "V w_query w_norm eps=1e-06",
    vllm.attn_res: (
        "prefix delta blocks norm_weight qk_weight output_norm_weight num_blocks "
        "block_write_idx eps output_norm_eps"
    ),
    flashinfer.kimi_k3_attn_res: (
        "prefix delta blocks norm_weight qk_weight output_norm_weight out num_blocks "
        "block_write_idx=-1 eps=1e-05 output_norm_eps=1e-05 enable_pdl=False backend='cake'"
    ),
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f"{f.__module__}.{f.__qualname__}")
def test_signatures(function: Callable[..., Any]) -> None:
    words = []
    for parameter in inspect.signature(function).parameters.values():
        star = "*" if parameter.kind is inspect.Parameter.VAR_POSITIONAL else ""
        default = parameter.default
        given = "" if default is inspect.Parameter.empty else f"={default!r}"
        words.append(f"{star}{parameter.name}{given}")
    assert " ".join(words) == SIGNATURES[function]


def test_modules_are_reached_from_the_package() -> None:
    assert set(compat.__all__) == {"fla", "flashinfer", "liger", "seed", "vllm"}
