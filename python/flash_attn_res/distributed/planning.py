"""What Attention Residuals add to a distributed network: memory, bytes that travel, time."""

from __future__ import annotations

import dataclasses

from flash_attn_res.distributed.layout import PipelineLayout


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Counted for a network of L sublayers of width D over P x V stages and a group of TP ranks.

    Memory and time are those of blocks and running sums alone: not of parameters, of optimizers or
    of what layers keep. Tokens are sharded over the tensor-parallel group.

    Attributes:
        layers, dim, block_size: sublayers L, D, S.
        pp, vpp: ranks of the pipeline, and virtual stages of each.
        tp: ranks of the tensor-parallel group.
        seq: tokens T of a micro-batch.
        value_bytes: of an element of the stream.
        grad_bytes: of an element of the buffers that sum the gradients of blocks.
    """

    layers: int
    dim: int
    block_size: int
    pp: int = 1
    vpp: int = 1
    tp: int = 1
    seq: int = 8192
    value_bytes: int = 2
    grad_bytes: int = 4

    def layout(self, cache: bool = True) -> PipelineLayout:
        """Stages of equal size."""
        return PipelineLayout.even(self.layers, self.block_size, self.pp, self.vpp, cache=cache)

    @property
    def tokens(self) -> int:
        """Of a device."""
        return -(-self.seq // self.tp)

    @property
    def value(self) -> int:
        """Bytes of one [T / TP, D] value."""
        return self.tokens * self.dim * self.value_bytes

    def transitions(self, cache: bool = True) -> list[int]:
        """Bytes that each transition carries for one micro-batch, forward, from each device."""
        layout = self.layout(cache)
        return [layout.values_received(c) * self.value for c in range(1, layout.num_stages)]

    def in_flight(self, rank: int) -> int:
        """Micro-batches whose forward is done and whose backward is not, at most.

        1F1B holds P - rank; interleaved 1F1B warms up 2 (P - rank - 1) + (V - 1) P chunks and one
        more, which belong to so many micro-batches at most.
        """
        if self.vpp == 1:
            return self.pp - rank
        return min(2 * (self.pp - rank - 1) + (self.vpp - 1) * self.pp + 1, 2 * self.pp)

    def blocks_memory(self, rank: int) -> int:
        """Bytes of the blocks that a rank holds at most, of all micro-batches in flight."""
        return self.in_flight(rank) * self.layout().values_held(rank) * self.value

    def gradients_memory(self, rank: int) -> int:
        """Bytes of the gradient buffers of one micro-batch's blocks."""
        return self.layout().values_held(rank) * self.tokens * self.dim * self.grad_bytes

    def describe(self, links: list[float]) -> str:
        """The table that ``flash-attn-res plan`` prints; links in GB/s a direction."""
        layout = self.layout()
        sources = -(-self.layers // self.block_size) + 1
        lines = [
            f"{self.layers} sublayers of width {self.dim} in {sources - 1} blocks of "
            f"{self.block_size}; {self.seq} tokens, {self.value_bytes}-byte values",
            f"pipeline of {self.pp} x {self.vpp} stages, tensor-parallel group of {self.tp}: "
            f"{self.tokens} tokens a device, {_size(self.value)} a value",
            "",
            "prefill or one device's forward: embedding and blocks "
            f"{_size(sources * self.value)} a device",
        ]
        rows: list[tuple[str, ...]] = [
            ("rank", "stages", "blocks held", "in flight", "blocks", "gradient buffers")
        ]
        rows += [
            (
                str(rank),
                ", ".join(map(str, layout.stages_of(rank))),
                str(layout.values_held(rank)),
                str(self.in_flight(rank)),
                _size(self.blocks_memory(rank)),
                _size(self.gradients_memory(rank)),
            )
            for rank in range(self.pp)
        ]
        lines += ["", "memory a device while training", *_table(rows)]
        if layout.num_stages > 1:
            cached, naive = self.transitions(), self.transitions(cache=False)
            speeds = (f"ms at {link:g} GB/s" for link in links)
            rows = [("transition", "carries", "bytes", "without cache", *speeds)]
            for stage, (some, every) in enumerate(zip(cached, naive, strict=True)):
                count = len(layout.received(stage + 1))
                carries = f"{count} blocks" + " + sum" * layout.has_partial(stage + 1)
                times = (f"{some / link / 1e6:.2f}" for link in links)
                rows.append((f"{stage}-{stage + 1}", carries, _size(some), _size(every), *times))
            total = (f"{sum(cached) / link / 1e6:.2f}" for link in links)
            rows.append(("all", "", _size(sum(cached)), _size(sum(naive)), *total))
            lines += ["", "a micro-batch forward; its backward returns as much", *_table(rows)]
        if self.tp > 1:
            moved = (self.tp - 1) * self.value
            spent = ", ".join(f"{moved / link / 1e6:.2f} ms at {link:g} GB/s" for link in links)
            lines += [
                "",
                f"a sublayer's reduce-scatter, and its all-gather: {_size(moved)} a device each "
                f"({spent}); together as much as the all-reduce that they take the place of",
            ]
        return "\n".join(lines)


def _size(count: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:.0f} B"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
