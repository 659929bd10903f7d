"""``BlockBank``: the sources of a model's sites, in memory allocated once."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn_res import _check

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

    Attributes:
        data: the memory, in its layout.
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
        self.data = torch.empty(shape, dtype=dtype, device=device)
        _check.value_dtype(op, "dtype", self.data)
        self._rows = self.data.movedim(1, 0) if layout == "tnd" else self.data  # [N, T, D]
        self._written = [False] * num_rows

    def reset(self) -> None:
        """Begins a step: no row is in use. The memory stays as it is."""
        self._written = [False] * self.num_rows

    def row(self, index: int, tokens: int | None = None) -> Tensor:
        """Row ``index`` of the first ``tokens`` tokens, [T, D], a view."""
        self._check_index("row", index)
        return self._rows[index, : self._tokens("row", tokens)]

    def sources(self, count: int, tokens: int | None = None) -> Tensor:
        """The first ``count`` rows, [count, T, D], a view for :func:`read_out` and others."""
        if not 1 <= count <= self.num_rows:
            raise ValueError(
                f"BlockBank.sources: count is {count}, expected 1 to {self.num_rows}, the rows of "
                "the bank"
            )
        return self._rows[:count, : self._tokens("sources", tokens)]

    def claim(self, index: int, tokens: int | None = None) -> Tensor:
        """:meth:`row`, to be written now; each row once a step."""
        self._check_index("claim", index)
        if self._written[index]:
            raise ValueError(
                f"BlockBank.claim: row {index} is in use: it was written in this step; reset() "
                "begins the next one"
            )
        view = self.row(index, tokens)
        self._written[index] = True
        return view

    def write(self, index: int, value: Tensor) -> None:
        """Copies a value [T, D] into row ``index``; each row once a step."""
        checked = _check.tensor("BlockBank.write", "value", value)
        if checked.dim() != 2 or checked.shape[1] != self.dim:
            raise ValueError(
                f"BlockBank.write: value has shape {_check.shape_text(checked)}, expected "
                f"[T, {self.dim}]"
            )
        self._tokens("write", checked.shape[0])
        self.claim(index, checked.shape[0]).copy_(checked)

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
