"""``BlockBank``: the sources of a model's sites, in memory allocated once."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn_res import _check
from flash_attn_res import storage as modes
from flash_attn_res.inference.operators import in_words
from flash_attn_res.storage import QuantizedSource

LAYOUTS = ("tnd", "ntd")


class BlockBank:
    """Rows for the embedding and the completed blocks of up to ``max_tokens`` tokens.

    Row 0 is the embedding's, row j that of block j. In a step each row is written once, before it
    is read; :meth:`reset` begins the next step.

    Args:
        num_rows: N, rows to hold.
        max_tokens: most tokens T of a step.
        dim: D.
        layout: ``"tnd"`` for memory [T, N, D], in which a token's rows are neighbours (Hugging
            Face, vLLM, SGLang, FlashInfer), or ``"ntd"`` for [N, T, D] (TensorRT-LLM, Liger).
        dtype, device: of the memory.
        storage: keep the rows as :func:`flash_attn_res.quantize` makes them, ``"float16"`` or
            ``"float8"``. Rows are then written by :meth:`write` and read by :meth:`stored`;
            :meth:`row`, :meth:`claim` and :meth:`sources` are for rows that hold values.

    Attributes:
        data: the memory, in its layout.
        scale: that of the scales, uint8, in the same layout; None without ``storage``.
    """

    def __init__(
        self,
        num_rows: int,
        max_tokens: int,
        dim: int,
        *,
        layout: str = "tnd",
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        storage: str | None = None,
    ) -> None:
        op = type(self).__name__
        self.num_rows = _check.positive_int(op, "num_rows", num_rows)
        self.max_tokens = _check.positive_int(op, "max_tokens", max_tokens)
        self.dim = _check.positive_int(op, "dim", dim)
        _check.count(op, "num_rows", num_rows, 1, _check.MAX_SOURCES)
        if layout not in LAYOUTS:
            raise ValueError(f"{op}: layout is {layout!r}, expected one of {', '.join(LAYOUTS)}")
        self.layout = layout
        shape = (max_tokens, num_rows, dim) if layout == "tnd" else (num_rows, max_tokens, dim)
        self.storage = storage
        self.scale: Tensor | None = None
        if storage is None:
            self.data = torch.empty(shape, dtype=dtype, device=device)
            _check.value_dtype(op, "dtype", self.data)
        else:
            modes.check_mode(op, "storage", storage)
            where = torch.empty(0, device=device).device
            self.data, self.scale = modes.empty(shape, storage, where)
        self._rows = self._by_row(self.data)  # [N, T, D]
        # [N, T, 1 or ceil(D / 128)]
        self._scales = None if self.scale is None else self._by_row(self.scale)
        self._written = [False] * num_rows

    def _by_row(self, memory: Tensor) -> Tensor:
        return memory.movedim(1, 0) if self.layout == "tnd" else memory

    def reset(self) -> None:
        """Begins a step: no row is in use. The memory stays as it is."""
        self._written = [False] * self.num_rows

    def row(self, index: int, tokens: int | None = None) -> Tensor:
        """Row ``index`` of the first ``tokens`` tokens, [T, D], a view."""
        self._check_values("row")
        self._check_index("row", index)
        return self._rows[index, : self._tokens("row", tokens)]

    def sources(self, count: int, tokens: int | None = None) -> Tensor:
        """The first ``count`` rows, [count, T, D], a view for :func:`read_out` and others."""
        self._check_values("sources")
        self._check_count("sources", count)
        return self._rows[:count, : self._tokens("sources", tokens)]

    def stored(self, count: int, tokens: int | None = None) -> QuantizedSource:
        """The first ``count`` rows of a bank with ``storage``, for :func:`read_out` and others.

        Returns:
            QuantizedSource: values [count, T, D], scale [count, T, 1 or ceil(D / 128)], views.
        """
        self._check_count("stored", count)
        return self._stored("stored", slice(count), tokens)

    def stored_row(self, index: int, tokens: int | None = None) -> QuantizedSource:
        """Row ``index`` of a bank with ``storage``: values [T, D] and their scale, views."""
        self._check_index("stored_row", index)
        return self._stored("stored_row", index, tokens)

    def claim(self, index: int, tokens: int | None = None) -> Tensor:
        """:meth:`row`, to be written now; each row once a step."""
        self._check_values("claim")
        self._check_free(index)
        view = self.row(index, tokens)
        self._written[index] = True
        return view

    def write(self, index: int, value: Tensor) -> None:
        """Copies a value [T, D] into row ``index``, quantised if the bank is; once a step."""
        checked = _check.tensor("BlockBank.write", "value", value)
        if checked.dim() != 2 or checked.shape[1] != self.dim:
            raise ValueError(
                f"BlockBank.write: value has shape {_check.shape_text(checked)}, expected "
                f"[T, {self.dim}]"
            )
        self._tokens("write", checked.shape[0])
        if self.storage is None:
            self.claim(index, checked.shape[0]).copy_(checked)
        else:
            self.quantize_row(index, checked.detach(), self.stored_row(index, checked.shape[0]))

    def quantize_row(self, index: int, value: Tensor, row: QuantizedSource) -> None:
        """:meth:`write` through views that are there: ``row`` is ``stored_row(index, T)``."""
        self._check_free(index)
        try:
            torch.ops.flash_attn_res.quantize_into([value], row.values, row.scale)
        except RuntimeError as error:
            raise in_words(error) from None
        self._written[index] = True

    def _stored(self, method: str, rows: int | slice, tokens: int | None) -> QuantizedSource:
        if self._scales is None:
            raise ValueError(
                f"BlockBank.{method}: this bank holds values of {self.data.dtype}, expected one "
                "with storage; row() and sources() give values"
            )
        end = self._tokens(method, tokens)
        return QuantizedSource(self._rows[rows, :end], self._scales[rows, :end])

    def _check_values(self, method: str) -> None:
        if self.storage is not None:
            raise ValueError(
                f"BlockBank.{method}: this bank stores {self.storage} with scales, which stored() "
                "and stored_row() give, and write() writes"
            )

    def _check_free(self, index: int) -> None:
        self._check_index("claim", index)
        if self._written[index]:
            raise ValueError(
                f"BlockBank.claim: row {index} is in use: it was written in this step; reset() "
                "begins the next one"
            )

    def _check_count(self, method: str, count: int) -> None:
        if not 1 <= count <= self.num_rows:
            raise ValueError(
                f"BlockBank.{method}: count is {count}, expected 1 to {self.num_rows}, the rows of "
                "the bank"
            )

    def _check_index(self, method: str, index: int) -> None:
        if not 0 <= index < self.num_rows:
            raise ValueError(
                f"BlockBank.{method}: row {index} is out of range, expected 0 to "
                f"{self.num_rows - 1}: the bank has {self.num_rows} rows"
            )

    def _tokens(self, method: str, tokens: int | None) -> int:
        if tokens is None:
            return self.max_tokens
        if not 0 <= tokens <= self.max_tokens:
            raise ValueError(
                f"BlockBank.{method}: {tokens} tokens do not fit: the bank holds {self.max_tokens}"
            )
        return tokens
