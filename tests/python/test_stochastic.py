"""Stochastic rounding: the operator against its definition, and the streams that use it."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from flash_attn_res import BlockAttnRes, stochastic_add

OP = torch.ops.flash_attn_res.stochastic_add


def seed_of(seed: int, step: int, device: str = "cpu") -> Tensor:
    return torch.tensor([seed, step], dtype=torch.int64, device=device)


def neighbours(total: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 values next to a float32, toward zero and away from it, as float32."""
    bits = total.view(torch.int32) & -65536
    up = torch.where(bits == total.view(torch.int32), bits, bits + 65536)
    return bits.view(torch.float32), up.view(torch.float32)


@pytest.mark.parametrize("dtypes", [("float32",), ("bfloat16", "float32"), ("float16",) * 4])
def test_neighbours_and_mean(dtypes: tuple[str, ...]) -> None:
    terms = [torch.randn(4, 33).to(getattr(torch, dtype)) for dtype in dtypes]
    total = terms[0].float()
    for term in terms[1:]:
        total = total + term.float()
    low, high = neighbours(total)
    count = 2000
    mean = torch.zeros(4, 33, dtype=torch.float64)
    for step in range(count):
        out = stochastic_add(terms, seed_of(3, step)).float()
        assert ((out == low) | (out == high)).all()
        mean += out.double()
    mean /= count
    error = (high - low).double().abs() / 2 / count**0.5  # at least the standard error
    assert ((mean - total.double()).abs() <= 5.5 * error).all()


def test_running_sum_does_not_drift() -> None:
    """1000 additions of 2^-10 to 1: to nearest they are all lost, here none is on average."""
    total = torch.ones(64, 64, dtype=torch.bfloat16)
    update = torch.full((64, 64), 2.0**-10, dtype=torch.bfloat16)
    nearest = total.clone()
    for step in range(1000):
        total = stochastic_add([total, update], seed_of(1, step))
        nearest = nearest + update
    expected = 1 + 1000 * 2.0**-10
    assert (nearest == 1).all()
    # The variance of one addition is at most ulp^2 / 4, of 1000 over 4096 elements this:
    assert abs(total.double().mean().item() - expected) < 5 * (1000 / 4 / 4096) ** 0.5 * 2.0**-7


def test_reproducible_and_keyed() -> None:
    value = torch.randn(50, 129)
    first = stochastic_add([value], seed_of(5, 2), site=9)
    assert stochastic_add([value], seed_of(5, 2), site=9).equal(first)
    for other in (
        stochastic_add([value], seed_of(6, 2), site=9),
        stochastic_add([value], seed_of(5, 3), site=9),
        stochastic_add([value], seed_of(5, 2), site=8),
    ):
        assert not other.equal(first)
    strided = torch.nn.functional.pad(value, (3, 2))[:, 3:132]
    assert stochastic_add([strided], seed_of(5, 2), site=9).equal(first)
    assert stochastic_add([value.view(5, 10, 129)], seed_of(5, 2), site=9).equal(
        first.view(5, 10, 129)
    )
    assert stochastic_add([value], 5).equal(stochastic_add([value], seed_of(5, 0)))


def test_straight_through() -> None:
    a = torch.randn(3, 8, requires_grad=True)
    b = torch.randn(3, 8).bfloat16().requires_grad_()
    gradient = torch.randn(3, 8).bfloat16()
    stochastic_add([a, b], 1).backward(gradient)
    assert a.grad is not None
    assert a.grad.dtype == torch.float32
    assert a.grad.equal(gradient.float())
    assert b.grad is not None
    assert b.grad.equal(gradient)


def test_opcheck() -> None:
    terms = [torch.randn(3, 9, requires_grad=True), torch.randn(3, 9).bfloat16()]
    torch.library.opcheck(OP, (terms, seed_of(1, 0), 4))
    out = torch.zeros(3, 9, dtype=torch.bfloat16)
    given = ([term.detach() for term in terms], seed_of(1, 0), 4, out)
    torch.library.opcheck(torch.ops.flash_attn_res.stochastic_add_into, given)


