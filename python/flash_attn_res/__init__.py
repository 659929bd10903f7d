"""Attention Residuals (arXiv 2603.15031) for PyTorch: compiled kernels, forward and backward.

Start with :class:`BlockAttnRes` in a model, or :func:`attend` and :func:`read` on tensors.
:mod:`flash_attn_res.inference` serves engines, :mod:`flash_attn_res.compat` has the operators of
other packages under their own names.
"""

from importlib import metadata as _metadata

from flash_attn_res._load import load_operators as _load_operators

_load_operators()

from flash_attn_res import compat, inference, quantized  # noqa: E402, F401
from flash_attn_res.finite import check_finite  # noqa: E402
from flash_attn_res.functional import AttendResult, ReadResult, attend, read, stochastic_add  # noqa: E402
from flash_attn_res.modules import BlockAttnRes  # noqa: E402
from flash_attn_res.plan import Plan  # noqa: E402
from flash_attn_res.storage import QuantizedSource, quantize  # noqa: E402
from flash_attn_res.stream import Stream  # noqa: E402

try:
    __version__ = _metadata.version("flash-attn-res")
except _metadata.PackageNotFoundError:  # used from a source tree
    __version__ = "unknown"

__all__ = [
    "AttendResult",
    "BlockAttnRes",
    "Plan",
    "QuantizedSource",
    "ReadResult",
    "Stream",
    "__version__",
    "attend",
    "check_finite",
    "compat",
    "inference",
    "quantize",
    "read",
    "stochastic_add",
]
