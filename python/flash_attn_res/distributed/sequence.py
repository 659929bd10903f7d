"""Sequence-sharded reading in a tensor-parallel group (section 3.4 of arXiv 2603.15031).

Reading mixes depths, not tokens. A group of P ranks splits the tokens: each keeps the blocks and
the running sum of T / P tokens, and the all-reduce after a sublayer becomes a reduce-scatter and an
all-gather with the ``read`` between them::

    y (partial sums, all tokens) -> reduce-scatter -> add, mixture, norm of T / P tokens
                                 -> all-gather -> x (all tokens)

The gradients go the same way back: a reduce-scatter for each all-gather and the other way round.
What every rank holds in full (queries, key weights, norm weights) sees the tokens of its own shard;
:meth:`TokenShards.sync_gradients` adds those gradients up after the backward.

While the all-gather of a block's first site runs, phase 1 of the other sites is computed on a side
stream of the GPU (``overlap``).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from flash_attn_res import _check
from flash_attn_res.modules import BlockAttnRes
from flash_attn_res.plan import Group, Plan
from flash_attn_res.stream import Stream
from flash_attn_res.tape import TapeStream

# Their names since PyTorch 2.13, which warns of those before.
_all_gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor
_reduce_scatter = (
    getattr(collectives, "reduce_scatter_single", None) or collectives.reduce_scatter_tensor
)


@dataclasses.dataclass
class _Starts:
    """The streams that this process started in a group; all its ranks start each of them."""

    count: int = 0
    alike: set[str] = dataclasses.field(default_factory=set)  # kinds in which all ranks agree


_starts: weakref.WeakKeyDictionary[dist.ProcessGroup, _Starts] = weakref.WeakKeyDictionary()


class _Gather(Function):
    """All ranks' shards, one after the other; the gradient of each rank's copy is summed."""

    @staticmethod
    def forward(ctx: Any, shards: TokenShards, shard: Tensor, pending: _Pending) -> Tensor:
        ctx.shards = shards
        return pending.wait()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return None, ctx.shards.reduce_scatter(gradient), None


class _Scatter(Function):
    """The sum over ranks of this rank's tokens; its gradient goes to all of them."""

    @staticmethod
    def forward(ctx: Any, shards: TokenShards, whole: Tensor) -> Tensor:
        ctx.shards, ctx.tokens = shards, whole.shape[shards.dim]
        return shards.reduce_scatter(whole)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, ctx.shards.begin_gather(gradient, ctx.tokens).wait()


class _Take(Function):
    """This rank's tokens of a value that every rank has in full, and likewise its gradient."""

    @staticmethod
    def forward(ctx: Any, shards: TokenShards, whole: Tensor) -> Tensor:
        ctx.shards, ctx.tokens = shards, whole.shape[shards.dim]
        return shards.own(whole)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, ctx.shards.begin_gather(gradient, ctx.tokens).wait()


class _Pending:
    """An all-gather that runs."""

    def __init__(self, dim: int, rows: Tensor, tokens: int) -> None:
        self._dim, self._rows, self._tokens = dim, rows, tokens

    def wait(self) -> Tensor:
        # On a GPU, the current stream waits, the host does not.
        rows = collectives.wait_tensor(self._rows)
        return rows.narrow(0, 0, self._tokens).movedim(0, self._dim).contiguous()


