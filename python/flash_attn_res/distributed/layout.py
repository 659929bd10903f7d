"""Which stage of a pipeline runs what, and what travels between stages.

With C stages of which each completes N_p blocks on average, a token's width D, P ranks and V
virtual stages a rank (C = P V), section 4.1 of the paper (arXiv 2603.15031) counts, in elements a
token::

    naive    C (C - 1) / 2 * N_p D                              every block goes to every stage
    cached   P (P - 1) / 2 * N_p D + (V - 1) P^2 * N_p D        a rank keeps what it received

A rank also has the blocks that it completed itself. They need not come back to it, so that a
transition of a later virtual stage carries (P - 1) N_p blocks rather than P N_p, and the cached
volume here is (V - 1) P * N_p D below the paper's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from flash_attn_res import _check


@dataclasses.dataclass(frozen=True)
class PipelineLayout:
    """The sublayers of each stage, and the rank that runs it.

    A source is named by its index: 0 is the embedding, j the sum of block j. Blocks need not end
    where stages do: a stage that begins in the middle of a block receives the running sum, too.

    Args:
        num_sublayers: L.
        block_size: S.
        bounds: first sublayer of each stage, and L: C + 1 increasing numbers, from 0 to L.
        ranks: rank in the pipeline's group of each stage.
        cache: whether a rank keeps blocks for its later stages; else all travel every time.
    """

    num_sublayers: int
    block_size: int
    bounds: tuple[int, ...]
    ranks: tuple[int, ...]
    cache: bool = True

    def __post_init__(self) -> None:
        op = "PipelineLayout"
        L = _check.positive_int(op, "num_sublayers", self.num_sublayers)
        _check.positive_int(op, "block_size", self.block_size)
        object.__setattr__(self, "bounds", tuple(self.bounds))
        object.__setattr__(self, "ranks", tuple(self.ranks))
        steps = zip(self.bounds, self.bounds[1:], strict=False)
        if len(self.bounds) < 2 or self.bounds[0] != 0 or self.bounds[-1] != L:
            raise ValueError(f"{op}: bounds are {self.bounds}, expected to go from 0 to {L}")
        if any(first >= end for first, end in steps):
            raise ValueError(
                f"{op}: bounds are {self.bounds}, expected to increase: every stage has a sublayer"
            )
        if len(self.ranks) != self.num_stages:
            raise ValueError(
                f"{op}: ranks has {len(self.ranks)} items, expected {self.num_stages}, one a stage"
            )
        if sorted(set(self.ranks)) != list(range(self.num_ranks)):
            raise ValueError(
                f"{op}: ranks are {self.ranks}, expected every rank from 0 to {self.num_ranks - 1}"
            )
        for stage, pair in enumerate(zip(self.ranks, self.ranks[1:], strict=False)):
            if pair[0] == pair[1]:
                raise ValueError(
                    f"{op}: stages {stage} and {stage + 1} are both on rank {pair[0]}; make one "
                    "stage of them"
                )

    @classmethod
    def even(
        cls,
        num_sublayers: int,
        block_size: int,
        num_ranks: int,
        num_virtual: int = 1,
        *,
        cache: bool = True,
    ) -> PipelineLayout:
        """P V stages of equal size (as nearly as L allows), stage c on rank c mod P."""
        stages = _check.positive_int("even", "num_ranks", num_ranks) * _check.positive_int(
            "even", "num_virtual", num_virtual
        )
        bounds = tuple(num_sublayers * stage // stages for stage in range(stages + 1))
        ranks = tuple(stage % num_ranks for stage in range(stages))
        return cls(num_sublayers, block_size, bounds, ranks, cache)

    @property
    def num_stages(self) -> int:
        """C."""
        return len(self.bounds) - 1

    @property
    def num_ranks(self) -> int:
        """P."""
        return max(self.ranks) + 1

    def sublayers(self, stage: int) -> range:
        """The sublayers of a stage."""
        return range(self.bounds[stage], self.bounds[stage + 1])

    def sites(self, stage: int) -> range:
        """The reading sites of a stage: its sublayers, and the output's if it is the last."""
        last = stage == self.num_stages - 1
        return range(self.bounds[stage], self.bounds[stage + 1] + int(last))

    def stages_of(self, rank: int) -> list[int]:
        """The stages of a rank, first to last."""
        return [stage for stage, owner in enumerate(self.ranks) if owner == rank]

    def completed(self, stage: int) -> int:
        """Sources that are complete where a stage begins: the embedding and the blocks before."""
        return self.bounds[stage] // self.block_size + 1

    def known(self, stage: int) -> int:
        """Sources that the stage's rank has already when the stage receives."""
        before = [s for s in self.stages_of(self.ranks[stage]) if s < stage] if self.cache else []
        return self.completed(before[-1] + 1) if before else 0

    def received(self, stage: int) -> range:
        """The sources that a stage takes in; stage 0 makes the embedding itself."""
        return range(self.known(stage), self.completed(stage)) if stage > 0 else range(0)

    def sent(self, stage: int) -> range:
        """The sources that a stage sends on."""
        return self.received(stage + 1) if stage + 1 < self.num_stages else range(0)

    def has_partial(self, stage: int) -> bool:
        """Whether the stage begins in the middle of a block and so receives the running sum."""
        return self.bounds[stage] % self.block_size != 0

    def values_received(self, stage: int) -> int:
        """[T, D] values that a stage takes in, forward; its backward returns as many."""
        return len(self.received(stage)) + int(self.has_partial(stage)) if stage > 0 else 0

    def blocks_sent(self) -> int:
        """Sources that all transitions carry for one micro-batch, forward."""
        return sum(len(self.received(stage)) for stage in range(self.num_stages))


def paper_volume(
    num_ranks: int, num_virtual: int, blocks_per_stage: float, *, cache: bool
) -> float:
    """Equations 7 and 8 of the paper: values [T, D] that all transitions carry, embedding apart."""
    P, V = num_ranks, num_virtual
    if not cache:
        return P * V * (P * V - 1) / 2 * blocks_per_stage
    return (P * (P - 1) / 2 + (V - 1) * P * P) * blocks_per_stage


def check_stage(op: str, layout: PipelineLayout, stage: int) -> int:
    """A stage of the layout."""
    if isinstance(stage, bool) or not isinstance(stage, int):
        raise TypeError(f"{op}: stage is {stage!r}, expected an integer")
    if not 0 <= stage < layout.num_stages:
        raise ValueError(f"{op}: stage is {stage}, expected 0 to {layout.num_stages - 1}")
    return stage


def spans(numbers: Sequence[int]) -> str:
    """``0-3`` or ``none``, for messages."""
    return f"{numbers[0]}-{numbers[-1]}" if numbers else "none"
