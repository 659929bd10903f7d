"""``BlockAttnRes``: the parameters and the schedule of Attention Residuals for one network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flash_attn_res import _check
from flash_attn_res.plan import Plan
from flash_attn_res.stream import Stream


class BlockAttnRes(nn.Module):
    """Block Attention Residuals for a network of L sublayers (arXiv 2603.15031).

    Attention and MLP count separately. Sublayers form blocks of ``block_size``; a site reads a
    softmax mixture over the embedding, the completed blocks' sums and the running sum of its own
    block. There is one site before each sublayer and one before the output head.

    .. code-block:: python

        attn_res = BlockAttnRes(num_sublayers=L, dim=D, block_size=S)
        stream = attn_res.start(embedding)
        for l, layer in enumerate(sublayers):
            x = stream.read(norm_weight[l])  # pending add + mixture + pre-norm
            stream.write(layer(x))
        y = stream.finish(final_norm_weight)

    With the queries at zero, where they start, the network computes the same function as its plain
    pre-norm counterpart (up to eps).

    Args:
        num_sublayers: L.
        dim: width D of the residual stream.
        block_size: sublayers in a block; 1 is Full AttnRes, L a single block.
        key_weight: whether the keys' RMSNorm has a learned weight at each site.
        scale: factor of the logits; the paper and Kimi K3 use 1.
        eps: of the keys' RMSNorm.
        query_dim: width R of the queries; R < D reads the last R coordinates as keys.

    Attributes:
        queries: [L + 1, R] pseudo-queries, zero at initialisation; the last is the output's.
        key_weight: [L + 1, R] weights, one at initialisation, or None.
    """

    def __init__(
        self,
        num_sublayers: int,
        dim: int,
        block_size: int = 8,
        *,
        key_weight: bool = True,
        scale: float = 1.0,
        eps: float = 1e-6,
        query_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        self.num_sublayers = _check.positive_int(op, "num_sublayers", num_sublayers)
        self.dim = _check.positive_int(op, "dim", dim)
        self.block_size = _check.positive_int(op, "block_size", block_size)
        self.scale = _check.finite(op, "scale", scale)
        self.eps = _check.positive(op, "eps", eps)
        self.query_dim = _check.positive_int(
            op, "query_dim", dim if query_dim is None else query_dim
        )
        if self.query_dim > self.dim:
            raise ValueError(f"{op}: query_dim is {query_dim}, expected at most dim, {dim}")
        # The final aggregation reads every block and the embedding.
        num_sources = -(-num_sublayers // block_size) + 1
        if num_sources > _check.MAX_SOURCES:
            raise ValueError(
                f"{op}: {num_sublayers} sublayers in blocks of {block_size} make {num_sources} "
                f"sources, expected at most {_check.MAX_SOURCES}; use larger blocks"
            )
        if min(block_size, num_sublayers) > _check.MAX_QUERIES:
            raise ValueError(
                f"{op}: block_size is {block_size}, expected at most {_check.MAX_QUERIES}"
            )
        shape = (num_sublayers + 1, self.query_dim)
        self.queries = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
        self.key_weight: nn.Parameter | None
        if key_weight:
            self.key_weight = nn.Parameter(torch.ones(shape, device=device, dtype=dtype))
        else:
            self.register_parameter("key_weight", None)

    @classmethod
    def kimi_k3(
        cls, num_layers: int, dim: int, block_size: int = 12, *, eps: float = 1e-5, **options: Any
    ) -> BlockAttnRes:
        """The layout of Kimi K3: ``block_size`` counts decoder layers, of two sublayers each.

        K3 mixes the snapshots with the raw running prefix, then at a block boundary stores the
        prefix as a snapshot and starts a new one: the same sources as here, where the finished
        block becomes a source before the boundary's site reads.
        """
        _check.positive_int("kimi_k3", "num_layers", num_layers)
        _check.positive_int("kimi_k3", "block_size", block_size)
        return cls(2 * num_layers, dim, 2 * block_size, eps=eps, **options)

    def reset_parameters(self) -> None:
        """Zero queries and unit key weights, as at construction."""
        nn.init.zeros_(self.queries)
        if self.key_weight is not None:
            nn.init.ones_(self.key_weight)

    def plan(self) -> Plan:
        """The schedule: ``print(attn_res.plan())``."""
        return Plan(self.num_sublayers, self.block_size)

    def site_sources(self, site: int) -> list[int]:
        """What a site reads, in the order of its probabilities: see :meth:`Plan.site_sources`."""
        return self.plan().site_sources(site)

    def start(self, embedding: Tensor, *, return_probs: bool = False) -> Stream:
        """Begins a forward pass.

        Args:
            embedding: [..., D], the input of the first sublayer; its dtype is the stream's.
            return_probs: collect each site's probabilities in ``stream.probabilities``.
        """
        return Stream(self, embedding, return_probs)

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        parts = [f"{self.num_sublayers}", f"dim={self.dim}", f"block_size={self.block_size}"]
        if self.query_dim != self.dim:
            parts.append(f"query_dim={self.query_dim}")
        if self.key_weight is None:
            parts.append("key_weight=False")
        if self.scale != 1.0:
            parts.append(f"scale={self.scale}")
        parts.append(f"eps={self.eps}")
        return ", ".join(parts)
