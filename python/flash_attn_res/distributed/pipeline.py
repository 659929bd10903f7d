"""Pipeline parallelism with cross-stage caching, on :mod:`torch.distributed.pipelining`.

A stage receives the blocks that its rank does not have and, in the middle of a block, the running
sum; it sends on the blocks that the next rank does not have. They travel as inputs and outputs of
the stage's module, so that schedules (GPipe, 1F1B, interleaved 1F1B, its zero-bubble form) move
them and their gradients as they move any activation.

Blocks that a rank keeps for its later stages go past autograd. A rank has, for each micro-batch,
one gradient buffer for each block: the sites of all its stages add to it in place, and so does what
the next stage returns. The stage that received the block runs backward after all of those. It hands
the buffer out, once, and the gradient takes the way back that the block came.

.. code-block:: python

    layout = PipelineLayout.even(L, S, num_ranks=P, num_virtual=V)


    class Stage(nn.Module):  # of stage c
        def __init__(self):
            self.attn_res = StageAttnRes(layout, c, D)
            ...

        def forward(self, *given):
            if c == 0:
                stream = self.attn_res.start(self.embed(*given))
            else:
                stream = self.attn_res.resume(*given)
            for layer, norm in zip(self.layers, self.norms):
                stream.sublayer(layer, norm)
            if c < layout.num_stages - 1:
                return self.attn_res.export(stream)
            return self.head(stream.finish(self.final_norm))


    stages = make_stages({c: Stage(c) for c in layout.stages_of(rank)}, ...)
    schedule = ScheduleInterleaved1F1B(stages, num_microbatches, loss_fn)
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from flash_attn_res import _check
from flash_attn_res.distributed.layout import PipelineLayout, check_stage, spans
from flash_attn_res.distributed.payload import Payload, Plain, Stored, decode, encode
from flash_attn_res.modules import BlockAttnRes
from flash_attn_res.plan import PartialPlan, part
from flash_attn_res.storage import QuantizedSource
from flash_attn_res.tape import Given, TapeStream


@dataclasses.dataclass
class MicroBatch:
    """What one rank keeps of one micro-batch, from its first stage's forward to that's backward.

    Attributes:
        sources: [..., D] the completed sources that the rank has, the embedding first.
        stored: in a storage mode, all of them as they are stored; ``sources`` has the numbers.
        needs_grad: whether each of them needs a gradient.
        grads: source -> [..., D], the gradients added up so far.
    """

    sources: list[Tensor] = dataclasses.field(default_factory=list)
    stored: list[QuantizedSource] = dataclasses.field(default_factory=list)
    needs_grad: list[bool] = dataclasses.field(default_factory=list)
    grads: dict[int, Tensor] = dataclasses.field(default_factory=dict)


class BlockCache:
    """The blocks that one rank keeps for its later stages, a :class:`MicroBatch` each.

    Attributes:
        current: the micro-batch that runs forward; None outside of a pipeline's step.
        peak_values: most sources [T, D] that were kept at a time.
    """

    def __init__(self) -> None:
        self._kept: dict[int, MicroBatch] = {}
        self.current: MicroBatch | None = None
        self.peak_values = 0

    def enter(self, index: int) -> None:
        """A stage begins the forward of a micro-batch."""
        self.current = self._kept.setdefault(index, MicroBatch())

    def leave(self) -> None:
        """The forward is done."""
        self.current = None
        held = sum(len(micro_batch.sources) for micro_batch in self._kept.values())
        self.peak_values = max(self.peak_values, held)

    def forget_sources(self, index: int) -> None:
        """No later stage reads them; the graphs hold what the backwards need."""
        micro_batch = self._kept[index]
        micro_batch.sources, micro_batch.stored, micro_batch.needs_grad = [], [], []

    def drop(self, index: int) -> None:
        """The micro-batch has ended on this rank."""
        self._kept.pop(index, None)

    def clear(self) -> None:
        """Forgets everything, also what a step that failed has left behind."""
        self._kept.clear()
        self.current = None

    def __len__(self) -> int:
        return len(self._kept)


class StageAttnRes(BlockAttnRes):
    """The part of a :class:`BlockAttnRes` that one pipeline stage runs.

    It holds the queries and key weights of the stage's own sites: rows ``layout.sites(stage)`` of
    those of the whole network.

    Args:
        layout: of the pipeline.
        stage: this stage.
        dim: width D of the residual stream.
        options: as of :class:`BlockAttnRes`; ``stochastic_rounding`` is refused.
    """

    def __init__(self, layout: PipelineLayout, stage: int, dim: int, **options: Any) -> None:
        self.layout, self.stage = layout, check_stage(type(self).__name__, layout, stage)
        if options.get("stochastic_rounding") is not None:
            raise ValueError(
                f"{type(self).__name__}: stochastic_rounding is given, expected None: what travels "
                "between stages is rounded to nearest"
            )
        super().__init__(layout.num_sublayers, dim, layout.block_size, **options)
        first, end = layout.bounds[stage], layout.bounds[stage + 1]
        self._partial_plans: dict[torch.dtype | None, PartialPlan] = {
            dtype: part(plan, first, end) for dtype, plan in self._training_plans.items()
        }
        self._partial_plans[None] = part(self._inference_plan, first, end)
        # Set by make_stages:
        self.payload: Payload = Plain()
        self.stream_dtype = torch.float32
        self.cache: BlockCache | None = None

    def _sites(self) -> range:
        return self.layout.sites(self.stage)

    @property
    def where(self) -> str:
        """The rank and the stage, for messages."""
        return f"rank {self.layout.ranks[self.stage]}, stage {self.stage}"

    def start(
        self, embedding: Tensor, *, return_probs: bool = False, functional: bool | None = None
    ) -> TapeStream:
        """Begins the forward pass of stage 0.

        Raises:
            RuntimeError: another stage starts.
            ValueError, TypeError: as of :meth:`BlockAttnRes.start`.
        """
        if self.stage > 0:
            raise RuntimeError(f"start: {self.where}: only stage 0 starts; the others resume")
        if functional:
            raise ValueError(f"start: {self.where}: a stage has no functional stream")
        held = self._held()
        need = torch.is_grad_enabled() and embedding.requires_grad
        given = Given([embedding], [need], 1, None, held.grads)
        return self._begin("start", given, return_probs)

    def resume(self, *tensors: Tensor, return_probs: bool = False) -> TapeStream:
        """Begins the forward pass of a later stage with what it received.

        Args:
            tensors: what :meth:`export` of the stage before returned.
            return_probs: as of :meth:`BlockAttnRes.start`.

        Raises:
            RuntimeError: stage 0 resumes, or the rank lacks a block that it should have kept.
            ValueError, TypeError: another number of tensors, or of another shape or dtype.
        """
        op, layout, stage = f"resume: {self.where}", self.layout, self.stage
        if stage == 0:
            raise RuntimeError(f"{op}: stage 0 has nothing to resume; call start")
        held, known = self._held(), layout.known(stage)
        if len(held.sources) < known:
            raise RuntimeError(
                f"{op}: missing block: this rank should have kept the sources 0-{known - 1} and "
                f"has {spans(range(len(held.sources)))}; run the stages that make_stages gave"
            )
        values, stored = self._decode(op, tensors)
        partial = values.pop() if layout.has_partial(stage) else None
        received = layout.received(stage)
        grad = torch.is_grad_enabled()
        # A stream begins with values; it stores them again, but for what is stored already.
        kept = held.sources[:known]
        like = values[0] if values else kept[0]
        wanted = self.sum_dtype_of(like.dtype)
        if partial is not None and partial.dtype != wanted:
            raise TypeError(
                f"{op}: the running sum is {partial.dtype}, expected {wanted}, the dtype of sums "
                f"in a stream of {like.dtype}"
            )
        for source, item in enumerate(held.stored[:known]):
            stored[source] = item
            if source > 0:
                kept[source] = item.dequantize(like.dtype)
        given = Given(
            sources=[*kept, *values],
            needs_grad=[
                *held.needs_grad[:known],
                *(grad and value.requires_grad for value in values),
            ],
            received=len(received),
            partial=partial,
            grads=held.grads,
        )
        return self._begin("resume", given, return_probs, stored)

    def export(self, stream: TapeStream) -> tuple[Tensor, ...]:
        """Ends the forward pass of a stage that is not the last: what the next one receives.

        Raises:
            RuntimeError: a sublayer is still to come, or the stage is the last.
        """
        layout, stage = self.layout, self.stage
        if stage == layout.num_stages - 1:
            raise RuntimeError(f"export: {self.where}: the last stage ends with finish")
        first = layout.known(stage + 1)
        sources, partial = stream.export(first, not layout.has_partial(stage + 1))
        held, tape = self._held(), stream._tape
        held.sources = stream.sources if tape.storage is None else list(tape.sources)
        held.stored, held.needs_grad = list(tape.stored), stream.sources_need_grad
        stream.release()
        values = sources if partial is None else [*sources, partial]
        sent: list[Tensor] = []
        formats = formats_of(layout, stage + 1, self.payload)
        for source, (value, form) in enumerate(zip(values, formats, strict=True), start=first):
            stored = None
            if source < len(held.stored) and isinstance(form, Stored):
                stored = held.stored[source] if form.mode == self.block_storage else None
            sent += encode(form, value, stored)
        return tuple(sent)

    def _held(self) -> MicroBatch:
        """What the rank keeps of the micro-batch; of its own, a stage alone keeps nothing."""
        if self.cache is not None and self.cache.current is not None:
            return self.cache.current
        return MicroBatch()

    def _decode(
        self, op: str, tensors: Sequence[Tensor]
    ) -> tuple[list[Tensor], dict[int, QuantizedSource]]:
        """The values, and by source what came as this stage stores it."""
        received = self.layout.received(self.stage)
        formats = formats_of(self.layout, self.stage, self.payload)
        dtypes = dtypes_of(self, self.stage, self.stream_dtype)
        likes = [torch.empty((1, self.dim), dtype=dtype, device="meta") for dtype in dtypes]
        counts = [len(form.encode(like)) for form, like in zip(formats, likes, strict=True)]
        if len(tensors) != sum(counts):
            parts = f"the sources {spans(received)}" if received else "no source"
            if self.layout.has_partial(self.stage):
                parts += " and the running sum"
            raise ValueError(
                f"{op}: missing block: {len(tensors)} tensors were given, expected {parts}, "
                f"{len(formats)} values in {sum(counts)} tensors"
            )
        values: list[Tensor] = []
        stored: dict[int, QuantizedSource] = {}
        rest = iter(tensors)
        wires = zip(formats, dtypes, counts, strict=True)
        for source, (form, dtype, count) in enumerate(wires, received.start):
            parts_of = [next(rest) for _ in range(count)]
            values.append(decode(form, parts_of, dtype))
            if isinstance(form, Stored) and form.mode == self.block_storage:
                stored[source] = form.unpack(parts_of)
        for index, value in enumerate(values):
            _check.leading(op, f"value {index}", value)
            _check.value(op, f"value {index}", value, "value 0", values[0])
            if index < len(received):
                _check.same_dtype(op, f"value {index}", value, "value 0", values[0])
        return values, stored

    def _begin(
        self,
        op: str,
        given: Given,
        return_probs: bool,
        stored: Mapping[int, QuantizedSource] | None = None,
    ) -> TapeStream:
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"{op}: {self.where}: a stage is not compiled as a whole; compile its layers"
            )
        like = given.sources[-1]
        queries = self._fold(f"{op}: {self.where}", "the value", like)
        plan = self._partial_plans[like.dtype if torch.is_grad_enabled() else None]
        stream = TapeStream(self, like, queries, plan, return_probs, given)
        for source, item in (stored or {}).items():
            stream._tape.stored[source] = item
            if source > 0:
                stream._tape.sources[source] = item.values
        return stream


def formats_of(layout: PipelineLayout, stage: int, payload: Payload) -> list[Payload]:
    """How each value that a stage receives travels, the running sum last."""
    plain = Plain() if isinstance(payload, Stored) else payload
    formats = [payload if source > 0 else plain for source in layout.received(stage)]
    return [*formats, plain] if layout.has_partial(stage) else formats


def dtypes_of(attn_res: StageAttnRes, stage: int, dtype: torch.dtype) -> list[torch.dtype]:
    """The dtype of each value that a stage receives, the running sum last."""
    layout = attn_res.layout
    dtypes = [dtype for _ in layout.received(stage)]
    return [*dtypes, attn_res.sum_dtype_of(dtype)] if layout.has_partial(stage) else dtypes


def _nothing() -> None:
    """The second half of a backward that has run as a whole."""


class _Stage(PipelineStage):
    """A PipelineStage that tells the rank's cache which micro-batch runs, and counts bytes.

    A PipelineStage has receive buffers for all micro-batches of a step and keeps them from step to
    step. Here a buffer is on the meta device but for the time from its receive to its use: after a
    forward the graph alone holds what came, and after a backward nothing does.

    Attributes:
        attn_res: the stage's module.
        sent_bytes: what was sent so far, ``"forward"`` and ``"backward"``.
        peak_buffers: most receive buffers at a time, tensors.
    """

    def __init__(
        self, module: nn.Module, attn_res: StageAttnRes, cache: BlockCache, **given: Any
    ) -> None:
        layout, stage = attn_res.layout, attn_res.stage
        # With a dw_builder, schedules that split the backward (zero bubble) run it as a whole where
        # its first half would be: the gradients of blocks are added up in place, once.
        super().__init__(module, stage, layout.num_stages, dw_builder=lambda: _nothing, **given)
        self.attn_res, self.cache = attn_res, cache
        self.own_stages = layout.stages_of(layout.ranks[stage])
        self.sent_bytes = {"forward": 0, "backward": 0}
        self.peak_buffers = self._buffers = 0

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._prepare_forward_infra(*args, **kwargs)
        for infos in self.args_recv_info.values():
            self._move_buffers(infos, "meta")
        self._buffers = 0
        return result

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._prepare_backward_infra(*args, **kwargs)
        for infos in self.grad_recv_info.values():
            self._move_buffers(infos, "meta")
        self._buffers = 0
        return result

    def _move_buffers(self, infos: Sequence[Any], device: torch.device | str) -> None:
        for info in infos:
            held = getattr(info, "buffer", None)
            if held is None or held.is_meta == (str(device) == "meta"):
                continue
            info.buffer = torch.empty_like(held, device=device).requires_grad_(held.requires_grad)
            self._buffers += -1 if info.buffer.is_meta else 1
        self.peak_buffers = max(self.peak_buffers, self._buffers)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self._move_buffers(self.args_recv_info[fwd_chunk_id], self.device)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if self.has_backward and not self.is_last:
            self._move_buffers(self.grad_recv_info[bwd_chunk_id], self.device)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        self.cache.enter(fwd_chunk_id)
        try:
            output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        except Exception as error:
            self._tell(f"forward of micro-batch {fwd_chunk_id}", error)
            raise
        finally:
            self.cache.leave()
        self._move_buffers(self.args_recv_info[fwd_chunk_id], "meta")
        if self.stage_index == self.own_stages[-1]:
            self.cache.forget_sources(fwd_chunk_id)
            if not self.has_backward:
                self.cache.drop(fwd_chunk_id)
        return output

    def backward_one_chunk(
        self,
        bwd_chunk_id: int,
        loss: Any = None,
        full_backward: bool = True,
        last_backward: bool = False,
    ) -> Any:
        try:
            result = super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        except Exception as error:
            self._tell(f"backward of micro-batch {bwd_chunk_id}", error)
            raise
        if not self.is_last and self.has_backward:
            self._move_buffers(self.grad_recv_info[bwd_chunk_id], "meta")
        if self.stage_index == self.own_stages[0]:
            self.cache.drop(bwd_chunk_id)
        return result

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._count("forward", super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._count("backward", super().get_bwd_send_ops(bwd_chunk_id))

    def clear_runtime_states(self) -> None:
        super().clear_runtime_states()
        self.cache.clear()

    @property
    def store(self) -> dist.Store:
        """The group's, which outlasts a collective that hangs."""
        group = self.group or dist.distributed_c10d._get_default_group()
        return dist.distributed_c10d._get_process_group_store(group)

    def _tell(self, doing: str, error: Exception) -> None:
        """Leaves a note for :func:`shared_errors` of the other ranks."""
        cause = error.__cause__ or error
        text = f"{self.attn_res.where}: {doing}: {type(cause).__name__}: {cause}"
        self.store.set(f"flash_attn_res error {self.group_rank}", text)

    def _count(self, way: str, ops: list[dist.P2POp]) -> list[dist.P2POp]:
        self.sent_bytes[way] += sum(op.tensor.nbytes for op in ops)
        return ops


