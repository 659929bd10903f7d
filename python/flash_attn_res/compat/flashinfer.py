"""``kimi_k3_attn_res`` and ``prepare_kimi_k3_attn_res`` with the signatures of FlashInfer.

.. code-block:: python

    from flashinfer.kimi_k3_attn_res import kimi_k3_attn_res  # before
    from flash_attn_res.compat.flashinfer import kimi_k3_attn_res  # after

The site is that of :func:`flash_attn_res.compat.vllm.attn_res`, with a result in the caller's
memory. Any width, dtype and number of blocks, on any GPU from sm_80 on and on the CPU.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from flash_attn_res.compat.vllm import checked_site, fold_once
from flash_attn_res.inference.operators import read_out, read_workspace_bytes

BACKENDS = ("cake", "flash_attn_res")


@dataclasses.dataclass(frozen=True)
class KimiK3AttnResRunner:
    """One site, checked and ready: ``launch()`` runs it, as often as one likes.

    A launch allocates nothing and may be captured into a CUDA graph.
    """

    prefix: Tensor  #: [T, D]
    delta: Tensor | None  #: [T, D]
    sources: list[Tensor]  #: [num_blocks, T, D], a view of the bank, or nothing
    row: Tensor | None  #: [T, D], a view of the bank
    query: Tensor | None  #: [D] float32, folded
    output_norm_weight: Tensor | None  #: [D]
    out: Tensor  #: [T, D]
    eps: float
    output_norm_eps: float
    workspace: Tensor | None  #: uint8; None in a compiled program, which plans its own memory

    def launch(self) -> Tensor:
        """Runs the site on the current stream and returns ``out``."""
        with torch.no_grad():
            read_out(
                self.query,
                x=self.out,
                sources=self.sources,
                partial=self.prefix,
                update=self.delta,
                partial_out=None if self.delta is None else self.prefix,
                snapshot=self.row,
                eps=self.eps,
                norm_weight=self.output_norm_weight,
                norm_eps=self.output_norm_eps,
                workspace=self.workspace,
            )
        return self.out


def prepare_kimi_k3_attn_res(
    prefix: Tensor,
    delta: Tensor | None,
    blocks: Tensor,
    norm_weight: Tensor,
    qk_weight: Tensor,
    output_norm_weight: Tensor | None,
    out: Tensor,
    *,
    num_blocks: int,
    block_write_idx: int = -1,
    eps: float = 1e-5,
    output_norm_eps: float = 1e-5,
    enable_pdl: bool = False,
    backend: str = "cake",
) -> KimiK3AttnResRunner:
    """Checks the arguments of :func:`kimi_k3_attn_res` and folds the weights, for many launches.

    Weights are folded here: change them and prepare again. ``enable_pdl`` has no effect, and
    ``backend`` may be theirs or ``"flash_attn_res"``: the kernels are this package's.
    """
    del enable_pdl
    op = "kimi_k3_attn_res"
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    packed, row = checked_site(
        op, prefix, blocks, norm_weight, qk_weight, num_blocks, block_write_idx
    )
    query = fold_once(norm_weight, qk_weight) if num_blocks > 0 else None
    sources = [packed] if num_blocks > 0 else []
    workspace = None
    if not torch.compiler.is_compiling():
        with torch.no_grad():
            needed = read_workspace_bytes(
                query,
                x=out,
                sources=sources,
                partial=prefix,
                update=delta,
                partial_out=None if delta is None else prefix,
                snapshot=row,
                norm_weight=output_norm_weight,
            )
        workspace = torch.empty(needed, dtype=torch.uint8, device=prefix.device)
    return KimiK3AttnResRunner(
        prefix=prefix,
        delta=delta,
        sources=sources,
        row=row,
        query=query,
        output_norm_weight=output_norm_weight,
        out=out,
        eps=eps,
        output_norm_eps=output_norm_eps,
        workspace=workspace,
    )


def kimi_k3_attn_res(
    prefix: Tensor,
    delta: Tensor | None,
    blocks: Tensor,
    norm_weight: Tensor,
    qk_weight: Tensor,
    output_norm_weight: Tensor | None,
    out: Tensor,
    *,
    num_blocks: int,
    block_write_idx: int = -1,
    eps: float = 1e-5,
    output_norm_eps: float = 1e-5,
    enable_pdl: bool = False,
    backend: str = "cake",
) -> Tensor:
    """One reading site of Kimi K3 into ``out``, with its effects on ``prefix`` and ``blocks``.

    The formula is that of :func:`flash_attn_res.compat.vllm.attn_res`.

    Args:
        prefix: [T, D], changed in place by a delta.
        delta: [T, D] or None.
        blocks: [T, NB, D], the bank; one row is written when asked for.
        norm_weight, qk_weight: [D].
        output_norm_weight: [D] or None.
        out: [T, D], written.
        num_blocks: rows that are read, 0 to NB.
        block_write_idx: row that is written, not one of those that are read; -1: none.
        eps, output_norm_eps: of the keys' norm and of the output norm.
        enable_pdl, backend: see :func:`prepare_kimi_k3_attn_res`.

    Returns:
        ``out``.
    """
    return prepare_kimi_k3_attn_res(
        *(prefix, delta, blocks, norm_weight, qk_weight, output_norm_weight, out),
        num_blocks=num_blocks,
        block_write_idx=block_write_idx,
        eps=eps,
        output_norm_eps=output_norm_eps,
        enable_pdl=enable_pdl,
        backend=backend,
    ).launch()
