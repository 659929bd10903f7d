"""The schedule of a network: which site reads what, and in which of the exact forms.

A *site* is a place where a mixture is read: one before each sublayer, one at the output (site L).
Sites that read their sources through one phase 1 form a *group*: a run of whole blocks, of which
the last may take the output's site along. In a group of ``size`` sites that begins with n completed
sources, phase 1 computes the mixtures of the n sources for all its sites at once; a site then reads
its phase-1 result, the blocks that were completed inside the group, and the running sum. With one
block a group this is Algorithm 1 of the paper (arXiv 2603.15031); with several blocks of one
sublayer it is the schedule of its appendix B for Full AttnRes. A group without phase 1 (*one-shot*)
reads every source at every site. All forms compute the same function.

The planner counts bytes. With e bytes an element of the storage dtype, a of the gradient buffers,
n completed sources and m of the group's own, one token and one unit of width cost

====================  =========================================================================
phase 1               e (n + size), and again when it is recomputed in the backward;
                      its backward e (n + size) + 2 a n
read                  e (phase 1 + sources read directly + pending tensors + new sum + x)
read, backward        e (dx + phase 1 + sources + sum + its incoming gradient + dh + dsum)
                      + 2 a (sources)
running sum           where sums have a dtype of their own, of f bytes: f in place of e for a sum
                      of two outputs or more and for its gradients; f + e for what the backward
                      hands on to the output, and for a sum that a read makes a source
closing a block       3 e for the last addition, e + a for the gradient that it hands on
                      (a read that ends a block, and so needs no closing, costs a for it)
storing a source      where sources have a storage of their own, of s bytes an element: e (pending
                      tensors) + s, in place of the last addition
====================  =========================================================================

and dynamic programming over the block boundaries finds the cheapest sequence of groups. Groups of
several blocks hold the phase-1 results of more sites at a time: they are chosen where they save
:data:`MIN_GAIN` of the bytes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

EMBEDDING = 0
"""Label of the embedding among the sources of a site; block j has label j."""

PARTIAL = -1
"""Label of the running partial sum of the site's own block."""

FORMS = ("auto", "two_phase", "one_shot")
"""How a block may read: by counted bytes, through phase 1, or every source at every site."""

MAX_GROUP = 128
"""Sites that one phase 1 can serve: the queries of one ``attend``."""

MIN_GAIN = 0.05
"""Share of the bytes that groups of several blocks must save over groups of one.

They hold the phase-1 results of more sites at a time, and their reads have more terms.
"""


@dataclasses.dataclass(frozen=True)
class Block:
    """A run of sublayers whose outputs are summed; the sum is a source of later blocks."""

    index: int  #: 1 for the first block; source label of its representation
    first: int  #: its first sublayer
    size: int  #: number of sublayers S
    num_sources: int  #: completed sources before it: the embedding and the blocks before


@dataclasses.dataclass(frozen=True)
class Group:
    """A run of sites that read in one form."""

    index: int
    first: int  #: its first site
    size: int  #: number of sites
    num_sources: int  #: completed sources at its first site
    two_phase: bool  #: whether a phase 1 over these sources serves all its sites


@dataclasses.dataclass(frozen=True)
class Site:
    """What one read is given, besides the pending output."""

    index: int
    group: Group
    opens: bool  #: the group's phase 1 runs before this read
    closes: bool  #: before that, what is pending becomes a source
    slot: int  #: row of the phase-1 result; -1: none
    first_direct: int  #: sources from this one on are read directly
    num_sources: int  #: completed sources at this read; first_direct to here are read directly
    promotes: bool  #: the sum that this read completes is a source from here on
    output: bool  #: the final aggregation: nothing is added to its sum


