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
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn_res import _check
from flash_attn_res.inference.bank import BlockBank
from flash_attn_res.inference.operators import FP8, in_words, scale_columns
from flash_attn_res.inference.weights import SiteWeights
from flash_attn_res.storage import QuantizedSource

MODES = ("auto", "one_shot", "two_phase")
QUANTISATIONS = ("token", "group")

TWO_PHASE_FROM = {None: 3, "float16": 3, "float8": 5}
"""Rows from which "auto" takes two phases: a site then reads o in place of them all. Phase 1 moves
(n + S) / S units of T * D elements a site and the merge reads one more; one-shot reads n. A row in
float8 is half a unit."""

DEFAULT_EPS = 1e-5
"""That of Kimi K3, where neither the caller nor the weights say another one."""

KEPT_SCHEDULES = 64
"""Numbers of tokens whose views a runner keeps: some 200 kB of host memory each for Kimi K3."""


class Quantized(NamedTuple):
    """A quantised x: ``x.float() * scale`` (each group's columns times its scale)."""

    x: Tensor  #: [T, D] float8_e4m3fn
    scale: Tensor  #: [T, 1] or [T, ceil(D / 128)] float32


class _Site(NamedTuple):
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


class _Phase1(NamedTuple):
    """One call of attend_out, for the sites behind a boundary."""

    sources: list[Tensor]  # [n, T, D]
    scales: list[Tensor]  # [n, T, groups] of a bank with storage
    queries: Tensor  # [S, R]
    out: Tensor  # [S, T, D]
    lse: Tensor  # [S, T]


class _Schedule(NamedTuple):
    """Every call of a step of T tokens: views of the runner's buffers, no memory of their own."""

    tokens: int
    sites: list[_Site]
    phase1: dict[int, _Phase1]  # by the boundary site that it follows


def _agreed(op: str, name: str, given: Any, known: Any) -> Any:
    """What the caller gives or the weights know, if not both and differently."""
    if given is not None and known not in (None, given):
        raise ValueError(
            f"{op}: {name} is {given} but the weights are of a model with {name} {known}"
        )
    return known if given is None else given