V = torch.zeros(3, 8)
ERRORS = {
    "no terms": (lambda: stochastic_add([], 0), ValueError, "terms has 0 items, expected 1 to 4"),
    "many terms": (lambda: stochastic_add([V] * 5, 0), ValueError, "terms has 5 items"),
    "shape": (
        lambda: stochastic_add([V, V[:2]], 0),
        ValueError,
        "terms[1] has shape [2, 8], expected [3, 8] like terms[0]",
    ),
    "float64": (lambda: stochastic_add([V.double()], 0), TypeError, "terms[0] is torch.float64"),
    "site": (lambda: stochastic_add([V], 0, site=-1), ValueError, "site is -1"),
    "seed type": (lambda: stochastic_add([V], 0.5), TypeError, "seed is a float"),
    "seed dtype": (lambda: stochastic_add([V], torch.zeros(2)), TypeError, "seed is torch.float32"),
    "seed shape": (
        lambda: stochastic_add([V], torch.zeros(3, dtype=torch.int64)),
        ValueError,
        "seed has shape [3], expected [2]: seed and step",
    ),
    "stream dtype": (
        lambda: BlockAttnRes(4, 8, 2, stochastic_rounding=1).start(V),
        TypeError,
        "start: embedding is torch.float32, expected torch.bfloat16: stochastic_rounding",
    ),
    "module seed": (
        lambda: BlockAttnRes(4, 8, 2, stochastic_rounding=True),
        TypeError,
        "stochastic_rounding is a bool, expected an int",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    call, kind, message = ERRORS[case]
    with pytest.raises(kind, match=re.escape(message)):
        call()


def run_stream(
    attn_res: BlockAttnRes,
    embedding: Tensor,
    layers: list[Tensor],
    functional: bool,
    checkpoint: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    leaves = [embedding.detach().requires_grad_(), *[w.detach().requires_grad_() for w in layers]]
    attn_res.zero_grad()
    stream = attn_res.start(leaves[0], functional=functional)
    for weight in leaves[1:]:
        stream.sublayer(lambda x, w=weight: torch.tanh(x @ w), checkpoint=checkpoint)
    y = stream.finish()
    y.float().square().sum().backward()
    grads = [leaf.grad for leaf in leaves] + [attn_res.queries.grad]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
    return y.detach(), [grad.clone() for grad in grads if grad is not None]


def make_network(grad_dtype: torch.dtype | None, forms: str = "auto", seed: int | None = 11):
    torch.manual_seed(0)
    attn_res = BlockAttnRes(12, 32, 4, grad_dtype=grad_dtype, forms=forms, stochastic_rounding=seed)
    torch.nn.init.normal_(attn_res.queries, std=0.3)
    embedding = torch.randn(40, 32).bfloat16()
    layers = [(torch.randn(32, 32) / 8).bfloat16() for _ in range(12)]
    return attn_res, embedding, layers


def at_step(attn_res: BlockAttnRes, step: int) -> BlockAttnRes:
    assert attn_res.rounding_seed is not None
    attn_res.rounding_seed[1] = step
    return attn_res


@pytest.mark.parametrize("forms", ["two_phase", "one_shot"])
@pytest.mark.parametrize("grad_dtype", [torch.float32, None])
def test_stream(grad_dtype: torch.dtype | None, forms: str) -> None:
    attn_res, embedding, layers = make_network(grad_dtype, forms)
    assert attn_res.rounding_seed is not None
    y, grads = run_stream(at_step(attn_res, 5), embedding, layers, False)
    assert attn_res.rounding_seed.tolist() == [11, 6]
    again, same = run_stream(at_step(attn_res, 5), embedding, layers, False)
    assert again.equal(y)
    assert all(a.equal(b) for a, b in zip(same, grads, strict=True))
    other, _ = run_stream(attn_res, embedding, layers, False)
    assert not other.equal(y)
    # The functional stream takes the same sums to the same numbers.
    functional, _ = run_stream(at_step(attn_res, 5), embedding, layers, True)
    assert functional.equal(y)
    # So does one that is recomputed, bit for bit, gradients included.
    recomputed, third = run_stream(at_step(attn_res, 5), embedding, layers, False, checkpoint=True)
    assert recomputed.equal(y)
    assert all(a.equal(b) for a, b in zip(third, grads, strict=True))


@pytest.mark.parametrize("forms", ["two_phase", "one_shot"])
@pytest.mark.parametrize("grad_dtype", [torch.float32, None])
def test_stream_error(grad_dtype: torch.dtype | None, forms: str) -> None:
    """The error of a pass, and that of the mean of many.

    One addition has up to sqrt(2) times the RMS error of nearest rounding, and independent errors:
    single passes scatter, their RMS is bounded, and the mean of passes is nearer than one pass.
    """
    plain, embedding, layers = make_network(grad_dtype, forms, seed=None)
    exact, _, _ = make_network(torch.float32, forms, seed=None)
    exact.double()
    rounded, _, _ = make_network(grad_dtype, forms)
    y, grads = run_stream(exact, embedding.double(), [w.double() for w in layers], False)
    near_y, near = run_stream(plain, embedding, layers, False)
    count = 24
    runs = [run_stream(rounded, embedding, layers, False) for _ in range(count)]

    def error(got: Tensor, want: Tensor) -> float:
        return ((got.double() - want).norm() / want.norm()).item()

    ulp = 2.0**-8
    for index in range(len(grads) + 1):
        want = y if index == 0 else grads[index - 1]
        nearest = error(near_y if index == 0 else near[index - 1], want)
        got = [run[0] if index == 0 else run[1][index - 1] for run in runs]
        rms = (sum(error(one, want) ** 2 for one in got) / count) ** 0.5
        assert rms <= 1.75 * nearest + ulp, index
        mean = torch.stack([one.double() for one in got]).mean(0)
        assert error(mean, want) <= 0.8 * nearest, index


def test_state_dict_keeps_the_step() -> None:
    attn_res, _, _ = make_network(None)
    other, _, _ = make_network(None, seed=99)
    other.load_state_dict(at_step(attn_res, 17).state_dict())
    assert other.rounding_seed is not None
    assert other.rounding_seed.tolist() == [11, 17]
    assert "rounding_seed" not in make_network(None, seed=None)[0].state_dict()


def test_compile() -> None:
    attn_res, embedding, layers = make_network(torch.float32)

    def forward(embedding: Tensor) -> Tensor:
        stream = attn_res.start(embedding)
        for weight in layers:
            stream.write(torch.tanh(stream.read() @ weight))
        return stream.finish()

    at_step(attn_res, 3)
    eager = forward(embedding)
    at_step(attn_res, 3)
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")(embedding)
    assert compiled.equal(eager)
    assert attn_res.rounding_seed is not None
    assert attn_res.rounding_seed.tolist() == [11, 4]
