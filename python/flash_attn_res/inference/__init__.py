"""Attention Residuals for inference engines: results in the caller's memory, nothing allocated.

:func:`attend_out` and :func:`read_out` are :func:`flash_attn_res.attend` and
:func:`flash_attn_res.read` into given tensors, without gradients. :class:`BlockBank` holds what the
sites of a model read, :class:`SiteWeights` their weights, folded once, and :class:`Runner` runs all
sites of a model with buffers that it allocated when it was made: a step may be captured into a CUDA
graph.
"""

from flash_attn_res.inference.bank import BlockBank
from flash_attn_res.inference.operators import (
    attend_out,
    attend_workspace_bytes,
    read_out,
    read_workspace_bytes,
    scale_columns,
)
from flash_attn_res.inference.runner import Quantized, Runner, Step
from flash_attn_res.inference.weights import KIMI_K3_NAMES, SiteNames, SiteWeights

__all__ = [
    "KIMI_K3_NAMES",
    "BlockBank",
    "Quantized",
    "Runner",
    "SiteNames",
    "SiteWeights",
    "Step",
    "attend_out",
    "attend_workspace_bytes",
    "read_out",
    "read_workspace_bytes",
    "scale_columns",
]
