"""The stream that takes the place of the residual stream while a network runs.

Per sublayer l of a block with completed sources b_0..b_{n-1}:

* first of the block: x_l = norm(o_l), where (o, lse) is the block's phase 1;
* others: the pending output is added to the block's partial sum b, and
  x_l = norm(o_l + q (b - o_l)), q = sigmoid(logit(b) - lse_l). One ``read``.

Where the plan says so, a block reads its sources directly instead (same values, one softmax).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flash_attn_res import _check
from flash_attn_res.functional import AttendResult, attend, fold_query, read
from flash_attn_res.ops import statistics_dtype
from flash_attn_res.plan import Block

if TYPE_CHECKING:
    from flash_attn_res.modules import BlockAttnRes


class Stream:
    """One forward pass: ``read`` and ``write`` for each sublayer, then ``finish``.

    Made by :meth:`BlockAttnRes.start`.

    Attributes:
        probabilities: with ``return_probs=True``, one detached tensor [..., K] for each site read
            so far, in the order that :meth:`BlockAttnRes.site_sources` names.
    """

    def __init__(self, module: BlockAttnRes, embedding: Tensor, return_probs: bool) -> None:
        _check.leading("start", "embedding", embedding)
        if embedding.shape[-1] != module.dim:
            raise ValueError(
                f"start: embedding has shape {_check.shape_text(embedding)}, expected a width of "
                f"{module.dim}, the dim of this BlockAttnRes"
            )
        _check.same_device("start", "embedding", embedding, "queries", module.queries)
        self._plan = module.plan()
        self._scale, self._eps = module.scale, module.eps
        # Folded once for all sites: two element-wise products of a few kilobytes.
        self._queries = fold_query(module.queries, module.key_weight, statistics_dtype(embedding))
        self._sources = [embedding]
        self._partial: Tensor | None = None
        self._update: Tensor | None = None
        self._phase1: AttendResult | None = None
        self._phase1_probs: Tensor | None = None
        self._sublayer = 0
        self._state = "read"
        self._return_probs = return_probs
        self.probabilities: list[Tensor] = []

    def _expect(self, call: str) -> None:
        if self._state == call:
            return
        at = f"sublayer {self._sublayer} of {self._plan.num_sublayers}"
        if self._state == "done":
            raise RuntimeError(f"{call}: this stream is finished; start a new one for each forward")
        if self._state == "write":
            raise RuntimeError(f"{call}: {at} has been read and not written; call write first")
        if call == "write":
            raise RuntimeError(f"write: {at} has not been read; call read first")
        if call == "finish":
            raise RuntimeError(f"finish: {at} is still to come; every sublayer reads and writes")
        raise RuntimeError(f"read: all {self._plan.num_sublayers} sublayers are done; call finish")

    def read(self, norm_weight: Tensor | None = None, norm_eps: float | None = None) -> Tensor:
        """The input of the next sublayer: the mixture, RMS-normalised if a weight [D] is given.

        Returns:
            [..., D] in the embedding's dtype.
        """
        self._expect("read")
        block = self._plan.block_of(self._sublayer)
        first = self._sublayer == block.first
        if first:
            self._close_block()
            if block.two_phase:
                self._open_block(block)
        x = self._read_site(self._sublayer, block, norm_weight, norm_eps)
        self._state = "write"
        return x

    def write(self, output: Tensor) -> None:
        """Takes the output [..., D] of the sublayer that was read last."""
        self._expect("write")
        checked = _check.value("write", "output", output, "the embedding", self._sources[0])
        self._update = checked
        self._sublayer += 1
        self._state = "finish" if self._sublayer == self._plan.num_sublayers else "read"

    def finish(self, norm_weight: Tensor | None = None, norm_eps: float | None = None) -> Tensor:
        """The final aggregation over all blocks, RMS-normalised if a weight [D] is given."""
        self._expect("finish")
        y = self._read_direct(self._plan.num_sublayers, norm_weight, norm_eps)
        self._sources, self._partial, self._update = [], None, None
        self._state = "done"
        return y

    def _read_site(
        self, site: int, block: Block, norm_weight: Tensor | None, norm_eps: float | None
    ) -> Tensor:
        if not block.two_phase:
            return self._read_direct(site, norm_weight, norm_eps)
        assert self._phase1 is not None
        s = site - block.first
        phase1 = (self._phase1.out[s], self._phase1.lse[s])
        if site == block.first:
            result = read(
                phase1=phase1,
                eps=self._eps,
                norm_weight=norm_weight,
                norm_eps=norm_eps,
                return_probs=self._return_probs,
            )
        else:
            partial, update = self._pending_sum()
            result = read(
                self._queries[site],
                phase1=phase1,
                partial=partial,
                update=update,
                scale=self._scale,
                eps=self._eps,
                norm_weight=norm_weight,
                norm_eps=norm_eps,
                return_probs=self._return_probs,
            )
            self._partial, self._update = result.partial, None
        if result.probs is not None:
            # The phase-1 term stands for all completed sources: it hands its weight on to them.
            assert self._phase1_probs is not None
            share = result.probs[..., :1] * self._phase1_probs[..., s, :]
            self.probabilities.append(torch.cat([share, result.probs[..., 1:]], -1).detach())
        return result.x

    def _read_direct(self, site: int, norm_weight: Tensor | None, norm_eps: float | None) -> Tensor:
        partial, update = self._pending_sum()
        result = read(
            self._queries[site],
            sources=self._sources,
            partial=partial,
            update=update,
            scale=self._scale,
            eps=self._eps,
            norm_weight=norm_weight,
            norm_eps=norm_eps,
            return_probs=self._return_probs,
        )
        self._partial, self._update = result.partial, None
        if result.probs is not None:
            self.probabilities.append(result.probs.detach())
        return result.x

    def _pending_sum(self) -> tuple[Tensor | None, Tensor | None]:
        """(partial, update) for a read. A block's first output is its partial sum as it stands."""
        if self._partial is None and self._update is not None:
            return self._update.to(self._sources[0].dtype), None
        return self._partial, self._update

    def _open_block(self, block: Block) -> None:
        self._phase1 = attend(
            self._sources,
            self._queries[block.first : block.first + block.size],
            scale=self._scale,
            eps=self._eps,
            return_probs=self._return_probs,
        )
        self._phase1_probs = self._phase1.probs

    def _close_block(self) -> None:
        """The finished block becomes a source."""
        partial, update = self._pending_sum()
        if partial is None:
            return
        total = partial if update is None else (partial + update).to(partial.dtype)
        self._sources.append(total)
        self._partial = self._update = self._phase1 = self._phase1_probs = None
