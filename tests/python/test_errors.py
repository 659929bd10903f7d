"""Bad input: a clear error that names the argument, its shape and what was expected."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch
from torch.autograd import forward_ad

from flash_attn_res import BlockAttnRes, attend, read, stochastic_add


def v(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


Q = torch.zeros(2, 8)

ATTEND = {
    "no sources": (lambda: attend([], Q), ValueError, "sources has 0 items, expected 1 to 512"),
    "too many sources": (
        lambda: attend([v(3, 8)] * 513, Q),
        ValueError,
        "sources has 513 items, expected 1 to 512",
    ),
    "too many packed sources": (
        lambda: attend(torch.empty(513, 1, 8), Q),
        ValueError,
        "sources has 513 items",
    ),
    "width mismatch": (
        lambda: attend([v(3, 8), v(3, 7)], Q),
        ValueError,
        "sources[1] has shape [3, 7], expected [3, 8] like sources[0]",
    ),
    "rank mismatch": (
        lambda: attend([v(3, 8), v(1, 3, 8)], Q),
        ValueError,
        "sources[1] has shape [1, 3, 8], expected [3, 8]",
    ),
    "packed rank": (
        lambda: attend(v(8), Q),
        ValueError,
        "sources has shape [8], expected packed [N, ..., D]",
    ),
    "scalar": (
        lambda: attend([torch.tensor(1.0)], Q),
        ValueError,
        "sources[0] has shape [], expected [..., D] with D >= 1",
    ),
    "zero width": (lambda: attend([v(3, 0)], Q), ValueError, "sources[0] has shape [3, 0]"),
    "mixed source dtypes": (
        lambda: attend([v(3, 8), v(3, 8, dtype=torch.bfloat16)], Q),
        TypeError,
        "sources[1] is torch.bfloat16 but sources[0] is torch.float32",
    ),
    "integers": (
        lambda: attend([v(3, 8).int()], Q),
        TypeError,
        "sources[0] is torch.int32, expected float32, bfloat16, float16",
    ),
    "float64 mixed in": (
        lambda: read(Q[0], sources=[v(3, 8)], partial=v(3, 8).double()),
        TypeError,
        "partial is torch.float64 but sources[0] is torch.float32",
    ),
    "no tensor": (lambda: attend([[1.0]], Q), TypeError, "sources[0] is a list"),
    "no list": (lambda: attend(3, Q), TypeError, "sources is a int, expected a list of tensors"),
    "wide queries": (
        lambda: attend([v(3, 8)], torch.zeros(2, 9)),
        ValueError,
        "queries has shape [2, 9], expected [S, R] with R from 1 to 8, the width of sources[0]"
        " [3, 8]",
    ),
    "query rank": (
        lambda: attend([v(3, 8)], Q[0]),
        ValueError,
        "queries has shape [8], expected [S, R]",
    ),
    "too many queries": (
        lambda: attend([v(3, 8)], torch.zeros(129, 8)),
        ValueError,
        "has 129 items, expected 1 to 128",
    ),
    "key weight": (
        lambda: attend([v(3, 8)], Q, torch.ones(3, 8)),
        ValueError,
        "key_weight has shape [3, 8], expected [2, 8] like queries, or [8]",
    ),
    "eps zero": (lambda: attend([v(3, 8)], Q, eps=0.0), ValueError, "eps is 0.0, expected"),
    "eps nan": (lambda: attend([v(3, 8)], Q, eps=float("nan")), ValueError, "eps is nan"),
    "eps negative": (lambda: attend([v(3, 8)], Q, eps=-1e-6), ValueError, "eps is -1e-06"),
    "scale inf": (
        lambda: attend([v(3, 8)], Q, scale=float("inf")),
        ValueError,
        "scale is inf, expected a finite number",
    ),
    "eps no number": (
        lambda: attend([v(3, 8)], Q, eps="a"),
        TypeError,
        "attend: eps is 'a', expected a number",
    ),
    "eps none": (lambda: attend([v(3, 8)], Q, eps=None), TypeError, "eps is None, expected"),
    "scale no number": (
        lambda: attend([v(3, 8)], Q, scale="a"),
        TypeError,
        "scale is 'a', expected a number",
    ),
    "dtype of integers": (
        lambda: attend([v(3, 8)], Q, dtype=torch.int32),
        TypeError,
        "attend: dtype is torch.int32, expected float32, bfloat16, float16",
    ),
    "dtype by name": (
        lambda: attend([v(3, 8)], Q, dtype="bf16"),
        TypeError,
        "dtype is 'bf16', expected a torch.dtype",
    ),
    "sparse": (
        lambda: attend([v(3, 8).to_sparse()], Q),
        TypeError,
        "sources[0] is torch.sparse_coo, expected a dense tensor",
    ),
    "devices": (
        lambda: attend([v(3, 8), torch.empty(3, 8, device="meta")], Q),
        ValueError,
        "sources[1] is on meta but sources[0] is on cpu: all tensors of a call must be on one",
    ),
    "query device": (
        lambda: attend([v(3, 8)], torch.empty(2, 8, device="meta")),
        ValueError,
        "queries is on meta but sources[0] is on cpu",
    ),
}

READ = {
    "nothing": (lambda: read(Q[0]), ValueError, "no value was given: expected at least one of"),
    "no query": (
        lambda: read(sources=[v(3, 8), v(3, 8)]),
        ValueError,
        "query is missing, expected shape [R]: there are 2 terms",
    ),
    "partial shape": (
        lambda: read(Q[0], sources=[v(3, 8)], partial=v(4, 8)),
        ValueError,
        "partial has shape [4, 8], expected [3, 8] like sources[0]",
    ),
    "update shape": (
        lambda: read(Q[0], partial=v(3, 8), update=v(3, 9)),
        ValueError,
        "update[0] has shape [3, 9], expected [3, 8] like partial",
    ),
    "three updates": (
        lambda: read(Q[0], partial=v(3, 8), update=[v(3, 8)] * 3),
        ValueError,
        "update has 3 items, expected 0 to 2",
    ),
    "a number for an update": (
        lambda: read(Q[0], partial=v(3, 8), update=3),
        TypeError,
        "update is a int, expected a list of tensors",
    ),
    "dtype by name": (
        lambda: read(Q[0], sources=[v(3, 8)], dtype="bf16"),
        TypeError,
        "read: dtype is 'bf16', expected a torch.dtype",
    ),
    "norm eps no number": (
        lambda: read(Q[0], sources=[v(3, 8)], norm=True, norm_eps="a"),
        TypeError,
        "norm_eps is 'a', expected a number",
    ),
    "sparse weight": (
        lambda: read(Q[0], sources=[v(3, 8)], norm_weight=torch.ones(8).to_sparse()),
        TypeError,
        "norm_weight is torch.sparse_coo, expected a dense tensor",
    ),
    "phase 1 alone": (
        lambda: read(Q[0], phase1=v(3, 8)),
        TypeError,
        "phase1 is a Tensor, expected (out, lse)",
    ),
    "lse shape": (
        lambda: read(Q[0], phase1=(v(3, 8), v(4)), partial=v(3, 8)),
        ValueError,
        "phase1[1] is torch.float32 of shape [4], expected torch.float32 of shape [3]",
    ),
    "norm weight": (
        lambda: read(Q[0], sources=[v(3, 8)], norm_weight=torch.ones(7)),
        ValueError,
        "norm_weight has shape [7], expected [8], the width of sources[0] [3, 8]",
    ),
    "norm eps": (
        lambda: read(Q[0], sources=[v(3, 8)], norm=True, norm_eps=0.0),
        ValueError,
        "norm_eps is 0.0, expected a number > 0",
    ),
    "query rank": (
        lambda: read(Q, sources=[v(3, 8)] * 2),
        ValueError,
        "query has shape [2, 8], expected [R]",
    ),
}

MODULE = {
    "no sublayers": (lambda: BlockAttnRes(0, 8), ValueError, "num_sublayers is 0, expected"),
    "negative width": (lambda: BlockAttnRes(4, -8), ValueError, "dim is -8, expected at least 1"),
    "fractional block": (
        lambda: BlockAttnRes(4, 8, 1.5),
        TypeError,
        "block_size is 1.5, expected an integer",
    ),
    "nan eps": (lambda: BlockAttnRes(4, 8, eps=float("nan")), ValueError, "eps is nan"),
    "nan scale": (lambda: BlockAttnRes(4, 8, scale=float("nan")), ValueError, "scale is nan"),
    "scale no number": (
        lambda: BlockAttnRes(4, 8, scale="a"),
        TypeError,
        "BlockAttnRes: scale is 'a', expected a number",
    ),
    "group of blocks by name": (
        lambda: BlockAttnRes(4, 8, 2, group_blocks="a"),
        TypeError,
        "group_blocks is 'a', expected an integer",
    ),
    "fractional group": (
        lambda: BlockAttnRes(4, 8, 2, group_blocks=1.5),
        TypeError,
        "group_blocks is 1.5, expected an integer",
    ),
    "query width": (
        lambda: BlockAttnRes(4, 8, query_dim=9),
        ValueError,
        "query_dim is 9, expected at most dim, 8",
    ),
    "too many blocks": (
        lambda: BlockAttnRes(600, 8, 1),
        ValueError,
        "make 601 sources, expected at most 512; use larger blocks",
    ),
    "too large a block": (
        lambda: BlockAttnRes(400, 8, 200),
        ValueError,
        "block_size is 200, expected at most 128",
    ),
    "embedding width": (
        lambda: BlockAttnRes(4, 8).start(v(3, 9)),
        ValueError,
        "embedding has shape [3, 9], expected a width of 8",
    ),
}

ALL = {
    f"{group}: {name}": case
    for group, cases in (("attend", ATTEND), ("read", READ), ("module", MODULE))
    for name, case in cases.items()
}


@pytest.mark.parametrize(("call", "error", "words"), ALL.values(), ids=ALL.keys())
def test_refused(call, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        call()


TANGENTS = {
    "attend: sources": lambda x: attend([x, v(3, 8)], v(2, 8)).out,
    "attend: packed sources": lambda x: attend(torch.stack([x, x]), v(2, 8)).out,
    "attend: queries": lambda x: attend([v(3, 8)] * 2, x).lse,
    "attend: key weight": lambda x: attend([v(3, 8)] * 2, v(3, 8), x).lse,
    "read: partial": lambda x: read(v(8), sources=[v(3, 8)], partial=x).x,
    "read: update": lambda x: read(v(8), partial=v(3, 8), update=x).x,
    "read: phase 1": lambda x: read(v(8), phase1=(x, v(3)), partial=v(3, 8)).x,
    "read: query": lambda x: read(x[0], sources=[v(3, 8)] * 2).x,
    "read: norm weight": lambda x: read(v(8), sources=[v(3, 8)] * 2, norm_weight=x[0]).x,
    "stochastic_add": lambda x: stochastic_add([x], 0),
    "embedding": lambda x: BlockAttnRes(4, 8, 2).start(x).read(),
    "embedding, functional": lambda x: BlockAttnRes(4, 8, 2).start(x, functional=True).read(),
}


@pytest.mark.parametrize("call", TANGENTS.values(), ids=TANGENTS.keys())
def test_tangents_are_refused_not_dropped(call) -> None:
    """Forward-mode differentiation through an operator without a rule gives zeros in silence."""
    x = v(3, 8)
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="carries a tangent of forward-mode"),
    ):
        call(forward_ad.make_dual(x, x))


def test_tangents_of_parameters_are_refused() -> None:
    """By the stream of eager mode too: its autograd functions have no forward mode, as they say."""
    model = BlockAttnRes(4, 8, 2)
    queries = model.queries.detach()

    def second_site(queries: torch.Tensor, functional: bool) -> torch.Tensor:
        with parametrize_by(model, queries):
            stream = model.start(v(3, 8), functional=functional)
            stream.write(stream.read())
            return stream.read()

    with pytest.raises(RuntimeError, match=r"a transform of torch\.func"):
        torch.func.jvp(lambda q: second_site(q, True), (queries,), (queries,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode AD"):
        second_site(forward_ad.make_dual(queries, queries), False)


@contextlib.contextmanager
def parametrize_by(model: BlockAttnRes, queries: torch.Tensor):
    """The model with other queries, as `torch.func.functional_call` has it."""
    held = model._parameters.pop("queries")
    model.queries = queries  # type: ignore[assignment]
    try:
        yield
    finally:
        del model.queries
        model._parameters["queries"] = held


@pytest.mark.parametrize("call", [TANGENTS["attend: sources"], TANGENTS["read: partial"]])
def test_tangents_are_refused_while_compiling(call) -> None:
    x = v(3, 8)
    compiled = torch.compile(lambda x: torch.func.jvp(call, (x,), (x,)))
    with pytest.raises(Exception, match=r"a transform of torch\.func"):
        compiled(x)


def test_no_tangents_no_refusal() -> None:
    """Inside a dual level, of tensors that have none."""
    with forward_ad.dual_level():
        x = forward_ad.make_dual(v(3, 8), v(3, 8))
        y = read(v(8), sources=[v(3, 8)] * 2).x
        assert forward_ad.unpack_dual(x + y).tangent is not None


def test_the_operators_check_on_their_own() -> None:
    """Whoever calls torch.ops directly gets the library's own words."""
    attend_op = torch.ops.flash_attn_res.attend
    with pytest.raises(RuntimeError, match=r"sources\[1\] has shape \[3, 7\], expected \[3, 8\]"):
        attend_op([v(3, 8), v(3, 7)], Q, 1.0, 1e-6, None)
    with pytest.raises(RuntimeError, match="eps is -1"):
        attend_op([v(3, 8)], Q, 1.0, -1.0, None)
    with pytest.raises(RuntimeError, match="queries is bfloat16, expected float32"):
        attend_op([v(3, 8)], Q.bfloat16(), 1.0, 1e-6, None)
    with pytest.raises(RuntimeError, match="a value has 1 dimensions"):
        attend_op([v(8)], Q, 1.0, 1e-6, None)