class TokenShards:
    """How a tensor-parallel group splits the tokens.

    Args:
        group: the tensor-parallel group, or a DeviceMesh of one dimension; the default group if
            None.
        dim: dimension of the tokens in [..., D] values: 0 for Megatron's [T, B, D], where nothing
            is copied to lay out a collective; 1 for [B, T, D].
        overlap: compute phase 1 of a block on a side stream while the block's first input is
            gathered. The first site then reads its sources directly. CUDA alone.

    Raises:
        TypeError, ValueError: naming the argument and what was expected.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | DeviceMesh | None = None,
        *,
        dim: int = 0,
        overlap: bool = True,
    ) -> None:
        op = type(self).__name__
        self.mesh: DeviceMesh | None = None
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(
                    f"{op}: group is a mesh of {group.ndim} dimensions, expected one: index it by "
                    "the name of its tensor-parallel dimension"
                )
            self.mesh, group = group, group.get_group()
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 0:
            raise ValueError(f"{op}: dim is {dim!r}, expected an integer from 0 on")
        self.group = dist.distributed_c10d._get_default_group() if group is None else group
        self.dim, self.overlap = dim, overlap
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError(f"{op}: this process is not in the group")
        self._side: dict[torch.device, torch.cuda.Stream] = {}

    def shard_size(self, tokens: int) -> int:
        """Tokens to a rank: T / P rounded up; the last ranks' shards are padded with zeros."""
        return -(-tokens // self.size)

    def take(self, whole: Tensor) -> Tensor:
        """This rank's shard of a value [..., T, ..., D] that every rank has in full.

        The backward gathers the shards' gradients, so that each rank has the full gradient.
        """
        whole = self._leading("take", whole)
        if not torch.is_grad_enabled():
            return self.own(whole)
        taken: Tensor = _Take.apply(self, whole)
        return taken

    def scatter(self, whole: Tensor) -> Tensor:
        """This rank's shard of the sum over ranks of ``whole``: a reduce-scatter."""
        whole = self._leading("scatter", whole)
        if not torch.is_grad_enabled():  # a node costs the host more than it does
            return self.reduce_scatter(whole)
        scattered: Tensor = _Scatter.apply(self, whole)
        return scattered

    def gather(self, shard: Tensor, tokens: int) -> Tensor:
        """All ranks' shards as one value of ``tokens`` tokens: an all-gather.

        The backward takes the gradient as one of P terms: those of all ranks are summed.
        """
        return self._gathered(shard, self.begin_gather(shard.detach(), tokens))

    def _gathered(self, shard: Tensor, pending: _Pending) -> Tensor:
        """What an all-gather of the shard gives."""
        if not torch.is_grad_enabled():
            return pending.wait()
        whole: Tensor = _Gather.apply(self, shard, pending)
        return whole

    def start(self, attn_res: BlockAttnRes, embedding: Tensor, **options: Any) -> ShardedStream:
        """A stream over this rank's tokens; ``embedding`` is the whole, the same on every rank.

        The ranks' streams must be alike. Each start leaves a note in the group's store, and before
        the first one of its kind a rank waits for the others' notes and compares.

        Args:
            attn_res: whose queries every rank holds in full.
            embedding: [..., T, ..., D].
            options: of :meth:`BlockAttnRes.start`.

        Raises:
            ValueError: ranks start with other shapes, dtypes or networks; it names one.
            RuntimeError: a rank does not start within the group's timeout.
        """
        whole = self._leading("start", embedding)
        if self.size > 1 and not torch.compiler.is_compiling():
            self._compare(attn_res, whole)
        return ShardedStream(self, attn_res, self.take(whole), whole.shape[self.dim], **options)

    def chunks(self, tokens: int, chunk: int) -> Iterator[slice]:
        """Spans of at most ``chunk`` tokens, for chunked prefill: a stream for each.

        A chunk's blocks take up N * chunk / P * D elements a rank, whatever the prompt's length.
        """
        chunk = _check.positive_int("chunks", "chunk", chunk)
        for first in range(0, tokens, chunk):
            yield slice(first, min(first + chunk, tokens))

    def sync_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Adds up over the group the gradients of what each rank holds in full: one all-reduce.

        Those are the parameters that a stream reads with, queries, key weights and norm weights.
        Call it once a backward, before gradients of other micro-batches come on top, or once after
        all of them. Every rank names the same parameters in the same order.
        """
        gradients = []
        for parameter in parameters:
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad is not None:
                gradients.append(parameter.grad)
        if not gradients:
            return
        flat = torch.cat([gradient.reshape(-1).float() for gradient in gradients])
        if gradients[0].dtype == torch.float64:
            flat = torch.cat([gradient.reshape(-1).double() for gradient in gradients])
        total = collectives.wait_tensor(collectives.all_reduce(flat, "sum", self.group))
        summed = total.split([gradient.numel() for gradient in gradients])
        for gradient, value in zip(gradients, summed, strict=True):
            gradient.copy_(value.view_as(gradient))

    # ---------------------------------------------------------------------------- collectives

    def own(self, whole: Tensor) -> Tensor:
        """This rank's tokens, padded, without a collective."""
        size = self.shard_size(whole.shape[self.dim])
        padded = self._pad(whole, size * self.size)
        return padded.narrow(self.dim, self.rank * size, size).contiguous()

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        """The sum over ranks of this rank's tokens."""
        size = self.shard_size(whole.shape[self.dim])
        rows = self._pad(whole, size * self.size).movedim(self.dim, 0).contiguous()
        summed = _reduce_scatter(rows, "sum", 0, self.group)
        return collectives.wait_tensor(summed).movedim(0, self.dim).contiguous()

    def begin_gather(self, shard: Tensor, tokens: int) -> _Pending:
        """Starts the all-gather of shards."""
        rows = shard.movedim(self.dim, 0).contiguous()
        return _Pending(self.dim, _all_gather(rows, 0, self.group), tokens)

    def overlaps(self, device: torch.device) -> bool:
        """Whether phase 1 runs ahead on a device."""
        return self.overlap and device.type == "cuda"

    def side_stream(self, device: torch.device) -> torch.cuda.Stream:
        """The stream on which phase 1 runs beside a collective."""
        if device not in self._side:
            self._side[device] = torch.cuda.Stream(device)
        return self._side[device]

    def _compare(self, attn_res: BlockAttnRes, whole: Tensor) -> None:
        """Raises where this start is not that of the other ranks; see :meth:`start`."""
        mine = {
            "the embedding's shape": list(whole.shape),
            "the embedding's dtype": str(whole.dtype),
            "the dimension of tokens": self.dim,
            "num_sublayers": attn_res.num_sublayers,
            "block_size": attn_res.block_size,
        }
        starts = _starts.setdefault(self.group, _Starts())
        starts.count += 1
        store = dist.distributed_c10d._get_process_group_store(self.group)
        text, key = json.dumps([starts.count, mine]), f"flash_attn_res start {self.rank}"
        if str(mine) in starts.alike:
            store.set(key, text)
            return
        # Kept under its number: this rank may be on its way before the others have read it.
        store.set(f"{key} {starts.count}", text)
        seconds = _timeout(self.group, whole.device)
        notes = [_note(store, rank, starts.count, seconds) for rank in range(self.size)]
        for rank, note in enumerate(notes):
            for name, value in notes[0].items():
                if note[name] != value:
                    raise ValueError(
                        f"start: rank {rank}: {name} is {note[name]}, expected {value} as of rank 0"
                    )
        starts.alike.add(str(mine))

    def _pad(self, whole: Tensor, tokens: int) -> Tensor:
        missing = tokens - whole.shape[self.dim]
        if not missing:
            return whole
        shape = list(whole.shape)
        shape[self.dim] = missing
        return torch.cat([whole, whole.new_zeros(shape)], self.dim)

    def _leading(self, op: str, whole: Tensor) -> Tensor:
        _check.leading(op, "the value", whole)
        if whole.dim() < self.dim + 2:
            raise ValueError(
                f"{op}: rank {self.rank}: the value has shape {_check.shape_text(whole)}, expected "
                f"the tokens in dimension {self.dim} and the width in the last"
            )
        return whole


def _timeout(group: dist.ProcessGroup, device: torch.device) -> float:
    """How long collectives of a group wait for a rank, in seconds."""
    options = getattr(group._get_backend(device), "options", None)
    limit = getattr(options, "_timeout", None)
    return 1800.0 if limit is None else float(limit.total_seconds())


def _note(store: dist.Store, rank: int, number: int, seconds: float) -> dict[str, Any]:
    """What a rank says of its start of this number."""
    own = f"flash_attn_res start {rank} {number}"
    latest = f"flash_attn_res start {rank}"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ahead = json.loads(store.get(latest)) if store.check([latest]) else (0, {})
        found = json.loads(store.get(own)) if store.check([own]) else ahead
        if found[0] == number:
            return dict(found[1])
        if found[0] > number:
            raise RuntimeError(
                f"start: rank {rank} is at start {found[0]} of this group, another rank at "
                f"{number}: one of them has failed or was left out"
            )
        time.sleep(0.001)
    raise RuntimeError(
        f"start: rank {rank} has not come to start {number} of this group within {seconds:g} s"
    )


class ShardedStream:
    """The stream of one rank's tokens for layers that see all tokens.

    ``read`` gives [..., T, ..., D] of all tokens. ``write`` takes the layer's output before its
    all-reduce: each rank's partial sums, as a row-parallel linear layer leaves them. A DTensor is
    taken as it is placed: Partial is reduce-scattered, Shard of the tokens costs nothing.

    Made by :meth:`TokenShards.start`.

    Attributes:
        stream: of this rank's tokens; its blocks and sums are 1 / P of the whole.
    """

    def __init__(
        self,
        shards: TokenShards,
        attn_res: BlockAttnRes,
        embedding: Tensor,
        tokens: int,
        **options: Any,
    ) -> None:
        self._shards, self._tokens = shards, tokens
        self._overlap = shards.overlaps(embedding.device) and not options.get("functional")
        self.stream: Stream = attn_res.start(embedding, **options)
        if self._overlap and isinstance(self.stream, TapeStream):
            self.stream.use_plan(split_first)

    def read(
        self,
        norm_weight: Tensor | None = None,
        norm_eps: float | None = None,
        *,
        dtensor: bool = False,
    ) -> Tensor:
        """The next sublayer's input, of all tokens.

        Args:
            norm_weight, norm_eps: as of :meth:`Stream.read`.
            dtensor: give this rank's tokens as a DTensor with placement Shard(dim), for layers
                that gather them themselves (``parallelize_module``). Needs a DeviceMesh.
        """
        shard = self.stream.read(norm_weight, norm_eps)
        if dtensor:
            return self._as_dtensor(shard)
        pending = self._shards.begin_gather(shard.detach(), self._tokens)
        if self._overlap and isinstance(self.stream, TapeStream):
            self.stream.prefetch(self._shards.side_stream(shard.device))
        return self._shards._gathered(shard, pending)

    def write(self, output: Tensor) -> None:
        """Takes a sublayer's output: this rank's partial sums of all tokens, or a DTensor."""
        if isinstance(output, DTensor):
            placements = [Shard(self._shards.dim)]
            self.stream.write(output.redistribute(placements=placements).to_local())
            return
        checked = _check.tensor("write", "output", output)
        if checked.dim() <= self._shards.dim or checked.shape[self._shards.dim] != self._tokens:
            raise ValueError(
                f"write: rank {self._shards.rank}: output has shape {_check.shape_text(checked)}, "
                f"expected {self._tokens} tokens in dimension {self._shards.dim}: the partial sums "
                "of all tokens"
            )
        self.stream.write(self._shards.scatter(checked))

    def sublayer(
        self,
        layer: Callable[[Tensor], Tensor],
        norm_weight: Tensor | None = None,
        norm_eps: float | None = None,
        *,
        checkpoint: bool = False,
        preserve_rng_state: bool = True,
    ) -> None:
        """``write(layer(read(norm_weight, norm_eps)))``, on request with recomputation.

        With ``checkpoint`` the backward gathers the layer's input again. Where the layer raises,
        this rank's read is undone.
        """
        if not checkpoint:
            self.stream._undone(lambda: self.write(layer(self.read(norm_weight, norm_eps))))
            return

        def whole(shard: Tensor) -> Tensor:
            output = layer(self._shards.gather(shard, self._tokens))
            return self._shards.scatter(output)

        self.stream.sublayer(
            whole,
            norm_weight,
            norm_eps,
            checkpoint=True,
            preserve_rng_state=preserve_rng_state,
        )

    def finish(
        self,
        norm_weight: Tensor | None = None,
        norm_eps: float | None = None,
        *,
        gather: bool = True,
    ) -> Tensor:
        """The final aggregation: of all tokens, or with ``gather=False`` of this rank's.

        Gathered, it is for a head that each rank computes a part of: the gradients of all ranks
        are summed.
        """
        shard = self.stream.finish(norm_weight, norm_eps)
        return self._shards.gather(shard, self._tokens) if gather else shard

    def _as_dtensor(self, shard: Tensor) -> Tensor:
        mesh, size = self._shards.mesh, self._shards.size
        if mesh is None or self._tokens % size:
            raise ValueError(
                f"read: rank {self._shards.rank}: a DTensor needs TokenShards of a DeviceMesh and "
                f"tokens that {size} divides; the group is "
                f"{'a mesh' if mesh is not None else 'no mesh'} and there are {self._tokens} tokens"
            )
        return DTensor.from_local(shard, mesh, [Shard(self._shards.dim)], run_check=False)


@functools.lru_cache(maxsize=64)
def split_first(plan: Plan) -> Plan:
    """The plan whose groups with phase 1 let their first site read its sources directly.

    Phase 1 of the others may then run while the first site's sublayer begins.
    """
    groups: list[Group] = []
    for group in plan.groups:
        spans = [(group.first, group.size, group.two_phase)]
        # The output's site has nothing to overlap with; a group of several blocks keeps its order.
        splits = group.two_phase and group.size > 1 and group.size <= plan.block_size + 1
        if splits and group.first > 0 and group.first % plan.block_size == 0:
            spans = [(group.first, 1, False), (group.first + 1, group.size - 1, True)]
        for first, size, two_phase in spans:
            sources = first // plan.block_size + 1 if len(spans) > 1 else group.num_sources
            groups.append(Group(len(groups), first, size, sources, two_phase))
    return Plan(plan.num_sublayers, plan.block_size, tuple(groups), plan.costs)
