"""The operators that the tape is made of.

Those of a site, ``read`` and its backward, make their results themselves; the others write into
memory that they are given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_OPS = torch.ops.flash_attn_res


def _allocating(operator: Callable[..., Any]) -> Callable[..., Any]:
    """An operator that tells of exhausted memory as PyTorch does: the stable ABI loses the type."""

    def call(*arguments: Any) -> Any:
        try:
            return operator(*arguments)
        except RuntimeError as error:
            if "out of memory on CUDA" in str(error):
                raise torch.OutOfMemoryError(str(error)) from error
            raise

    return call


attend = _allocating(_OPS.attend_into.default)
attend_backward = _allocating(_OPS.attend_backward_into.default)
read = _allocating(_OPS.read_site.default)
read_backward = _allocating(_OPS.read_site_backward.default)
stochastic_add = _OPS.stochastic_add_into.default
quantize = _OPS.quantize_into.default
