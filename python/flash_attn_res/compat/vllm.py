"""``attn_res`` with the signature of vLLM's Kimi K3 layer (``vllm/models/kimi_k3``).

.. code-block:: python

    from vllm.models.kimi_k3.nvidia.ops.attn_res import attn_res  # before
    from flash_attn_res.compat.vllm import attn_res  # after

The sum is rounded to its storage dtype before it is read, the mixture stays in float32 up to the
output norm, as there.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from flash_attn_res import _check
from flash_attn_res.inference.operators import read_out


class _Folded(NamedTuple):
    qk_weight: weakref.ref[Tensor]
    versions: tuple[int, int]
    query: Tensor  # [D] float32


_folded: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def fold_once(norm_weight: Tensor, qk_weight: Tensor) -> Tensor:
    """``norm_weight * qk_weight`` in float32, kept as long as both tensors stay as they are.

    Tensors made under ``torch.inference_mode`` do not say when they change, memory of a CUDA graph
    is the graph's alone, and a compiled program is traced once: there the product is computed anew.
    """
    if torch.compiler.is_compiling():
        return norm_weight.detach().float() * qk_weight.detach().float()
    captured = norm_weight.is_cuda and torch.cuda.is_current_stream_capturing()
    remembers = not (norm_weight.is_inference() or qk_weight.is_inference())
    if remembers:
        versions = (norm_weight._version, qk_weight._version)
        held: _Folded | None = _folded.get(norm_weight)
        if held is not None and held.qk_weight() is qk_weight and held.versions == versions:
            return held.query
    query = norm_weight.detach().float() * qk_weight.detach().float()
    if remembers and not captured:
        _folded[norm_weight] = _Folded(weakref.ref(qk_weight), versions, query)
    return query


def checked_site(
    op: str,
    prefix: Tensor,
    blocks: Tensor,
    norm_weight: Tensor,
    qk_weight: Tensor,
    num_blocks: int,
    block_write_idx: int,
) -> tuple[Tensor, Tensor | None]:
    """The sources that are read [num_blocks, T, D] and the row that is written [T, D]."""
    value = _check.leading(op, "prefix", prefix)
    if value.dim() != 2:
        raise ValueError(f"{op}: prefix has shape {_check.shape_text(value)}, expected [T, D]")
    bank = _check.tensor(op, "blocks", blocks)
    if bank.dim() != 3 or bank.shape[0] != value.shape[0] or bank.shape[2] != value.shape[1]:
        raise ValueError(
            f"{op}: blocks has shape {_check.shape_text(bank)}, expected "
            f"[{value.shape[0]}, NB, {value.shape[1]}] like prefix {_check.shape_text(value)}"
        )
    if not 0 <= num_blocks <= bank.shape[1]:
        raise ValueError(
            f"{op}: num_blocks is {num_blocks}, expected 0 to {bank.shape[1]}, the rows of blocks "
            f"{_check.shape_text(bank)}"
        )
    if block_write_idx >= bank.shape[1]:
        raise ValueError(
            f"{op}: block_write_idx is {block_write_idx}, expected below {bank.shape[1]}, the rows "
            f"of blocks {_check.shape_text(bank)}, or negative for none"
        )
    if 0 <= block_write_idx < num_blocks:
        raise ValueError(
            f"{op}: block_write_idx is {block_write_idx}, but row {block_write_idx} is in use: "
            f"this call reads rows 0 to {num_blocks - 1}"
        )
    for name, weight in (("norm_weight", norm_weight), ("qk_weight", qk_weight)):
        _check.weight(op, name, weight, "prefix", value)
    row = bank[:, block_write_idx] if block_write_idx >= 0 else None
    return bank[:, :num_blocks].movedim(1, 0), row


def attn_res(
    prefix: Tensor,
    delta: Tensor | None,
    blocks: Tensor,
    norm_weight: Tensor,
    qk_weight: Tensor,
    output_norm_weight: Tensor | None,
    num_blocks: int,
    block_write_idx: int,
    eps: float,
    output_norm_eps: float,
) -> Tensor:
    """One reading site of Kimi K3, with its effects on ``prefix`` and ``blocks``.

    In this order::

        prefix += delta                            when given; rounded to the dtype of prefix
        blocks[:, block_write_idx] = prefix        when that is not negative
        h = softmax mixture of blocks[:, :num_blocks] and prefix, with keys
            v * rsqrt(mean(v^2) + eps) * norm_weight and the query qk_weight
        x = h * rsqrt(mean(h^2) + output_norm_eps) * output_norm_weight        when given, else h

    Args:
        prefix: [T, D], changed in place by a delta.
        delta: [T, D] or None.
        blocks: [T, NB, D], the bank; one row is written when asked for.
        norm_weight, qk_weight: [D].
        output_norm_weight: [D] or None.
        num_blocks: rows that are read, 0 to NB; with none x comes from prefix alone.
        block_write_idx: row that is written, not one of those that are read; negative: none.
        eps, output_norm_eps: of the keys' norm and of the output norm.

    Returns:
        x [T, D] in the dtype of prefix.
    """
    op = "attn_res"
    sources, row = checked_site(
        op, prefix, blocks, norm_weight, qk_weight, num_blocks, block_write_idx
    )
    x = torch.empty_like(prefix, memory_format=torch.contiguous_format)
    with torch.no_grad():
        read_out(
            fold_once(norm_weight, qk_weight) if num_blocks > 0 else None,
            x=x,
            sources=[sources] if num_blocks > 0 else [],
            partial=prefix,
            update=delta,
            partial_out=None if delta is None else prefix,
            snapshot=row,
            eps=eps,
            norm_weight=output_norm_weight,
            norm_eps=output_norm_eps,
        )
    return x
