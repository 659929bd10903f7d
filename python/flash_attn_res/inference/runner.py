"""``Runner``: all reading sites of a model, planned once, with buffers of its own.

Block b (from 0) begins at sublayer b S. Entering it, the running sum is stored in row b of the bank
(the embedding in row 0) and a new sum begins, so that with K = b + 1 rows written

    site b S (boundary)     reads rows 0..b-1 and the sum, which becomes row b     N = b + 1
    the sites behind it     read rows 0..b and the sum of their own block          N = b + 2
    the output site         reads every row and the sum of the last block

which is the data flow of Kimi K3 (its layers have two sublayers, so that S = 24) and of Block
Attention Residuals (arXiv 2603.15031). Site 0 has one source: its mixture is the embedding.

Two-phase: when row b is written, one `attend` gives (o, lse) over rows 0..b for all sites that
read exactly those rows, which are the sites b S + 1 to (b + 1) S (the next boundary, or the output
site), and each of them is then one `read` over (o, lse) and the sum.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn_res import _check
from flash_attn_res.inference.bank import BlockBank
from flash_attn_res.inference.operators import FP8, scale_columns
from flash_attn_res.inference.weights import SiteWeights
from flash_attn_res.storage import QuantizedSource

MODES = ("auto", "one_shot", "two_phase")
QUANTISATIONS = ("token", "group")

TWO_PHASE_FROM = {None: 3, "float16": 3, "float8": 5}
"""Rows from which "auto" takes two phases: a site then reads o in place of them all. Phase 1 moves
(n + S) / S units of T * D elements a site and the merge reads one more; one-shot reads n. A row in
float8 is half a unit."""


class Quantized(NamedTuple):
    """A quantised x: ``x.float() * scale`` (each group's columns times its scale)."""

    x: Tensor  #: [T, D] float8_e4m3fn
    scale: Tensor  #: [T, 1] or [T, ceil(D / 128)] float32


@dataclasses.dataclass(frozen=True)
class _Site:
    """One call of read_out, ready but for the tensors that a step brings."""

    sources: list[Tensor]  # [n, T, D], or nothing
    scales: list[Tensor]  # [n, T, groups] of a bank with storage
    phase1: tuple[Tensor | None, Tensor | None]  # ([T, D], [T])
    query: Tensor | None  # [R]
    norm_weight: Tensor  # [D]
    partial: Tensor | None  # [T, D]; site 0 has the embedding in its place
    partial_out: Tensor | None  # [T, D]
    snapshot: Tensor | None  # [T, D]
    claims: int | None  # row of the bank that the site writes
    stored: QuantizedSource | None  # that row of a bank with storage, written behind the read
    x: Tensor
    x_scale: Tensor | None


@dataclasses.dataclass(frozen=True)
class _Phase1:
    """One call of attend_out, for the sites behind a boundary."""

    sources: list[Tensor]  # [n, T, D]
    scales: list[Tensor]  # [n, T, groups] of a bank with storage
    queries: Tensor  # [S, R]
    out: Tensor  # [S, T, D]
    lse: Tensor  # [S, T]


@dataclasses.dataclass(frozen=True)
class _Schedule:
    """Every call of a step of T tokens."""

    tokens: int
    sites: list[_Site]
    phase1: dict[int, _Phase1]  # by the boundary site that it follows
    workspace: Tensor
    phase1_workspace: Tensor  # its own: it may run beside the sublayers


class Runner:
    """Runs the reading sites of one model, for inference.

    .. code-block:: python

        runner = Runner(weights, block_size=24, max_tokens=256)
        step = runner.start(embedding)  # [T, D]
        for sublayer in sublayers:
            x = step.read()  # pending add + mixture + pre-norm
            step.write(sublayer(x))
        y = step.finish()  # output mixture + final norm, for the head

    All buffers are allocated by the constructor, and the views of a step of T tokens when the first
    such step begins: from the second step of a size on nothing is allocated, so that steps can be
    captured into CUDA graphs. What ``read`` and ``finish`` return is one buffer, valid until the
    next ``read``; a runner runs one step at a time.

    Args:
        weights: of L + 1 sites.
        block_size: S, sublayers to a block (for Kimi K3, whose blocks have 12 layers, 24).
        max_tokens: most tokens T of a step.
        eps: of the keys' RMSNorm.
        norm_eps: of the norms behind the sites; by default ``eps``.
        layout: of the bank, see :class:`BlockBank`.
        dtype: of the bank, the sums and, unless quantised, x.
        mode: ``"one_shot"`` reads all sources at each site; ``"two_phase"`` runs phase 1 of a
            block in one launch and one merge at each site; ``"auto"`` takes the one that moves
            fewer bytes, block by block.
        side_stream: run phase 1 on a CUDA stream of its own, beside the sublayer that follows a
            boundary.
        fp8: ``"token"`` or ``"group"``: x of every site but the output one is
            :class:`Quantized`, with one scale a token or a group of 128 columns.
        power_of_two_scale: its scales are powers of two.
        round_mix: round the mixture to its storage dtype before the norm, as some engines do.
        storage: of the bank: ``"float16"`` or ``"float8"`` with scales, see :class:`BlockBank`. A
            snapshot is rounded once more and read so from then on; that takes one more launch a
            block. The site at a boundary reads the sum as it is.
        bank: to use in place of one of its own.

    Raises:
        ValueError, TypeError: naming the argument and what was expected.
    """

    def __init__(
        self,
        weights: SiteWeights,
        *,
        block_size: int,
        max_tokens: int,
        eps: float = 1e-5,
        norm_eps: float | None = None,
        layout: str = "tnd",
        dtype: torch.dtype = torch.bfloat16,
        mode: str = "auto",
        side_stream: bool = False,
        fp8: str | None = None,
        power_of_two_scale: bool = False,
        round_mix: bool = False,
        storage: str | None = None,
        bank: BlockBank | None = None,
    ) -> None:
        op = type(self).__name__
        if not isinstance(weights, SiteWeights):
            raise TypeError(f"{op}: weights is a {type(weights).__name__}, expected SiteWeights")
        self.weights = weights
        self.block_size = _check.positive_int(op, "block_size", block_size)
        self.max_tokens = _check.positive_int(op, "max_tokens", max_tokens)
        self.eps = _check.positive(op, "eps", eps)
        self.norm_eps = eps if norm_eps is None else _check.positive(op, "norm_eps", norm_eps)
        if mode not in MODES:
            raise ValueError(f"{op}: mode is {mode!r}, expected one of {', '.join(MODES)}")
        if fp8 is not None and fp8 not in QUANTISATIONS:
            raise ValueError(f"{op}: fp8 is {fp8!r}, expected None, 'token' or 'group'")
        if power_of_two_scale and fp8 is None:
            raise ValueError(f"{op}: power_of_two_scale was given without fp8")
        self.mode, self.round_mix = mode, bool(round_mix)
        self.power_of_two_scale = bool(power_of_two_scale)
        self.num_sublayers = weights.num_sublayers
        self.num_blocks = -(-self.num_sublayers // block_size)
        device = weights.queries.device
        if side_stream and device.type != "cuda":
            raise ValueError(f"{op}: side_stream needs CUDA, but the weights are on {device}")
        dim = weights.dim
        if bank is None:
            bank = BlockBank(
                *(self.num_blocks, max_tokens, dim),
                layout=layout,
                dtype=dtype,
                device=device,
                storage=storage,
            )
        elif storage not in (None, bank.storage):
            raise ValueError(f"{op}: storage is {storage!r} but that of bank is {bank.storage!r}")
        self._check_bank(op, bank, dim, dtype, device)
        self.bank = bank
        self._prefix = torch.empty(max_tokens, dim, dtype=dtype, device=device)  # [T, D]
        self._x = torch.empty(max_tokens, dim, dtype=dtype, device=device)  # [T, D]
        self._x_fp8 = self._x_scale = None
        if fp8 is not None:
            self._x_fp8 = torch.empty(max_tokens, dim, dtype=FP8, device=device)
            columns = scale_columns(dim, fp8 == "group")
            self._x_scale = torch.empty(max_tokens, columns, device=device)
        self._out = self._lse = None
        if any(self._two_phase(block) for block in range(self.num_blocks)):
            queries = min(block_size, self.num_sublayers)
            if queries > _check.MAX_QUERIES:
                raise ValueError(
                    f"{op}: block_size is {block_size}, expected at most {_check.MAX_QUERIES}, the "
                    "most queries of one phase 1; or mode='one_shot'"
                )
            self._out = torch.empty(queries, max_tokens, dim, dtype=dtype, device=device)
            self._lse = torch.empty(queries, max_tokens, device=device)
        self._side = torch.cuda.Stream(device) if side_stream else None
        self._side_ahead = False  # it has work that no other stream has waited for
        self._schedules: dict[int, _Schedule] = {}
        self._schedule(max_tokens)

    def start(self, embedding: Tensor) -> Step:
        """Begins a step of T tokens; one that was not finished is given up.

        Args:
            embedding: [T, D], the input of the first sublayer, in the runner's dtype.
        """
        op = "Runner.start"
        checked = _check.tensor(op, "embedding", embedding)
        self._check_value(op, "embedding", checked, None)
        self._join()  # phase 1 of a step that was given up may still read the bank
        self.bank.reset()
        return Step(self, self._schedule(checked.shape[0]), checked)

    def _check_value(self, op: str, name: str, given: Tensor, tokens: int | None) -> None:
        dim = self.weights.dim
        wanted = f"[{'T' if tokens is None else tokens}, {dim}]"
        if given.dim() != 2 or given.shape[1] != dim or tokens not in (None, given.shape[0]):
            raise ValueError(
                f"{op}: {name} has shape {_check.shape_text(given)}, expected {wanted}"
            )
        if given.shape[0] > self.max_tokens:
            raise ValueError(
                f"{op}: {name} has shape {_check.shape_text(given)}, expected at most "
                f"{self.max_tokens} tokens, the runner's max_tokens"
            )
        if given.dtype != self._prefix.dtype:
            raise TypeError(f"{op}: {name} is {given.dtype}, expected {self._prefix.dtype}")
        _check.same_device(op, name, given, "the runner's memory", self._prefix)
        if given.shape[-1] > 1 and given.stride(-1) != 1:
            raise ValueError(
                f"{op}: {name} has stride {given.stride(-1)} in its last dimension, expected 1"
            )
        if given.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{op}: {name} requires a gradient, which a Runner does not compute; run the step "
                "under torch.no_grad() or torch.inference_mode()"
            )

    def _check_bank(
        self, op: str, bank: BlockBank, dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        if bank.num_rows < self.num_blocks:
            raise ValueError(
                f"{op}: bank has {bank.num_rows} rows, expected at least {self.num_blocks}, one "
                f"for each block of {self.block_size} of {self.num_sublayers} sublayers"
            )
        if bank.max_tokens < self.max_tokens or bank.dim != dim:
            raise ValueError(
                f"{op}: bank holds {bank.max_tokens} tokens of width {bank.dim}, expected at least "
                f"{self.max_tokens} of width {dim}"
            )
        if bank.storage is None and bank.data.dtype != dtype:
            raise TypeError(f"{op}: bank is {bank.data.dtype}, expected {dtype}")
        if bank.data.device != device:
            raise ValueError(f"{op}: bank is on {bank.data.device}, the weights on {device}")

    def _two_phase(self, block: int) -> bool:
        """Whether the sites that read rows 0..block take two phases."""
        if self.mode == "auto":
            return block + 1 >= TWO_PHASE_FROM[self.bank.storage]
        return self.mode == "two_phase"

    def _schedule(self, tokens: int) -> _Schedule:
        """The calls of a step of T tokens: made once, then looked up."""
        if tokens not in self._schedules:
            self._schedules[tokens] = self._plan(tokens)
        return self._schedules[tokens]

    def _plan(self, tokens: int) -> _Schedule:
        S, L = self.block_size, self.num_sublayers
        weights, bank = self.weights, self.bank
        prefix = self._prefix[:tokens]
        phase1: dict[int, _Phase1] = {}
        for block in range(self.num_blocks):
            if self._two_phase(block) and self._out is not None and self._lse is not None:
                first, last = block * S + 1, min((block + 1) * S, L)  # sites, inclusive
                count = last - first + 1
                sources, scales = self._rows(block + 1, tokens)
                phase1[block * S] = _Phase1(
                    sources=sources,
                    scales=scales,
                    queries=weights.queries[first : last + 1],
                    out=self._out[:count, :tokens],
                    lse=self._lse[:count, :tokens],
                )

        def site(index: int) -> _Site:
            block = index // S
            boundary = index % S == 0 and index < L
            # The row of the newest block that this site reads; -1 at site 0.
            newest = block - 1 if boundary else min(block, self.num_blocks - 1)
            if index == L:
                newest = self.num_blocks - 1
            previous = phase1.get(newest * S) if newest >= 0 else None
            merged: tuple[Tensor | None, Tensor | None] = (None, None)
            if previous is not None:
                position = index - newest * S - 1
                merged = (previous.out[position], previous.lse[position])
            reads_rows = newest >= 0 and previous is None
            # Behind a boundary the sum begins with the one output that is pending.
            begins = index > 0 and (index - 1) % S == 0
            row = stored = None
            if boundary and bank.storage is None:
                row = bank.row(block, tokens)
            elif boundary:
                stored = bank.stored_row(block, tokens)
            sources, scales = self._rows(newest + 1, tokens) if reads_rows else ([], [])
            quantized = self._x_fp8 is not None and index < L
            x = self._x_fp8 if quantized else self._x
            assert x is not None
            return _Site(
                sources=sources,
                scales=scales,
                phase1=merged,
                query=None if index == 0 else weights.queries[index],
                norm_weight=weights.norm_weights[index],
                partial=None if index == 0 or begins else prefix,
                partial_out=None if index == 0 else (prefix if row is None else row),
                snapshot=row if index == 0 else None,
                claims=block if boundary else None,
                stored=stored,
                x=x[:tokens],
                x_scale=self._x_scale[:tokens] if quantized and self._x_scale is not None else None,
            )

        sites = [site(index) for index in range(L + 1)]
        # Of the shape and dtype that a step's own tensors have.
        update, mix = torch.empty_like(prefix), torch.empty_like(prefix)
        needs = [
            torch.ops.flash_attn_res.read_out_workspace(
                *self._read_arguments(site, update, () if i == 0 else (update,), mix)
            )
            for i, site in enumerate(sites)
        ]
        phase1_needs = [
            torch.ops.flash_attn_res.attend_out_workspace(*self._attend_arguments(call))
            for call in phase1.values()
        ]
        return _Schedule(
            tokens,
            sites,
            phase1,
            workspace=self._bytes(max(needs)),
            phase1_workspace=self._bytes(max(phase1_needs, default=0)),
        )

    def _rows(self, count: int, tokens: int) -> tuple[list[Tensor], list[Tensor]]:
        """The first rows of the bank and, if they are stored with any, their scales."""
        if self.bank.storage is None:
            return [self.bank.sources(count, tokens)], []
        stored = self.bank.stored(count, tokens)
        return [stored.values], [stored.scale]

    def _bytes(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.uint8, device=self._prefix.device)

    def _attend_arguments(self, call: _Phase1) -> tuple[Any, ...]:
        return call.sources, call.scales, call.queries, 1.0, self.eps, call.out, call.lse

    def _read_arguments(
        self, site: _Site, embedding: Tensor, updates: tuple[Tensor, ...], mix: Tensor | None
    ) -> tuple[Any, ...]:
        # Site 0, the one without a query, reads the embedding.
        partial = embedding if site.query is None else site.partial
        return (
            *(*site.phase1, site.sources, site.scales, partial, updates, site.query),
            *(
                site.norm_weight,
                1.0,
                self.eps,
                True,
                self.norm_eps,
                self.round_mix,
                self.power_of_two_scale,
            ),
            *(site.x, site.x_scale, site.partial_out, site.snapshot, mix, None),
        )

    def _run_phase1(self, call: _Phase1, workspace: Tensor) -> None:
        with self._beside():
            torch.ops.flash_attn_res.attend_out(*self._attend_arguments(call), workspace)

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """On the side stream, behind what is in the current one; or just here."""
        if self._side is None:
            yield
            return
        self._side.wait_stream(torch.cuda.current_stream(self._side.device))
        self._side_ahead = True
        with torch.cuda.stream(self._side):
            yield

    def _join(self) -> None:
        # Only where there is something to wait for: a graph that is being captured may not depend
        # on what ran before it on the side stream.
        if self._side is not None and self._side_ahead:
            torch.cuda.current_stream(self._side.device).wait_stream(self._side)
            self._side_ahead = False


class Step:
    """One forward pass of a :class:`Runner`: read, write, ..., finish."""

    def __init__(self, runner: Runner, schedule: _Schedule, embedding: Tensor) -> None:
        self._runner = runner
        self._schedule = schedule
        self._embedding = embedding
        self._next = 0  # site
        self._pending: tuple[Tensor, ...] = ()
        self._reads = True  # what comes next: read or write

    def read(self, *, mix: Tensor | None = None) -> Tensor | Quantized:
        """The input of the next sublayer: pending add, mixture, pre-norm.

        Args:
            mix: [T, D], also filled in with the mixture before the norm.

        Returns:
            x [T, D], or :class:`Quantized`; a buffer of the runner's, valid until the next read.
        """
        if self._next >= self._runner.num_sublayers or not self._reads:
            raise RuntimeError(
                f"Step.read: site {self._next} of {self._runner.num_sublayers}: expected "
                + ("write()" if not self._reads else "finish()")
            )
        self._reads = False
        return self._read(mix)

    def write(self, output: Tensor, addend: Tensor | None = None) -> None:
        """The output of the sublayer that has just run, [T, D]; ``addend`` is added to it.

        It is not copied before the next read: leave the memory as it is until then.
        """
        if self._reads:
            raise RuntimeError("Step.write: there is no sublayer to write for: expected read()")
        pending = (output,) if addend is None else (output, addend)
        for name, given in zip(("output", "addend"), pending, strict=False):
            self._runner._check_value(
                "Step.write", name, _check.tensor("Step.write", name, given), self._schedule.tokens
            )
        self._pending = pending
        self._reads = True

    def finish(self, *, mix: Tensor | None = None) -> Tensor:
        """What the output head sees: the mixture over all blocks, normalised, [T, D]."""
        if self._next != self._runner.num_sublayers or not self._reads:
            raise RuntimeError(
                f"Step.finish: {self._next} of {self._runner.num_sublayers} sublayers have run: "
                "expected " + ("read()" if self._reads else "write()")
            )
        y = self._read(mix)
        assert isinstance(y, Tensor)
        return y

    def _read(self, mix: Tensor | None) -> Tensor | Quantized:
        runner, index = self._runner, self._next
        site = self._schedule.sites[index]
        if mix is not None:
            runner._check_value(
                "Step.read", "mix", _check.tensor("Step.read", "mix", mix), self._schedule.tokens
            )
        if site.claims is not None and site.stored is None:
            runner.bank.claim(site.claims, self._schedule.tokens)
        if site.phase1[0] is not None:
            runner._join()
        torch.ops.flash_attn_res.read_out(
            *runner._read_arguments(site, self._embedding, self._pending, mix),
            self._schedule.workspace,
        )
        if site.claims is not None and site.stored is not None:
            total = self._embedding if site.partial_out is None else site.partial_out
            runner.bank.quantize_row(site.claims, total, site.stored)
        self._pending = ()
        self._next += 1
        phase1 = self._schedule.phase1.get(index)
        if phase1 is not None:
            runner._run_phase1(phase1, self._schedule.phase1_workspace)
        return site.x if site.x_scale is None else Quantized(site.x, site.x_scale)
