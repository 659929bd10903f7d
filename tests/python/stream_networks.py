"""A small Transformer whose residual connection is a stream, and the same by its formulas.

Shared by the tests of the stream on CPU and GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import rms_norm, silu

import eager
from flash_attn_res import BlockAttnRes

DIM = 32


class Attention(nn.Module):
    """Causal self-attention of two heads, written out: fused ones may differ from run to run."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4)
        past = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
        scores = (q @ k.transpose(-2, -1) * (2 / d) ** 0.5).masked_fill(~past, -torch.inf)
        y = scores.softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(b, t, d))


class SwiGlu(nn.Module):
    def __init__(self, dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(2 * dim, dim)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x).chunk(2, -1)
        return drop(self.down(silu(a) * b), self.dropout, self.training)


@dataclasses.dataclass
class Trace:
    """What a test looks at inside of a network: inputs and outputs of its sublayers."""

    inputs: list[Tensor] = dataclasses.field(default_factory=list)
    outputs: list[Tensor] = dataclasses.field(default_factory=list)


class Network(nn.Module):
    def __init__(
        self,
        num_sublayers: int,
        block_size: int,
        *,
        dim: int = DIM,
        dropout: float = 0.0,
        queries: float = 0.2,
        k3: bool = False,
        **options,
    ) -> None:
        super().__init__()
        if k3:
            self.attn_res = BlockAttnRes.kimi_k3(
                num_sublayers // 2, dim, block_size // 2, eps=1e-6, **options
            )
        else:
            self.attn_res = BlockAttnRes(num_sublayers, dim, block_size, **options)
        self.layers = nn.ModuleList(
            SwiGlu(dim, dropout) if i % 2 else Attention(dim) for i in range(num_sublayers)
        )
        # Kept apart: sublayers may be wrapped, compiled or sharded on their own.
        self.norms = nn.ParameterList(1 + 0.1 * torch.randn(dim) for _ in range(num_sublayers + 1))
        nn.init.normal_(self.attn_res.queries, std=queries)
        if self.attn_res.key_weight is not None:
            nn.init.normal_(self.attn_res.key_weight, mean=1.0, std=0.1)

    def forward(
        self,
        x: Tensor,
        *,
        checkpoint: bool = False,
        functional: bool | None = None,
        trace: Trace | None = None,
        wrap: Callable[[nn.Module, Tensor], Tensor] | None = None,
    ) -> Tensor:
        stream = self.attn_res.start(x, functional=functional)
        for norm, layer in zip(self.norms, self.layers, strict=False):
            if checkpoint:
                stream.sublayer(layer, norm, checkpoint=True)
                continue
            h = stream.read(norm)
            y = layer(h) if wrap is None else wrap(layer, h)
            stream.write(y)
            if trace is not None:
                trace.inputs.append(h)
                trace.outputs.append(y)
        return stream.finish(self.norms[-1])

    def plain(self, x: Tensor) -> Tensor:
        """The same sublayers with one running residual."""
        for norm, layer in zip(self.norms, self.layers, strict=False):
            x = x + layer(rms_norm(x, norm.shape, norm, 1e-6))
        return rms_norm(x, self.norms[-1].shape, self.norms[-1], 1e-6)

    def eager(self, x: Tensor, trace: Trace | None = None) -> Tensor:
        """Attention residuals by their formulas, one site at a time (equation 6 of the paper)."""
        module = self.attn_res
        wide = module.sum_dtype_of(x.dtype)
        queries = module.queries
        if module.key_weight is not None:
            queries = queries * module.key_weight
        blocks, partial = [x], None
        for site, (norm, layer) in enumerate(zip(self.norms, self.layers, strict=False)):
            if site % module.block_size == 0 and partial is not None:
                blocks, partial = [*blocks, partial.to(x.dtype)], None
            h, _, _ = eager.read(
                queries[site], sources=blocks, partial=partial, norm=True, norm_weight=norm
            )
            y = layer(h)
            if trace is not None:
                trace.inputs.append(h)
                trace.outputs.append(y)
            partial = y if partial is None else partial.to(wide) + y
        return eager.read(
            queries[-1], sources=[*blocks, partial], norm=True, norm_weight=self.norms[-1]
        )[0]


def tensors_of(network: Network, x: Tensor) -> dict[str, Tensor]:
    return {"embedding": x, **dict(network.named_parameters())}


def gradients(
    y: Tensor, tensors: dict[str, Tensor], cotangent: Tensor, **options
) -> dict[str, Tensor]:
    given = [t for t in tensors.values() if t.requires_grad]
    found = iter(torch.autograd.grad(y, given, cotangent, **options))
    return {name: next(found) for name, t in tensors.items() if t.requires_grad}


def assert_equal(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name


def assert_gradients(
    ours: dict[str, Tensor],
    exact: dict[str, Tensor],
    plain: dict[str, Tensor] | None = None,
    ulps: float = 4.0,
) -> None:
    """float64: equal up to its rounding. Else err(ours) <= 2 err(eager) + a few ulp, in L2.

    Eager's errors are one draw of a noise that runs through the whole network: a tensor that was
    lucky is held to the root mean square of the relative errors of all. A gradient that is zero
    (the queries, where there is one source) may come out as noise of the largest gradient.
    """
    assert ours.keys() == exact.keys()
    scale = max(value.abs().max().item() for value in exact.values())
    typical = 0.0
    if plain is not None:
        relative = [
            ((plain[name].double() - value).norm() / value.norm()).item()
            for name, value in exact.items()
            if value.any()
        ]
        typical = (sum(r * r for r in relative) / len(relative)) ** 0.5
    for name, value in exact.items():
        got = ours[name].double()
        assert torch.isfinite(got).all(), name
        error = (got - value).norm().item()
        if plain is None:
            assert ours[name].dtype == torch.float64
            allowed = 1e-9 * value.norm().item() + 1e-12 * scale
        else:
            eps = torch.finfo(ours[name].dtype).eps
            eager_error = (plain[name].double() - value).norm().item()
            allowed = 2 * max(eager_error, typical * value.norm().item())
            allowed += ulps * eps * value.norm().item() + eps * 1e-3 * scale
        assert error <= allowed, f"{name}: error {error:.3e} exceeds {allowed:.3e}"


def make(
    num_sublayers: int,
    block_size: int,
    device: str,
    dtype: torch.dtype,
    shape: tuple[int, int] = (3, 16),
    **options,
) -> tuple[Network, Tensor, Tensor]:
    """A network, its input and a cotangent for its output."""
    network = Network(num_sublayers, block_size, **options).to(device, dtype)
    dim = network.attn_res.dim
    x = torch.randn(*shape, dim, device=device).to(dtype).requires_grad_()
    return network, x, torch.randn(*shape, dim, device=device).to(dtype)


@contextlib.contextmanager
def large_saved(numel: int) -> Iterator[dict[int, int]]:
    """Storages of at least so many elements that graph nodes save, with their bytes."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() >= numel and not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # a freed storage's address may be given out again
        return tensor

    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
