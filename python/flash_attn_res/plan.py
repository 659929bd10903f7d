"""The block schedule: which site reads what, and by which of the two exact forms."""

from __future__ import annotations

import dataclasses

EMBEDDING = 0
"""Label of the embedding among the sources of a site; block j has label j."""

PARTIAL = -1
"""Label of the running partial sum of the site's own block."""


@dataclasses.dataclass(frozen=True)
class Block:
    """A run of sublayers that share their completed sources."""

    index: int  #: 1 for the first block; source label of its representation
    first: int  #: its first sublayer
    size: int  #: number of sublayers S
    num_sources: int  #: completed sources n: the embedding and the blocks before

    def two_phase_units(self) -> int:
        """Traffic of phase 1 and one advance a sublayer, forward and backward, in T * D units."""
        n, s = self.num_sources, self.size
        return (n + s) + (3 * n + s) + 5 * s + 6 * s

    def one_shot_units(self) -> int:
        """Traffic of reading every source at every sublayer, forward and backward."""
        n, s = self.num_sources, self.size
        return s * ((n + 4) + (3 * n + 4))

    @property
    def two_phase(self) -> bool:
        """Whether phase 1 once a block moves fewer bytes than reading all sources at each site.

        A block of one sublayer (Full AttnRes) has no partial sum to merge: one read is
        cheapest.
        """
        return self.size > 1 and self.two_phase_units() < self.one_shot_units()


@dataclasses.dataclass(frozen=True)
class Plan:
    """The schedule of a network of ``num_sublayers``; print it to see the table."""

    num_sublayers: int
    block_size: int

    @property
    def blocks(self) -> list[Block]:
        """The blocks in order; the last one is short if L is not a multiple of S."""
        return [self.block_of(first) for first in range(0, self.num_sublayers, self.block_size)]

    def block_of(self, sublayer: int) -> Block:
        """The block that a sublayer belongs to."""
        index = sublayer // self.block_size
        first = index * self.block_size
        size = min(self.block_size, self.num_sublayers - first)
        return Block(index=index + 1, first=first, size=size, num_sources=index + 1)

    def site_sources(self, site: int) -> list[int]:
        """Labels of what a site reads, in the order of its probabilities.

        0 is the embedding, j block j, and -1 the running partial sum. Site L, the last, is the
        final aggregation over all blocks.
        """
        if not 0 <= site <= self.num_sublayers:
            raise ValueError(
                f"site_sources: site is {site}, expected 0 to {self.num_sublayers} "
                "(the final aggregation)"
            )
        if site == self.num_sublayers:
            return list(range(len(self.blocks) + 1))
        block = self.block_of(site)
        labels = list(range(block.num_sources))
        return labels if site == block.first else [*labels, PARTIAL]

    def __str__(self) -> str:
        rows = [("block", "sublayers", "sources", "form", "units", "other form")]
        for block in self.blocks:
            last = block.first + block.size - 1
            units = (block.two_phase_units(), block.one_shot_units())
            forms = ("phase 1 + advance", "one-shot")
            chosen = 0 if block.two_phase else 1
            rows.append(
                (
                    str(block.index),
                    str(last) if last == block.first else f"{block.first}-{last}",
                    str(block.num_sources),
                    forms[chosen],
                    str(units[chosen]),
                    f"{forms[1 - chosen]}: {units[1 - chosen]}",
                )
            )
        rows.append(("out", "", str(len(self.blocks) + 1), "one-shot", "", ""))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        title = (
            f"{self.num_sublayers} sublayers in {len(self.blocks)} blocks of {self.block_size}; "
            "units: T * D elements read or written, forward and backward"
        )
        return "\n".join([title, *lines])
