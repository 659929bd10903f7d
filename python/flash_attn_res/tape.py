"""The memory-lean stream of eager PyTorch, for training at the price of a plain residual.

Autograd sees the sublayers' inputs and outputs and the running sums, and nothing else that is
large. What belongs to several sites goes past it, over a *tape* that one forward pass shares:

* Gradients of the sources. Each source has one buffer, to which the backward of every site that
  read it adds in place. Nodes are ordered by *tokens*, empty tensors that form one chain: whatever
  reads a source takes a token that was made after it, so that a source's buffer is complete when
  the node that made the source runs.
* Storage modes. With ``block_storage`` the completed sources are quantised; a source's gradient is
  that of the value that it stands for, and goes to what the value was made of. The embedding is
  kept as it came, too: the first block reads it alone.
* Phase-1 results. A group's results [S, T, D] live while the group runs forward; the backward
  computes them again, once a group (or keeps them, by an option). The gradient of a phase-1 result
  is never written: a site's backward writes dh over its row of the results, and the phase-1
  backward reads dh with the site's gate p_0.

====================  ==============================================  ===========================
node                  forward                                         backward
====================  ==============================================  ===========================
``_Start``            takes embedding and queries                     hands out their gradients
``_Close``            adds a block's last output; the sum is a        hands out the gradient of
                      source                                          the sum
``_Open``             phase 1 of a group                              phase 1's backward
``_Read``             one site                                        the site's backward
====================  ==============================================  ===========================

Kept for the backward, per site: the running sum [T, D], where a plain network keeps the residual
stream, and 2 K + 1 floats a token for K softmax terms.

State of a backward pass belongs to that pass: a node that finds the state of another one (a pass
over a part of the graph, or one that an exception ended) drops it. No node is reachable from the
tape, so that a graph and its tape are freed by reference counting.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, Variable
from torch.utils.checkpoint import checkpoint as checkpoint_function

from flash_attn_res import finite
from flash_attn_res._check import MAX_SOURCES
from flash_attn_res.plan import Group, PartialPlan, Plan, Site
from flash_attn_res.storage import QuantizedSource, empty
from flash_attn_res.stream import Stream, spread

if TYPE_CHECKING:
    from flash_attn_res.modules import BlockAttnRes

_attend = torch.ops.flash_attn_res.attend_into.default
_attend_backward = torch.ops.flash_attn_res.attend_backward_into.default
_read = torch.ops.flash_attn_res.read_into.default
_read_backward = torch.ops.flash_attn_res.read_backward_into.default
_stochastic_add = torch.ops.flash_attn_res.stochastic_add_into.default
_quantize = torch.ops.flash_attn_res.quantize_into.default

_backward_pass = torch._C._current_graph_task_id  # -1 outside of a backward

KEEP = ("none", "last", "all")
"""Whose phase-1 results the backward finds kept; it computes the others again."""


@dataclasses.dataclass
class Given:
    """What a stream begins with that continues another one, as a pipeline stage does.

    Attributes:
        sources: [..., D] all completed sources, the embedding first.
        needs_grad: whether each of them needs a gradient.
        received: so many of the last of them are inputs to autograd: their gradients are handed
            out. Those of the others stay in ``grads``.
        partial: [..., D] running sum of the block in whose middle the stream begins.
        grads: source -> [..., D], the gradients added up so far. They outlive a backward pass.
    """

    sources: Sequence[Tensor]
    needs_grad: Sequence[bool]
    received: int
    partial: Tensor | None
    grads: dict[int, Tensor]


class Sources(NamedTuple):
    """Completed sources [..., D], quantised ones with their scales."""

    values: Sequence[Tensor]
    scales: Sequence[Tensor] = ()

    def flat(self) -> list[Tensor]:
        """All tensors, to be saved; :meth:`of` takes them apart again."""
        return [*self.values, *self.scales]

    @staticmethod
    def of(flat: Sequence[Tensor], count: int) -> Sources:
        """``count`` sources from what ``flat`` gave."""
        return Sources(flat[:count], flat[count:])


class Phase1:
    """Phase 1 of one group: S mixtures of its sources, over which the backward writes dh."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.out: Tensor | None = None  # [S, ..., D]
        self.rows: Sequence[Tensor] = ()  # S x [..., D]
        self.lse: Tensor  # [S, T]
        self.logits: Tensor  # [T, S, n]
        self.inv_rms: Tensor  # [T, n]
        self.lse_rows: Sequence[Tensor] = ()  # S x [T]
        self.begun = False  # by the backward pass that runs
        self.replaced: set[int] = set()  # rows that hold dh by now
        self.gate: Tensor  # [S, T]
        self.dlse: Tensor  # [S, T]
        self.gate_rows: Sequence[Tensor] = ()  # S x [T]
        self.dlse_rows: Sequence[Tensor] = ()  # S x [T]

    def compute(self, tape: Tape, sources: Sources) -> None:
        """Results and statistics of the group's queries over its sources [..., D]."""
        group, values = self.group, sources.values
        queries = tape.queries[group.first : group.first + group.size]  # [S, R]
        self.out = tape.values(group.size)
        self.lse = tape.floats(group.size, tape.tokens)
        self.logits = tape.floats(tape.tokens, group.size, len(values))
        self.inv_rms = tape.floats(tape.tokens, len(values))
        _attend(
            values,
            queries,
            tape.scale,
            tape.eps,
            self.out,
            self.lse,
            self.logits,
            self.inv_rms,
            sources.scales,
        )
        self.rows, self.lse_rows = self.out.unbind(0), self.lse.unbind(0)
        if finite.enabled():
            finite.check(
                self.name,
                [("lse", self.lse), ("the mixtures", self.out)],
                [*named_sources(sources), ("queries", queries)],
            )

    @property
    def name(self) -> str:
        """For messages."""
        return f"phase 1 of sites {self.group.first} to {self.group.first + self.group.size - 1}"

    def begin(self, tape: Tape, sources: Sources) -> None:
        """First thing of a group in a backward pass: the results are there, and no dh yet."""
        if self.begun:
            return
        if self.out is None:
            self.compute(tape, sources)
        # A site whose backward does not run counts with gate 0; its row stays finite.
        gradients = torch.zeros(
            (2, self.group.size, tape.tokens), dtype=tape.queries.dtype, device=tape.device
        )
        self.gate, self.dlse = gradients.unbind(0)
        self.gate_rows, self.dlse_rows = self.gate.unbind(0), self.dlse.unbind(0)
        self.begun = True
        tape.begun.append(self)

    def drop(self) -> None:
        """Frees the results."""
        self.out, self.rows, self.lse_rows = None, (), ()
        self.gate_rows = self.dlse_rows = ()
        self.begun = False
        self.replaced.clear()
        # What has no default: an access after this is a mistake that shows.
        for name in ("lse", "logits", "inv_rms", "gate", "dlse"):
            self.__dict__.pop(name, None)


