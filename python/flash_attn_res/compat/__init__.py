"""The operators of other packages under their own names, computed by this one.

Switching is changing one import. Each module keeps its package's function names, signatures,
defaults, shapes, returned extras and in-place effects:

=================  =====================================================================
``compat.seed``    ``flash-attn-res`` up to 0.1.12: two-phase operators, autograd class
``compat.fla``     flash-linear-attention: ``fused_attnres``
``compat.liger``   Liger-Kernel: ``liger_attn_res`` and its module
``compat.vllm``    vLLM's Kimi K3 layer: ``attn_res``
``compat.flashinfer``  FlashInfer: ``kimi_k3_attn_res``, ``prepare_kimi_k3_attn_res``
=================  =====================================================================

Where theirs is limited (widths that are powers of two, one dtype, one GPU, few sources) these are
not. Where theirs rounds an intermediate value to a 16-bit type, the module says whether it does.
"""

from flash_attn_res.compat import fla, flashinfer, liger, seed, vllm

__all__ = ["fla", "flashinfer", "liger", "seed", "vllm"]