class Runner:
    """Runs the reading sites of one model, for inference.

    .. code-block:: python

        runner = Runner(weights, block_size=24, max_tokens=256)
        step = runner.start(embedding)  # [T, D]
        for sublayer in sublayers:
            x = step.read()  # pending add + mixture + pre-norm
            step.write(sublayer(x))
        y = step.finish()  # output mixture + final norm, for the head

    All device memory is allocated by the constructor, for ``max_tokens``: a step of any number of
    tokens allocates none and can be captured into a CUDA graph, the first one too. The views of a
    step of T tokens are made on the host when T comes up and kept for the 64 numbers that came up
    last. What ``read`` and ``finish`` return is one buffer, valid until the next ``read``; a runner
    runs one step at a time. Graphs hold addresses of its buffers: it must outlive them.

    Args:
        weights: of L + 1 sites.
        block_size: S, sublayers to a block (for Kimi K3, whose blocks have 12 layers, 24); by
            default that of the weights, where they say one.
        max_tokens: most tokens T of a step.
        eps: of the keys' RMSNorm; by default that of the weights, else 1e-5.
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
        round_mix: round the mixture to its storage dtype before the norm, as some engines do; with
            ``fp8`` and 16-bit values on the CPU alone.
        storage: of the bank: ``"float16"`` or ``"float8"`` with scales, see :class:`BlockBank`. A
            snapshot is rounded once more and read so from then on; that takes one more launch a
            block. The site at a boundary reads the sum as it is.
        sum_dtype: of the running sum: float32, or None for ``dtype``. A float32 sum is rounded
            once, to a row of the bank; the site at that boundary reads the row's values.
        bank: to use in place of one of its own.

    Raises:
        ValueError, TypeError: naming the argument and what was expected.
    """

    def __init__(
        self,
        weights: SiteWeights,
        *,
        block_size: int | None = None,
        max_tokens: int,
        eps: float | None = None,
        norm_eps: float | None = None,
        layout: str = "tnd",
        dtype: torch.dtype = torch.bfloat16,
        mode: str = "auto",
        side_stream: bool = False,
        fp8: str | None = None,
        power_of_two_scale: bool = False,
        round_mix: bool = False,
        storage: str | None = None,
        sum_dtype: torch.dtype | None = None,
        bank: BlockBank | None = None,
    ) -> None:
        op = type(self).__name__
        if not isinstance(weights, SiteWeights):
            raise TypeError(f"{op}: weights is a {type(weights).__name__}, expected SiteWeights")
        self.weights = weights
        block_size = _agreed(op, "block_size", block_size, weights.block_size)
        if block_size is None:
            raise ValueError(
                f"{op}: block_size is missing, expected a number of sublayers: the weights say none"
            )
        self.block_size = _check.positive_int(op, "block_size", block_size)
        self.max_tokens = _check.positive_int(op, "max_tokens", max_tokens)
        eps = _agreed(op, "eps", eps, weights.eps)
        self.eps = _check.positive(op, "eps", DEFAULT_EPS if eps is None else eps)
        self.norm_eps = self.eps if norm_eps is None else _check.positive(op, "norm_eps", norm_eps)
        if mode not in MODES:
            raise ValueError(f"{op}: mode is {mode!r}, expected one of {', '.join(MODES)}")
        if fp8 is not None and fp8 not in QUANTISATIONS:
            raise ValueError(f"{op}: fp8 is {fp8!r}, expected None, 'token' or 'group'")
        if power_of_two_scale and fp8 is None:
            raise ValueError(f"{op}: power_of_two_scale was given without fp8")
        if sum_dtype not in (torch.float32, None):
            raise ValueError(
                f"{op}: sum_dtype is {sum_dtype}, expected torch.float32, or None for dtype"
            )
        self.mode, self.round_mix = mode, bool(round_mix)
        self.power_of_two_scale = bool(power_of_two_scale)
        self.num_sublayers = weights.num_sublayers
        self.num_blocks = -(-self.num_sublayers // block_size)
        device = weights.queries.device
        if side_stream and device.type != "cuda":
            raise ValueError(f"{op}: side_stream needs CUDA, but the weights are on {device}")
        if round_mix and fp8 is not None and device.type == "cuda" and dtype != torch.float32:
            raise ValueError(
                f"{op}: round_mix was given with fp8 and {dtype}, which the CPU alone computes: "
                "expected one of them, or torch.float32, on CUDA"
            )
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
        self._prefix = torch.empty(max_tokens, dim, dtype=sum_dtype or dtype, device=device)
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
        # Every read writes there: its first address and the one behind its last.
        begin = self._x.data_ptr()
        self._x_memory = (begin, begin + self._x.nbytes)
        self._queries = weights.queries.unbind()
        self._norm_weights = weights.norm_weights.unbind()
        self._schedules: dict[int, _Schedule] = {}
        self._workspace, self._phase1_workspace = self._make_workspaces()
        self._side = torch.cuda.Stream(device) if side_stream else None
        self._side_ahead = False  # it has work that no other stream has waited for
        if self._side is not None:
            self._keep_for(self._side)
        self._generation = 0  # of the newest step: an older one has been given up

    def start(self, embedding: Tensor) -> Step:
        """Begins a step of T tokens; one that was not finished is given up.

        Args:
            embedding: [T, D], the input of the first sublayer, in the runner's dtype. It is not
                copied: leave the memory as it is until the first read.
        """
        op = "Runner.start"
        checked = _check.tensor(op, "embedding", embedding)
        self._check_value(op, "embedding", checked, None)
        schedule = self._schedule(checked.shape[0])
        self._join()  # phase 1 of a step that was given up may still read the bank
        self.bank.reset()
        self._generation += 1
        return Step(self, schedule, checked)

    def _check_value(self, op: str, name: str, given: Tensor, tokens: int | None) -> None:
        """A tensor for the next read, which writes x."""
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
        if given.dtype != self._x.dtype:
            raise TypeError(f"{op}: {name} is {given.dtype}, expected {self._x.dtype}")
        _check.same_device(op, name, given, "the runner's memory", self._x)
        if given.shape[-1] > 1 and given.stride(-1) != 1:
            raise ValueError(
                f"{op}: {name} has stride {given.stride(-1)} in its last dimension, expected 1"
            )
        begin, end = self._x_memory
        # A traced tensor has no address: there the operator refuses it.
        if not torch.compiler.is_compiling() and begin <= given.data_ptr() < end:
            raise ValueError(
                f"{op}: {name} is memory that read() or finish() gave, which the next read "
                "overwrites: expected another tensor"
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
        """The calls of a step of T tokens, of the numbers that came up last."""
        schedule = self._schedules.pop(tokens, None)
        if schedule is None:
            schedule = self._plan(tokens)
            if len(self._schedules) >= KEPT_SCHEDULES:
                del self._schedules[next(iter(self._schedules))]
        self._schedules[tokens] = schedule  # the newest is the last
        return schedule

    def _plan(self, tokens: int) -> _Schedule:
        S, L = self.block_size, self.num_sublayers
        bank, x, prefix = self.bank, self._x[:tokens], self._prefix[:tokens]
        x_fp8, x_scale = (None if t is None else t[:tokens] for t in (self._x_fp8, self._x_scale))
        rows = [self._rows(count, tokens) for count in range(1, self.num_blocks + 1)]
        nothing: tuple[list[Tensor], list[Tensor]] = ([], [])
        phase1: dict[int, _Phase1] = {}
        merged: dict[int, tuple[Tensor, Tensor]] = {}  # what a site has of phase 1
        for block in range(self.num_blocks):
            if self._two_phase(block) and self._out is not None and self._lse is not None:
                first, last = block * S + 1, min((block + 1) * S, L)  # sites, inclusive
                count = last - first + 1
                phase1[block * S] = call = _Phase1(
                    *rows[block],
                    queries=self.weights.queries[first : last + 1],
                    out=self._out[:count, :tokens],
                    lse=self._lse[:count, :tokens],
                )
                results = zip(call.out.unbind(), call.lse.unbind(), strict=True)
                merged |= dict(enumerate(results, start=first))

        def site(index: int) -> _Site:
            block = index // S
            boundary = index % S == 0 and index < L
            # The row of the newest block that this site reads; -1 at site 0.
            newest = block - 1 if boundary else min(block, self.num_blocks - 1)
            reads_rows = newest >= 0 and index not in merged
            # Behind a boundary the sum begins with the one output that is pending.
            begins = index > 0 and (index - 1) % S == 0
            row = stored = None
            if boundary and bank.storage is None:
                row = bank.row(block, tokens)
            elif boundary:
                stored = bank.stored_row(block, tokens)
            quantized = x_fp8 is not None and index < L
            sources, scales = rows[newest] if reads_rows else nothing
            return _Site(
                sources=sources,
                scales=scales,
                phase1=merged.get(index, (None, None)),
                query=None if index == 0 else self._queries[index],
                norm_weight=self._norm_weights[index],
                partial=None if index == 0 or begins else prefix,
                partial_out=None if index == 0 else (prefix if row is None else row),
                snapshot=row if index == 0 else None,
                claims=block if boundary else None,
                stored=stored,
                x=x_fp8 if quantized and x_fp8 is not None else x,
                x_scale=x_scale if quantized else None,
            )

        return _Schedule(tokens, [site(index) for index in range(L + 1)], phase1)

    def _make_workspaces(self) -> tuple[Tensor, Tensor]:
        """Of reads, and of phase 1, which may run beside the sublayers.

        A call over fewer tokens needs no more bytes: what it needs is a number of bytes for each
        token, or for each of a number of pieces that tokens are dealt to, at most one a token.
        """
        schedule = self._schedule(self.max_tokens)
        # Of the shape and dtype that a step's own tensors have.
        update, mix = torch.empty_like(self._x), torch.empty_like(self._x)
        needs = [
            torch.ops.flash_attn_res.read_out_workspace(
                *self._read_arguments(site, update, () if i == 0 else (update,), mix)
            )
            for i, site in enumerate(schedule.sites)
        ]
        phase1_needs = [
            torch.ops.flash_attn_res.attend_out_workspace(*self._attend_arguments(call))
            for call in schedule.phase1.values()
        ]
        return self._bytes(max(needs)), self._bytes(max(phase1_needs, default=0))

    def _keep_for(self, side: torch.cuda.Stream) -> None:
        """Memory that phase 1 uses is not given away before the side stream has done with it.

        A runner may go while a step that was given up still runs there.
        """
        used = (self._out, self._lse, self._phase1_workspace, self.bank.data, self.bank.scale)
        for memory in (*used, self.weights.queries):
            if memory is not None:
                memory.record_stream(side)

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

    def _run_phase1(self, call: _Phase1) -> None:
        with self._beside():
            torch.ops.flash_attn_res.attend_out(
                *self._attend_arguments(call), self._phase1_workspace
            )

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
    """One forward pass of a :class:`Runner`: read, write, ..., finish.

    A call that raises because of its arguments leaves the step where it was. A step is over when
    its runner starts another one.
    """

    def __init__(self, runner: Runner, schedule: _Schedule, embedding: Tensor) -> None:
        self._runner = runner
        self._generation = runner._generation
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

        Raises:
            ValueError, TypeError: naming the argument and what was expected.
            RuntimeError: the call is out of order, or the step is over.
        """
        runner = self._runner
        if (
            self._generation != runner._generation
            or self._next >= runner.num_sublayers
            or not self._reads
        ):
            raise self._out_of_order("read")
        result = self._read("Step.read", mix)
        self._reads = False
        return result

    def write(self, output: Tensor, addend: Tensor | None = None) -> None:
        """The output of the sublayer that has just run, [T, D]; ``addend`` is added to it.

        It is not copied before the next read: leave the memory as it is until then. It may not be
        the memory that ``read`` gave, which the next read overwrites.

        Raises:
            ValueError, TypeError, RuntimeError: as :meth:`read`.
        """
        if self._generation != self._runner._generation or self._reads:
            raise self._out_of_order("write")
        pending = (output,) if addend is None else (output, addend)
        for name, given in zip(("output", "addend"), pending, strict=False):
            self._runner._check_value(
                "Step.write", name, _check.tensor("Step.write", name, given), self._schedule.tokens
            )
        self._pending = pending
        self._reads = True

    def finish(self, *, mix: Tensor | None = None) -> Tensor:
        """What the output head sees: the mixture over all blocks, normalised, [T, D].

        Raises:
            ValueError, TypeError, RuntimeError: as :meth:`read`.
        """
        runner = self._runner
        if (
            self._generation != runner._generation
            or self._next != runner.num_sublayers
            or not self._reads
        ):
            raise self._out_of_order("finish")
        y = self._read("Step.finish", mix)
        assert isinstance(y, Tensor)
        return y

    def _out_of_order(self, call: str) -> RuntimeError:
        """Why this call may not come now."""
        last = self._runner.num_sublayers
        if self._generation != self._runner._generation:
            text = (
                "this step is over: its runner has started another one, or one of its calls failed "
                "half-way"
            )
        elif self._next > last:
            text = "this step is finished: expected Runner.start()"
        elif not self._reads:
            text = f"site {self._next - 1} of {last} has been read: expected write()"
        elif call == "write":
            text = "there is no sublayer to write for: expected read()"
        else:
            text = f"{self._next} of {last} sublayers have run: expected "
            text += "read()" if self._next < last else "finish()"
        return RuntimeError(f"Step.{call}: {text}")

    def _read(self, op: str, mix: Tensor | None) -> Tensor | Quantized:
        runner, index = self._runner, self._next
        site = self._schedule.sites[index]
        if mix is not None:
            runner._check_value(op, "mix", _check.tensor(op, "mix", mix), self._schedule.tokens)
        if site.claims is not None:
            runner.bank._check_free(site.claims)
        if site.phase1[0] is not None:
            runner._join()
        try:
            torch.ops.flash_attn_res.read_out(
                *runner._read_arguments(site, self._embedding, self._pending, mix),
                runner._workspace,
            )
        except RuntimeError as error:
            raise in_words(error) from None
        # The sum is written: from here on there is no way back.
        self._pending = ()
        self._next += 1
        try:
            if site.stored is not None and site.claims is not None:
                total = self._embedding if site.partial_out is None else site.partial_out
                runner.bank.quantize_row(site.claims, total, site.stored)
            elif site.claims is not None:
                runner.bank._written[site.claims] = True
            phase1 = self._schedule.phase1.get(index)
            if phase1 is not None:
                runner._run_phase1(phase1)
        except BaseException:
            runner._generation += 1  # later sites would read what is not there
            raise
        return site.x if site.x_scale is None else Quantized(site.x, site.x_scale)
