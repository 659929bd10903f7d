"""A byte-level Transformer language model whose residual connection is a part like any other.

    stream = residual.start(embedding)                 plain, Block AttnRes or Full AttnRes
    for each attention and each MLP:
        x = stream.read(norm_weight)                   what the sublayer sees, RMS-normalised
        stream.write(sublayer(x))
    logits = head(stream.finish(final_norm_weight))

The three variants differ in `residual` alone. Parameters and the optimizer are float32; matrix
products run in `compute_dtype` and the residual stream, unless it has a dtype of its own, too; the
loss is computed in float32.

Shapes: B sequences of T bytes, width D, H heads of E = D / H, L = 2 * layers sublayers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from flash_attn_res import BlockAttnRes
from flash_attn_res.cli import options
from flash_attn_res.cli.errors import CliError

VOCABULARY = 256
NORM_EPS = 1e-6
ROTARY_BASE = 10_000.0
EMBEDDING_STD = 1.0

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in options.DTYPES}


@dataclass(frozen=True)
class ModelConfig:
    """Everything that the shapes and the function of a model depend on."""

    variant: str
    layers: int
    dim: int
    heads: int
    block_size: int  # sublayers to a block; the full variant always has 1
    seq_len: int
    dtype: str = "float32"
    stream_dtype: str | None = None  # of the residual stream, if another than that of products
    block_storage: str | None = None  # as of BlockAttnRes
    stochastic_rounding: int | None = None  # as of BlockAttnRes
    sum_dtype: str | None = None  # as of BlockAttnRes

    @property
    def sublayers(self) -> int:
        """L: attentions and MLPs."""
        return 2 * self.layers

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` reads it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Undoes `to_dict`."""
        return cls(**values)


@dataclass
class Probe:
    """What one forward pass leaves behind for the figures."""

    embedding: Tensor | None = None  # [B, T, D]
    outputs: list[Tensor] = field(default_factory=list)  # L x [B, T, D], of each sublayer
    probabilities: list[Tensor] = field(default_factory=list)  # L + 1 x [B, T, sources of the site]


@dataclass
class KeyValueCache:
    """Keys and values of the bytes seen so far, for sampling: one entry a layer."""

    window: int
    position: int = 0
    entries: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # 2 x [B, H, T, E]


class PlainResidual(nn.Module):
    """The usual residual connection, behind the interface of `BlockAttnRes`."""

    def start(self, embedding: Tensor, *, return_probs: bool = False) -> PlainStream:
        """Begins the sum with the embedding."""
        del return_probs  # there are no probabilities: each site reads the whole sum
        return PlainStream(embedding)


class PlainStream:
    """One running sum that every sublayer reads through its pre-norm and adds its output to."""

    def __init__(self, embedding: Tensor) -> None:
        self._sum = embedding
        self.probabilities: list[Tensor] = []

    def read(self, norm_weight: Tensor, norm_eps: float) -> Tensor:
        """The whole sum, RMS-normalised."""
        return nn.functional.rms_norm(
            self._sum, norm_weight.shape, norm_weight.to(self._sum.dtype), norm_eps
        )

    def write(self, output: Tensor) -> None:
        """Adds a sublayer's output."""
        self._sum = self._sum + output

    def finish(self, norm_weight: Tensor, norm_eps: float) -> Tensor:
        """What the head sees."""
        return self.read(norm_weight, norm_eps)


class Linear(nn.Module):
    """x W^T in the dtype of x, with a float32 weight."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        return nn.functional.linear(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, dim: int, heads: int, index: int) -> None:
        super().__init__()
        self.heads = heads
        self.index = index
        self.qkv = Linear(dim, 3 * dim)
        self.out = Linear(dim, dim)

    def forward(self, x: Tensor, rotation: Tensor, cache: KeyValueCache | None) -> Tensor:
        """[B, T, D] to [B, T, D]; with a cache, after the bytes that it remembers."""
        b, t, d = x.shape
        qkv = self.qkv(x).view(b, t, 3, self.heads, d // self.heads)  # [B, T, 3, H, E]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x [B, H, T, E]
        q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:
            if self.index in cache.entries:
                old_k, old_v = cache.entries[self.index]
                k = torch.cat((old_k, k), dim=2)[:, :, -cache.window :]
                v = torch.cat((old_v, v), dim=2)[:, :, -cache.window :]
            cache.entries[self.index] = (k, v)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=t > 1)  # [B, H, T, E]
        out: Tensor = self.out(y.transpose(1, 2).reshape(b, t, d))
        return out


class SwiGlu(nn.Module):
    """W_down(silu(W_gate x) * W_up x), about 8/3 as wide inside as outside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = 16 * math.ceil(dim * 8 / 3 / 16)
        self.gate_up = Linear(dim, 2 * hidden)
        self.down = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # 2 x [B, T, hidden]
        out: Tensor = self.down(nn.functional.silu(gate) * up)
        return out


