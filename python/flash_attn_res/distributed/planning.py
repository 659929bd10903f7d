"""What Attention Residuals add to a distributed network: memory, bytes that travel, time."""

from __future__ import annotations

import dataclasses
from functools import cached_property

from flash_attn_res.distributed import schedule
from flash_attn_res.distributed.layout import PipelineLayout
from flash_attn_res.distributed.schedule import Action


@dataclasses.dataclass(frozen=True)
class Memory:
    """The most that a rank holds at a time in a step, in bytes; each number at its own moment.

    Attributes:
        in_flight: micro-batches of which a backward is still to come.
        blocks: the embedding and completed blocks.
        sums: running sums of blocks that are not complete, one for each site that reads one.
        buffers: gradients of blocks, while they are added up.
        together: blocks, sums and buffers.
        plain: what a plain residual stream keeps meanwhile: the input of each norm.
    """

    in_flight: int = 0
    blocks: int = 0
    sums: int = 0
    buffers: int = 0
    together: int = 0
    plain: int = 0

    def most(self, other: Memory) -> Memory:
        """The larger of each."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Memory(*(max(pair) for pair in pairs))


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Counted for a network of L sublayers of width D over P x V stages and a group of TP ranks.

    Memory and time are those of the residual stream alone: not of parameters, of optimizers or of
    what layers keep. Tokens are sharded over the tensor-parallel group. One stage a rank runs 1F1B,
    several run interleaved 1F1B.

    Attributes:
        layers, dim, block_size: sublayers L, D, S.
        pp, vpp: ranks of the pipeline, and virtual stages of each.
        tp: ranks of the tensor-parallel group.
        seq: tokens T of a micro-batch.
        micro_batches: M of a step.
        value_bytes: of an element of the stream.
        sum_bytes: of an element of a running sum; those of the stream if None.
        grad_bytes: of an element of the buffers that sum the gradients of blocks.
    """

    layers: int
    dim: int
    block_size: int
    pp: int = 1
    vpp: int = 1
    tp: int = 1
    seq: int = 8192
    micro_batches: int = 1
    value_bytes: int = 2
    sum_bytes: int | None = None
    grad_bytes: int = 4

    def layout(self, cache: bool = True) -> PipelineLayout:
        """Stages of equal size."""
        return PipelineLayout.even(self.layers, self.block_size, self.pp, self.vpp, cache=cache)

    @cached_property
    def _layout(self) -> PipelineLayout:
        return self.layout()

    @property
    def tokens(self) -> int:
        """Of a device."""
        return -(-self.seq // self.tp)

    @property
    def value(self) -> int:
        """Bytes of one [T / TP, D] value."""
        return self.tokens * self.dim * self.value_bytes

    @property
    def wide(self) -> int:
        """Bytes of a running sum [T / TP, D]."""
        return self.tokens * self.dim * (self.sum_bytes or self.value_bytes)

    def transitions(self, cache: bool = True) -> list[int]:
        """Bytes that each transition carries for one micro-batch, forward, from each device."""
        layout = self.layout(cache)
        return [
            len(layout.received(stage)) * self.value + layout.has_partial(stage) * self.wide
            for stage in range(1, layout.num_stages)
        ]

    def sent(self, rank: int) -> int:
        """Bytes that a device sends to other stages in a step, forward and backward."""
        layout, carried = self._layout, self.transitions()
        stages = layout.stages_of(rank)
        forward = sum(carried[stage] for stage in stages if stage + 1 < layout.num_stages)
        # Gradients travel in the dtype of what they are of, the way that it came.
        backward = sum(carried[stage - 1] for stage in stages if stage > 0)
        return self.micro_batches * (forward + backward)

    def actions(self, rank: int) -> list[Action]:
        """What the rank runs in a step, in order."""
        return schedule.actions(self.pp, self.vpp, self.micro_batches, rank)

    def memory(self, rank: int) -> Memory:
        """What the rank holds, followed through its schedule.

        A block is held once, from its completion or arrival to the last backward that reads it.
        Gradient buffers of a micro-batch live from the first to the last of its backwards.
        """
        layout = self._layout
        own = layout.stages_of(rank)
        waiting: dict[int, list[int]] = {}  # by micro-batch: stages whose backward is to come
        buffers: dict[int, int] = {}  # by micro-batch: sources whose gradients are added up
        grad = self.tokens * self.dim * self.grad_bytes
        peak = Memory()
        for backward, stage, micro_batch in self.actions(rank):
            stages = waiting.setdefault(micro_batch, [])
            if backward:
                buffers[micro_batch] = self._complete(stage)
            else:
                stages.append(stage)
            blocks = sums = plain = 0
            for index, alive in waiting.items():
                more = index not in buffers and alive[-1] < own[-1]  # forwards are to come
                blocks += self._complete(alive[-1]) if more else self._read(alive[-1])
                sums += sum(map(self._sums, alive))
                plain += sum(len(layout.sites(each)) for each in alive)
            blocks *= self.value
            gradients = sum(buffers.values()) * grad
            together = blocks + sums + gradients
            now = (len(waiting), blocks, sums, gradients, together, plain * self.value)
            peak = peak.most(Memory(*now))
            if backward:
                stages.remove(stage)
                buffers[micro_batch] = layout.known(stage)
                if not stages:
                    del waiting[micro_batch], buffers[micro_batch]
        return peak

    def _read(self, stage: int) -> int:
        """Sources that the sites of a stage read; the last running sum of all is none."""
        return (self._layout.bounds[stage + 1] - 1) // self.block_size + 1

    def _complete(self, stage: int) -> int:
        """Sources that are complete when a stage has run."""
        last = stage + 1 == self._layout.num_stages
        return self._read(stage) if last else self._layout.completed(stage + 1)

    def _sums(self, stage: int) -> int:
        """Bytes of the running sums that a stage keeps for its backward."""
        layout, S = self._layout, self.block_size
        first, end = layout.bounds[stage], layout.bounds[stage + 1]
        kept = self.wide if layout.has_partial(stage) else 0
        # The sum behind the stage's last sublayer is kept by who reads it.
        for sublayer in range(first, end if end == self.layers else end - 1):
            if (sublayer + 1) % S or sublayer + 1 == self.layers:  # else it is a block
                kept += self.wide if sublayer % S else self.value  # the first output as it came
        return kept

    def describe(self, links: list[float]) -> str:
        """The table that ``flash-attn-res plan`` prints; links in GB/s a direction."""
        layout = self._layout
        sources = -(-self.layers // self.block_size) + 1
        lines = [
            f"{self.layers} sublayers of width {self.dim} in {sources - 1} blocks of "
            f"{self.block_size}; {self.seq} tokens, {self.value_bytes}-byte values",
            f"pipeline of {self.pp} x {self.vpp} stages, tensor-parallel group of {self.tp}: "
            f"{self.tokens} tokens a device, {_size(self.value)} a value",
            "",
            "prefill or one device's forward: embedding and blocks "
            f"{_size(sources * self.value)} a device",
            "",
            f"a training step of {self.micro_batches} micro-batches: most bytes that a device "
            "holds of the residual stream",
        ]
        header = ("rank", "stages", "in flight", "blocks", "running sums", "gradient buffers")
        rows: list[tuple[str, ...]] = [(*header, "together", "plain residuals")]
        for rank in range(self.pp):
            held = self.memory(rank)
            sizes = (held.blocks, held.sums, held.buffers, held.together, held.plain)
            stages = ", ".join(map(str, layout.stages_of(rank)))
            rows.append((str(rank), stages, str(held.in_flight), *map(_size, sizes)))
        lines += _table(rows)
        if layout.num_stages > 1:
            share = schedule.bubble(self.pp, self.vpp, self.micro_batches)
            cached, naive = self.transitions(), self.transitions(cache=False)
            rows = [("transition", "carries", "bytes", "without cache", *_headers(links))]
            for stage, (some, every) in enumerate(zip(cached, naive, strict=True)):
                count = len(layout.received(stage + 1))
                carries = "1 block" if count == 1 else f"{count} blocks"
                carries += " + sum" * layout.has_partial(stage + 1)
                places = (f"{stage}-{stage + 1}", carries, _size(some), _size(every))
                rows.append((*places, *_times(some, links)))
            busiest = max(range(self.pp), key=self.sent)
            total = self.sent(busiest)
            rows.append(
                ("all", "", _size(sum(cached)), _size(sum(naive)), *_times(sum(cached), links))
            )
            rows.append(("a step", f"from rank {busiest}", _size(total), "", *_times(total, links)))
            lines += [
                f"bubble: {100 * share:.1f} % of a step; stages take equal times, backwards twice "
                "those of forwards, transfers none",
                "",
                "a micro-batch forward, and what the busiest rank sends in a step, forward and "
                "backward",
                *_table(rows),
            ]
        if self.tp > 1:
            moved = (self.tp - 1) * self.value
            sublayers = max(
                sum(len(layout.sublayers(stage)) for stage in layout.stages_of(rank))
                for rank in range(self.pp)
            )
            step = 4 * self.micro_batches * sublayers * moved
            rows = [
                ("collectives", "bytes", *_headers(links)),
                ("reduce-scatter, all-gather: each", _size(moved), *_times(moved, links)),
                ("a step, forward and backward", _size(step), *_times(step, links)),
            ]
            lines += [
                "",
                "a sublayer's collectives, a device; together as much as the all-reduce that they "
                "take the place of",
                *_table(rows),
            ]
        return "\n".join(lines)


def _headers(links: list[float]) -> list[str]:
    return [f"ms at {link:g} GB/s" for link in links]


def _times(count: float, links: list[float]) -> list[str]:
    return [f"{count / link / 1e6:.2f}" for link in links]


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
