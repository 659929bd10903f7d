"""``fused_attnres`` with the signature of ``fla.ops.attnres`` (flash-linear-attention 0.6).

.. code-block:: python

    from fla.ops.attnres import fused_attnres  # before
    from flash_attn_res.compat.fla import fused_attnres  # after

The mixture stays in float32 up to the output norm, as there. Probabilities do not carry gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flash_attn_res.functional import read


def fused_attnres(
    query: Tensor,
    residuals: Sequence[Tensor],
    rms_weight: Tensor,
    output_rms_weight: Tensor | None = None,
    rms_eps: float = 1e-6,
    scale: float = 1.0,
    return_weights: bool = False,
    checkpoint_level: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    """The softmax mixture of residual sources, with a fused pre-norm by option.

    With k_l = v_l * rsqrt(mean(v_l^2) + rms_eps) * rms_weight::

        p = softmax_l(scale * <query, k_l>)        o = sum_l p_l v_l
        o = o * rsqrt(mean(o^2) + rms_eps) * output_rms_weight          when that is given

    Args:
        query: [D] or [D, 1].
        residuals: L tensors [..., D] of one dtype.
        rms_weight: [D], of the keys' RMSNorm.
        output_rms_weight: [D], of the norm after the mixture.
        rms_eps: of both norms.
        scale: factor of the logits.
        return_weights: also return the probabilities.
        checkpoint_level: 0 or 1; has no effect: the backward recomputes the mixture as it reads
            the sources, so that nothing needs to be kept.

    Returns:
        o [..., D], and with ``return_weights`` the probabilities [L, ...] in float32.
    """
    if len(residuals) == 0:
        raise ValueError("residuals must contain at least one source")
    if checkpoint_level not in (0, 1):
        raise ValueError(f"checkpoint_level must be 0 or 1, got {checkpoint_level}")
    result = read(
        query.reshape(-1),
        rms_weight.reshape(-1),
        sources=residuals if isinstance(residuals, Tensor) else list(residuals),
        scale=scale,
        eps=rms_eps,
        norm_weight=output_rms_weight,
        return_probs=return_weights,
    )
    if not return_weights:
        return result.x
    assert result.probs is not None
    return result.x, result.probs.detach().movedim(-1, 0)