@dataclasses.dataclass(frozen=True)
class Costs:
    """What the planner counts by."""

    training: bool = True  #: forward, recomputed phase 1 and backward; else forward alone
    storage_bytes: int = 2  #: of an element of the stream
    sum_bytes: int | None = None  #: of an element of a running sum; None: that of the stream
    source_bytes: int | None = None  #: of an element of a stored source; None: kept as they come
    grad_bytes: int = 4  #: of an element of the buffers that sum the gradients of the sources
    recompute: bool = True  #: the backward computes phase 1 again

    @property
    def source(self) -> int:
        """Bytes of an element of a completed source."""
        return self.storage_bytes if self.source_bytes is None else self.source_bytes

    def sum(self, pending: int) -> int:
        """Bytes of an element of the sum of so many outputs: one is a sum as it stands."""
        return self.storage_bytes if self.sum_bytes is None or pending < 2 else self.sum_bytes

    def addends(self, pending: int) -> int:
        """Bytes of what a sum of so many outputs is made of: the sum before, and the last one."""
        return self.storage_bytes * min(pending, 1) + self.sum(pending - 1) * int(pending > 1)

    def handed_on(self, pending: int, gradient: int) -> int:
        """Bytes of turning the gradient of a sum, of ``gradient`` bytes, to what was added."""
        e = self.storage_bytes
        wanted = {e, self.sum(pending - 1)} if pending > 1 else {e}
        return sum(gradient + own for own in wanted if own != gradient)

    def phase1(self, sources: int, queries: int) -> int:
        """Bytes of phase 1 and of what it adds to the backward, for T = D = 1."""
        once = self.source * sources + self.storage_bytes * queries
        if not self.training:
            return once
        again = once if self.recompute else 0
        return once + again + once + 2 * self.grad_bytes * sources

    def read(
        self, phase1: bool, direct: int, pending: int, sum_grad: int, as_it_came: bool = False
    ) -> int:
        """Bytes of a read behind ``pending`` outputs of its block, and of its backward.

        ``sum_grad`` are the bytes of an element of the gradient that comes in for the sum;
        ``as_it_came``: what is read directly is no stored source.
        """
        e, own = self.storage_bytes, self.sum(pending)
        terms = e * int(phase1) + (e if as_it_came else self.source) * direct
        total = terms + self.addends(pending) + own * int(pending > 1) + e
        if self.training:
            # dx, the terms and the sum; dh; the sum's gradient, in and out; the sources', both ways
            total += terms + e * (1 + int(phase1)) + 2 * own * int(pending > 0) + sum_grad
            total += 2 * self.grad_bytes * direct + self.handed_on(pending, own) * int(pending > 0)
        return total

    def store(self, addends: int) -> int:
        """Bytes of quantising what takes ``addends`` bytes; 0 where sources stay as they come."""
        return 0 if self.source_bytes is None else addends + self.source_bytes

    def promote(self, pending: int) -> int:
        """Bytes of making a source of a sum that a read has written."""
        own = self.sum(pending)
        if self.source_bytes is None and own != self.storage_bytes:
            return own + self.storage_bytes
        return self.store(own)

    def close(self, pending: int) -> int:
        """Bytes of making a source of what is pending, before a phase 1 that reads it."""
        if self.source_bytes is not None:
            total = self.store(self.addends(pending))
        else:
            total = self.addends(pending) + self.storage_bytes if pending > 1 else 0
        if self.training:
            total += self.handed_on(pending, self.grad_bytes)
        return total


