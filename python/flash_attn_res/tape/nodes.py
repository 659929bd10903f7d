"""What autograd sees of the stream: one function for each kind of node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from flash_attn_res import finite
from flash_attn_res.plan import Site
from flash_attn_res.stream import as_it_stands
from flash_attn_res.tape import operators
from flash_attn_res.tape.state import Opened, Phase1, Sources, Tape, named_sources


class Start(Function):
    """The first token. Its backward runs last and hands out what the tape has summed."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, queries: Tensor, *sources: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.tape, ctx.first = tape, len(tape.sources) - len(sources)
        return queries.new_empty(0, dtype=tape.dtype)

    @staticmethod
    def backward(ctx: Any, _token: Tensor | None) -> tuple[Any, ...]:
        tape: Tape = ctx.tape
        tape.enter()
        _, need_queries, *need_sources = ctx.needs_input_grad
        dsources: list[Tensor | None] = []
        for source, need in enumerate(need_sources, start=ctx.first):
            gradient = tape.take(source, tape.dtype) if need else None
            if need and gradient is None and tape.shared:  # another process waits for it
                gradient = torch.zeros(tape.shape, dtype=tape.dtype, device=tape.device)
            dsources.append(gradient)
        dqueries = tape.query_gradients() if tape.shared else tape.dqueries
        return None, dqueries if need_queries else None, *dsources


class Close(Function):
    """Makes a source of what is pending: the partial sum plus the last output."""

    @staticmethod
    def forward(
        ctx: Any,
        tape: Tape,
        site: int,
        partial: Tensor | None,
        update: Tensor,
        token: Tensor,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        if partial is None:
            terms = [as_it_stands(update.detach(), tape.dtype, tape.sum_dtype)]
        elif tape.seed is not None:
            terms = [tape.total(partial, update, site)]
        else:
            terms = [partial, update]
        needs = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        ctx.tape, ctx.source = tape, tape.add_source(terms, needs)
        if finite.enabled():
            # A stored sum may be larger than what the dtype of the stream holds.
            total = tape.stored[-1].dequantize() if tape.storage is not None else tape.sources[-1]
            finite.check(
                f"end of block {ctx.source}",
                [("the block's sum", total)],
                [("the partial sum", partial), ("the sublayer's output", update)],
            )
        ctx.partial_dtype = None if partial is None else partial.dtype
        ctx.update_dtype = update.dtype
        return token.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _token: Tensor | None) -> tuple[Any, ...]:
        tape: Tape = ctx.tape
        tape.enter()
        gradient = tape.dsources.pop(ctx.source, None)  # complete, in the dtype of the buffers
        _, _, *needs, _ = ctx.needs_input_grad
        return None, None, *to_addends(gradient, ctx.partial_dtype, ctx.update_dtype, needs), None


