"""``BlockAttnRes``: the parameters and the schedule of Attention Residuals for one network."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flash_attn_res import _check, storage
from flash_attn_res.functional import fold_query
from flash_attn_res.ops import statistics_dtype
from flash_attn_res.plan import Costs, Plan
from flash_attn_res.stream import FunctionalStream, Stream
from flash_attn_res.tape import KEEP, TapeStream

_STREAM = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class BlockAttnRes(nn.Module):
    """Block Attention Residuals for a network of L sublayers (arXiv 2603.15031).

    Attention and MLP count separately. Sublayers form blocks of ``block_size``; a site reads a
    softmax mixture over the embedding, the completed blocks' sums and the running sum of its own
    block. There is one site before each sublayer and one before the output head.

    .. code-block:: python

        attn_res = BlockAttnRes(num_sublayers=L, dim=D, block_size=S)
        stream = attn_res.start(embedding)
        for l, layer in enumerate(sublayers):
            x = stream.read(norm_weight[l])  # pending add + mixture + pre-norm
            stream.write(layer(x))
        y = stream.finish(final_norm_weight)

    With the queries at zero, where they start, the network computes the same function as its plain
    pre-norm counterpart (up to eps).

    Args:
        num_sublayers: L.
        dim: width D of the residual stream.
        block_size: sublayers in a block; 1 is Full AttnRes, L a single block.
        key_weight: whether the keys' RMSNorm has a learned weight at each site.
        scale: factor of the logits; the paper and Kimi K3 use 1.
        eps: of the keys' RMSNorm.
        query_dim: width R of the queries; R < D reads the last R coordinates as keys.
        forms: how blocks read: ``"auto"`` (by counted bytes, see :meth:`plan`), ``"two_phase"``,
            ``"one_shot"``, or a list with one of these for each block.
        group_blocks: blocks that share one phase 1; by default by counted bytes.
        grad_dtype: of the buffers in which the gradients of the sources are summed: float32, or
            None for the dtype of the stream, which moves fewer bytes and rounds at every addition.
        keep_phase1: whose phase-1 results training keeps for the backward: those of ``"none"``,
            of the ``"last"`` group or of ``"all"``. The others are computed again, with equal bits.
        sum_dtype: of the running sum of a block: float32, or None for the dtype of the stream. A
            float32 sum is rounded once, when the block is complete; its completed blocks and what
            a site gives keep the dtype of the stream. Nothing changes in a stream that is float32,
            or where every block is a single sublayer; a float64 stream sums in float64.
        stochastic_rounding: a seed; then the running sums of a bfloat16 stream are rounded as by
            :func:`stochastic_add` instead of to nearest, and so are the buffers of ``grad_dtype``
            None. Each ``start`` is a step of its own. A sum is then written before its site reads
            it, which costs that site two more passes over a value. Not with ``sum_dtype``, whose
            sums are not rounded.
        block_storage: keep the completed blocks as :func:`quantize` makes them, ``"float16"`` or
            ``"float8"``, instead of in the dtype of the stream. A block is rounded once more when
            it is complete, and the embedding for the blocks behind the first; running sums and
            gradients keep their dtypes, and the gradient of a block passes the rounding unchanged.
            Reads of several blocks then go through phase 1, unless ``forms`` says otherwise.

    Attributes:
        queries: [L + 1, R] pseudo-queries, zero at initialisation; the last is the output's.
        key_weight: [L + 1, R] weights, one at initialisation, or None.
        rounding_seed: int64 [2], seed and step of the next ``start``, a buffer that checkpoints
            keep; None without stochastic rounding.
    """

    rounding_seed: Tensor | None

    def __init__(
        self,
        num_sublayers: int,
        dim: int,
        block_size: int = 8,
        *,
        key_weight: bool = True,
        scale: float = 1.0,
        eps: float = 1e-6,
        query_dim: int | None = None,
        forms: str | Sequence[str] = "auto",
        group_blocks: int | None = None,
        grad_dtype: torch.dtype | None = torch.float32,
        keep_phase1: str = "none",
        sum_dtype: torch.dtype | None = None,
        stochastic_rounding: int | None = None,
        block_storage: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        self.num_sublayers = _check.positive_int(op, "num_sublayers", num_sublayers)
        self.dim = _check.positive_int(op, "dim", dim)
        self.block_size = _check.positive_int(op, "block_size", block_size)
        self.scale = _check.finite(op, "scale", scale)
        self.eps = _check.positive(op, "eps", eps)
        self.query_dim = _check.positive_int(
            op, "query_dim", dim if query_dim is None else query_dim
        )
        if self.query_dim > self.dim:
            raise ValueError(f"{op}: query_dim is {query_dim}, expected at most dim, {dim}")
        # The final aggregation reads every block and the embedding.
        num_sources = -(-num_sublayers // block_size) + 1
        if num_sources > _check.MAX_SOURCES:
            raise ValueError(
                f"{op}: {num_sublayers} sublayers in blocks of {block_size} make {num_sources} "
                f"sources, expected at most {_check.MAX_SOURCES}; use larger blocks"
            )
        if min(block_size, num_sublayers) > _check.MAX_QUERIES:
            raise ValueError(
                f"{op}: block_size is {block_size}, expected at most {_check.MAX_QUERIES}"
            )
        if grad_dtype not in (torch.float32, None):
            raise ValueError(
                f"{op}: grad_dtype is {grad_dtype}, expected torch.float32, or None for the dtype "
                "of the stream"
            )
        if keep_phase1 not in KEEP:
            raise ValueError(f"{op}: keep_phase1 is {keep_phase1!r}, expected one of {KEEP}")
        if sum_dtype not in (torch.float32, None):
            raise ValueError(
                f"{op}: sum_dtype is {sum_dtype}, expected torch.float32, or None for the dtype of "
                "the stream"
            )
        if sum_dtype is not None and stochastic_rounding is not None:
            raise ValueError(
                f"{op}: sum_dtype is {sum_dtype} and stochastic_rounding is given, expected one of "
                "them: a float32 running sum is not rounded to bfloat16"
            )
        self.grad_dtype, self.keep_phase1, self.sum_dtype = grad_dtype, keep_phase1, sum_dtype
        self.block_storage: str | None = None
        if block_storage is not None:
            self.block_storage = storage.check_mode(op, "block_storage", block_storage)
        self.forms = forms if isinstance(forms, str) else tuple(forms)
        if self.block_storage is not None and self.forms == "auto":
            self.forms = "two_phase"
        self.group_blocks = group_blocks
        # Made here: torch.compile then finds them ready.
        self._inference_plan = self._make_plan(self._costs(torch.bfloat16, training=False))
        self._training_plans = {dtype: self._make_plan(self._costs(dtype)) for dtype in _STREAM}
        shape = (len(self._sites()), self.query_dim)
        self.queries = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
        self.key_weight: nn.Parameter | None
        if key_weight:
            self.key_weight = nn.Parameter(torch.ones(shape, device=device, dtype=dtype))
        else:
            self.register_parameter("key_weight", None)

        seed = None
        if stochastic_rounding is not None:
            seed = torch.tensor(
                [_check.integer(op, "stochastic_rounding", stochastic_rounding), 0],
                dtype=torch.int64,
                device=device,
            )
        self.register_buffer("rounding_seed", seed)

    @classmethod
    def kimi_k3(
        cls, num_layers: int, dim: int, block_size: int = 12, *, eps: float = 1e-5, **options: Any
    ) -> BlockAttnRes:
        """The layout of Kimi K3: ``block_size`` counts decoder layers, of two sublayers each.

        K3 mixes the snapshots with the raw running prefix, then at a block boundary stores the
        prefix as a snapshot and starts a new one: the same sources as here, where the finished
        block becomes a source before the boundary's site reads.
        """
        _check.positive_int("kimi_k3", "num_layers", num_layers)
        _check.positive_int("kimi_k3", "block_size", block_size)
        return cls(2 * num_layers, dim, 2 * block_size, eps=eps, **options)

    def _sites(self) -> range:
        """The sites whose parameters this module holds."""
        return range(self.num_sublayers + 1)

    def reset_parameters(self) -> None:
        """Zero queries and unit key weights, as at construction."""
        nn.init.zeros_(self.queries)
        if self.key_weight is not None:
            nn.init.ones_(self.key_weight)

    def _costs(self, dtype: torch.dtype, training: bool = True) -> Costs:
        e, wide = dtype.itemsize, self.sum_dtype_of(dtype).itemsize
        kept = Costs(
            training=training,
            storage_bytes=e,
            sum_bytes=None if wide == e else wide,
            source_bytes=self._source_bytes,
        )
        if not training:
            return kept
        grad_dtype = self.grad_dtype or dtype
        return dataclasses.replace(
            kept,
            grad_bytes=max(grad_dtype.itemsize, 8 if dtype == torch.float64 else 0),
            recompute=self.keep_phase1 != "all",
        )

    def sum_dtype_of(self, dtype: torch.dtype) -> torch.dtype:
        """Dtype of the running sums of a stream of this dtype."""
        wide = self.sum_dtype is not None and dtype.itemsize < self.sum_dtype.itemsize
        return self.sum_dtype if wide and self.sum_dtype is not None else dtype

    @property
    def _source_bytes(self) -> int | None:
        """Of an element of a stored block."""
        return {None: None, "float16": 2, "float8": 1}[self.block_storage]

    def _make_plan(self, costs: Costs) -> Plan:
        return Plan.choose(
            self.num_sublayers, self.block_size, costs, self.forms, self.group_blocks
        )

    def plan(
        self,
        *,
        training: bool = True,
        dtype: torch.dtype = torch.bfloat16,
        tokens: int | None = None,
    ) -> Plan:
        """The schedule, with the bytes that it moves: ``print(attn_res.plan(tokens=8192))``.

        Training and inference are planned apart: the backward recomputes phase 1 and reads and
        writes the gradient buffers. Either plan computes the same function; results differ by
        rounding.

        Args:
            training: forward and backward, as while gradients are enabled; else forward alone.
            dtype: of the stream.
            tokens: T, to print bytes for; by default they are for one token and a width of one.
        """
        _check.stream_dtype("plan", dtype)
        plan = self._training_plans[dtype]
        if not training:
            plan = self._make_plan(self._costs(dtype, training=False))
        if tokens is None:
            return plan
        return dataclasses.replace(
            plan, tokens=_check.positive_int("plan", "tokens", tokens), dim=self.dim
        )

    def site_sources(self, site: int) -> list[int]:
        """What a site reads, in the order of its probabilities: see :meth:`Plan.site_sources`."""
        return self._inference_plan.site_sources(site)

    def start(
        self, embedding: Tensor, *, return_probs: bool = False, functional: bool | None = None
    ) -> Stream:
        """Begins a forward pass.

        In eager mode the stream keeps for the backward what a plain pre-norm network keeps and sums
        the gradients of the sources in place (``docs/training.md``). Inside ``torch.compile`` and
        ``torch.export`` it is made of pure operators instead. Both compute the same numbers.

        Args:
            embedding: [..., D], the input of the first sublayer; its dtype is the stream's.
            return_probs: collect each site's probabilities in ``stream.probabilities``.
            functional: whether to use pure operators; by default while compiling.

        Raises:
            ValueError, TypeError: naming the argument, its shape or dtype and what was expected.
            RuntimeError: a transform of ``torch.func`` is active (``functional_call`` is none).
        """
        _check.no_transform("start")
        queries = self._fold("start", "embedding", embedding)
        if self.rounding_seed is not None and embedding.dtype != torch.bfloat16:
            raise TypeError(
                f"start: embedding is {embedding.dtype}, expected torch.bfloat16: "
                "stochastic_rounding rounds sums to bfloat16"
            )
        plan = self._inference_plan
        if torch.is_grad_enabled():
            plan = self._training_plans[embedding.dtype]
        if functional is None:
            functional = torch.compiler.is_compiling()
        if self.block_storage is not None and embedding.dtype == torch.float64:
            raise TypeError(
                f"start: embedding is {embedding.dtype}, expected torch.float32, torch.bfloat16 or "
                "torch.float16: block_storage rounds what float32 holds"
            )
        kind = FunctionalStream if functional else TapeStream
        return kind(self, embedding, queries, plan, return_probs)

    def _fold(self, op: str, name: str, value: Tensor) -> Tensor:
        """Checks a value [..., D] that a stream begins with, and gives the folded queries.

        They are folded once for all sites: two element-wise products of a few kilobytes.
        """
        _check.leading(op, name, value)
        if value.shape[-1] != self.dim:
            raise ValueError(
                f"{op}: {name} has shape {_check.shape_text(value)}, expected a width of "
                f"{self.dim}, the dim of this {type(self).__name__}"
            )
        _check.same_device(op, name, value, "queries", self.queries)
        if hasattr(self.queries, "full_tensor"):
            raise TypeError(
                f"{op}: queries is a sharded DTensor; call {op} inside the forward of the module "
                "that fully_shard wraps, or register it with register_fsdp_forward_method"
            )
        # Copies: whoever owns the parameters may free or change them before the backward. FSDP does
        # when start returns, where it shards this module on its own.
        dtype = statistics_dtype(value)
        weight = None if self.key_weight is None else self.key_weight.to(dtype, copy=True)
        return fold_query(self.queries.to(dtype, copy=True), weight, dtype)

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        parts = [f"{self.num_sublayers}", f"dim={self.dim}", f"block_size={self.block_size}"]
        if self.query_dim != self.dim:
            parts.append(f"query_dim={self.query_dim}")
        if self.key_weight is None:
            parts.append("key_weight=False")
        if self.scale != 1.0:
            parts.append(f"scale={self.scale}")
        parts.append(f"eps={self.eps}")
        if self.forms != ("auto" if self.block_storage is None else "two_phase"):
            parts.append(f"forms={self.forms!r}")
        if self.group_blocks is not None:
            parts.append(f"group_blocks={self.group_blocks}")
        if self.grad_dtype != torch.float32:
            parts.append(f"grad_dtype={self.grad_dtype}")
        if self.keep_phase1 != "none":
            parts.append(f"keep_phase1={self.keep_phase1!r}")
        if self.sum_dtype is not None:
            parts.append(f"sum_dtype={self.sum_dtype}")
        if self.rounding_seed is not None:
            parts.append("stochastic_rounding=...")  # the seed is state, perhaps on a GPU
        if self.block_storage is not None:
            parts.append(f"block_storage={self.block_storage!r}")
        return ", ".join(parts)