@dataclasses.dataclass(frozen=True)
class Plan:
    """The schedule of a network of ``num_sublayers``; print it to see the table.

    Attributes:
        num_sublayers: L.
        block_size: S.
        groups: which together cover the sites 0 to L.
        costs: what their bytes were counted by.
        tokens, dim: T and D, to print bytes for; by default for one token and a width of one.
    """

    num_sublayers: int
    block_size: int
    groups: tuple[Group, ...]
    costs: Costs = Costs()
    tokens: int | None = None
    dim: int | None = None
    sites: tuple[Site, ...] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        sites = [site for group in self.groups for site in self._sites_of(group)]
        if [site.index for site in sites] != list(range(self.num_sublayers + 1)):
            raise ValueError(
                f"Plan: the groups cover the sites {[site.index for site in sites]}, expected 0 to "
                f"{self.num_sublayers} in order"
            )
        object.__setattr__(self, "sites", tuple(sites))

    @classmethod
    def choose(
        cls,
        num_sublayers: int,
        block_size: int,
        costs: Costs | None = None,
        forms: str | Sequence[str] = "auto",
        group_blocks: int | None = None,
    ) -> Plan:
        """The plan of fewest bytes.

        Args:
            num_sublayers, block_size: L and S.
            costs: what to count by; by default training in bfloat16 with float32 gradients.
            forms: one of :data:`FORMS` for the network, or one for each block.
            group_blocks: blocks that share one phase 1; by default the cheapest number.
        """
        forms = forms if isinstance(forms, str) else tuple(forms)
        if group_blocks is not None and type(group_blocks) is not int:
            raise TypeError(f"plan: group_blocks is {group_blocks!r}, expected an integer")
        return _choose(num_sublayers, block_size, costs or Costs(), forms, group_blocks)

    @classmethod
    def _choose(
        cls,
        num_sublayers: int,
        block_size: int,
        costs: Costs,
        forms: str | tuple[str, ...],
        group_blocks: int | None,
    ) -> Plan:
        if group_blocks is None:
            single = cls._choose(num_sublayers, block_size, costs, forms, 1)
            free = cls._cheapest(num_sublayers, block_size, costs, forms, None)
            return free if free.bytes < (1 - MIN_GAIN) * single.bytes else single
        if group_blocks < 1 or (group_blocks > 1 and group_blocks * block_size > MAX_GROUP):
            raise ValueError(
                f"plan: group_blocks is {group_blocks}, expected 1 to "
                f"{max(1, MAX_GROUP // block_size)}: a phase 1 serves at most {MAX_GROUP} sites"
            )
        return cls._cheapest(num_sublayers, block_size, costs, forms, group_blocks)

    @classmethod
    def _cheapest(
        cls,
        num_sublayers: int,
        block_size: int,
        costs: Costs,
        forms: str | tuple[str, ...],
        group_blocks: int | None,
    ) -> Plan:
        num_blocks = -(-num_sublayers // block_size)
        allowed = _allowed_forms(forms, num_blocks)
        # A group ends where a block does, or after the output's site, which may stand alone.
        ends = [*range(0, num_sublayers, block_size), num_sublayers, num_sublayers + 1]
        counted = _Counted(num_sublayers, block_size, costs)
        # best[i]: bytes of the sites before ends[i]; where the last group begins; its form.
        best: list[tuple[int, int, bool] | None] = [(0, 0, False)] + [None] * (len(ends) - 1)

        def offer(begin: int, end: int, two_phase: bool, group_bytes: int) -> None:
            before, held = best[begin], best[end]
            if before is None:
                return
            total = before[0] + group_bytes
            if held is None or total < held[0]:
                best[end] = (total, begin, two_phase)

        for begin in range(len(ends) - 1):
            if "one_shot" in allowed[begin]:
                # Reads of this form cost the same in one group or in two.
                sites = range(ends[begin], ends[begin + 1])
                offer(begin, begin + 1, False, sum(counted.read(s, 0, False) for s in sites))
            sources = _sources_before(ends[begin], num_sublayers, block_size)
            reads = 0
            for end in range(begin + 1, len(ends)):
                size = ends[end] - ends[begin]
                blocks = range(begin, min(end, num_blocks))
                if size > MAX_GROUP or not all("two_phase" in allowed[b] for b in blocks):
                    break
                if group_blocks is not None and len(blocks) > group_blocks:
                    break
                for site in range(ends[end - 1], ends[end]):
                    reads += counted.read(site, sources, site == ends[begin])
                whole = group_blocks is None or (
                    begin % group_blocks == 0 and (len(blocks) == group_blocks or end >= num_blocks)
                )
                if whole:
                    opening = counted.opening(ends[begin], size, sources)
                    offer(begin, end, True, opening + reads)

        groups: list[tuple[int, int, bool]] = []
        end = len(ends) - 1
        while end > 0:
            chosen = best[end]
            if chosen is None:
                raise ValueError(
                    f"plan: no plan fits the forms {forms} and group_blocks {group_blocks}: a "
                    f"phase 1 serves at most {MAX_GROUP} sites"
                )
            _, begin, two_phase = chosen
            groups.insert(0, (ends[begin], ends[end] - ends[begin], two_phase))
            end = begin
        return cls(
            num_sublayers,
            block_size,
            tuple(
                Group(index, first, size, _sources_before(first, num_sublayers, block_size), phase1)
                for index, (first, size, phase1) in enumerate(groups)
            ),
            costs,
        )

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

    def group_bytes(self, group: Group) -> int:
        """Bytes that a group moves for one token and one unit of width."""
        counted = _Counted(self.num_sublayers, self.block_size, self.costs)
        return counted.group_bytes(group.first, group.first + group.size, group.two_phase)

    @property
    def bytes(self) -> int:
        """Bytes that the network moves for one token and one unit of width."""
        return sum(self.group_bytes(group) for group in self.groups)

    def _sites_of(self, group: Group) -> list[Site]:
        L, S = self.num_sublayers, self.block_size
        sites = []
        for site in range(group.first, group.first + group.size):
            boundary = site % S == 0 and 0 < site < L
            opens = group.two_phase and site == group.first
            closes = opens and (boundary or site == L)
            # Completed before this read; what the read itself completes comes on top.
            num_sources = 1 + min(site, L - 1) // S - int(boundary and not closes)
            if site == L and closes:
                num_sources += 1
            sites.append(
                Site(
                    index=site,
                    group=group,
                    opens=opens,
                    closes=closes,
                    slot=site - group.first if group.two_phase else -1,
                    first_direct=group.num_sources if group.two_phase else 0,
                    num_sources=num_sources,
                    promotes=boundary and not closes,
                    output=site == L,
                )
            )
        return sites

    def __str__(self) -> str:
        tokens, dim = self.tokens, self.dim
        sized = tokens is not None and dim is not None
        factor = tokens * dim / 1e9 if tokens is not None and dim is not None else 1
        unit = "GB" if sized else "bytes"

        def amount(count: int) -> str:
            return f"{count * factor:.3f}" if sized else str(count)

        rows = [("sites", "blocks", "sources", "form", unit, "other form")]
        counted = _Counted(self.num_sublayers, self.block_size, self.costs)
        for group in self.groups:
            last = group.first + group.size - 1
            blocks = sorted({min(s, self.num_sublayers - 1) // self.block_size + 1
                             for s in range(group.first, last + 1)})  # fmt: skip
            span = (group.first, last + 1)
            own, other = (counted.group_bytes(*span, form == group.two_phase) for form in (1, 0))
            names = ("one-shot", "phase 1 + read")
            rows.append(
                (
                    _span(group.first, last, self.num_sublayers),
                    str(blocks[0]) if len(blocks) == 1 else f"{blocks[0]}-{blocks[-1]}",
                    str(group.num_sources),
                    names[group.two_phase],
                    amount(own),
                    f"{names[not group.two_phase]}: {amount(other)}",
                )
            )
        rows.append(("all", "", "", "", amount(self.bytes), ""))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        work = "forward and backward" if self.costs.training else "forward"
        shape = f"T = {tokens}, D = {dim}" if sized else "one token and one unit of width"
        title = (
            f"{self.num_sublayers} sublayers in {len(self.blocks)} blocks of {self.block_size}; "
            f"{unit} read and written for {shape}, {work}, {self.costs.storage_bytes}-byte values"
        )
        if self.costs.sum_bytes is not None:
            title += f", {self.costs.sum_bytes}-byte sums"
        if self.costs.source_bytes is not None:
            title += f", {self.costs.source_bytes}-byte blocks"
        if self.costs.training:
            title += f" and {self.costs.grad_bytes}-byte gradient buffers"
        return "\n".join([title, *lines])


@dataclasses.dataclass(frozen=True)
class PartialPlan:
    """The sites of a run of sublayers, numbered from 0: what one pipeline stage runs.

    The pending sum is added up where the run ends, so that the run begins with its completed
    sources and, in the middle of a block, with the running sum.
    """

    num_sublayers: int
    groups: tuple[Group, ...]
    sites: tuple[Site, ...]


def part(plan: Plan, first: int, end: int) -> PartialPlan:
    """The sublayers first..end - 1 of a plan, and the output's site if they are the last."""
    groups: list[Group] = []
    sites: list[Site] = []
    for site in plan.sites[first : end if end < plan.num_sublayers else end + 1]:
        group = site.group
        begins = site.index == first or site.index == group.first
        if begins:
            stop = min(group.first + group.size, end + int(end == plan.num_sublayers))
            sources = group.num_sources
            if site.index == first:  # all that is complete by now is there for phase 1
                sources = first // plan.block_size + 1
            groups.append(
                Group(
                    index=len(groups),
                    first=site.index - first,
                    size=stop - site.index,
                    num_sources=sources,
                    two_phase=group.two_phase,
                )
            )
        group = groups[-1]
        start = site.index == first
        sites.append(
            Site(
                index=site.index - first,
                group=group,
                opens=group.two_phase and begins,
                closes=site.closes and not start,
                slot=site.index - first - group.first if group.two_phase else -1,
                first_direct=group.num_sources if group.two_phase else 0,
                num_sources=first // plan.block_size + 1 if start else site.num_sources,
                promotes=site.promotes and not start,
                output=site.output,
            )
        )
    return PartialPlan(end - first, tuple(groups), tuple(sites))


# Networks of one shape share their plans.
_choose = functools.lru_cache(maxsize=256)(Plan._choose)


def _span(first: int, last: int, num_sublayers: int) -> str:
    if last < num_sublayers:
        return str(first) if first == last else f"{first}-{last}"
    before = last - 1
    if first > before:
        return "out"
    return f"{first}, out" if first == before else f"{first}-{before}, out"


def _allowed_forms(forms: str | Sequence[str], num_blocks: int) -> list[tuple[str, ...]]:
    given = [forms] * num_blocks if isinstance(forms, str) else list(forms)
    if len(given) != num_blocks:
        raise ValueError(
            f"plan: forms has {len(given)} items, expected {num_blocks}, one for each block"
        )
    for form in given:
        if form not in FORMS:
            raise ValueError(f"plan: {form!r} is no form, expected one of {', '.join(FORMS)}")
    # Phase 1 over a single source would copy it: the one-shot form is the same and stores nothing.
    # A network that asks for phase 1 as a whole means the blocks where there is something to gain.
    allowed = [FORMS[1:] if form == "auto" else (form,) for form in given]
    if isinstance(forms, str) and forms == "two_phase":
        allowed[0] = ("one_shot", "two_phase") if num_blocks > 1 else ("one_shot",)
    return [*allowed, FORMS[1:]]


def _sources_before(site: int, num_sublayers: int, block_size: int) -> int:
    """Completed sources when a group begins at this site, all that is pending closed."""
    if site == num_sublayers:
        return -(-num_sublayers // block_size) + 1
    return site // block_size + 1


class _Counted:
    """Bytes of groups, each site counted as the stream runs it."""

    def __init__(self, num_sublayers: int, block_size: int, costs: Costs) -> None:
        self.L, self.S, self.costs = num_sublayers, block_size, costs

    def _pending(self, site: int) -> int:
        """Outputs since the block of the last sublayer that wrote began."""
        return 0 if site == 0 else (site - 1) % self.S + 1

    def opening(self, first: int, size: int, sources: int) -> int:
        """Bytes of a group's phase 1 and of closing what is pending before it."""
        closing = self.costs.close(self._pending(first)) if first > 0 else 0
        return closing + self.costs.phase1(sources, size)

    def read(self, site: int, phase1_sources: int, opens: bool) -> int:
        """Bytes of one site's read; phase1_sources are those that its phase 1 covers, or 0."""
        boundary = 0 < site < self.L and site % self.S == 0
        pending = 0 if opens else self._pending(site)
        completed = 1 + min(site, self.L - 1) // self.S - int(boundary)
        direct = 0 if opens else completed - phase1_sources
        sum_grad = self.costs.grad_bytes if boundary else self.costs.sum(pending)
        if pending == 0 or site == self.L:
            sum_grad = 0
        # The embedding alone is read as it came.
        alone = phase1_sources == 0 and completed == 1
        total = self.costs.read(phase1_sources > 0, direct, pending, sum_grad, alone)
        # The embedding, and a block whose sum a read completes, are stored beside their reads.
        if site == 0:
            return total + self.costs.store(self.costs.storage_bytes)
        return total + (self.costs.promote(pending) if boundary and not opens else 0)

    def group_bytes(self, first: int, end: int, two_phase: bool) -> int:
        """Bytes of the sites first..end - 1 as one group."""
        if not two_phase:
            return sum(self.read(site, 0, False) for site in range(first, end))
        sources = _sources_before(first, self.L, self.S)
        reads = sum(self.read(site, sources, site == first) for site in range(first, end))
        return self.opening(first, end - first, sources) + reads
