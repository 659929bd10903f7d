"""What one forward pass and its backward share: sources, their gradients, phase-1 results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Variable

from flash_attn_res import finite
from flash_attn_res._check import MAX_SOURCES
from flash_attn_res.plan import Group
from flash_attn_res.storage import QuantizedSource, empty
from flash_attn_res.tape import operators

backward_pass = torch._C._current_graph_task_id  # -1 outside of a backward


def named_sources(sources: Sources) -> finite.Named:
    """For messages. Of quantised ones the scales say whether the values are finite."""
    if sources.scales:
        scales = [scale.view(torch.float8_e8m0fnu).float() for scale in sources.scales]
        return finite.numbered("the scales of sources", scales)
    return finite.numbered("sources", sources.values)


@dataclasses.dataclass
class Given:
    """What a stream begins with that continues another one, as a pipeline stage does.

    Attributes:
        sources: [..., D] all completed sources, the embedding first.
        needs_grad: whether each of them needs a gradient.
        received: so many of the last of them are inputs to autograd: their gradients are handed
            out. Those of the others stay in ``grads``.
        partial: [..., D] running sum of the block in whose middle the stream begins, in the dtype
            of sums.
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
        self.lse: Tensor  # [S, T]
        self.logits: Tensor  # [T, S, n]
        self.inv_rms: Tensor  # [T, n]
        self.begun = False  # by the backward pass that runs
        self.saved: Sources | None = None  # what the node of the group held, in this pass
        self.replaced: set[int] = set()  # rows of out that hold dh by now
        self.gate: Tensor  # [S, T]
        self.dlse: Tensor  # [S, T]

    def compute(self, tape: Tape, sources: Sources) -> None:
        """Results and statistics of the group's queries over its sources [..., D]."""
        group, values = self.group, sources.values
        queries = tape.queries[group.first : group.first + group.size]  # [S, R]
        self.out = tape.values(group.size)
        self.lse = tape.floats(group.size, tape.tokens)
        self.logits = tape.floats(tape.tokens, group.size, len(values))
        self.inv_rms = tape.floats(tape.tokens, len(values))
        operators.attend(
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

    def begin(self, tape: Tape, sources: Callable[[], Sources]) -> None:
        """First thing of a group in a backward pass: the results are there, and no dh yet."""
        if self.begun:
            return
        if self.out is None:
            self.compute(tape, sources())
        # A site whose backward does not run counts with gate 0; its row stays finite.
        gradients = torch.zeros(
            (2, self.group.size, tape.tokens), dtype=tape.queries.dtype, device=tape.device
        )
        self.gate, self.dlse = gradients.unbind(0)
        self.begun = True
        tape.begun.append(self)

    def drop(self) -> None:
        """Frees the results."""
        self.out = self.saved = None
        self.begun = False
        self.replaced.clear()
        # What has no default: an access after this is a mistake that shows.
        for name in ("lse", "logits", "inv_rms", "gate", "dlse"):
            self.__dict__.pop(name, None)


class Opened(NamedTuple):
    """A phase 1 that the sites of its group read, and the node that ran it.

    Attributes:
        node: holds the sources for all of them. None where neither sources nor queries need a
            gradient, so that there is no node: who needs the sources keeps them himself.
    """

    phase1: Phase1
    node: Any | None

    def keeps(self, tape: Tape) -> Sources:
        """The sources of the group that a site has to keep for its backward."""
        if self.node is not None:
            return Sources(())
        return tape.given(0, self.phase1.group.num_sources)

    def sources(self, kept: Sequence[Tensor]) -> Sources:
        """The sources of the group in a backward; ``kept``: what :meth:`keeps` gave, flat."""
        phase1 = self.phase1
        if self.node is None:
            return Sources.of(kept, phase1.group.num_sources)
        if phase1.saved is None:  # checkpointing lets saved tensors be taken out once
            phase1.saved = Sources.of(self.node.saved_tensors, phase1.group.num_sources)
        return phase1.saved


class Tape:
    """What the nodes of one forward pass share."""

    def __init__(
        self,
        embedding: Tensor,
        queries: Tensor,
        scale: float,
        eps: float,
        grad_dtype: torch.dtype,
        sum_dtype: torch.dtype,
        seed: Tensor | None,
        storage: str | None,
    ) -> None:
        self.queries = queries.detach()  # [L + 1, R] folded
        self.query_grad = queries.requires_grad
        self.scale, self.eps, self.grad_dtype = scale, eps, grad_dtype
        self.seed = seed  # of stochastic rounding
        self.shape, self.dtype, self.device = embedding.shape, embedding.dtype, embedding.device
        self.sum_dtype = sum_dtype  # of running sums
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
        self.record = False  # whether to keep logits
        self.logits: Tensor | None = None  # [T, K] of the site that was read last
        self.freed = False  # a backward pass has run
        self.shared = False  # the gradients in dsources are shared with other tapes
        # Of the backward pass that runs:
        self.task: int | None = None
        self.replaced: set[int] = set()  # passes whose state was dropped before they ended
        self.dsources: dict[int, Tensor] = {}  # source -> [..., D]
        self.dqueries: Tensor | None = None  # [L + 1, R]
        self.begun: list[Phase1] = []
        self.cuda_stream: torch.cuda.Stream | None = None
        self.cuda_stream_id = -1  # as PyTorch numbers them

    def store(self, terms: Sequence[Tensor]) -> QuantizedSource:
        """A sum [..., D] in the storage mode, appended to ``stored``."""
        assert self.storage is not None
        numbers, scale = empty(self.shape, self.storage, self.device)
        operators.quantize(terms, numbers, scale)
        self.stored.append(QuantizedSource(numbers, scale))
        return self.stored[-1]

    def add_source(self, terms: Sequence[Tensor], needs_grad: bool) -> int:
        """Appends a completed source, the sum of ``terms``, and returns its index."""
        if self.storage is not None:
            self.sources.append(self.store(terms).values)
        elif len(terms) == 1:
            self.sources.append(terms[0].to(self.dtype))
        else:
            self.sources.append(torch.add(*terms, out=self.values()))
        self.source_grads.append(needs_grad)
        return len(self.sources) - 1

    def mark(self) -> tuple[int, int]:
        """How many sources there are, for :meth:`undo`."""
        return len(self.sources), len(self.stored)

    def undo(self, mark: tuple[int, int]) -> None:
        """Drops the sources that were added since."""
        sources, stored = mark
        del self.sources[sources:], self.source_grads[sources:], self.stored[stored:]
        self.completed = None

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
        task = backward_pass()
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
        self.cuda_stream_id = -1

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
        current_id = torch._C._cuda_getCurrentRawStream(self.device.index)
        if current_id == self.cuda_stream_id:
            return
        current = torch.cuda.current_stream(self.device)
        before = self.cuda_stream
        self.cuda_stream, self.cuda_stream_id = current, current_id
        if before is not None:
            current.wait_stream(before)
            held = [*self.dsources.values(), *self.sources]
            held += [tensor for item in self.stored for tensor in (item.values, item.scale)]
            held += [] if self.dqueries is None else [self.dqueries]
            for phase1 in self.begun:
                held += [phase1.gate, phase1.dlse]
            for phase1 in (*self.begun, *([] if self.phase1 is None else [self.phase1])):
                held += [phase1.lse, phase1.logits, phase1.inv_rms]
                held += [] if phase1.out is None else [phase1.out]
            for tensor in held:
                tensor.record_stream(current)

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
            operators.stochastic_add(terms, seed, 2**31 + node * MAX_SOURCES + j, self.dsources[j])

    def total(self, partial: Tensor, update: Tensor, site: int) -> Tensor:
        """A running sum plus the last output, where sums are rounded stochastically."""
        assert self.seed is not None
        total = self.values()
        operators.stochastic_add([partial, update], self.seed, site, total)
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
