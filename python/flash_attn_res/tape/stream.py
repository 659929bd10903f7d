"""The stream of eager mode, on a tape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as checkpoint_function

from flash_attn_res.plan import PartialPlan, Plan, Site
from flash_attn_res.stream import Stream, spread
from flash_attn_res.tape.nodes import (
    Close,
    Export,
    Open,
    Read,
    Reading,
    Start,
    read_without_graph,
    run_site,
)
from flash_attn_res.tape.state import Given, Opened, Phase1, Sources, Tape, backward_pass

if TYPE_CHECKING:
    from flash_attn_res.modules import BlockAttnRes

KEEP = ("none", "last", "all")
"""Whose phase-1 results the backward finds kept; it computes the others again."""


class TapeStream(Stream):
    """The stream of eager mode; see the text of :mod:`flash_attn_res.tape`."""

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
            self._sum_dtype,
            self._seed,
            module.block_storage,
        )
        self._tape.record = return_probs
        self._keep = module.keep_phase1
        self._last_group = last_group(plan)
        self._opened: Opened | None = None
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
        self._token: Tensor = Start.apply(self._tape, queries, *received)

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

    def _remember(self, x: Tensor) -> None:
        if x.grad_fn is None:  # else its node tells
            super()._remember(x)

    def _is_foreign(self, output: Tensor) -> bool:
        node: Any = output.grad_fn
        is_read = isinstance(node, Read._backward_cls)
        # What another stream's finish gave is the output of a network, which may be a layer.
        if is_read:
            reading: Reading = node.reading
            return not reading.site.output and reading.tape is not self._tape
        return super()._is_foreign(output)

    def _mark(self) -> tuple[Any, ...]:
        return self._token, self._opened, self._tape.mark(), super()._mark()

    def _undo(self, mark: tuple[Any, ...]) -> None:
        self._token, opened, tape, rest = mark
        # Results are freed where the next group begins: the call to come does so again.
        freed = opened is not None and opened.phase1.out is None
        self._hold(None if freed else opened)
        self._tape.undo(tape)
        super()._undo(rest)

    def _read(self, site: Site, norm_weight: Tensor | None, norm_eps: float) -> Tensor:
        tape = self._tape
        if tape.device.type == "cuda":
            tape.follow_stream()
        opened = self._opened_for(site)
        tape.completed = None
        if norm_weight is not None and tape.dtype == torch.float64:
            norm_weight = norm_weight.to(torch.float64)
        reading = Reading(tape, site, opened, norm_eps)
        if torch.is_grad_enabled():
            # Of a single term, a query changes nothing.
            single = site.num_sources == 1 and self._partial is None and self._update is None
            token = self._token.detach() if single and not tape.source_grads[0] else self._token
            results = Read.apply(reading, norm_weight, self._partial, self._update, token)
            self._partial = self._update = None
            if isinstance(results, Tensor):
                x = results
            elif site.promotes:
                x, self._token = results
            else:
                x, self._partial = results
        else:
            x, total = read_without_graph(reading, norm_weight, self._partial, self._update)
            self._partial, self._update = total, None
        if self._return_probs:
            self._record(site, opened)
        return x

    def _opened_for(self, site: Site) -> Opened | None:
        """The phase 1 that a site reads, run if the site is the first to."""
        opened = self._opened
        if not site.opens:
            if site.slot < 0 and opened is not None:
                self._release_phase1()
            return self._opened
        if opened is not None and opened.phase1.group is site.group:
            return opened  # prefetched
        if site.closes:
            self._token = Close.apply(
                self._tape, site.index, self._partial, self._update, self._token
            )
            self._partial = self._update = None
        self._release_phase1()
        phase1 = self._tape.phase1 = Phase1(site.group)
        self._token = Open.apply(self._tape, phase1, self._token)
        self._hold(Opened(phase1, self._token.grad_fn))
        return self._opened

    def _hold(self, opened: Opened | None) -> None:
        self._opened = opened
        self._tape.phase1 = None if opened is None else opened.phase1

    def _release_phase1(self) -> None:
        opened = self._opened
        self._hold(None)
        if opened is None or self._keep == "all":
            return
        if self._keep == "none" or opened.phase1.group.index != self._last_group:
            opened.phase1.drop()

    def use_plan(self, change: Callable[[Plan], Plan]) -> None:
        """Runs by another plan of the same network; before the first read.

        A stream of a part of a network keeps its own.

        Raises:
            RuntimeError: a site has been read.
        """
        if self._sublayer > 0 or self._state != "read":
            raise RuntimeError("use_plan: a site has been read; call use_plan before the first")
        if isinstance(self._plan, Plan):
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
            self._undone(lambda: self._opened_for(site[0]))

    def export(self, first: int, boundary: bool) -> tuple[list[Tensor], Tensor | None]:
        """Ends a part of a network: the sources from ``first`` on, and the running sum.

        Args:
            first: of the sources to hand out.
            boundary: the part ends where a block does: the sum is the last source.

        Raises:
            RuntimeError: a sublayer is still to come.
        """
        self._expect("finish")
        exported = self._undone(lambda: self._export(first, boundary))
        self._partial = self._update = None
        self._state = "done"
        return exported, None if boundary else exported.pop()

    def _export(self, first: int, boundary: bool) -> list[Tensor]:
        tape = self._tape
        if tape.device.type == "cuda":
            tape.follow_stream()
        self._release_phase1()
        if boundary:
            self._token = Close.apply(
                tape, self._sublayer, self._partial, self._update, self._token
            )
            self._partial = self._update = None
        return list(Export.apply(tape, first, self._partial, self._update, self._token))

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

    def _record(self, site: Site, opened: Opened | None) -> None:
        lead = self._tape.shape[:-1]
        assert self._tape.logits is not None
        probs, inner = self._tape.logits.softmax(-1), None
        if opened is not None:
            phase1 = opened.phase1
            inner = (phase1.logits[:, site.slot] - phase1.lse[site.slot, :, None]).exp()
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
        reading = Reading(tape, site, self._opened, norm_eps)
        need_grad = first[0].requires_grad
        total = self._partial
        if site.promotes:
            total = tape.completed
        elif total is not None:
            total = total.detach()

        frozen = Sources(()) if reading.opened is None else reading.opened.keeps(tape)
        sources = reading.direct()
        direct = sources.flat()
        split, count = len(direct), len(sources.values)  # no tensors: those are what is saved

        def run(weight: Tensor | None, total: Tensor | None, *saved: Tensor) -> Tensor:
            if first:
                x = first.pop()
            else:
                with torch.no_grad():
                    again = Sources.of(saved[:split], count)
                    x = read_again(reading, weight, total, again, saved[split:])
                x.requires_grad_(need_grad)
            return layer(x)

        output: Tensor = checkpoint_function(
            run,
            norm_weight,
            total,
            *direct,
            *frozen.flat(),
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
    reading: Reading,
    norm_weight: Tensor | None,
    total: Tensor | None,
    direct: Sources,
    kept: Sequence[Tensor],
) -> Tensor:
    """The input of a sublayer, from the saved sum and the sources, in the middle of a backward."""
    tape, site, opened, _ = reading
    if opened is not None:
        in_backward = backward_pass() != -1
        if in_backward:
            tape.enter()
        if in_backward and site.slot not in opened.phase1.replaced:
            opened.phase1.begin(tape, lambda: opened.sources(kept))
        else:
            # The layer does not lead back to its input, so that the site's backward came first; or
            # somebody looks at saved tensors.
            phase1 = Phase1(opened.phase1.group)
            phase1.compute(tape, opened.sources(kept))
            if not opened.phase1.begun:
                opened.phase1.saved = None
            reading = reading._replace(opened=Opened(phase1, opened.node))
    if norm_weight is not None and tape.dtype == torch.float64:
        norm_weight = norm_weight.to(torch.float64)
    return run_site(reading, norm_weight, total, None, direct, keep=False)[0]
