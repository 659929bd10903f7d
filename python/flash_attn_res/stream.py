"""The stream that takes the place of the residual stream while a network runs.

A site reads a mixture of the completed sources and the running sum of its block (equations 2-6 of
arXiv 2603.15031). The plan says in which of the exact forms (:mod:`flash_attn_res.plan`): sites
that share completed sources share one phase 1; whatever else a site needs, the pending addition to
the running sum and the sublayer's pre-norm included, is one ``read``::

    b'  = b + output of the last sublayer          in the sum's dtype
    h   = softmax mixture of the phase-1 result, sources read directly, and b'
    x   = h * rsqrt(mean(h^2) + eps) * norm_weight

Two implementations compute the same numbers from the same plan. The eager one
(:mod:`flash_attn_res.tape`) keeps what a plain pre-norm network keeps and sums the gradients of the
sources in place. The functional one, here, is made of pure operators, for ``torch.compile`` and
``torch.export``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as checkpoint_function
from torch.utils.weak import WeakIdKeyDictionary

from flash_attn_res import _check
from flash_attn_res.functional import AttendResult, attend, read
from flash_attn_res.plan import PartialPlan, Plan, Site
from flash_attn_res.storage import QuantizedSource, quantize

if TYPE_CHECKING:
    from flash_attn_res.modules import BlockAttnRes

_T = TypeVar("_T")

_numbers = itertools.count()
# Input of a sublayer -> number of the stream whose read gave it.
_origins = WeakIdKeyDictionary()


class Stream:
    """One forward pass: ``read`` and ``write`` for each sublayer, then ``finish``.

    A call that fails leaves the stream as it was before, whatever the exception.

    Made by :meth:`BlockAttnRes.start`.

    Attributes:
        probabilities: with ``return_probs=True``, one detached tensor [..., K] for each site read
            so far, in the order that :meth:`BlockAttnRes.site_sources` names.
    """

    def __init__(
        self,
        module: BlockAttnRes,
        embedding: Tensor,
        plan: Plan | PartialPlan,
        return_probs: bool,
    ) -> None:
        self._plan = plan
        self._scale, self._eps = module.scale, module.eps
        self._like = embedding
        self._sum_dtype = module.sum_dtype_of(embedding.dtype)
        # Seed and step of this pass: the backward finds them as they were, whatever starts later.
        self._seed: Tensor | None = None
        if module.rounding_seed is not None:
            self._seed = module.rounding_seed.clone()
            module.rounding_seed[1] += 1
        self._output_dtype: torch.dtype | None = None
        self._partial: Tensor | None = None
        self._update: Tensor | None = None
        self._sublayer = 0
        self._state = "read"
        self._number = None if torch.compiler.is_compiling() else next(_numbers)
        self._return_probs = return_probs
        self.probabilities: list[Tensor] = []

    def _expect(self, call: str) -> None:
        if self._state == call:
            return
        at = f"sublayer {self._sublayer} of {self._plan.num_sublayers}"
        if self._state == "done":
            raise RuntimeError(
                f"{call}: this stream is finished; start a new one for each forward. To recompute "
                "a sublayer in the backward, use stream.sublayer(..., checkpoint=True)"
            )
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

        Raises:
            RuntimeError: the call is out of order, or a backward pass has freed the stream.
            ValueError, TypeError: naming the argument, its shape or dtype and what was expected.
        """
        self._expect("read")
        norm = self._norm("read", norm_weight, norm_eps)
        x = self._undone(lambda: self._read(self._plan.sites[self._sublayer], *norm))
        self._state = "write"
        self._remember(x)
        return x

    def write(self, output: Tensor) -> None:
        """Takes the output [..., D] of the sublayer that was read last.

        All outputs have one dtype, which may be another than the embedding's; under autocast they
        may differ.

        Raises:
            RuntimeError: the call is out of order, or the output is what another stream gave.
            ValueError, TypeError: the output has another shape, device or dtype than expected.
        """
        self._expect("write")
        checked = _check.value("write", "output", output, "the embedding", self._like)
        if (
            self._output_dtype is not None
            and checked.dtype != self._output_dtype
            and not torch.is_autocast_enabled(checked.device.type)
        ):
            raise TypeError(
                f"write: output is {checked.dtype} but that of the sublayers before was "
                f"{self._output_dtype}; they may differ under autocast alone"
            )
        if self._is_foreign(checked):
            raise RuntimeError("write: output is what another stream's read gave")
        self._output_dtype = self._output_dtype or checked.dtype
        self._update = checked
        self._sublayer += 1
        self._state = "finish" if self._sublayer == self._plan.num_sublayers else "read"

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

        If the layer raises, the read is undone: the sublayer may be tried again.

        Args:
            layer: from [..., D] to [..., D].
            norm_weight, norm_eps: as for :meth:`read`.
            checkpoint: keep neither the input of the layer nor what is inside it: the backward
                computes the read and the layer again. The numbers are the same, bit for bit.
            preserve_rng_state: with checkpoint, run dropout and the like with the same random
                numbers again. Turn it off where there are none: it costs a little time, and
                CUDA graphs cannot capture it.

        Raises:
            RuntimeError, ValueError, TypeError: as :meth:`read` and :meth:`write`.
        """
        if not checkpoint or not torch.is_grad_enabled():
            self._undone(lambda: self.write(layer(self.read(norm_weight, norm_eps))))
            return
        self._expect("read")
        norm = self._norm("sublayer", norm_weight, norm_eps)
        site = self._plan.sites[self._sublayer]

        def run() -> None:
            output = self._checkpointed(layer, site, *norm, preserve_rng_state)
            self._state = "write"
            self.write(output)

        self._undone(run)

    def finish(self, norm_weight: Tensor | None = None, norm_eps: float | None = None) -> Tensor:
        """The final aggregation over all blocks, RMS-normalised if a weight [D] is given.

        Raises:
            RuntimeError, ValueError, TypeError: as :meth:`read`.
        """
        self._expect("finish")
        if self._sublayer == len(self._plan.sites):
            raise RuntimeError(
                "finish: this stream runs a part of a network that has no output; call export"
            )
        norm = self._norm("finish", norm_weight, norm_eps)
        y = self._undone(lambda: self._read(self._plan.sites[self._sublayer], *norm))
        self._state = "done"
        self._partial = self._update = None
        self._release()
        return y

    def _norm(
        self, op: str, weight: Tensor | None, eps: float | None
    ) -> tuple[Tensor | None, float]:
        if weight is not None:
            weight = _check.weight(op, "norm_weight", weight, "the embedding", self._like)
        return weight, self._eps if eps is None else _check.positive(op, "norm_eps", eps)

    def _remember(self, x: Tensor) -> None:
        """So that :meth:`_is_foreign` of another stream knows x."""
        if self._number is not None:
            _origins[x] = self._number

    def _is_foreign(self, output: Tensor) -> bool:
        """Whether an output is the very tensor that another stream's read gave."""
        if self._number is None or len(_origins) == 0:
            return False
        return bool(_origins.get(output, self._number) != self._number)

    def _undone(self, call: Callable[[], _T]) -> _T:
        """What ``call`` returns; where it raises, the stream is as it was before."""
        before = self._mark()
        try:
            return call()
        except BaseException:
            self._undo(before)
            raise

    def _mark(self) -> tuple[Any, ...]:
        """What a call may change, for :meth:`_undo`."""
        probabilities = len(self.probabilities)
        pending = self._partial, self._update
        return self._sublayer, self._state, self._output_dtype, pending, probabilities

    def _undo(self, mark: tuple[Any, ...]) -> None:
        self._sublayer, self._state, self._output_dtype, pending, probabilities = mark
        self._partial, self._update = pending
        del self.probabilities[probabilities:]

    def _read(self, site: Site, norm_weight: Tensor | None, norm_eps: float) -> Tensor:
        raise NotImplementedError

    def _checkpointed(
        self,
        layer: Callable[[Tensor], Tensor],
        site: Site,
        norm_weight: Tensor | None,
        norm_eps: float,
        preserve_rng_state: bool,
    ) -> Tensor:
        """The output of a sublayer that is recomputed in the backward."""
        raise NotImplementedError

    def _release(self) -> None:
        """Lets go of what only later reads would need."""


