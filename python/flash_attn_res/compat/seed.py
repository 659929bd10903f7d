"""The operators and the autograd class of the package ``flash-attn-res`` up to version 0.1.12.

That package had the import name of this one, so that its users change the module alone:

.. code-block:: python

    from flash_attn_res import phase_1_batched_attention_triton_op  # before, or from its
    from flash_attn_res.ops.phase_1 import phase_1_batched_attention_triton_op  # own module
    from flash_attn_res.compat.seed import phase_1_batched_attention_triton_op  # after

    from flash_attn_res.experimental.autograd import BlockAttentionResiduals  # before
    from flash_attn_res.compat.seed import BlockAttentionResiduals  # after

Its semantics: no key weight, no scale, no output norm; phase 1 always gives bfloat16. Here D need
not be a power of two, gradients of blocks are not rounded to bfloat16 between uses, and partial
sums are kept rather than reconstructed by subtraction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flash_attn_res.functional import attend, read


def phase_1_batched_attention_triton_op(
    block_representations: Tensor | Sequence[Tensor], pseudo_queries: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Phase 1: all queries of a block over the completed blocks.

    Args:
        block_representations: [S, B, T, D] (S sources), or a list of [B, T, D].
        pseudo_queries: [Q, D].
        eps: of the keys' RMSNorm.

    Returns:
        Outputs [Q, B, T, D] in bfloat16 and the logsumexp of the logits [Q, B, T] in float32.
    """
    sources: Any = block_representations
    result = attend(sources, pseudo_queries, eps=eps, dtype=torch.bfloat16)
    return result.out, result.lse


def phase_2_online_softmax_merge_triton_op(
    intrablock_partial_sum: Tensor,
    pseudo_query: Tensor,
    interblock_normalized_output: Tensor,
    interblock_lse: Tensor,
    eps: float,
) -> Tensor:
    """Phase 2: merges the running sum of the block into a result of phase 1.

    Args:
        intrablock_partial_sum: [B, T, D].
        pseudo_query: [D].
        interblock_normalized_output: [B, T, D], one output of phase 1.
        interblock_lse: [B, T] float32.
        eps: of the key's RMSNorm.

    Returns:
        [B, T, D] in the dtype of ``interblock_normalized_output``.
    """
    return read(
        pseudo_query,
        phase1=(interblock_normalized_output, interblock_lse),
        partial=intrablock_partial_sum,
        eps=eps,
        dtype=interblock_normalized_output.dtype,
    ).x


def _run_block(
    layers: Sequence[Callable[[Tensor], Tensor]],
    eps: float,
    dtype: torch.dtype,
    queries: Tensor,
    *sources: Tensor,
) -> Tensor:
    """The sum of a block's layer outputs [B, T, D]."""
    out, lse = phase_1_batched_attention_triton_op(list(sources), queries, eps)
    total: Tensor | None = None
    for i, layer in enumerate(layers):
        layer_input = out[i]
        if total is not None:
            layer_input = phase_2_online_softmax_merge_triton_op(
                total, queries[i], out[i], lse[i], eps
            )
        update = layer(layer_input)
        total = update.to(dtype) if total is None else (total + update).to(dtype)
    assert total is not None
    return total


class BlockAttentionResiduals:
    """``apply(inputs, pseudo_queries, layers, BLOCK_SIZE, eps, *params)``: the whole stack.

    It is no ``torch.autograd.Function`` itself: ``forward`` and ``backward`` are those of the
    package's operators.
    """

    @staticmethod
    def apply(
        inputs: Tensor,
        pseudo_queries: Tensor,
        layers: Sequence[Callable[[Tensor], Tensor]],
        BLOCK_SIZE: int,
        eps: float,
        *flat_layer_params: Tensor,
    ) -> Tensor:
        """Runs the layers in blocks with Attention Residuals between them.

        Blocks are recomputed in the backward: what is kept is one tensor a block. Random numbers
        that layers draw are drawn alike in the recomputation.

        Args:
            inputs: [B, T, D].
            pseudo_queries: [L + 1, D]; the last one is the output's.
            layers: L callables, [B, T, D] in bfloat16 to [B, T, D].
            BLOCK_SIZE: layers in a block.
            eps: of the keys' RMSNorm.
            flat_layer_params: accepted for the signature's sake; parameters of the layers get
                their gradients whether they are listed or not.

        Returns:
            The output mixture [B, T, D] in the dtype of ``inputs``.
        """
        del flat_layer_params
        if len(pseudo_queries) != len(layers) + 1:
            raise ValueError(
                f"BlockAttentionResiduals: pseudo_queries has shape {list(pseudo_queries.shape)}, "
                f"expected [{len(layers) + 1}, D], one more than there are layers"
            )
        blocks = [inputs]
        for first in range(0, len(layers), BLOCK_SIZE):
            count = min(BLOCK_SIZE, len(layers) - first)
            block: Tensor = checkpoint(
                _run_block,
                *(layers[first : first + count], eps, inputs.dtype),
                *(pseudo_queries[first : first + count], *blocks),
                use_reentrant=False,
            )
            blocks.append(block)
        out, _ = phase_1_batched_attention_triton_op(blocks, pseudo_queries[-1:], eps)
        return out[0].to(inputs.dtype)