class Tape:
    """What the nodes of one forward pass share."""

    def __init__(
        self,
        embedding: Tensor,
        queries: Tensor,
        scale: float,
        eps: float,
        grad_dtype: torch.dtype,
        seed: Tensor | None,
        storage: str | None,
    ) -> None:
        self.queries = queries.detach()  # [L + 1, R] folded
        self.query_rows = self.queries.unbind(0)
        self.query_grad = queries.requires_grad
        self.scale, self.eps, self.grad_dtype = scale, eps, grad_dtype
        self.seed = seed  # of stochastic rounding
        self.shape, self.dtype, self.device = embedding.shape, embedding.dtype, embedding.device
        self.tokens = embedding.numel() // embedding.shape[-1]
        # [..., D] each; for the forward alone. In a storage mode, source 0 stays as it came and
        # has a quantised copy in ``stored``, beside the others' numbers and scales.
        self.sources = [embedding.detach()]
        self.storage = storage
        self.stored: list[QuantizedSource] = []
        self.completed: Tensor | None = None  # [..., D] sum that the last read made a source of
        if storage is not None:
            self.store([self.sources[0]])
        self.source_grads = [embedding.requires_grad]  # whether a source needs a gradient
        self.phase1: Phase1 | None = None  # that of the group that runs forward
        self.logits: Tensor | None = None  # [T, K] of the site that was read last, if recorded
        self.record = False
        self.freed = False  # a backward pass has run
        self.shared = False  # the gradients in dsources are shared with other tapes
        # Of the backward pass that runs:
        self.task: int | None = None
        self.replaced: set[int] = set()  # passes whose state was dropped before they ended
        self.dsources: dict[int, Tensor] = {}  # source -> [..., D]
        self.dqueries: Tensor | None = None  # [L + 1, R]
        self.begun: list[Phase1] = []
        self.cuda_stream: torch.cuda.Stream | None = None

    def store(self, terms: Sequence[Tensor]) -> QuantizedSource:
        """A sum [..., D] in the storage mode, appended to ``stored``."""
        assert self.storage is not None
        stored = empty(self.shape, self.storage, self.device)
        _quantize(terms, *stored)
        self.stored.append(stored)
        return stored

    def add_source(self, terms: Sequence[Tensor], needs_grad: bool) -> int:
        """Appends a completed source, the sum of ``terms``, and returns its index."""
        if self.storage is not None:
            self.sources.append(self.store(terms).values)
        else:
            total = terms[0] if len(terms) == 1 else torch.add(*terms)
            self.sources.append(total.to(self.dtype))
        self.source_grads.append(needs_grad)
        return len(self.sources) - 1

    def given(self, first: int, end: int, direct: bool = False) -> Sources:
        """The sources first..end - 1; ``direct``: for a read."""
        if self.storage is None or (direct and end <= 1):
            return Sources(self.sources[first:end])
        stored = self.stored[first:end]
        return Sources([item.values for item in stored], [item.scale for item in stored])

    def widened(self, first: int) -> list[Tensor]:
        """The sources from ``first`` on in the dtype of the stream."""
        if self.storage is None:
            return [source.detach().contiguous() for source in self.sources[first:]]
        kept = [self.sources[0].detach().contiguous()] if first == 0 else []
        return kept + [item.dequantize(self.dtype) for item in self.stored[max(first, 1) :]]

    def needs_grad(self, first: int, end: int) -> bool:
        """Whether any of the sources first..end - 1 needs a gradient."""
        return True in self.source_grads[first:end]

    def values(self, *lead: int) -> Tensor:
        """A fresh value [..., D] of the stream, or a stack of them."""
        return torch.empty((*lead, *self.shape), dtype=self.dtype, device=self.device)

    def floats(self, *shape: int) -> Tensor:
        """Fresh statistics."""
        return torch.empty(shape, dtype=self.queries.dtype, device=self.device)

    # ------------------------------------------------------------------------- backward passes

    def enter(self) -> None:
        """First line of every backward."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "flash_attn_res: the stream has no second derivative; call backward without "
                "create_graph=True"
            )
        task = _backward_pass()
        if task != self.task:
            self._begin_pass(task)
        if self.device.type == "cuda":
            self.follow_stream()

    def _begin_pass(self, task: int) -> None:
        if task in self.replaced:
            raise RuntimeError(
                "flash_attn_res: two backward passes run over one stream at a time; let one end "
                "before the other begins"
            )
        if self.task is not None:
            self.replaced.add(self.task)
        self.reset()
        self.task, self.freed, self.cuda_stream = task, True, None

        def end() -> None:
            if self.task == task:
                self.reset()
                self.task = None

        Variable._execution_engine.queue_callback(end)

    def reset(self) -> None:
        """Drops the state of a pass, with what one over a part of the graph has left behind."""
        if not self.shared:
            self.dsources.clear()
        self.dqueries = None
        for phase1 in self.begun:
            phase1.drop()
        self.begun.clear()

    def follow_stream(self) -> None:
        """Side-channel memory is used on the stream of whichever node runs: they take turns."""
        current = torch.cuda.current_stream(self.device)
        before = self.cuda_stream
        if before is None:
            self.cuda_stream = current
        elif before != current:
            current.wait_stream(before)
            held = [*self.dsources.values(), *self.sources]
            held += [tensor for item in self.stored for tensor in item]
            held += [] if self.dqueries is None else [self.dqueries]
            for phase1 in self.begun:
                held += [phase1.gate, phase1.dlse]
            for phase1 in (*self.begun, *([] if self.phase1 is None else [self.phase1])):
                held += [phase1.lse, phase1.logits, phase1.inv_rms]
                held += [] if phase1.out is None else [phase1.out]
            for tensor in held:
                tensor.record_stream(current)
            self.cuda_stream = current

    # ------------------------------------------------------------------------------- gradients

    def buffers(self, first: int, end: int) -> tuple[list[Tensor], bool]:
        """Gradient buffers of the sources first..end - 1, and whether they hold something yet."""
        missing = [j for j in range(first, end) if j not in self.dsources]
        for j in missing:
            self.dsources[j] = torch.empty(self.shape, dtype=self.grad_dtype, device=self.device)
        accumulate = len(missing) < end - first
        if accumulate:
            for j in missing:
                self.dsources[j].zero_()
        return [self.dsources[j] for j in range(first, end)], accumulate

    @property
    def rounds_gradients(self) -> bool:
        """Whether gradients of sources are added up with stochastic rounding."""
        return self.seed is not None and self.grad_dtype == torch.bfloat16

    def parts(self, first: int, end: int) -> list[Tensor]:
        """float32 gradients of the sources first..end - 1 from one node, for ``add_parts``."""
        return [
            torch.empty(self.shape, dtype=torch.float32, device=self.device)
            for _ in range(first, end)
        ]

    def add_parts(self, first: int, parts: Sequence[Tensor], node: int) -> None:
        """Adds what a node wrote to ``parts`` to the buffers, rounded stochastically.

        Nodes are numbered; sites of the generator below 2^31 are those of the forward.
        """
        seed = self.seed
        assert seed is not None
        for j, part in enumerate(parts, first):
            terms = [self.dsources[j], part] if j in self.dsources else [part]
            if j not in self.dsources:
                self.dsources[j] = self.values()
            _stochastic_add(terms, seed, 2**31 + node * MAX_SOURCES + j, self.dsources[j])

    def total(self, partial: Tensor, update: Tensor, site: int) -> Tensor:
        """A running sum plus the last output, where sums are rounded stochastically."""
        assert self.seed is not None
        total = self.values()
        _stochastic_add([partial, update], self.seed, site, total)
        return total

    def take(self, source: int, dtype: torch.dtype) -> Tensor | None:
        """The gradient of a source, which is complete."""
        gradient = self.dsources.pop(source, None)
        return None if gradient is None else gradient.to(dtype)

    def query_gradients(self) -> Tensor:
        """[L + 1, R], to which the backwards add."""
        if self.dqueries is None:
            self.dqueries = torch.zeros_like(self.queries)
        return self.dqueries


class _Start(Function):
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


class _Close(Function):
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
            terms = [update.detach().to(tape.dtype)]
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
        ctx.update_dtype = update.dtype
        return token.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _token: Tensor | None) -> tuple[Any, ...]:
        tape: Tape = ctx.tape
        tape.enter()
        gradient = tape.take(ctx.source, tape.dtype)
        _, _, need_partial, need_update, _ = ctx.needs_input_grad
        dupdate = gradient.to(ctx.update_dtype) if gradient is not None and need_update else None
        return None, None, gradient if need_partial else None, dupdate, None


class _Export(Function):
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
        ctx.update_dtype = None if update is None else update.dtype
        exported = tape.widened(first)
        needs = tape.source_grads[first:]
        if update is not None:
            total = update.to(tape.dtype) if partial is None else torch.add(partial, update)
            exported.append(total.to(tape.dtype))
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
        _, _, need_partial, need_update, _ = ctx.needs_input_grad
        dupdate = dtotal.to(ctx.update_dtype) if dtotal is not None and need_update else None
        return None, None, dtotal if need_partial else None, dupdate, None


class _Open(Function):
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
        sources = Sources.of(ctx.saved_tensors, phase1.group.num_sources)
        if phase1.begun:  # else no site of the group has a gradient
            group = phase1.group
            sites = slice(group.first, group.first + group.size)
            dsources: list[Tensor] = []
            accumulate = False
            if tape.needs_grad(0, group.num_sources):
                if tape.rounds_gradients:
                    dsources = tape.parts(0, group.num_sources)
                else:
                    dsources, accumulate = tape.buffers(0, group.num_sources)
            _attend_backward(
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
                tape.add_parts(0, dsources, len(tape.query_rows) + group.first)
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


class _Read(Function):
    """One site: x, and the new sum where later sublayers of the block add to it."""

    @staticmethod
    def forward(
        ctx: Any,
        tape: Tape,
        site: Site,
        phase1: Phase1 | None,
        norm_eps: float,
        norm_weight: Tensor | None,
        partial: Tensor | None,
        update: Tensor | None,
        token: Tensor,
    ) -> Any:
        ctx.set_materialize_grads(False)
        sources = tape.given(site.first_direct, site.num_sources, direct=True)
        x, total, statistics = run_site(
            tape, site, phase1, norm_weight, norm_eps, partial, update, sources
        )
        frozen = Sources(()) if phase1 is None else tape.given(0, phase1.group.num_sources)
        ctx.save_for_backward(norm_weight, total, *statistics, *frozen.flat(), *sources.flat())
        ctx.tape, ctx.site, ctx.phase1, ctx.frozen = tape, site, phase1, len(frozen.flat())
        ctx.update_dtype = None if update is None else update.dtype
        if tape.record:
            tape.logits = statistics[0]
        if site.promotes:
            needs = ctx.needs_input_grad[5] or ctx.needs_input_grad[6]
            assert total is not None
            tape.completed = total.detach()
            tape.add_source([tape.completed], needs)
            return x, token.new_empty(0)
        # The last site's sum has no reader. A block's first output is its sum as it stands:
        # returned, so that its gradient comes from one place and autograd adds nothing.
        return x if total is None or site.output else (x, total)

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, dtotal: Tensor | None = None) -> tuple[Any, ...]:
        tape: Tape = ctx.tape
        site: Site = ctx.site
        phase1: Phase1 | None = ctx.phase1
        tape.enter()
        norm_weight, total, logits, inv_rms, mix_inv_rms, *rest = ctx.saved_tensors
        direct = site.num_sources - site.first_direct
        frozen = Sources.of(rest[: ctx.frozen], 0 if phase1 is None else phase1.group.num_sources)
        sources = Sources.of(rest[ctx.frozen :], direct)
        if site.promotes:  # the sum is a source: what its readers have added up
            dtotal = tape.dsources.pop(site.num_sources, None)
        if dx is None and dtotal is None:
            return (None,) * 8
        _, _, _, _, need_weight, need_partial, need_update, need_token = ctx.needs_input_grad

        phase1_out = dh = gate = dlse = None
        if phase1 is not None:
            phase1.begin(tape, frozen)
            phase1_out = phase1.rows[site.slot]
            if need_token:
                dh = phase1_out
                phase1.replaced.add(site.slot)
                gate, dlse = phase1.gate_rows[site.slot], phase1.dlse_rows[site.slot]
        dsources: list[Tensor] = []
        accumulate = False
        if tape.needs_grad(site.first_direct, site.num_sources):
            if tape.rounds_gradients:
                dsources = tape.parts(site.first_direct, site.num_sources)
            else:
                dsources, accumulate = tape.buffers(site.first_direct, site.num_sources)
        dpartial = total.new_empty(total.shape) if need_partial or need_update else None
        has_query = logits.shape[1] > 1
        dquery = tape.query_gradients()[site.index] if has_query and tape.query_grad else None
        norm = mix_inv_rms is not None
        dweight = torch.empty_like(norm_weight) if need_weight else None
        _read_backward(
            dx,
            dtotal,
            phase1_out,
            sources.values,
            total,
            tape.query_rows[site.index] if has_query else None,
            norm_weight,
            logits,
            inv_rms,
            mix_inv_rms,
            tape.scale,
            norm,
            dh,
            gate,
            dlse,
            dsources,
            accumulate,
            dpartial,
            dquery,
            True,
            dweight,
            sources.scales,
        )
        if tape.rounds_gradients:
            tape.add_parts(site.first_direct, dsources, site.index)
        if finite.enabled():
            finite.check(
                f"backward of site {site.index}",
                [
                    ("the gradient of the mixture", dh),
                    *finite.numbered("the gradients of sources", dsources),
                    ("the gradient of the partial sum", dpartial),
                    ("the gradient of the query", dquery),
                    ("the gradient of norm_weight", dweight),
                ],
                [("the gradient of x", dx), ("the gradient of later sites", dtotal)],
            )
        dupdate = None
        if dpartial is not None and need_update:
            dupdate = dpartial.to(ctx.update_dtype)
        return None, None, None, None, dweight, dpartial if need_partial else None, dupdate, None


def run_site(
    tape: Tape,
    site: Site,
    phase1: Phase1 | None,
    norm_weight: Tensor | None,
    norm_eps: float,
    partial: Tensor | None,
    update: Tensor | None,
    sources: Sources,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor, Tensor | None]]:
    """One read: x [..., D], the new sum [..., D] if there is one, and the saved statistics."""
    before, output = partial, update
    if partial is None and update is not None:
        partial, update = update.to(tape.dtype), None
    elif tape.seed is not None and partial is not None and update is not None:
        partial, update = tape.total(partial, update, site.index), None
    total = partial if update is None else tape.values()
    x = tape.values()
    terms = int(phase1 is not None) + len(sources.values) + int(total is not None)
    logits = tape.floats(tape.tokens, terms)
    inv_rms = tape.floats(tape.tokens, terms)
    norm = norm_weight is not None
    mix_inv_rms = tape.floats(tape.tokens) if norm else None
    _read(
        None if phase1 is None else phase1.rows[site.slot],
        None if phase1 is None else phase1.lse_rows[site.slot],
        sources.values,
        partial,
        update,
        tape.query_rows[site.index] if terms > 1 else None,
        norm_weight,
        tape.scale,
        tape.eps,
        norm,
        norm_eps,
        x,
        None if update is None else total,
        logits,
        inv_rms,
        mix_inv_rms,
        sources.scales,
    )
    if finite.enabled():
        finite.check(
            f"read of site {site.index}",
            [("the partial sum", total), ("x", x)],
            [
                ("the sum before it", before),
                ("the sublayer's output", output),
                ("the phase-1 mixture", None if phase1 is None else phase1.rows[site.slot]),
                *named_sources(sources),
                ("norm_weight", norm_weight),
            ],
        )
    return x, total, (logits, inv_rms, mix_inv_rms)


def named_sources(sources: Sources) -> finite.Named:
    """For messages. Of quantised ones the scales say whether the values are finite."""
    if sources.scales:
        scales = [scale.view(torch.float8_e8m0fnu).float() for scale in sources.scales]
        return finite.numbered("the scales of sources", scales)
    return finite.numbered("sources", sources.values)


class TapeStream(Stream):
    """The stream of eager mode; see the module's text."""

    def __init__(
        self,
        module: BlockAttnRes,
        embedding: Tensor,
        queries: Tensor,
        plan: Plan | PartialPlan,
        return_probs: bool,
        given: Given | None = None,
    ) -> None:
        super().__init__(module, embedding.detach(), plan, return_probs)
        grad_dtype = module.grad_dtype or embedding.dtype
        if embedding.dtype == torch.float64:
            grad_dtype = torch.float64
        self._tape = Tape(
            embedding,
            queries,
            module.scale,
            module.eps,
            grad_dtype,
            self._seed,
            module.block_storage,
        )
        self._tape.record = return_probs
        self._keep = module.keep_phase1
        self._last_group = last_group(plan)
        self._phase1: Phase1 | None = None
        received: Sequence[Tensor] = [embedding]
        if given is not None:
            self._tape.sources = [source.detach() for source in given.sources]
            self._tape.stored = []
            for source in self._tape.sources if module.block_storage is not None else ():
                self._tape.store([source])
            self._tape.source_grads = list(given.needs_grad)
            self._tape.dsources, self._tape.shared = given.grads, True
            received = given.sources[len(given.sources) - given.received :]
            self._partial = given.partial
        self._token: Tensor = _Start.apply(self._tape, queries, *received)

    def _expect(self, call: str) -> None:
        super()._expect(call)
        if self._tape.freed and self._token.grad_fn is not None:
            # A backward pass has run in the middle of the forward: fine if the graph is there yet.
            try:
                _ = self._token.grad_fn.saved_tensors  # type: ignore[attr-defined]
            except RuntimeError as error:
                raise RuntimeError(
                    f"{call}: a backward pass has freed the graph of this stream; run it after "
                    "finish, or with retain_graph=True"
                ) from error
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"{call}: this stream was started outside of the compiled function; call start "
                "inside of it"
            )

    def _check_origin(self, output: Tensor) -> None:
        node: Any = output.grad_fn
        is_read = isinstance(node, _Read._backward_cls)
        if is_read and node.tape is not self._tape:
            raise RuntimeError("write: output is what another stream's read gave")

    def _read(self, site: Site, norm_weight: Tensor | None, norm_eps: float) -> Tensor:
        tape = self._tape
        if tape.device.type == "cuda":
            tape.follow_stream()
        phase1 = self._phase1_of(site)
        tape.completed = None
        weight = norm_weight
        if weight is not None and tape.dtype == torch.float64:
            weight = weight.to(torch.float64)
        # Of a single term, a query changes nothing.
        single = site.num_sources == 1 and self._partial is None and self._update is None
        token = self._token.detach() if single and not tape.source_grads[0] else self._token
        given = _Read.apply(
            tape, site, phase1, norm_eps, weight, self._partial, self._update, token
        )
        self._partial = self._update = None
        if isinstance(given, Tensor):
            x = given
        elif site.promotes:
            x, self._token = given
        else:
            x, self._partial = given
        if self._return_probs:
            self._record(site, phase1)
        return x

    def _phase1_of(self, site: Site) -> Phase1 | None:
        """The phase 1 that a site reads, run if the site is the first to."""
        if site.opens and self._phase1 is not None and self._phase1.group is site.group:
            return self._phase1  # prefetched
        if site.opens:
            if site.closes:
                self._token = _Close.apply(
                    self._tape, site.index, self._partial, self._update, self._token
                )
                self._partial = self._update = None
            self._release_phase1()
            self._phase1 = self._tape.phase1 = Phase1(site.group)
            self._token = _Open.apply(self._tape, self._phase1, self._token)
        elif site.slot < 0:
            self._release_phase1()
        return self._phase1

    def _release_phase1(self) -> None:
        phase1, self._phase1, self._tape.phase1 = self._phase1, None, None
        if phase1 is None or self._keep == "all":
            return
        if self._keep == "none" or phase1.group.index != self._last_group:
            phase1.drop()

    def use_plan(self, change: Callable[[Plan], Plan]) -> None:
        """Runs by another plan of the same network; before the first read."""
        assert isinstance(self._plan, Plan)
        assert self._sublayer == 0
        self._plan = change(self._plan)
        self._last_group = last_group(self._plan)

    def prefetch(self, side: torch.cuda.Stream | None = None) -> None:
        """Between read and write: runs the phase 1 that the next site opens, if it needs no output.

        Args:
            side: the CUDA stream to run it on; the next read waits for it.
        """
        self._expect("write")
        site = self._plan.sites[self._sublayer + 1 : self._sublayer + 2]
        if not site or not site[0].opens or site[0].closes:
            return
        with torch.cuda.stream(side):
            if side is not None:
                self._tape.follow_stream()
            self._phase1_of(site[0])

    def export(self, first: int, boundary: bool) -> tuple[list[Tensor], Tensor | None]:
        """Ends a part of a network: the sources from ``first`` on, and the running sum.

        Args:
            first: of the sources to hand out.
            boundary: the part ends where a block does: the sum is the last source.

        Raises:
            RuntimeError: a sublayer is still to come.
        """
        self._expect("finish")
        tape = self._tape
        if tape.device.type == "cuda":
            tape.follow_stream()
        self._release_phase1()
        if boundary:
            self._token = _Close.apply(
                tape, self._sublayer, self._partial, self._update, self._token
            )
            self._partial = self._update = None
        exported = list(_Export.apply(tape, first, self._partial, self._update, self._token))
        self._partial = self._update = None
        self._state = "done"
        return exported, None if boundary else exported.pop()

    def release(self) -> None:
        """Lets go of the sources after :meth:`export`; the graph holds what its backward needs."""
        self._release()

    @property
    def sources(self) -> list[Tensor]:
        """The completed sources [..., D], detached, in the dtype of the stream."""
        return self._tape.widened(0)

    @property
    def sources_need_grad(self) -> list[bool]:
        """Whether each of them needs a gradient."""
        return list(self._tape.source_grads)

    def _record(self, site: Site, phase1: Phase1 | None) -> None:
        lead = self._tape.shape[:-1]
        assert self._tape.logits is not None
        probs, inner = self._tape.logits.softmax(-1), None
        if phase1 is not None:
            logits, lse = phase1.logits[:, site.slot], phase1.lse_rows[site.slot]
            inner = (logits - lse[:, None]).exp()
        probs = spread(probs, inner)
        self.probabilities.append(probs.reshape(*lead, probs.shape[-1]))

    def _checkpointed(
        self,
        layer: Callable[[Tensor], Tensor],
        site: Site,
        norm_weight: Tensor | None,
        norm_eps: float,
        preserve_rng_state: bool,
    ) -> Tensor:
        tape = self._tape
        first = [self._read(site, norm_weight, norm_eps)]
        phase1 = self._phase1
        need_grad = first[0].requires_grad
        total = self._partial
        if site.promotes:
            total = tape.completed
        elif total is not None:
            total = total.detach()

        frozen = Sources(()) if phase1 is None else tape.given(0, phase1.group.num_sources)
        direct = tape.given(site.first_direct, site.num_sources, direct=True)

        def run(weight: Tensor | None, total: Tensor | None, *saved: Tensor) -> Tensor:
            if first:
                x = first.pop()
            else:
                with torch.no_grad():
                    split = len(frozen.flat())
                    x = read_again(
                        tape,
                        site,
                        phase1,
                        weight,
                        norm_eps,
                        total,
                        Sources.of(saved[:split], len(frozen.values)),
                        Sources.of(saved[split:], len(direct.values)),
                    )
                x.requires_grad_(need_grad)
            return layer(x)

        output: Tensor = checkpoint_function(
            run,
            norm_weight,
            total,
            *frozen.flat(),
            *direct.flat(),
            use_reentrant=False,
            preserve_rng_state=preserve_rng_state,
        )
        return output

    def _release(self) -> None:
        self._release_phase1()
        self._tape.sources, self._tape.stored, self._tape.completed = [], [], None


def last_group(plan: Plan | PartialPlan) -> int:
    """Index of the last group with phase 1, or -1."""
    return max((group.index for group in plan.groups if group.two_phase), default=-1)


def read_again(
    tape: Tape,
    site: Site,
    phase1: Phase1 | None,
    norm_weight: Tensor | None,
    norm_eps: float,
    total: Tensor | None,
    frozen: Sources,
    direct: Sources,
) -> Tensor:
    """The input of a sublayer, from the saved sum and the sources, in the middle of a backward."""
    if phase1 is not None:
        in_backward = _backward_pass() != -1
        if in_backward:
            tape.enter()
        if in_backward and site.slot not in phase1.replaced:
            phase1.begin(tape, frozen)
        else:
            # The layer does not lead back to its input, so that the site's backward came first; or
            # somebody looks at saved tensors.
            phase1 = Phase1(phase1.group)
            phase1.compute(tape, frozen)
    if norm_weight is not None and tape.dtype == torch.float64:
        norm_weight = norm_weight.to(torch.float64)
    return run_site(tape, site, phase1, norm_weight, norm_eps, total, None, direct)[0]
