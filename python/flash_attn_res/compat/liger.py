"""``liger_attn_res`` with the signature of Liger-Kernel 0.8.

.. code-block:: python

    from liger_kernel.transformers.functional import liger_attn_res  # before
    from flash_attn_res.compat.liger import liger_attn_res  # after

One difference, to the better: there the normalised value is rounded to the dtype of ``w_norm``
before it meets the weights; here keys stay in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flash_attn_res.functional import read


def liger_attn_res(
    V: Tensor | Sequence[Tensor], w_query: Tensor, w_norm: Tensor, eps: float = 1e-6
) -> Tensor:
    """The softmax mixture of N block outputs.

    With k_n = v_n * rsqrt(mean(v_n^2) + eps) * w_norm::

        alpha = softmax_n(<w_query, k_n>)        h = sum_n alpha_n v_n

    Args:
        V: [N, ..., D] (usually [N, B, T, D]), or a list of N tensors [..., D], which is not
            stacked.
        w_query: [D].
        w_norm: [D], of the keys' RMSNorm.
        eps: of that norm.

    Returns:
        h [..., D] in the dtype of V.
    """
    sources = V if isinstance(V, Tensor) else list(V)
    return read(w_query, w_norm, sources=sources, eps=eps).x


class LigerAttnResFunction:
    """``apply(V, w_query, w_norm, eps)``: the same, as the autograd class is called.

    It is no ``torch.autograd.Function`` itself: ``forward`` and ``backward`` are those of the
    package's operators.
    """

    @staticmethod
    def apply(V: Tensor, w_query: Tensor, w_norm: Tensor, eps: float) -> Tensor:
        """:func:`liger_attn_res`, differentiable like any function of this package."""
        return liger_attn_res(V, w_query, w_norm, eps)


class LigerAttnRes(nn.Module):
    """One site as a module.

    Args:
        hidden_size: D.
        eps: of the keys' RMSNorm.
        query_init_std: standard deviation of the initial pseudo-query; the key weight begins at
            ones.

    Attributes:
        w_query: [D].
        w_norm: [D].
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6, query_init_std: float = 0.02) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.eps = eps
        self.query_init_std = query_init_std
        self.w_query = nn.Parameter(torch.randn(hidden_size) * query_init_std)
        self.w_norm = nn.Parameter(torch.ones(hidden_size))

    def forward(self, V: Tensor | Sequence[Tensor]) -> Tensor:
        """[N, ..., D], or a list of N tensors [..., D], to [..., D]."""
        return liger_attn_res(V, self.w_query, self.w_norm, self.eps)

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f"hidden_size={self.hidden_size}, eps={self.eps}"