class Export(Function):
    """Hands out sources, and the running sum if there is one, to a stream that goes on."""

    @staticmethod
    def forward(
        ctx: Any,
        tape: Tape,
        first: int,
        partial: Tensor | None,
        update: Tensor | None,
        token: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.tape, ctx.first, ctx.end = tape, first, len(tape.sources)
        ctx.partial_dtype = None if partial is None else partial.dtype
        ctx.update_dtype = None if update is None else update.dtype
        exported = tape.widened(first)
        needs = tape.source_grads[first:]
        if update is not None:
            total = update if partial is None else torch.add(partial, update)
            exported.append(total.to(tape.sum_dtype))
            needs.append(ctx.needs_input_grad[2] or ctx.needs_input_grad[3])
        pairs = zip(exported, needs, strict=True)
        ctx.mark_non_differentiable(*(tensor for tensor, need in pairs if not need))
        return tuple(exported)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        tape: Tape = ctx.tape
        tape.enter()
        count = ctx.end - ctx.first
        for source, gradient in enumerate(gradients[:count], start=ctx.first):
            if gradient is None or not tape.source_grads[source]:
                continue
            held = tape.dsources.get(source)
            if held is None:
                tape.dsources[source] = gradient.to(tape.grad_dtype, copy=True)
            else:
                held.add_(gradient)
        dtotal = gradients[count] if len(gradients) > count else None
        _, _, *needs, _ = ctx.needs_input_grad
        return None, None, *to_addends(dtotal, ctx.partial_dtype, ctx.update_dtype, needs), None


class Open(Function):
    """Phase 1 of a group."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, phase1: Phase1, token: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.tape, ctx.phase1 = tape, phase1
        sources = tape.given(0, phase1.group.num_sources)
        ctx.save_for_backward(*sources.flat())
        phase1.compute(tape, sources)
        return token.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _token: Tensor | None) -> tuple[None, None, None]:
        tape: Tape = ctx.tape
        phase1: Phase1 = ctx.phase1
        tape.enter()
        if phase1.begun:  # else no site of the group has a gradient
            group = phase1.group
            sources = phase1.saved or Sources.of(ctx.saved_tensors, group.num_sources)
            sites = slice(group.first, group.first + group.size)
            dsources: list[Tensor] = []
            accumulate = False
            if tape.needs_grad(0, group.num_sources):
                if tape.rounds_gradients:
                    dsources = tape.parts(0, group.num_sources)
                else:
                    dsources, accumulate = tape.buffers(0, group.num_sources)
            operators.attend_backward(
                phase1.out,
                phase1.dlse,
                phase1.gate,
                sources.values,
                tape.queries[sites],
                phase1.lse,
                phase1.logits,
                phase1.inv_rms,
                tape.scale,
                dsources,
                accumulate,
                tape.query_gradients()[sites] if tape.query_grad else None,
                True,
                sources.scales,
            )
            if tape.rounds_gradients:
                tape.add_parts(0, dsources, tape.queries.shape[0] + group.first)
            if finite.enabled():
                finite.check(
                    f"backward of {phase1.name}",
                    [
                        *finite.numbered("the gradients of sources", dsources),
                        ("the gradient of the queries", tape.dqueries),
                    ],
                    [("the gradients of the sites", phase1.out), ("their gates", phase1.gate)],
                )
            phase1.drop()
            tape.begun.remove(phase1)
        return None, None, None


class Reading(NamedTuple):
    """What a site reads with, beside tensors that autograd is to see."""

    tape: Tape
    site: Site
    opened: Opened | None
    norm_eps: float

    def direct(self) -> Sources:
        """The sources that the site reads itself, while the stream runs forward."""
        return self.tape.given(self.site.first_direct, self.site.num_sources, direct=True)


class Read(Function):
    """One site: x, and the new sum where later sublayers of the block add to it."""

    @staticmethod
    def forward(
        ctx: Any,
        reading: Reading,
        norm_weight: Tensor | None,
        partial: Tensor | None,
        update: Tensor | None,
        token: Tensor,
    ) -> Any:
        ctx.set_materialize_grads(False)
        tape, site, opened, _ = reading
        sources = reading.direct()
        x, total, statistics = run_site(reading, norm_weight, partial, update, sources)
        frozen = Sources(()) if opened is None else opened.keeps(tape)
        direct = sources.flat()
        ctx.save_for_backward(norm_weight, total, statistics, *direct, *frozen.flat())
        ctx.reading, ctx.direct = reading, len(direct)
        ctx.partial_dtype = None if partial is None else partial.dtype
        ctx.update_dtype = None if update is None else update.dtype
        if site.promotes or site.output:
            _, _, need_partial, need_update, _ = ctx.needs_input_grad
            total = keep_total(tape, site, total, need_partial or need_update)
        if site.promotes:
            return x, token.new_empty(0)
        # A block's first output is its sum as it stands: returned, so that its gradient comes from
        # one place and autograd adds nothing.
        return x if total is None else (x, total)

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, dtotal: Tensor | None = None) -> tuple[Any, ...]:
        tape, site, opened, _ = ctx.reading
        tape.enter()
        norm_weight, total, statistics, *kept = ctx.saved_tensors
        sources = Sources.of(kept[: ctx.direct], site.num_sources - site.first_direct)
        if site.promotes:  # the sum is a source: what its readers have added up
            dtotal = tape.dsources.pop(site.num_sources, None)
        if dx is None and dtotal is None:
            return (None,) * 5
        _, need_weight, need_partial, need_update, need_token = ctx.needs_input_grad

        phase1_out = gate = dlse = None
        if opened is not None:
            phase1: Phase1 = opened.phase1
            phase1.begin(tape, lambda: opened.sources(kept[ctx.direct :]))
            if site.slot in phase1.replaced:  # by the read that a failed call has left behind
                raise RuntimeError(
                    f"flash_attn_res: site {site.index} was read twice, for a call of its sublayer "
                    "failed, and both inputs have a gradient; drop losses that a failed call made"
                )
            phase1_out = phase1.out
            if need_token:  # dh takes the place of the site's row
                phase1.replaced.add(site.slot)
                gate, dlse = phase1.gate, phase1.dlse
        dsources: list[Tensor] = []
        accumulate = False
        if tape.needs_grad(site.first_direct, site.num_sources):
            if tape.rounds_gradients:
                dsources = tape.parts(site.first_direct, site.num_sources)
            else:
                dsources, accumulate = tape.buffers(site.first_direct, site.num_sources)
        need_total = need_partial or need_update
        dsum, dweight = operators.read_backward(
            dx,
            dtotal,
            phase1_out,
            gate,
            dlse,
            site.slot,
            sources.values,
            sources.scales,
            total,
            tape.queries,
            site.index,
            norm_weight,
            statistics,
            tape.scale,
            dsources,
            accumulate,
            need_total,
            tape.query_gradients() if tape.query_grad else None,
            need_weight,
        )
        dpartial = dsum if need_total else None
        if tape.rounds_gradients:
            tape.add_parts(site.first_direct, dsources, site.index)
        if finite.enabled():
            dh = None if phase1_out is None or gate is None else phase1_out[site.slot]
            dquery = None if tape.dqueries is None else tape.dqueries[site.index]
            finite.check(
                f"backward of site {site.index}",
                [
                    ("the gradient of the mixture", dh),
                    *finite.numbered("the gradients of sources", dsources),
                    ("the gradient of the partial sum", dpartial),
                    ("the gradient of the query", dquery),
                    ("the gradient of norm_weight", dweight if need_weight else None),
                ],
                [("the gradient of x", dx), ("the gradient of later sites", dtotal)],
            )
        addends = to_addends(
            dpartial, ctx.partial_dtype, ctx.update_dtype, (need_partial, need_update)
        )
        return None, dweight if need_weight else None, *addends, None


def read_without_graph(
    reading: Reading,
    norm_weight: Tensor | None,
    partial: Tensor | None,
    update: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The input and the running sum, as :class:`Read` gives them, where gradients are off.

    A node costs the host as much as the rest of a read.
    """
    keep = reading.tape.record
    x, total, _ = run_site(reading, norm_weight, partial, update, reading.direct(), keep)
    return x, keep_total(reading.tape, reading.site, total, False)


def keep_total(tape: Tape, site: Site, total: Tensor | None, needs_grad: bool) -> Tensor | None:
    """Makes a source of a sum that is complete; returns one that is still to be added to."""
    if site.promotes:
        assert total is not None
        tape.completed = total.detach()
        tape.add_source([tape.completed], needs_grad)
        return None
    return None if site.output else total  # the last site's sum has no reader


def to_addends(
    gradient: Tensor | None,
    partial_dtype: torch.dtype | None,
    update_dtype: torch.dtype | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of a sum to the partial sum and the output that were added, in their dtypes."""
    if gradient is None:
        return None, None
    dpartial = gradient.to(partial_dtype) if needs[0] else None
    if needs[1] and dpartial is not None and partial_dtype == update_dtype:
        return dpartial, dpartial
    return dpartial, gradient.to(update_dtype) if needs[1] else None


def run_site(
    reading: Reading,
    norm_weight: Tensor | None,
    partial: Tensor | None,
    update: Tensor | None,
    sources: Sources,
    keep: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One read: x [..., D], the new sum [..., D] if there is one, and the statistics if kept."""
    tape, site, opened, norm_eps = reading
    before, output = partial, update
    if partial is None and update is not None:
        partial, update = as_it_stands(update, tape.dtype, tape.sum_dtype), None
    elif tape.seed is not None and partial is not None and update is not None:
        partial, update = tape.total(partial, update, site.index), None
    phase1_out = lse = None
    if opened is not None:
        phase1_out, lse = opened.phase1.out, opened.phase1.lse
    x, total, statistics = operators.read(
        phase1_out,
        lse,
        site.slot,
        sources.values,
        sources.scales,
        partial,
        update,
        tape.queries,
        site.index,
        norm_weight,
        tape.scale,
        tape.eps,
        norm_eps,
        tape.dtype,
        tape.sum_dtype,
        keep,
    )
    if total is None:
        total = partial
    if tape.record and keep:
        terms = int(opened is not None) + len(sources.values) + int(total is not None)
        tape.logits = statistics[: tape.tokens * terms].view(tape.tokens, terms)
    if finite.enabled():
        finite.check(
            f"read of site {site.index}",
            [("the partial sum", total), ("x", x)],
            [
                ("the sum before it", before),
                ("the sublayer's output", output),
                ("the phase-1 mixture", None if phase1_out is None else phase1_out[site.slot]),
                *named_sources(sources),
                ("norm_weight", norm_weight),
            ],
        )
    return x, total, statistics