@contextlib.contextmanager
def shared_errors(stages: Sequence[PipelineStage]) -> Iterator[None]:
    """Around ``schedule.step(...)``: an error in a stage is named on every rank that it ends.

    A stage that fails leaves a note in the group's store. The other ranks' step ends when the
    backend finds out, as the process ends or by the group's timeout, with an error that knows
    nothing of stages; here it is raised as that of the note. Where the failing process was itself
    the store's host, as rank 0 is outside of torchrun, the backend's error stands.

    Args:
        stages: of this rank, as :func:`make_stages` returned them.

    Raises:
        RuntimeError: naming rank, stage and micro-batch; its cause is this rank's own error.
    """
    own = [stage for stage in stages if isinstance(stage, _Stage)]
    if own:
        own[0].store.delete_key(f"flash_attn_res error {own[0].group_rank}")
    try:
        yield
    except Exception as error:
        note = ""
        with contextlib.suppress(RuntimeError):  # the store may be gone with its host
            for rank in range(own[0].group_size if own else 0):
                key = f"flash_attn_res error {rank}"
                if not note and own[0].store.check([key]):
                    note = own[0].store.get(key).decode()
        if note:
            raise RuntimeError(note) from error
        raise


def make_stages(
    modules: Mapping[int, nn.Module],
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    device: torch.device | str,
    group: dist.ProcessGroup | None = None,
    payload: Payload | None = None,
    input_args: Tensor | tuple[Tensor, ...] | None = None,
    output_args: Tensor | tuple[Tensor, ...] | None = None,
) -> list[PipelineStage]:
    """The PipelineStages of this rank, for a schedule of torch.distributed.pipelining.

    All ranks of the group call it together: they compare what they were given, so that stages that
    do not fit together are an error on every rank, before anything is sent.

    Args:
        modules: stage -> module, of all stages of this rank. Each has one :class:`StageAttnRes`
            among its submodules and may be wrapped by DDP or ``fully_shard``.
        shape: [..., D] of a micro-batch's stream.
        dtype: of the stream.
        device: of this rank.
        group: of the pipeline; the default group if None.
        payload: the format in which values travel; as they are by default.
        input_args: like a micro-batch's input of stage 0, on the meta device; given where stage 0
            is. By default the embedding itself, [..., D].
        output_args: like the output of the last stage; given where that is. By default [..., D].

    Returns:
        The stages in order. Each counts what it sends in ``sent_bytes``.

    Raises:
        ValueError, TypeError, RuntimeError: on every rank, naming the rank that is wrong, and the
            stage where it is one.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    payload = Plain() if payload is None else payload
    found: dict[int, StageAttnRes] = {}
    own: dict[int, dict[str, str]] = {}
    stages: list[PipelineStage] = []
    # What goes wrong here goes through the exchange: the others would wait for a rank that left.
    kind = text = ""
    cache, here = BlockCache(), None
    try:
        here = torch.empty(0, device=device).device
        found = _find(modules, rank, size, tuple(shape), dtype)
        own = {stage: _describe(part_of, payload, shape, dtype) for stage, part_of in found.items()}
        for stage in sorted(found):
            inputs, outputs = _wires(found[stage], payload, tuple(shape), dtype)
            last = stage == found[stage].layout.num_stages - 1
            stages.append(
                _Stage(
                    modules[stage],
                    found[stage],
                    cache,
                    device=here,
                    input_args=input_args if stage == 0 and input_args is not None else inputs,
                    output_args=output_args if last and output_args is not None else outputs,
                    group=group,
                )
            )
    except Exception as problem:
        kind, text = type(problem).__name__, str(problem)
        if "make_stages: " not in text:
            text = f"make_stages: rank {rank}: {kind}: {text}"
    gathered: list[Any] = [None] * size
    # NCCL sends objects from the current device, which need not be this rank's.
    with torch.cuda.device(here if here is not None and here.type == "cuda" else -1):
        dist.all_gather_object(gathered, (kind, text, own), group=group)
    _compare(gathered)
    for attn_res in found.values():
        attn_res.payload, attn_res.cache, attn_res.stream_dtype = payload, cache, dtype
    return stages


def _wires(
    attn_res: StageAttnRes, payload: Payload, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Meta tensors like what a stage takes in and gives out; [..., D] at the pipeline's ends."""
    layout, stage = attn_res.layout, attn_res.stage
    value = torch.empty(shape, dtype=dtype, device="meta")

    def wire(stage: int) -> tuple[Tensor, ...]:
        formats = zip(
            formats_of(layout, stage, payload), dtypes_of(attn_res, stage, dtype), strict=True
        )
        parts = [item for form, own in formats for item in form.encode(value.to(own))]
        return tuple(item.detach().requires_grad_() for item in parts)

    inputs = wire(stage) if stage > 0 else (value,)
    last = stage == layout.num_stages - 1
    return inputs, (value,) if last else wire(stage + 1)