class Layer(nn.Module):
    """An attention and an MLP, each with the weight of its pre-norm."""

    def __init__(self, dim: int, heads: int, index: int) -> None:
        super().__init__()
        self.attention_norm = nn.Parameter(torch.ones(dim))
        self.attention = Attention(dim, heads, index)
        self.mlp_norm = nn.Parameter(torch.ones(dim))
        self.mlp = SwiGlu(dim)


class LanguageModel(nn.Module):
    """Bytes [B, T] to logits [B, T, 256] of the next byte."""

    def __init__(self, config: ModelConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = DTYPES[config.dtype]
        self.embedding = nn.Parameter(torch.empty(VOCABULARY, config.dim))
        self.layers = nn.ModuleList(
            Layer(config.dim, config.heads, index) for index in range(config.layers)
        )
        self.final_norm = nn.Parameter(torch.ones(config.dim))
        self.head = Linear(config.dim, VOCABULARY)
        self.residual: PlainResidual | BlockAttnRes = make_residual(config)
        self._initialise(seed)

    def _initialise(self, seed: int) -> None:
        """Draws the weights that all variants share, in one order, from the seed alone."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.embedding.normal_(std=EMBEDDING_STD, generator=generator)
            for module in self.modules():
                if isinstance(module, Linear):
                    std = module.weight.shape[1] ** -0.5
                    module.weight.normal_(std=std, generator=generator)

    def forward(
        self, tokens: Tensor, *, cache: KeyValueCache | None = None, probe: Probe | None = None
    ) -> Tensor:
        """Tokens [B, T] to logits [B, T, 256]; continues a cache, or fills a probe, if given."""
        start = cache.position if cache is not None else 0
        rotation = rotary_angles(
            start, tokens.shape[1], self.config.dim // self.config.heads, tokens.device
        )
        named = self.config.stream_dtype
        stream_dtype = DTYPES[named] if named else self.compute_dtype
        embedding = nn.functional.embedding(tokens, self.embedding).to(stream_dtype)  # [B, T, D]
        stream = self.residual.start(embedding, return_probs=probe is not None)
        outputs = []  # L x [B, T, D]
        for layer in cast("Iterable[Layer]", self.layers):
            x = stream.read(layer.attention_norm, NORM_EPS).to(self.compute_dtype)
            outputs.append(layer.attention(x, rotation, cache))
            stream.write(outputs[-1])
            x = stream.read(layer.mlp_norm, NORM_EPS).to(self.compute_dtype)
            outputs.append(layer.mlp(x))
            stream.write(outputs[-1])
        y = stream.finish(self.final_norm, NORM_EPS).to(self.compute_dtype)
        logits: Tensor = self.head(y)
        if cache is not None:
            cache.position += tokens.shape[1]
        if probe is not None:
            probe.embedding, probe.outputs = embedding, outputs
            probe.probabilities = list(stream.probabilities)
        return logits


def make_residual(config: ModelConfig) -> PlainResidual | BlockAttnRes:
    """The only part in which the variants differ."""
    if config.variant == "plain":
        return PlainResidual()
    block_size = 1 if config.variant == "full" else config.block_size
    try:
        return BlockAttnRes(
            config.sublayers,
            config.dim,
            block_size=block_size,
            eps=NORM_EPS,
            block_storage=config.block_storage,
            stochastic_rounding=config.stochastic_rounding,
            sum_dtype=None if config.sum_dtype is None else DTYPES[config.sum_dtype],
        )
    except ValueError as error:
        raise CliError(
            f"--layers {config.layers} and --block-size {block_size} ({config.variant}): {error}"
        ) from error


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats a byte, in float32."""
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def rotary_angles(start: int, count: int, head_dim: int, device: torch.device) -> Tensor:
    """Cosines and sines [2, count, E / 2] of the positions from `start` on."""
    frequencies = ROTARY_BASE ** (
        -torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    )  # [E / 2]
    positions = torch.arange(start, start + count, device=device, dtype=torch.float32)
    angles = torch.outer(positions, frequencies)  # [T, E / 2]
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turns the pairs (x_i, x_{i + E/2}) of x [B, H, T, E] by the angles of their positions."""
    cos, sin = rotation.to(x.dtype)  # 2 x [T, E / 2]
    first, second = x.chunk(2, dim=-1)  # 2 x [B, H, T, E / 2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def parameter_groups(model: LanguageModel, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay pulls at matrices only, not at norms, pseudo-queries or the embedding."""
    matrices = [module.weight for module in model.modules() if isinstance(module, Linear)]
    decayed = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in decayed]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