class FunctionalStream(Stream):
    """The stream of pure operators: nothing is mutated, gradients flow through autograd."""

    def __init__(
        self,
        module: BlockAttnRes,
        embedding: Tensor,
        queries: Tensor,
        plan: Plan,
        return_probs: bool,
    ) -> None:
        super().__init__(module, embedding, plan, return_probs)
        self._queries = queries  # [L + 1, R] folded
        self._storage = module.block_storage
        # [..., D]; in a storage mode quantised, the embedding as well.
        self._sources: list[Any] = []
        self._complete([embedding])
        self._phase1: AttendResult | None = None

    def _mark(self) -> tuple[Any, ...]:
        return len(self._sources), self._phase1, super()._mark()

    def _undo(self, mark: tuple[Any, ...]) -> None:
        sources, self._phase1, rest = mark
        del self._sources[sources:]
        super()._undo(rest)

    def _read(self, site: Site, norm_weight: Tensor | None, norm_eps: float) -> Tensor:
        self._prepare(site)
        x, total, probs = self._call(site, norm_weight, norm_eps, *self._given(site))
        self._advance(site, total, probs)
        return x

    def _checkpointed(
        self,
        layer: Callable[[Tensor], Tensor],
        site: Site,
        norm_weight: Tensor | None,
        norm_eps: float,
        preserve_rng_state: bool,
    ) -> Tensor:
        self._prepare(site)

        def run(*given: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
            x, total, probs = self._call(site, norm_weight, norm_eps, *given)
            return layer(x), total, probs

        output, total, probs = checkpoint_function(
            run, *self._given(site), use_reentrant=False, preserve_rng_state=preserve_rng_state
        )
        self._advance(site, total, probs)
        return output

    def _prepare(self, site: Site) -> None:
        """Before a read: closes what is pending and runs phase 1 where the plan says so."""
        if not site.opens:
            return
        if site.closes:
            partial, update = self._pending(site)
            assert partial is not None
            self._complete([partial] if update is None else [partial, update])
            self._partial = self._update = None
        first = site.index
        self._phase1 = attend(
            self._sources,
            self._queries[first : first + site.group.size],
            scale=self._scale,
            eps=self._eps,
            dtype=self._like.dtype,
            return_probs=self._return_probs,
        )

    def _complete(self, terms: Sequence[Tensor]) -> None:
        """Appends a source, the sum of terms [..., D]."""
        if self._storage is not None:
            self._sources.append(quantize(terms, self._storage))
        else:
            total = terms[0] if len(terms) == 1 else terms[0] + terms[1]
            self._sources.append(total.to(self._like.dtype))

    def _pending(self, site: Site) -> tuple[Tensor | None, Tensor | None]:
        """(partial, update) for a read. A block's first output is its partial sum as it stands."""
        if self._partial is None and self._update is not None:
            return as_it_stands(self._update, self._like.dtype, self._sum_dtype), None
        if self._seed is not None and self._partial is not None and self._update is not None:
            terms = [self._partial, self._update]
            return torch.ops.flash_attn_res.stochastic_add(terms, self._seed, site.index), None
        if self._partial is not None and self._update is not None and not site.closes:
            return self._partial.to(self._sum_dtype), self._update  # the new sum is of its dtype
        return self._partial, self._update

    def _given(self, site: Site) -> tuple[Any, ...]:
        """What a read takes of the stream, as tensors that a checkpoint may hold."""
        out = lse = None
        if site.slot >= 0:
            assert self._phase1 is not None
            out, lse = self._phase1.out[site.slot], self._phase1.lse[site.slot]
        sources = self._sources[site.first_direct : site.num_sources]
        if site.first_direct == 0 and site.num_sources == 1:
            sources = [self._like]  # the embedding alone is read as it came
        parts = [part for source in sources for part in _parts(source)]
        return (out, lse, *self._pending(site), self._queries[site.index], *parts)

    def _call(
        self,
        site: Site,
        norm_weight: Tensor | None,
        norm_eps: float,
        out: Tensor | None,
        lse: Tensor | None,
        partial: Tensor | None,
        update: Tensor | None,
        query: Tensor,
        *parts: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        count = site.num_sources - site.first_direct
        sources: list[Any] = list(parts)
        if len(parts) > count:
            sources = [QuantizedSource(*parts[i : i + 3]) for i in range(0, 3 * count, 3)]  # type: ignore[arg-type]
        terms = int(out is not None) + len(sources) + int(partial is not None)
        result = read(
            query if terms > 1 else None,
            phase1=None if out is None or lse is None else (out, lse),
            sources=sources,
            partial=partial,
            update=update,
            scale=self._scale,
            eps=self._eps,
            norm_weight=norm_weight,
            norm_eps=norm_eps,
            dtype=self._like.dtype,
            return_probs=self._return_probs,
        )
        return result.x, result.partial, result.probs

    def _advance(self, site: Site, total: Tensor | None, probs: Tensor | None) -> None:
        """After a read: the completed sum goes on as the block's, or becomes a source."""
        if site.promotes:
            assert total is not None
            self._complete([total])
            total = None
        self._partial, self._update = total, None
        if probs is not None:
            inner = None
            if site.slot >= 0:
                assert self._phase1 is not None
                assert self._phase1.probs is not None
                inner = self._phase1.probs[..., site.slot, :]
            self.probabilities.append(spread(probs, inner))

    def _release(self) -> None:
        self._sources, self._phase1 = [], None


def _parts(source: Tensor | QuantizedSource) -> tuple[Tensor | None, ...]:
    return tuple(source) if isinstance(source, QuantizedSource) else (source,)


def as_it_stands(output: Tensor, dtype: torch.dtype, sum_dtype: torch.dtype) -> Tensor:
    """A block's first output [..., D] as its running sum: in the stream's dtype it is no copy."""
    return output if output.dtype == dtype else output.to(sum_dtype)


def spread(probs: Tensor, inner: Tensor | None) -> Tensor:
    """Probabilities [..., K] of a site's terms to those of what it reads, detached.

    The phase-1 term, if there is one (``inner`` [..., n] are its own probabilities), stands for all
    completed sources: it hands its weight on to them.
    """
    if inner is not None:
        probs = torch.cat([probs[..., :1] * inner, probs[..., 1:]], -1)
    return probs.detach()