def _find(
    modules: Mapping[int, nn.Module],
    rank: int,
    size: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> dict[int, StageAttnRes]:
    """The StageAttnRes of each module, checked by itself."""
    op = "make_stages"
    _check.stream_dtype(f"{op}: rank {rank}", dtype)
    if not modules:
        raise ValueError(f"{op}: rank {rank}: modules is empty, expected one for each stage")
    found: dict[int, StageAttnRes] = {}
    for stage, module in modules.items():
        where = f"{op}: rank {rank}, stage {stage}"
        parts = [item for item in module.modules() if isinstance(item, StageAttnRes)]
        if len(parts) != 1:
            raise ValueError(f"{where}: the module has {len(parts)} StageAttnRes, expected one")
        attn_res = parts[0]
        layout = attn_res.layout
        if attn_res.stage != stage:
            raise ValueError(f"{where}: its StageAttnRes was made for stage {attn_res.stage}")
        if layout.num_ranks != size:
            raise ValueError(
                f"{where}: the group has {size} ranks, expected {layout.num_ranks}, as many as "
                "the layout"
            )
        if layout.ranks[stage] != rank:
            raise ValueError(f"{where}: the layout has this stage on rank {layout.ranks[stage]}")
        if not shape or shape[-1] != attn_res.dim:
            raise ValueError(
                f"{where}: shape is {list(shape)}, expected [..., {attn_res.dim}], the width of "
                "its StageAttnRes"
            )
        found[stage] = attn_res
    layout = next(iter(found.values())).layout
    missing = [stage for stage in layout.stages_of(rank) if stage not in found]
    if missing:
        raise ValueError(f"{op}: rank {rank}, stage {missing[0]}: no module was given for it")
    return found


def _describe(
    attn_res: StageAttnRes, payload: Payload, shape: Sequence[int], dtype: torch.dtype
) -> dict[str, str]:
    """What all stages must have in common."""
    layout = attn_res.layout
    return {
        "block_size": str(layout.block_size),
        "dim": str(attn_res.dim),
        "num_sublayers": str(layout.num_sublayers),
        "bounds": str(layout.bounds),
        "ranks": str(layout.ranks),
        "cache": str(layout.cache),
        "scale": str(attn_res.scale),
        "eps": str(attn_res.eps),
        "query_dim": str(attn_res.query_dim),
        "key_weight": str(attn_res.key_weight is not None),
        "block_storage": str(attn_res.block_storage),
        "grad_dtype": str(attn_res.grad_dtype),
        "sum_dtype": str(attn_res.sum_dtype),
        "shape": str(list(shape)),
        "dtype": str(dtype),
        "payload": payload.name,
    }


def _compare(gathered: Sequence[tuple[str, str, dict[int, dict[str, str]]]]) -> None:
    """Raises the same error on every rank, if there is one."""
    for kind, text, _ in gathered:
        if text:
            kinds = {"TypeError": TypeError, "ValueError": ValueError}
            raise kinds.get(kind, RuntimeError)(text)
    everything = sorted(
        (stage, rank, described)
        for rank, (_, _, own) in enumerate(gathered)
        for stage, described in own.items()
    )
    _, first_rank, first = everything[0]
    for stage, rank, described in everything:
        for name, value in described.items():
            if value != first[name]:
                typed = name in ("dtype", "grad_dtype", "sum_dtype", "payload")
                kind_of = TypeError if typed else ValueError
                raise kind_of(
                    f"make_stages: rank {rank}, stage {stage}: {name} is {value}, expected "
                    f"{first[name]} as of rank {first_rank}, stage {everything[0][0]}"
                )
