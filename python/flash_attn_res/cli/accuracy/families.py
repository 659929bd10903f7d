"""The inputs: families of values over depth, as a network meets them and as a kernel fears them.

All values are ones that bfloat16 has, so that every storage of 16 bits and more starts from the
same numbers (a family whose values an fp16 cannot hold shows that).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LARGE = 1024.0  # magnitude of the last source of "growing" over that of the first
COMMON = 16.0  # magnitude of what all sources of "common" share over what they do not
PEAKED = 30.0  # standard deviation of the logits of "peaked"


@dataclass
class Inputs:
    """One family's values for N sources, T tokens, width D and S queries; float32, on the CPU."""

    sources: Tensor  # [N, T, D]
    partial: Tensor  # [T, D]
    update: Tensor  # [T, D]
    queries: Tensor  # [S, D]
    key_weight: Tensor  # [S, D]
    norm_weight: Tensor  # [D]


@dataclass(frozen=True)
class Size:
    """N sources, S queries, T tokens, width D."""

    N: int
    S: int
    T: int
    D: int


def generator_for(seed: int, *names: object) -> torch.Generator:
    """The same numbers for the same seed and names, whatever else is drawn beside them."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def storable(x: Tensor) -> Tensor:
    """X at bfloat16's values, in float32."""
    return x.bfloat16().float()


def gaussian(size: Size, generator: torch.Generator) -> Inputs:
    """Independent normal values; logits of standard deviation 1."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    N, S, T, D = size.N, size.S, size.T, size.D
    return Inputs(
        sources=normal(N, T, D),
        partial=normal(T, D),
        update=normal(T, D),
        queries=normal(S, D) / D**0.5,
        key_weight=1 + 0.1 * normal(S, D),
        norm_weight=1 + 0.1 * normal(D),
    )


def flat(size: Size, generator: torch.Generator) -> Inputs:
    """Zero queries, as where training begins: all probabilities are equal."""
    x = gaussian(size, generator)
    x.queries.zero_()
    return x


def peaked(size: Size, generator: torch.Generator) -> Inputs:
    """Logits so far apart that one source takes nearly everything."""
    x = gaussian(size, generator)
    x.queries *= PEAKED
    return x


def common(size: Size, generator: torch.Generator) -> Inputs:
    """All values share a large part: differences between sources drown in it."""
    x = gaussian(size, generator)
    shared = COMMON * torch.randn(size.T, size.D, generator=generator)
    x.sources += shared
    x.partial += shared
    return x


def growing(size: Size, generator: torch.Generator) -> Inputs:
    """Magnitudes that grow with depth, geometrically; the partial sum is the largest."""
    x = gaussian(size, generator)
    steps = torch.arange(size.N) / max(1, size.N - 1)
    x.sources *= (LARGE**steps)[:, None, None]
    x.partial *= LARGE
    x.update *= LARGE
    return x


FAMILIES: dict[str, Callable[[Size, torch.Generator], Inputs]] = {
    "gaussian": gaussian,
    "flat": flat,
    "peaked": peaked,
    "common": common,
    "growing": growing,
}
DEPTH = "depth"  # hidden states of a trained model: `states.States`
NETWORKS = {"network of 32": 32, "network of 128": 128}
LONGEST = "network of 128"  # which takes half the time of all, where float16 is slow
ALL = (*FAMILIES, DEPTH, *NETWORKS)


def draw(family: str, size: Size, seed: int) -> Inputs:
    """The inputs of a drawn family, at values that bfloat16 has."""
    x = FAMILIES[family](size, generator_for(seed, family, size))
    return Inputs(**{name: storable(value) for name, value in vars(x).items()})
