"""Attention Residuals over several processes, on torch.distributed.

* :class:`PipelineLayout`, :class:`StageAttnRes`, :func:`make_stages`: pipeline parallelism in which
  a rank keeps the blocks that it received for its later stages.
* :class:`TokenShards`: sequence-sharded reading in a tensor-parallel group.

Not imported by ``import flash_attn_res``: it needs a PyTorch with torch.distributed.
"""

from flash_attn_res.distributed.layout import PipelineLayout, paper_volume
from flash_attn_res.distributed.payload import Payload, Plain, Scaled, Stored
from flash_attn_res.distributed.pipeline import BlockCache, StageAttnRes, make_stages, shared_errors
from flash_attn_res.distributed.sequence import ShardedStream, TokenShards

__all__ = [
    "BlockCache",
    "Payload",
    "PipelineLayout",
    "Plain",
    "Scaled",
    "ShardedStream",
    "StageAttnRes",
    "Stored",
    "TokenShards",
    "make_stages",
    "paper_volume",
    "shared_errors",
]
